"""HyenaDNA (Nguyen et al., arXiv 2306.15794) with the norm as an argument.

Bases in, a vector a base out. Every block is a gated long convolution and an MLP, each behind a
norm and around a residual; no position is embedded, as the convolution knows distance. The order of
dropout, add and norm is flash-attention's, as published: written out it is the pre-norm block
below. Source: standalone_hyenadna.py and src/models/sequence of hyena-dna d553021.

The filter of the long convolution is an MLP of the time t = n / (l_max - 1), so `l_max` is a part
of the function: the same weights with another l_max are another filter. The decay of the filter
towards `modulation_shift` is 0.05 in the standalone and in Hugging Face's port, 0 in the training
code. Both are options, and neither is to be seen in a file of weights.

`bidirectional` is a two-sided model: a second filter for the later positions, and the short
convolution centred. (The published one of that name sees no distance below half of the length.)

Shapes: B sequences, L positions, C channels, D channels of the mixer (as many), E features of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.norms import NormFactory
from suite.registry import ModelOptions
from tasks.dna.longconv import direct_conv, fft_conv
from tasks.dna.tokens import ROWS

EPS = 1e-5  # what HyenaDNA was published with; a norm option overrides it
SITES = ("mixer", "ffn", "final")
SLOW, FAST, TARGET = 1.5, 0.3, 1e-2  # channels decay to TARGET at SLOW to FAST of l_max
CONVS = {"fft": fft_conv, "direct": direct_conv}


@dataclass(frozen=True)
class HyenaOptions(ModelOptions):
    """Sizes of HyenaDNA.

    hidden_dim: of the MLP. l_max: positions that the filter's time runs over, the longest input.
    filter_dim, filter_embed, filter_layers, filter_freq: width, features of time, inner layers and
        first frequency of the filter's MLP.
    modulation_shift: what the filter's decay ends at. short_kernel: taps of the short convolution.
    bidirectional: every position sees every other. dropout: of both residual branches.
    tie_head: the head of pre-training is the embedding.
    init: first weights of the linear layers, the filter's among them: published (normal, of
        init_std), or torch's own, with which a filter has a shape from the start and a short
        training gets further.
    embed_std, init_std: of the first weights of the embedding, of the linear layers and heads.
    conv: "direct" is exactly causal and takes L * L time. checkpoint: compute blocks again in the
        backward instead of keeping what is in them.
    """

    dim: int = 128
    depth: int = 2
    hidden_dim: int = 512
    l_max: int = 1026
    filter_dim: int = 64
    filter_embed: int = 5
    filter_layers: int = 2
    filter_freq: float = 10.0
    modulation_shift: float = 0.05
    short_kernel: int = 3
    bidirectional: bool = False
    embed_dropout: float = 0.1
    dropout: float = 0.0
    tie_head: bool = True
    embed_std: float = 0.02
    init_std: float = 0.02
    init: Literal["published", "torch"] = "published"
    conv: Literal["fft", "direct"] = "fft"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(("dim", "depth", "hidden_dim", "filter_dim", "short_kernel"), 1)
        for name, low in (least | {"l_max": 2, "filter_embed": 3, "filter_layers": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.filter_embed % 2 == 0:
            raise ValueError(
                "filter_embed must be odd: the time, and a cosine and a sine of each frequency, "
                f"got {self.filter_embed}"
            )
        for name in ("embed_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        for name in ("embed_std", "init_std", "modulation_shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be 0 or a finite number above, got {getattr(self, name)}"
                )
        if not 0 < self.filter_freq < math.inf:
            raise ValueError(f"filter_freq must be a finite number above 0, got {self.filter_freq}")
        if self.init not in ("published", "torch"):
            raise ValueError(f"init must be published or torch, got {self.init!r}")
        if self.conv not in CONVS:
            raise ValueError(f"conv must be fft or direct, got {self.conv}")


def time_features(length: int, *, l_max: int, features: int, like: Tensor) -> Tensor:
    """[L, E]: t in [0, 1], then cos and -sin of (E - 1) / 2 frequencies of 2 pi n / l_max.

    Computed when it is needed, in float32 or wider: as a buffer it would be rounded with the model.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    bands = (features - 1) // 2
    n_L1 = torch.arange(length, device=like.device, dtype=dtype).unsqueeze(1)
    f_F = torch.linspace(1e-4, bands - 1, bands, device=like.device, dtype=dtype)
    angle_LF = f_F * (2 * math.pi / l_max * n_L1)
    return torch.cat((n_L1 / (l_max - 1), angle_LF.cos(), -angle_LF.sin()), dim=-1)


