"""wav2vec 2.0 (Baevski et al., arXiv 2006.11477) with the norm as an argument.

A stack of convolutions turns the waveform into one frame every 20 ms, and a Transformer reads the
frames. Parameter names are those of torchaudio's Wav2Vec2Model, so that published weights load; the
initialisation is fairseq's, with which pre-training leaves chance (torchaudio's does not: its
extractor's output has a mean square of 1.8e-7).

Two norms are of the data rather than of the network: the extractor's (site "stem") and the one of
its frames (site "embed"). The runs of DyT (arXiv 2503.10622) and Derf (arXiv 2512.10938) left them
as published, and so does `keep_sites`.

Shapes: B batch, S samples, T frames, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from suite.norms import GroupNormOptions, NormFactory, make_norm

EPS = 1e-5  # what wav2vec 2.0 was published with; a norm option overrides it
RATE = 16_000  # samples a second
STRIDES = ((10, 5), *((3, 2),) * 4, *((2, 2),) * 2)  # kernel and stride of each convolution
HOP = 320  # samples from frame to frame
RECEPTIVE = 400  # samples that one frame sees: what is shorter has no frame
SITES = ("stem", "embed", "attn", "ffn", "final")

Length = TypeVar("Length", int, Tensor)
Convs = Sequence[tuple[int, int, int]]  # channels, kernel and stride of each convolution
Extractor = Literal["group_norm", "layer_norm"]


def frames_of(length: Length) -> Length:
    """How many frames so many samples give: 0 below RECEPTIVE, then one more every HOP."""
    for kernel, stride in STRIDES:
        length = (length - kernel) // stride + 1
    return length * (length > 0)


def valid_of(frames_B: Tensor, size: int) -> Tensor:
    """[B, T] bool, True within each row's own frames."""
    return torch.arange(size, device=frames_B.device) < frames_B[:, None]


