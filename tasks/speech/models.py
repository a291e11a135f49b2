"""The wav2vec 2.0 models that `model=` names: sizes, options and builders.

Sizes and dropouts are those of the published yaml files (fairseq,
`examples/wav2vec/config/pretraining` and `finetuning`); "large" is the one that DyT's and Derf's
authors trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from suite.data import DataInfo
from suite.norms import NormFactory
from suite.registry import Choice, ModelOptions
from tasks.speech.ctc_model import ForCTC
from tasks.speech.pretrain_model import ForPretraining, PretrainOutput
from tasks.speech.text import LABELS
from tasks.speech.wav2vec2 import SITES, STRIDES, Extractor, Wav2Vec2

__all__ = [
    "CTC_MODELS",
    "PRETRAIN_MODELS",
    "CTCOptions",
    "ForCTC",
    "ForPretraining",
    "PretrainOptions",
    "PretrainOutput",
    "Wav2Vec2Options",
]


@dataclass(frozen=True)
class Wav2Vec2Options(ModelOptions):
    """Settings of a wav2vec 2.0. The defaults are the base model's.

    extractor: "group_norm" has one norm, over time, after the first convolution; "layer_norm" one
        over the channels after every convolution.
    conv_dim, conv_bias: channels of the seven convolutions, and whether they have a bias.
    dim, depth, heads, hidden_dim: width, layers, attention heads and feed-forward width.
    pre_norm: norms before attention and feed-forward; else after their residual, as in the base
        model.
    pos_kernel, pos_groups: of the convolution that gives the positions.
    dropout: after attention, feed-forward and the positions; input_dropout: on the projected
        features; attention_dropout, activation_dropout: inside.
    layer_drop: share of layers that an update leaves out.
    init_std: spread of the first weights of the Transformer's linear layers.
    mask_padding: the extractor's norm over time does not see the padding. false reproduces the
        published group_norm models, whose features change with what a clip is batched with.
    keep_sites: sites that keep the published norm whatever `norm=` says: stem (the extractor's,
        of the data), embed (the features'), attn, ffn, final. [] puts the chosen norm everywhere.
    """

    extractor: Extractor = "group_norm"
    conv_dim: int = 512
    conv_bias: bool = False
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden_dim: int = 3072
    pre_norm: bool = False
    pos_kernel: int = 128
    pos_groups: int = 16
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    layer_drop: float = 0.05
    init_std: float = 0.02
    mask_padding: bool = True
    keep_sites: tuple[str, ...] = ("stem", "embed")

    def __post_init__(self) -> None:
        for name in ("conv_dim", "dim", "depth", "heads", "hidden_dim", "pos_kernel", "pos_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("heads", "pos_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(
                    f"{name} must divide dim ({self.dim}), got {name}={getattr(self, name)}"
                )
        for name in (field.name for field in fields(self)):
            if name.endswith(("dropout", "layer_drop")) and not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be a number above 0, got {self.init_std}")
        if self.extractor not in get_args(Extractor):
            raise ValueError(
                f"extractor must be one of {', '.join(get_args(Extractor))}, got {self.extractor!r}"
            )
        if isinstance(self.keep_sites, str):
            raise ValueError(f"keep_sites must be a list such as [stem], got {self.keep_sites!r}")
        if unknown := [site for site in self.keep_sites if site not in SITES]:
            raise ValueError(f"keep_sites may hold {', '.join(SITES)}, got {unknown[0]!r}")


@dataclass(frozen=True)
class PretrainOptions(Wav2Vec2Options):
    """And what pre-training adds.

    codebooks, codes: of the quantizer, and vectors in each; code_dim: width of a quantized vector,
        and of the two projections that are compared.
    feature_dropout: on the quantizer's input.
    feature_grad_mult: factor on the extractor's gradient.
    """

    codebooks: int = 2
    codes: int = 320
    code_dim: int = 256
    feature_dropout: float = 0.1
    feature_grad_mult: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("codebooks", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.codes < 2:
            raise ValueError(f"codes must be at least 2, got {self.codes}")
        if self.code_dim % self.codebooks:
            raise ValueError(
                f"code_dim must be a multiple of codebooks ({self.codebooks}), got {self.code_dim}"
            )
        if not 0 < self.feature_grad_mult < math.inf:
            raise ValueError(
                f"feature_grad_mult must be a number above 0, got {self.feature_grad_mult}"
            )


@dataclass(frozen=True)
class CTCOptions(Wav2Vec2Options):
    """And what fine-tuning adds. Its published dropouts are not those of pre-training.

    freeze_extractor: the convolutions never learn; set it to false to train from scratch.
    final_dropout: in front of the head.
    """

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.1
    input_dropout: float = 0.0
    layer_drop: float = 0.1
    freeze_extractor: bool = True
    final_dropout: float = 0.0


def encoder_of(options: Wav2Vec2Options, *, norm: NormFactory) -> Wav2Vec2:
    """The part that pre-training and fine-tuning share."""
    return Wav2Vec2(
        norm=norm,
        convs=[(options.conv_dim, kernel, stride) for kernel, stride in STRIDES],
        extractor=options.extractor,
        conv_bias=options.conv_bias,
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        hidden_dim=options.hidden_dim,
        pre_norm=options.pre_norm,
        pos_kernel=options.pos_kernel,
        pos_groups=options.pos_groups,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        activation_dropout=options.activation_dropout,
        input_dropout=options.input_dropout,
        init_std=options.init_std,
        mask_padding=options.mask_padding,
        keep_sites=options.keep_sites,
    )


def build_pretrain(
    options: PretrainOptions, *, norm: NormFactory, data: DataInfo
) -> ForPretraining:
    """The model of `options`. It takes any audio at 16 kHz: nothing of it depends on `data`."""
    return ForPretraining(
        encoder_of(options, norm=norm),
        features=options.conv_dim,
        dim=options.dim,
        codebooks=options.codebooks,
        codes=options.codes,
        code_dim=options.code_dim,
        feature_dropout=options.feature_dropout,
        feature_grad_mult=options.feature_grad_mult,
        layer_drop=options.layer_drop,
    )


def build_ctc(options: CTCOptions, *, norm: NormFactory, data: DataInfo) -> ForCTC:
    """The model of `options`, with a head of the letters of `tasks.speech.text`."""
    return ForCTC(
        encoder_of(options, norm=norm),
        dim=options.dim,
        letters=len(LABELS),
        freeze_extractor=options.freeze_extractor,
        final_dropout=options.final_dropout,
        layer_drop=options.layer_drop,
    )


TINY: dict[str, Any] = {
    "conv_dim": 48,
    "dim": 96,
    "depth": 3,
    "heads": 4,
    "hidden_dim": 384,
    "pre_norm": True,
    "pos_kernel": 32,
    "pos_groups": 8,
    "layer_drop": 0.0,
}
LARGE: dict[str, Any] = {
    "dim": 1024,
    "depth": 24,
    "heads": 16,
    "hidden_dim": 4096,
    "pre_norm": True,
}
LV60K: dict[str, Any] = {**LARGE, "extractor": "layer_norm", "conv_bias": True}
POST_NORM = "weights published for LibriSpeech-960 want model.pre_norm=false"

PRETRAIN_MODELS = {
    "wav2vec2_tiny": Choice(
        PretrainOptions(
            **TINY,
            dropout=0.05,
            attention_dropout=0.0,
            input_dropout=0.0,
            feature_dropout=0.0,
            codes=40,
            code_dim=32,
        ),
        build_pretrain,
        "0.4 M parameters, pre-norm, for laptops",
    ),
    "wav2vec2_base": Choice(PretrainOptions(), build_pretrain, "95 M parameters, post-norm"),
    "wav2vec2_large": Choice(
        PretrainOptions(**LARGE, attention_dropout=0.0, layer_drop=0.2, code_dim=768),
        build_pretrain,
        f"317 M parameters, pre-norm as in DyT's and Derf's runs; {POST_NORM}",
    ),
    "wav2vec2_large_lv60k": Choice(
        PretrainOptions(
            **LV60K,
            dropout=0.0,
            attention_dropout=0.0,
            input_dropout=0.0,
            feature_dropout=0.0,
            layer_drop=0.0,
            code_dim=768,
            feature_grad_mult=1.0,
        ),
        build_pretrain,
        "317 M parameters, pre-norm, extractor with layer norms (Libri-Light)",
    ),
}
CTC_MODELS = {
    "wav2vec2_tiny": Choice(
        CTCOptions(**TINY, dropout=0.1, activation_dropout=0.0, freeze_extractor=False),
        build_ctc,
        "0.4 M parameters, pre-norm, trained from scratch, for laptops",
    ),
    "wav2vec2_base": Choice(CTCOptions(), build_ctc, "94 M parameters, post-norm"),
    "wav2vec2_large": Choice(
        CTCOptions(**LARGE),
        build_ctc,
        f"315 M parameters, pre-norm as in DyT's and Derf's runs; {POST_NORM}",
    ),
    "wav2vec2_large_lv60k": Choice(
        CTCOptions(**LV60K),
        build_ctc,
        "315 M parameters, pre-norm, extractor with layer norms (Libri-Light)",
    ),
}