def decay_rates(dim: int, *, like: Tensor) -> Tensor:
    """[D]: a channel's decay in l_max positions, as a power of e; the last is the fastest."""
    low, high = (-math.log(TARGET) / at for at in (SLOW, FAST))
    return torch.linspace(low, high, dim, device=like.device, dtype=like.dtype)


class Filter(nn.Module):
    """Time -> a tap of every channel: an MLP with sines, times a decay of each channel's own.

    In float32 or wider under any autocast: the sines turn errors of their argument into noise.
    """

    def __init__(self, dim: int, *, options: HyenaOptions) -> None:
        super().__init__()
        width, inner = options.filter_dim, options.filter_layers
        sizes = (options.filter_embed, *(width,) * (inner + 1))
        self.layers = nn.ModuleList(nn.Linear(ins, outs) for ins, outs in pairwise(sizes))
        self.freq = nn.Parameter(torch.full((1, width), options.filter_freq))  # of all the sines
        self.out = nn.Linear(width, dim, bias=False)
        self.dim, self.shift = dim, options.modulation_shift

    def forward(self, z_LE: Tensor) -> Tensor:
        """Features of time -> filter [D, L]."""
        dtype = z_LE.dtype
        with torch.autocast(z_LE.device.type, enabled=False):
            h = z_LE
            for layer in self.layers:
                h = torch.sin(self.freq.to(dtype) * in_dtype(layer, h))
            k_LD = in_dtype(self.out, h) * self.decay(z_LE[:, :1])
        return k_LD.T

    def decay(self, t_L1: Tensor) -> Tensor:
        """[L, D], from 1 + shift at time 0 towards the shift."""
        rate_D = decay_rates(self.dim, like=t_L1)
        return torch.exp(-t_L1 * rate_D) + self.shift