class ConvLayer(nn.Module):
    """Convolution, a norm if there is one here, GELU."""

    def __init__(
        self, ins: int, outs: int, *, kernel: int, stride: int, bias: bool, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.layer_norm = norm
        self.conv = nn.Conv1d(ins, outs, kernel, stride=stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x_BCT: Tensor, length_B: Tensor | None = None) -> Tensor:
        """length_B: how much of each row of the *output* the norm may see; None: all."""
        x_BCT = self.conv(x_BCT)
        if self.layer_norm is not None:
            valid_BT = None if length_B is None else valid_of(length_B, x_BCT.shape[-1])
            x_BCT = self.layer_norm(x_BCT, valid_BT)
        return F.gelu(x_BCT)


class FeatureExtractor(nn.Module):
    """Waveform [B, S] -> features [B, T, C].

    mask_padding: norms over time leave the padding out, so that a clip's features are the same
    whatever it is batched with. The published `group_norm` models were trained without.
    """

    def __init__(self, layers: Sequence[ConvLayer], *, mask_padding: bool = True) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(layers)
        self.steps = [(layer.kernel, layer.stride) for layer in layers]
        self.mask_padding = mask_padding

    def forward(
        self, audio_BS: Tensor, length_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features [B, T, C] and the frames of each row [B] (None without lengths)."""
        x_BCT = audio_BS.unsqueeze(1)
        for layer, (kernel, stride) in zip(self.conv_layers, self.steps, strict=True):
            if length_B is not None:
                length_B = ((length_B - kernel) // stride + 1).clamp(min=0)
            x_BCT = layer(x_BCT, length_B if self.mask_padding else None)
        return x_BCT.transpose(1, 2), length_B


class FeatureProjection(nn.Module):
    """Linear map to the Transformer's width, dropout; and the norm in front, which is called apart.

    Apart, because the quantizer of pre-training reads what stands between the two.
    """

    def __init__(self, ins: int, outs: int, *, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.layer_norm = norm
        self.projection = nn.Linear(ins, outs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.projection(x_BTC))


class PositionalConv(nn.Module):
    """GELU of a grouped convolution over the frames, with weight norm: relative positions."""

    def __init__(self, dim: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4.0 / (kernel * dim)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
        self.surplus = 1 - kernel % 2  # an even kernel gives one frame too many

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BCT = self.conv(x_BTC.transpose(1, 2))
        x_BCT = x_BCT[..., : x_BCT.shape[-1] - self.surplus]
        return F.gelu(x_BCT).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with q, k and v in three layers, as published weights have them."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x_BTC: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (
            rearrange(project(x_BTC), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = None if valid_BT is None else valid_BT[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=keys, dropout_p=dropout
        )
        return self.out_proj(rearrange(out_BHTD, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """Linear, GELU, linear, with dropout after each."""

    def __init__(
        self, dim: int, *, hidden_dim: int, activation_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, hidden_dim)
        self.intermediate_dropout = nn.Dropout(activation_dropout)
        self.output_dense = nn.Linear(hidden_dim, dim)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.intermediate_dropout(F.gelu(self.intermediate_dense(x_BTC)))
        return self.output_dropout(self.output_dense(x_BTC))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual; the norms before them or after."""

    def __init__(
        self,
        attention: SelfAttention,
        feed_forward: FeedForward,
        *,
        norms: tuple[nn.Module, nn.Module],
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = norms[0]
        self.feed_forward = feed_forward
        self.final_layer_norm = norms[1]

    def forward(self, x_BTC: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        if self.pre_norm:
            y_BTC = self.attention(self.layer_norm(x_BTC, valid_BT), valid_BT)
            x_BTC = x_BTC + self.dropout(y_BTC)
            return x_BTC + self.feed_forward(self.final_layer_norm(x_BTC, valid_BT))
        y_BTC = self.dropout(self.attention(x_BTC, valid_BT))
        x_BTC = self.layer_norm(x_BTC + y_BTC, valid_BT)
        return self.final_layer_norm(x_BTC + self.feed_forward(x_BTC), valid_BT)


class Transformer(nn.Module):
    """Positions, layers, and one norm: before the layers where theirs are after, else behind."""

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        *,
        positions: PositionalConv,
        norm: nn.Module,
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pos_conv_embed = positions
        self.layer_norm = norm
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x_BTC: Tensor,
        valid_BT: Tensor | None = None,
        *,
        layers_kept: Tensor | None = None,
    ) -> Tensor:
        """layers_kept: bool [depth], the layers whose output counts (LayerDrop); None: all.

        A dropped layer runs and its output is thrown away, so that its parameters have gradients,
        of zero, and DDP finds every parameter used.
        """
        if valid_BT is not None:  # the positions' convolution would see what stands there
            x_BTC = torch.where(valid_BT.unsqueeze(-1), x_BTC, 0)
        x_BTC = x_BTC + self.pos_conv_embed(x_BTC)
        if not self.pre_norm:
            x_BTC = self.layer_norm(x_BTC, valid_BT)
        x_BTC = self.dropout(x_BTC)
        for i, layer in enumerate(self.layers):
            y_BTC = layer(x_BTC, valid_BT)
            x_BTC = y_BTC if layers_kept is None else torch.where(layers_kept[i], y_BTC, x_BTC)
        return self.layer_norm(x_BTC, valid_BT) if self.pre_norm else x_BTC


class Encoder(nn.Module):
    """The two parts behind the extractor, under torchaudio's name."""

    def __init__(self, projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = projection
        self.transformer = transformer


class Wav2Vec2(nn.Module):
    """Waveform [B, S] -> context [B, T, C]. The arguments are `Wav2Vec2Options`' fields.

    They are more than ten because they are the published architecture's own knobs.
    convs: channels, kernel and stride of each convolution of the extractor.
    keep_sites: sites with the published norm (LayerNorm; at "stem" the extractor's), whatever
        `norm` is.
    """

    def __init__(
        self,
        *,
        norm: NormFactory,
        convs: Convs,
        extractor: Extractor = "group_norm",
        conv_bias: bool = False,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden_dim: int = 3072,
        pre_norm: bool = False,
        pos_kernel: int = 128,
        pos_groups: int = 16,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        input_dropout: float = 0.0,
        init_std: float = 0.02,
        mask_padding: bool = True,
        keep_sites: Collection[str] = ("stem", "embed"),
    ) -> None:
        super().__init__()
        features = convs[-1][0]

        def at(site: str, width: int) -> nn.Module:
            factory = make_norm("layernorm") if site in keep_sites else norm
            return factory(width, site=site, eps=EPS)

        stem = None if "stem" in keep_sites else norm
        self.feature_extractor = FeatureExtractor(
            conv_layers(convs, mode=extractor, bias=conv_bias, norm=stem),
            mask_padding=mask_padding,
        )
        projection = FeatureProjection(
            features, dim, norm=at("embed", features), dropout=input_dropout
        )
        layers = [
            EncoderLayer(
                SelfAttention(dim, heads=heads, dropout=attention_dropout),
                FeedForward(
                    dim,
                    hidden_dim=hidden_dim,
                    activation_dropout=activation_dropout,
                    dropout=dropout,
                ),
                norms=(at("attn", dim), at("ffn", dim)),
                pre_norm=pre_norm,
                dropout=dropout,
            )
            for _ in range(depth)
        ]
        transformer = Transformer(
            layers,
            positions=PositionalConv(dim, kernel=pos_kernel, groups=pos_groups),
            norm=at("final", dim),
            pre_norm=pre_norm,
            dropout=dropout,
        )
        self.encoder = Encoder(projection, transformer)
        for module in transformer.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    def extract(
        self, audio_BS: Tensor, length_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features [B, T, C] without the norm behind them, and the frames of each row or None."""
        features_BTC, frames_B = self.feature_extractor(audio_BS, length_B)
        return features_BTC, frames_B

    def normalize(self, features_BTC: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """Features under the norm of site "embed"."""
        normed_BTC: Tensor = self.encoder.feature_projection.layer_norm(features_BTC, valid_BT)
        return normed_BTC

    def forward(self, audio_BS: Tensor, length_B: Tensor | None = None) -> Tensor:
        """audio [B, S] at RATE, length_B: samples of each row, RECEPTIVE at least; None: all."""
        features_BTC, frames_B = self.extract(audio_BS, length_B)
        valid_BT = None if frames_B is None else valid_of(frames_B, features_BTC.shape[1])
        x_BTC = self.encoder.feature_projection(self.normalize(features_BTC, valid_BT))
        context_BTC: Tensor = self.encoder.transformer(x_BTC, valid_BT)
        return context_BTC

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 up to the positions, then the layers, 1 more behind them."""
        _, found, rest = name.partition("transformer.layers.")
        if found:
            return int(rest.partition(".")[0]) + 1
        behind = "transformer.layer_norm." in name and self.encoder.transformer.pre_norm
        return len(self.encoder.transformer.layers) + 1 if behind else 0


def conv_layers(
    convs: Convs, *, mode: Extractor, bias: bool, norm: NormFactory | None
) -> list[ConvLayer]:
    """The extractor's layers. norm: what stands there instead of the published norm; None: that.

    mode: "group_norm", one after the first convolution, published with one group a channel, which
    normalizes each channel over time; "layer_norm", one after every convolution.
    """
    layers, ins = [], 1
    for i, (outs, kernel, stride) in enumerate(convs):
        made = None
        if i == 0 or mode == "layer_norm":
            published = make_norm("layernorm")
            if mode == "group_norm":
                published = make_norm("groupnorm", GroupNormOptions(groups=outs))
            factory = published if norm is None else norm
            made = factory(outs, site="stem", channels_first=True, eps=EPS)
        layers.append(ConvLayer(ins, outs, kernel=kernel, stride=stride, bias=bias, norm=made))
        ins = outs
    return layers
