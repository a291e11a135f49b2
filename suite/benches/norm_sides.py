"""What `suite.bench norms` compares: every way of computing a norm, with the same parameters.

A side is a norm and a kind: the suite's layer with one of its backends, the module as its paper
published it, torch's own function, or a peer's kernel. All have parameters in the dtype of x: with
float32 parameters and bf16 activations, the published modules return float32 and move twice the
bytes, which has been taken for a gain of fusing (Liger's table of DyT).

Peers are imported when they are asked for. One that is not there, or does not have the norm, is
Absent, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.norms import make_norm
from suite.norms.functions import FUNCTIONS
from suite.norms.table import NORMS

EPS = 1e-5
ALPHA = 0.5  # exact in every dtype
KINDS = {
    "eager": "the suite's layer, plain torch",
    "compile": "the suite's layer under torch.compile",
    "ours": "the suite's kernel: cpp on a CPU, triton on a GPU",
    "published": "the module of the paper's repository, eager",
    "torch": "torch's own function",
    "liger": "Liger's Triton kernel",
    "apex": "NVIDIA apex's kernel",
    "quack": "QuACK's CuTe kernel",
    "one-pass": "residual add and norm in one pass of the suite's kernel",
}
ROWS = {"layernorm": "layer", "rmsnorm": "rms"}
MEASURED = (*ROWS, *FUNCTIONS)  # norms that have kernels
PEERS = ("liger", "apex", "quack")
Work = Literal["norm", "add"]
WORKS: dict[Work, str] = {"norm": "norm", "add": "residual add and norm"}

PUBLISHED = {"dyt": torch.tanh, "derf": torch.erf}
RENAMED = {"gamma": "weight", "beta": "bias"}  # Liger's names


class Absent(Exception):
    """A side that cannot be measured here; its text says why."""


@dataclass(frozen=True)
class Side:
    """A norm and how it is computed. run: x, and the residual for work "add" -> the outputs.

    parameters: under the suite's names.
    """

    norm: str
    kind: str
    run: Callable[..., tuple[Tensor, ...]]
    parameters: dict[str, nn.Parameter]

    @property
    def name(self) -> str:
        return f"{self.norm} {self.kind}"


def kinds_of(norm: str, *, work: Work, device: str) -> list[str]:
    """The kinds that exist of a norm for this work on this kind of device."""
    found = ["eager", "compile", "ours"]
    found += ["published"] if norm in PUBLISHED else ["torch"] if norm in ROWS else []
    if work == "add":
        return [*found, "one-pass"]
    if device == "cuda":
        found += ["liger"] if norm in ("dyt", *ROWS) else []
        found += ["apex"] if norm in ROWS else []
        found += ["quack"] if norm == "rmsnorm" else []
    return found


def build(
    norm: str, kind: str, *, work: Work, dim: int, dtype: torch.dtype, device: torch.device
) -> Side:
    """One side, ready to run. Raises Absent."""
    module = _module(norm, kind, dim=dim, device=device)
    module = module.to(device=device, dtype=dtype)
    parameters = {RENAMED.get(name, name): p for name, p in module.named_parameters()}
    settle(parameters)
    if work == "norm":
        return Side(norm, kind, lambda x: (module(x),), parameters)
    if kind == "one-pass":
        return Side(norm, kind, partial(_one_pass, module, own_backend(device)), parameters)
    run = partial(_two_passes, module)
    # one graph of add and norm: a layer with backend=compile gives its formula to it. backend=eager
    # would not do: that keeps torch.tanh, which Inductor makes slow code of
    return Side(norm, kind, torch.compile(run) if kind == "compile" else run, parameters)


@torch.no_grad()
def settle(parameters: dict[str, nn.Parameter]) -> None:
    """The same values for every side: not those of a first step, where errors would not show."""
    draw = torch.Generator().manual_seed(0)
    for name, start, spread in (("weight", 1.0, 0.1), ("bias", 0.0, 0.1), ("shift", 0.0, 0.1)):
        if name in parameters:
            p = parameters[name]
            p.copy_(start + spread * torch.randn(p.shape, generator=draw))
    if "alpha" in parameters:
        parameters["alpha"].fill_(ALPHA)


def exact(norm: str, *, work: Work, dim: int, dtype: torch.dtype, device: torch.device) -> Side:
    """The norm in float64, with the parameters rounded to `dtype` as all sides have them."""
    like = layer(norm, "eager", dim=dim, device=device).to(device=device, dtype=dtype)
    settle(dict(like.named_parameters()))
    module = like.double()
    run = partial(_rounded_add, module, dtype) if work == "add" else lambda x: (module(x),)
    return Side(norm, "float64", run, dict(module.named_parameters()))


def _rounded_add(
    module: nn.Module, dtype: torch.dtype, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum is rounded to the dtype of x before the norm: that is part of what is computed."""
    h = x + residual
    h = h + (h.to(dtype).double() - h).detach()
    return module(h), h


