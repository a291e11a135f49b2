"""The norms of other libraries that `replace_norms` knows, each exact type by its full name.

A list, not isinstance: a subclass may have a forward of its own (EvoNorm, SplitBatchNorm2d, frozen
batch norms), and what it computes would be lost without a word. Read from torch 2.11 to 2.14, timm
1.0.21 to 1.0.31, torchvision and torchaudio; transformers' many RMSNorms go by name and weight.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_NORMALIZATION, _BATCHNORM = "torch.nn.modules.normalization", "torch.nn.modules.batchnorm"
_INSTANCENORM, _METAFORMER = "torch.nn.modules.instancenorm", "timm.models.metaformer"
_TIMM, _TIMM_ACT = "timm.layers.norm", "timm.layers.norm_act"
_FP32 = ("", "Fp32")

# timm: act(drop(norm(x))) in one module
_ACT_LAST = {
    f"{_TIMM_ACT}.{name}{fp32}" for name in ("LayerNormAct", "RmsNormAct") for fp32 in _FP32
}
_ACT_FIRST = {
    *(f"{_TIMM_ACT}.{name}" for name in ("BatchNormAct2d", "GroupNormAct", "GroupNorm1Act")),
    *(f"{_TIMM_ACT}.{name}{fp32}" for name in ("LayerNormAct2d", "RmsNormAct2d") for fp32 in _FP32),
}
WITH_ACTIVATION = frozenset(_ACT_LAST | _ACT_FIRST)

CHANNELS_LAST = frozenset(
    {
        f"{_NORMALIZATION}.LayerNorm",
        f"{_NORMALIZATION}.RMSNorm",
        *(
            f"{_TIMM}.{name}{fp32}"
            for name in ("LayerNorm", "RmsNorm", "SimpleNorm")
            for fp32 in _FP32
        ),
        f"{_METAFORMER}.LayerNormNoBias",
        *_ACT_LAST,
    }
)
CHANNELS_FIRST = frozenset(
    {
        f"{_NORMALIZATION}.GroupNorm",
        *(f"{_BATCHNORM}.BatchNorm{n}d" for n in (1, 2, 3)),
        f"{_BATCHNORM}.SyncBatchNorm",
        *(f"{_INSTANCENORM}.InstanceNorm{n}d" for n in (1, 2, 3)),
        *(
            f"{_TIMM}.{name}2d{fp32}"
            for name in ("LayerNorm", "RmsNorm", "SimpleNorm")
            for fp32 in _FP32
        ),
        f"{_TIMM}.GroupNorm",
        f"{_TIMM}.GroupNorm1",
        f"{_METAFORMER}.GroupNorm1NoBias",
        f"{_METAFORMER}.LayerNorm2dNoBias",
        "torchvision.models.convnext.LayerNorm2d",
        "torchaudio.models.wav2vec2.components.LayerNorm",
        *_ACT_FIRST,
    }
)
_TRANSFORMERS_RMS = re.compile(r"(RMSNorm|T5LayerNorm)$")


def type_name(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_known(module: nn.Module) -> bool:
    """Whether `replace_norms` knows what this very type of norm computes."""
    return type_name(module) in CHANNELS_LAST | CHANNELS_FIRST or _transformers_rms(module)


def _transformers_rms(module: Any) -> bool:
    """transformers' many RMSNorms: by name, with one weight over the channels and no more."""
    cls = type(module)
    if cls.__module__.split(".")[0] not in ("transformers", "transformers_modules"):
        return False
    names = [name for name, _ in module.named_parameters()]
    return (
        bool(_TRANSFORMERS_RMS.search(cls.__name__))
        and names == ["weight"]
        and module.weight.dim() == 1
    )