def in_dtype(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer computed in the dtype of its input, whatever that of its weights is."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype) if isinstance(bias, Tensor) else None)


class HyenaOperator(nn.Module):
    """out(x0 * (filter * (x1 v))), with x0, x1 and v by a projection and a short convolution."""

    def __init__(self, options: HyenaOptions) -> None:
        super().__init__()
        dim, kernel = options.dim, options.short_kernel
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = nn.Conv1d(3 * dim, 3 * dim, kernel, groups=3 * dim)
        later = (kernel - 1) // 2 if options.bidirectional else 0
        self.reach = (kernel - 1 - later, later)  # taps before a position and after it
        self.filter = Filter(dim, options=options)
        self.reverse_filter = Filter(dim, options=options) if options.bidirectional else None
        self.skip = nn.Parameter(torch.randn(dim))
        self.out_proj = nn.Linear(dim, dim)
        self.conv = CONVS[options.conv]

    def forward(self, x_BLC: Tensor, z_LE: Tensor, mask_BL: Tensor | None) -> Tensor:
        """What stands at padded positions enters neither convolution."""
        p_BDL = self.in_proj(x_BLC).transpose(1, 2)
        p_BDL = self.short_filter(F.pad(without_padding(p_BDL, mask_BL), self.reach))
        x0_BDL, x1_BDL, v_BDL = p_BDL.chunk(3, dim=1)
        reverse_DL = None if self.reverse_filter is None else self.reverse_filter(z_LE)
        y_BDL = self.conv(
            without_padding(v_BDL * x1_BDL, mask_BL),
            self.filter(z_LE),
            D_D=self.skip,
            k_reverse_DL=reverse_DL,
        )
        return self.out_proj((y_BDL * x0_BDL).transpose(1, 2))


def without_padding(x_BDL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """0 where mask_BL is False."""
    return x_BDL if mask_BL is None else torch.where(mask_BL.unsqueeze(1), x_BDL, 0)


class Mlp(nn.Module):
    """Linear, GELU by tanh, linear."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))


class Block(nn.Module):
    """Two residual branches, each behind its norm. The residual is in float32 or wider."""

    def __init__(self, options: HyenaOptions, *, norm: NormFactory) -> None:
        super().__init__()
        self.norm1 = norm(options.dim, site="mixer", eps=EPS)
        self.mixer = HyenaOperator(options)
        self.norm2 = norm(options.dim, site="ffn", eps=EPS)
        self.mlp = Mlp(options.dim, hidden_dim=options.hidden_dim)
        self.dropout = nn.Dropout(options.dropout)
        self.checkpoint = options.checkpoint

    def forward(self, x_BLC: Tensor, z_LE: Tensor, mask_BL: Tensor | None) -> Tensor:
        dtype = self.mixer.in_proj.weight.dtype
        y_BLC = self.kept(self.mixer, self.norm1(x_BLC.to(dtype), mask_BL), z_LE, mask_BL)
        x_BLC = x_BLC + self.dropout(y_BLC)
        y_BLC = self.kept(self.mlp, self.norm2(x_BLC.to(dtype), mask_BL))
        return x_BLC + self.dropout(y_BLC)

    def kept(self, part: nn.Module, *inputs: Tensor | None) -> Tensor:
        """part(inputs); what is in it is computed again in the backward where that is wanted.

        Not the norms: the running statistics of one would move twice.
        """
        if self.checkpoint and self.training:
            again: Tensor = checkpoint(part, *inputs, use_reentrant=False)
            return again
        found: Tensor = part(*inputs)
        return found


class HyenaDNA(nn.Module):
    """Ids [B, L] -> hidden [B, L, C].

    fixed_by_weights: options that no name or shape of a weight shows.
    """

    strands = 1
    fixed_by_weights = ("l_max", "modulation_shift")

    def __init__(self, options: HyenaOptions, *, norm: NormFactory) -> None:
        super().__init__()
        self.dim, self.depth, self.l_max = options.dim, options.depth, options.l_max
        self.causal = not options.bidirectional
        self.filter_embed = options.filter_embed
        self.embedding = nn.Embedding(ROWS, options.dim)
        self.embed_dropout = nn.Dropout(options.embed_dropout)
        self.blocks = nn.ModuleList(Block(options, norm=norm) for _ in range(options.depth))
        self.dropout = nn.Dropout(options.dropout)
        self.final_norm = norm(options.dim, site="final", eps=EPS)
        nn.init.normal_(self.embedding.weight, std=options.embed_std)
        if options.init == "published":
            self.initialise(options.init_std)

    def initialise(self, std: float) -> None:
        """N(0, std), what ends a residual branch less by its number; biases 0. As published."""
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith(("out_proj", "fc2"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.depth) if last else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """mask_BL: True at real positions; None: all are. Raises ValueError beyond l_max."""
        length = ids_BL.shape[1]
        if length > self.l_max:
            raise ValueError(f"sequence of {length} positions is longer than l_max={self.l_max}")
        x_BLC = self.embed_dropout(self.embedding(ids_BL))
        dtype = x_BLC.dtype
        z_LE = time_features(length, l_max=self.l_max, features=self.filter_embed, like=x_BLC)
        x_BLC = x_BLC.to(z_LE.dtype)
        for block in self.blocks:
            x_BLC = block(x_BLC, z_LE, mask_BL)
        hidden_BLC: Tensor = self.final_norm(x_BLC.to(dtype), mask_BL)
        return hidden_BLC

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 the embedding, then the blocks, 1 more the final norm."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith("embedding.") else self.depth + 1

    def no_weight_decay(self) -> set[str]:
        """The embedding and the filters' MLPs, as in the published groups."""
        exempt = ("embedding.", ".filter.", ".reverse_filter.")
        return {n for n, _ in self.named_parameters() if any(part in n for part in exempt)}


def _size(dim: int, *, depth: int, l_max: int, checkpoint: bool = False) -> HyenaOptions:
    return HyenaOptions(
        dim=dim, depth=depth, hidden_dim=4 * dim, l_max=l_max, checkpoint=checkpoint
    )


# What 1,000 steps on a laptop can train: a filter with a shape from the start, over its windows.
LAPTOP = HyenaOptions(l_max=514, embed_dropout=0.0, tie_head=False, embed_std=1.0, init="torch")
HYENA_SIZES = {
    "hyenadna_tiny": LAPTOP,
    "hyenadna_tiny_1k": _size(128, depth=2, l_max=1026),
    "hyenadna_tiny_1k_d256": _size(256, depth=2, l_max=1026),
    "hyenadna_tiny_16k": _size(128, depth=2, l_max=16_386),
    "hyenadna_small_32k": _size(256, depth=4, l_max=32_770),
    "hyenadna_medium_160k": _size(256, depth=8, l_max=160_002),
    "hyenadna_medium_450k": _size(256, depth=8, l_max=450_002, checkpoint=True),
    "hyenadna_large_1m": _size(256, depth=8, l_max=1_000_002, checkpoint=True),
}