def own_backend(device: torch.device) -> str:
    """The suite's kernel for a device."""
    return "triton" if device.type == "cuda" else "cpp"


def _module(norm: str, kind: str, *, dim: int, device: torch.device) -> nn.Module:
    if kind in ("eager", "compile", "ours", "one-pass"):
        own = {"ours": own_backend(device), "one-pass": own_backend(device)}
        return layer(norm, own.get(kind, kind), dim=dim, device=device)
    if kind == "published" and norm in PUBLISHED:
        return Published(norm, dim)
    if kind == "torch" and norm in ROWS:
        return Torch(norm, dim)
    if kind in PEERS:
        return _peer(norm, kind, dim)
    raise Absent(f"there is no {kind} of {norm}")


def layer(norm: str, backend: str, *, dim: int, device: torch.device) -> nn.Module:
    """The suite's layer. Raises Absent where another backend than this one would run."""
    options = NORMS[norm].options
    if hasattr(options, "backend"):
        options = replace(options, backend=backend)
    elif backend != "eager":
        raise Absent(f"{norm} has no option backend")
    module: Any = make_norm(norm, options)(dim, site="attn", eps=EPS)
    if hasattr(module, "choice"):
        chosen = module.choice(device.type)
        if chosen.name != backend:
            raise Absent(f"backend={backend} cannot run, {chosen.name} would: {chosen.why}")
    found: nn.Module = module
    return found


class Published(nn.Module):
    """DyT (jiachenzhu/DyT) and Derf as their repositories compute them, with equal dtypes."""

    def __init__(self, norm: str, dim: int) -> None:
        super().__init__()
        self.f = PUBLISHED[norm]
        self.alpha = nn.Parameter(torch.empty(1))
        self.shift = nn.Parameter(torch.empty(1)) if FUNCTIONS[norm].shift else None
        self.weight, self.bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        u = self.alpha * x if self.shift is None else self.alpha * x + self.shift
        return (self.f(u) * self.weight + self.bias).to(x.dtype)


class Torch(nn.Module):
    """F.layer_norm or F.rms_norm, which nn.LayerNorm and nn.RMSNorm call."""

    def __init__(self, norm: str, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if norm == "layernorm" else None
        self.norm, self.shape = norm, (dim,)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "layernorm":
            return F.layer_norm(x, self.shape, self.weight, self.bias, EPS)
        return F.rms_norm(x, self.shape, self.weight, EPS)


class Quack(nn.Module):
    """QuACK's RMSNorm, which is a function."""

    def __init__(self, rmsnorm: Callable[..., Tensor], dim: int) -> None:
        super().__init__()
        self.f, self.weight = rmsnorm, nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.weight, eps=EPS)


def _peer(norm: str, kind: str, dim: int) -> nn.Module:
    if kind == "liger":
        liger = _imported("liger_kernel.transformers", "liger-kernel")
        if norm == "dyt":
            dyt: nn.Module = _imported("liger_kernel.transformers.dyt", "liger-kernel").LigerDyT(
                dim
            )
            return dyt
        if norm == "layernorm":
            found: nn.Module = liger.LigerLayerNorm(dim, eps=EPS, bias=True)
            return found
        # in_place would write dx over the gradient that every round gives it
        return liger.LigerRMSNorm(dim, eps=EPS, in_place=False)  # type: ignore[no-any-return]
    if kind == "apex":
        apex = _imported("apex.normalization", "apex")
        made = apex.FusedLayerNorm if norm == "layernorm" else apex.FusedRMSNorm
        return made(dim, eps=EPS)  # type: ignore[no-any-return]
    return Quack(_imported("quack", "quack-kernels").rmsnorm, dim)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{package} is not installed ({error})") from None


def _two_passes(module: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return module(h), h


def _one_pass(module: Any, backend: str, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    from suite.norms.kernels import ops

    kind = ROWS.get(module.norm_name)
    if kind is not None:
        rest = {"kind": kind, "eps": module.eps, "backend": backend}
        return ops.rows_add(x, residual, module.weight, module.bias, **rest)
    return ops.pointwise_add(
        x,
        residual,
        module.alpha,
        module.shift,
        module.weight,
        module.bias,
        function=module.function,
        channels_first=False,
        backend=backend,
    )


def names(
    norms: Sequence[str], *, work: Work, device: str, kinds: Sequence[str]
) -> list[tuple[str, str]]:
    """(norm, kind) of all sides that are to be measured, LayerNorm of torch always among them."""
    found = [
        (norm, kind)
        for norm in norms
        for kind in kinds_of(norm, work=work, device=device)
        if kind in kinds
    ]
    baseline = ("layernorm", "torch")
    return found if baseline in found else [baseline, *found]
