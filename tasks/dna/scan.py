"""The selective scan of Mamba, one entry for every way of computing it.

    delta_t = softplus(delta_t + bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        (a state of N numbers per channel)
    y_t = C_t h_t + D u_t;  out_t = y_t silu(z_t)

(Mamba, arXiv:2312.00752, algorithm 2, with the discretisation of its code: exact for A, Euler for
B.) The state, A, D and the bias are float32 whatever the inputs are, float64 for float64: over 1024
steps a bf16 state is off by 1e-2, a float32 one by 2e-7.

Backends: `reference`, a loop over the positions that autograd differentiates; `chunked`, the same
in plain PyTorch with a backward of its own (tasks/dna/scan_chunked.py), for CPUs; `triton`, a
kernel for NVIDIA GPUs (tasks/dna/scan_triton.py); `mamba_ssm`, the authors' kernel where it is
installed. `auto` takes triton on CUDA, where it can, and chunked elsewhere.

Why the loop takes its positions by `unbind` and not by index: each index is a slice whose gradient
is a full-size tensor of zeros, so that the backward of L positions costs L squared.

Shapes: B sequences, L positions, D channels, N states.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "reference", "chunked", "triton", "mamba_ssm"]
Layout = Literal["BDL", "BLD"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class Scan:
    """What a backend is given, in one layout (views, of any strides).

    u, delta, z: [B, L, D]. A: [D, N]. B, C: [B, L, N]. D, delta_bias: [D]. mask: [B, L], bool; at
    positions that are False u and the softplus of delta count as 0.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    mask: Tensor | None
    softplus: bool
    reverse: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, as `of` takes them."""
        own = (self.u, self.delta, self.A, self.B, self.C)
        return (*own, self.D, self.z, self.delta_bias, self.mask)

    @classmethod
    def of(cls, tensors: Sequence[Any], *, softplus: bool, reverse: bool) -> Scan:
        """From what `tensors` gives: autograd functions take and save them one by one."""
        u, delta, A, B, C, D, z, bias, mask = tensors
        return cls(u, delta, A, B, C, D, z, bias, mask, softplus, reverse)

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the state: float64 for float64 inputs, else float32."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32


def selective_scan(
    u_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B_BNL: Tensor,
    C_BNL: Tensor,
    *,
    D_D: Tensor | None = None,
    z_BDL: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
    backend: Backend = "auto",
    mask_BL: Tensor | None = None,
    layout: Layout = "BDL",
) -> Tensor:
    """The scan of every channel, [B, D, L], in u's dtype.

    A: real and negative. reverse: from the last position to the first. mask: at positions that are
    False the state passes unchanged and the output is of no use. layout "BLD": u, delta, z and the
    result are [B, L, D], B and C [B, L, N], which saves a model its transposes. Raises ValueError
    for shapes that do not fit and for a backend that is not available here.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    sequences = [u_BDL, delta_BDL, B_BNL, C_BNL, z_BDL]
    if layout == "BDL":
        sequences = [None if x is None else x.transpose(1, 2) for x in sequences]
    u, delta, B, C, z = sequences
    assert u is not None
    assert delta is not None
    assert B is not None
    assert C is not None
    scan = Scan(u, delta, A_DN, B, C, D_D, z, delta_bias_D, mask_BL, softplus, reverse)
    check_shapes(scan)
    name = resolve(backend, u.device, dtype=u.dtype)
    with torch.autocast(u.device.type, enabled=False):  # a sum in bf16 would undo the float32 state
        out_BLD = RUN[name](scan)
    return out_BLD.transpose(1, 2) if layout == "BDL" else out_BLD


def check_shapes(scan: Scan) -> None:
    """Raise ValueError where the tensors do not belong together."""
    if scan.u.dim() != 3 or scan.A.dim() != 2:
        raise ValueError(
            f"u must have 3 dimensions and A 2, got {tuple(scan.u.shape)} and {tuple(scan.A.shape)}"
        )
    (b, length, d), n = scan.u.shape, scan.A.shape[1]
    if length < 1:
        raise ValueError("u must have at least one position, got none")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (scan.delta, (b, length, d)),
        "A": (scan.A, (d, n)),
        "B": (scan.B, (b, length, n)),
        "C": (scan.C, (b, length, n)),
        "D": (scan.D, (d,)),
        "z": (scan.z, (b, length, d)),
        "delta_bias": (scan.delta_bias, (d,)),
        "mask": (scan.mask, (b, length)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {shape} (as [B, L, ...]) for u with B={b}, L={length}, D={d} and "
                f"A with N={n}, got {tuple(tensor.shape)}"
            )
    if scan.mask is not None and scan.mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {scan.mask.dtype}")
    if scan.A.is_complex():
        raise ValueError("A must be real, got a complex tensor")


