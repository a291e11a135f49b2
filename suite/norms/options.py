"""What can be set about a norm: frozen dataclasses of plain types, checked when they are made.

A field left at None keeps what the model passes (its published eps, bias and affine). Every error
is a ValueError whose text starts with the field's name, so that a caller can prefix it with where
the field came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from suite.norms.sites import check_site

CALIBRATED = "calibrated"
Alpha = Literal["scalar", "channel", "none"]
Backend = Literal["auto", "eager", "compile", "triton", "cpp"]


def _positive(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def _check_literal(name: str, value: object, literal: object) -> None:
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class NormOptions:
    """What every norm has.

    by_site: site -> the norm that stands there instead ("final": "layernorm"). It takes over these
    options where they are of the same type, else its own defaults.
    """

    by_site: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.by_site:
            check_site(site, where="by_site")


@dataclass(frozen=True)
class StatisticsOptions(NormOptions):
    """Norms that compute statistics of their input. None keeps what the model was published with.

    eps: added to the variance (or mean square). weight, bias: whether there is a learned scale and
    offset.
    """

    eps: float | None = None
    weight: bool | None = None
    bias: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and not _positive(self.eps):
            raise ValueError(f"eps must be a positive number, got {self.eps!r}")


@dataclass(frozen=True)
class RowOptions(StatisticsOptions):
    """Of norms with kernels over a row. backend: "auto" and "eager" (torch's), "compile"
    (torch.compile of this layer alone), "triton" or "cpp" (suite.norms.kernels)."""

    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_literal("backend", self.backend, Backend)


@dataclass(frozen=True)
class BatchNormOptions(StatisticsOptions):
    """sync: statistics over all ranks (needs GPUs). momentum: the newest batch's weight."""

    sync: bool = True
    momentum: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _positive(self.momentum) or self.momentum > 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {self.momentum!r}")


@dataclass(frozen=True)
class GroupNormOptions(StatisticsOptions):
    """groups: None takes the most, up to 32, that leave at least 8 channels in each."""

    groups: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is not None and not (isinstance(self.groups, int) and self.groups >= 1):
            raise ValueError(f"groups must be a whole number of at least 1, got {self.groups!r}")


@dataclass(frozen=True)
class PointwiseOptions(NormOptions):
    """y = weight * f(alpha * x + shift) + bias.

    alpha_init: a positive number, or "calibrated": calibrate_target / RMS(input) per site, set by
    `calibrate`.
    alpha_init_by_site: numbers for the sites that differ.
    alpha: one for the layer, one per channel, or none (an ablation: alpha fixed at 1).
    shift: whether there is a learned shift inside f; None is what the norm was published with (Derf
    has one).
    weight, bias: learned scale and offset; None keeps what the model passes.
    backend: "auto" (the best that needs no building: triton on CUDA, else plain torch), "eager"
    (plain torch), "compile" (torch.compile of this layer alone), "triton" or "cpp" (the kernels of
    suite.norms.kernels).
    recompute: in training the outputs are computed again in the backward instead of kept
    (suite.norms.recompute): less memory, more work.
    """

    alpha_init: float | int | str = (
        0.5  # int is for OmegaConf, whose float does not take one in a union
    )
    calibrate_target: float = 1.0
    alpha_init_by_site: dict[str, float] = field(default_factory=dict)
    alpha: Alpha = "scalar"
    shift: bool | None = None
    weight: bool | None = None
    bias: bool | None = None
    backend: Backend = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_init != CALIBRATED and not _positive(self.alpha_init):
            raise ValueError(
                f"alpha_init must be a positive number or {CALIBRATED!r}, got {self.alpha_init!r}"
            )
        if not _positive(self.calibrate_target):
            raise ValueError(
                f"calibrate_target must be a positive number, got {self.calibrate_target!r}"
            )
        for site, value in self.alpha_init_by_site.items():
            check_site(site, where="alpha_init_by_site")
            if not _positive(value):
                raise ValueError(
                    f"alpha_init_by_site.{site} must be a positive number, got {value!r}"
                )
        _check_literal("alpha", self.alpha, Alpha)
        _check_literal("backend", self.backend, Backend)
        if self.alpha == "none" and (self.alpha_init == CALIBRATED or self.alpha_init_by_site):
            raise ValueError(
                "alpha is 'none': there is none to calibrate or to set by site; use 'scalar'"
            )