def resolve(backend: str, device: torch.device | str, *, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `backend` means on `device`. Raises ValueError if it cannot run there."""
    if backend not in BACKENDS:
        raise ValueError(f"scan must be one of {', '.join(BACKENDS)}, got {backend!r}")
    on_gpu = torch.device(device).type == "cuda"
    if backend == "auto":
        return "triton" if on_gpu and installed("triton") and dtype != torch.float64 else "chunked"
    if backend == "triton":
        check_triton(on_gpu, dtype)
    if backend == "mamba_ssm":
        if not on_gpu:
            raise ValueError("scan=mamba_ssm runs on NVIDIA GPUs only; take scan=chunked here")
        mamba_kernel()
    return backend


def check_triton(on_gpu: bool, dtype: torch.dtype) -> None:
    """Raise ValueError where the kernel cannot run."""
    if not installed("triton"):
        raise ValueError("scan=triton needs the package triton; install it or take scan=chunked")
    if dtype == torch.float64:
        raise ValueError("scan=triton computes in float32; take scan=chunked for float64")
    if not on_gpu:
        from tasks.dna.scan_triton import interpreted

        if not interpreted():
            raise ValueError("scan=triton runs on NVIDIA GPUs only; take scan=chunked here")


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def check_first_order(backend: str) -> None:
    """Raise RuntimeError in a backward that is to be differentiated itself, which would otherwise
    count as a constant without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"scan={backend} can be differentiated once; take scan=reference for create_graph=True"
        )


def discretised(scan: Scan) -> tuple[Tensor, Tensor]:
    """delta and u as the recurrence takes them, [B, L, D], in the state's dtype."""
    delta, u = scan.delta.to(scan.state_dtype), scan.u.to(scan.state_dtype)
    if scan.delta_bias is not None:
        delta = delta + scan.delta_bias.to(scan.state_dtype)
    if scan.softplus:
        delta = F.softplus(delta)
    if scan.mask is not None:
        keep = scan.mask[:, :, None]
        delta, u = delta.where(keep, 0), u.where(keep, 0)
    return delta, u


def run_reference(scan: Scan) -> Tensor:
    """Position by position, for autograd to differentiate: what the others are checked against."""
    delta, u = discretised(scan)
    A, B, C = (x.to(scan.state_dtype) for x in (scan.A, scan.B, scan.C))
    parts = [delta.unbind(1), (delta * u).unbind(1), B.unbind(1), C.unbind(1)]
    steps = list(zip(*parts, strict=True))
    state = A.new_zeros(u.shape[0], *A.shape)
    found = []
    for delta_BD, input_BD, B_BN, C_BN in reversed(steps) if scan.reverse else steps:
        kept = torch.exp(delta_BD[:, :, None] * A) * state
        state = kept + input_BD[:, :, None] * B_BN[:, None, :]
        found.append((state * C_BN[:, None, :]).sum(2))
    y = torch.stack(found[::-1] if scan.reverse else found, dim=1)
    if scan.D is not None:
        y = y + u * scan.D.to(scan.state_dtype)
    if scan.z is not None:
        y = y * F.silu(scan.z.to(scan.state_dtype))
    return y.to(scan.u.dtype)


def run_chunked(scan: Scan) -> Tensor:
    """tasks/dna/scan_chunked.py."""
    from tasks.dna.scan_chunked import chunked_scan

    return chunked_scan(scan)


def run_triton(scan: Scan) -> Tensor:
    """tasks/dna/scan_triton.py."""
    from tasks.dna.scan_triton import triton_scan

    return triton_scan(scan)


def run_mamba_ssm(scan: Scan) -> Tensor:
    """The authors' kernel, which has no direction and no mask: both are done around it."""
    kernel, dtype = mamba_kernel(), scan.u.dtype
    if dtype == torch.float64:
        raise ValueError("scan=mamba_ssm computes in float32; take scan=chunked for float64")
    bias = None if scan.delta_bias is None else scan.delta_bias.float()
    softplus = scan.softplus
    if scan.mask is not None:  # delta is to be 0 after the softplus, so it cannot be the kernel's
        steps, shown = discretised(scan)
        scan, bias, softplus = replace(scan, delta=steps, u=shown), None, False
    sequences = [scan.u, scan.delta, scan.B, scan.C, scan.z]
    if scan.reverse:
        sequences = [None if x is None else x.flip(1) for x in sequences]
    u, delta, B, C, gate = (
        None if x is None else x.transpose(1, 2).to(dtype).contiguous() for x in sequences
    )
    skip = None if scan.D is None else scan.D.float()
    y_BDL = kernel(
        u, delta, scan.A.float(), B, C, D=skip, z=gate, delta_bias=bias, delta_softplus=softplus
    )
    y = y_BDL.transpose(1, 2)
    return y.flip(1) if scan.reverse else y


def mamba_kernel() -> Callable[..., Tensor]:
    """mamba_ssm's selective_scan_fn. Raises ValueError, saying what is missing."""
    instead = "take scan=triton or scan=chunked, or build it with its CUDA kernels"
    if not installed("mamba_ssm"):
        raise ValueError(f"scan=mamba_ssm needs the package mamba_ssm; {instead}")
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as error:
        raise ValueError(
            f"scan=mamba_ssm: mamba_ssm cannot be imported ({error}); {instead}"
        ) from None
    # Wheels from 2.3.2.post1 on leave out the kernel of Mamba-1 and the module still imports.
    if getattr(module, "selective_scan_cuda", None) is None:
        raise ValueError(
            "scan=mamba_ssm: this mamba_ssm has no Mamba-1 kernel (selective_scan_cuda), as the "
            f"wheels from 2.3.2.post1 on; {instead} (MAMBA_KEEP_CUDA_BUILD=TRUE)"
        )
    return module.selective_scan_fn  # type: ignore[no-any-return]


RUN: dict[str, Callable[[Scan], Tensor]] = {
    "reference": run_reference,
    "chunked": run_chunked,
    "triton": run_triton,
    "mamba_ssm": run_mamba_ssm,
}
