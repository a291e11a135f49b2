"""The ways of running one Transformer block that suite.benches.fusion compares; times and bytes.

ViT's block is made of suite.layers; LLaMA's has three projections, a SwiGLU MLP and no biases
(rotary positions, which nothing here touches, are left out). Both take the residual stream and the
last branch and give the same back, so that each of their two norms stands behind an add.

Bytes are those of every storage that a forward made and that is alive after it: what is kept for
the backward, and the two outputs. The operations of a compiled block are not seen one by one; there
they are the storages that autograd saves, and the outputs.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from suite.benches.fusion_kernels import unbuilt, uncached
from suite.layers import Attention, Mlp
from suite.norms import NORMS, NormFactory, PointwiseNorm, make_norm
from suite.norms.kernels import choose_backend
from suite.norms.recompute import recompute_norms
from suite.norms.residual import add_norm
from suite.train import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = 196  # of a sequence
HEAD_DIM = 32
SLICE_SECONDS = 0.1  # what a timing lasts at least
AGAINST = {"kernel": "plain", "one pass": "kernel", "recompute": "plain", "compiled": "plain"}


@dataclass(frozen=True)
class Setting:
    """What is measured, as the command line says it. rows: tokens of a batch."""

    norms: tuple[str, ...]
    dims: tuple[int, ...]
    rows: int
    rounds: int
    device: str
    dtype: str
    compiled: bool

    def autocast(self) -> Any:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])

    def inputs(self, dim: int) -> tuple[Tensor, Tensor]:
        """The residual stream and a branch, [B, T, C]."""
        tokens = min(TOKENS, self.rows)
        shape = (max(1, self.rows // tokens), tokens, dim)
        x, branch = (torch.randn(shape, device=self.device).requires_grad_() for _ in range(2))
        return x, branch


@dataclass
class Found:
    """Of one side. ratios: its time by that of `against`, a round each; of the first side empty.
    bytes: alive after a forward."""

    block: str
    dim: int
    norm: str
    side: str
    bytes: int
    ms: float | None = None
    against: str | None = None
    ratios: list[float] = field(default_factory=list)


class Block(nn.Module):
    """Two branches behind a norm each: (x, branch) -> the next (x, branch), [B, T, C].

    together: add and norm in one pass where the norm can.
    """

    def __init__(self, kind: str, dim: int, *, norm: NormFactory, together: bool) -> None:
        super().__init__()
        heads = max(1, dim // HEAD_DIM)
        bias = kind == "vit"
        self.norm1 = norm(dim, site="attn", bias=bias)
        self.attn = Attention(dim, heads=heads) if bias else Projections(dim, heads=heads)
        self.norm2 = norm(dim, site="ffn", bias=bias)
        self.mlp = Mlp(dim, hidden_dim=4 * dim) if bias else Gated(dim, hidden_dim=8 * dim // 3)
        self.add_norm = add_norm if together else apart

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y, x = self.add_norm(self.norm1, branch, x)
        y, x = self.add_norm(self.norm2, self.attn(y), x)
        return x, self.mlp(y)


def apart(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """add_norm as two operations."""
    h = residual + x
    return norm(h), h


class Projections(nn.Module):
    """Causal attention with q, k and v from a linear layer each."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(dim, hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass
class Side:
    """A way to run a block.

    modules: the block itself. again: norms are recomputed. untimed: only its bytes are measured.
    """

    name: str
    block: Callable[..., tuple[Tensor, Tensor]]
    modules: nn.Module
    again: bool = False
    untimed: bool = False

    def step(self, setting: Setting, x: Tensor, branch: Tensor) -> None:
        """A forward and a backward."""
        out, last = self.forward(setting, x, branch)
        torch.autograd.backward([out, last], [out.detach(), last.detach()])
        for leaf in (x, branch, *self.modules.parameters()):
            leaf.grad = None

    def forward(self, setting: Setting, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        with setting.autocast(), recompute_norms(self.modules) if self.again else nullcontext():
            return self.block(x, branch)


def sides_of(setting: Setting, kind: str, dim: int, norm: str, notes: list[str]) -> list[Side]:
    """All that this norm can, with equal first weights."""

    def built(backend: str | None, together: bool) -> Block:
        torch.manual_seed(0)
        options = NORMS[norm].options
        if backend is not None:
            options = type(options)(backend=backend)  # type: ignore[call-arg]
        block = Block(kind, dim, norm=make_norm(norm, options), together=together)
        return block.to(setting.device)

    plain = built(None, False)
    sides = [Side("plain", plain, plain)]
    kernel = "triton" if setting.device == "cuda" else "cpp"
    if not hasattr(NORMS[norm].options, "backend"):
        note(notes, f"{norm} has no kernel: no side with one")
    elif (why := no_kernel(kernel, setting.device, plain.norm1)) is not None:
        note(notes, f"{kernel} kernels are left out: {why}")
    else:
        for name, together in (("kernel", False), ("one pass", True)):
            block = built(kernel, together)
            sides.append(Side(name, block, block))
    if isinstance(plain.norm1, PointwiseNorm):
        sides.append(Side("recompute", plain, plain, again=True))
    block = built(None, False)
    compiled = (
        torch.compile(block, dynamic=False) if setting.compiled else unbuilt(block, Counter())
    )
    sides.append(Side("compiled", compiled, block, untimed=not setting.compiled))
    return sides


def note(notes: list[str], text: str) -> None:
    """Add it once."""
    if text not in notes:
        notes.append(text)


def no_kernel(kernel: str, device: str, norm: nn.Module) -> str | None:
    """Why there is none here; None if there is."""
    family = "pointwise" if isinstance(norm, PointwiseNorm) else "rows"
    try:
        choice = choose_backend(kernel, device, family=family)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None if choice.name == kernel else choice.why


def of_norm(setting: Setting, kind: str, dim: int, norm: str, notes: list[str]) -> list[Found]:
    """All sides of one norm by turns. One that raises is left out, with a note."""
    x, branch = setting.inputs(dim)
    ready: dict[str, Side] = {}
    found, repeats = {}, {}
    for side in sides_of(setting, kind, dim, norm, notes):
        try:
            with uncached() if side.untimed else nullcontext():
                side.step(setting, x, branch)
                size = kept_bytes(setting, side, x, branch)
            found[side.name] = Found(kind, dim, norm, side.name, size)
            if side.untimed:
                continue
            first = timed(setting, side, x, branch, 1)
        except Exception as error:  # Triton's and a compiler's have no common class
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            note(notes, f"{side.name}, {kind} {dim} {norm} failed: {text}")
            continue
        ready[side.name] = side
        repeats[side.name] = max(1, round(1e3 * SLICE_SECONDS / max(first, 1e-3)))
    order, rounds = random.Random(dim), []
    for _ in range(setting.rounds):
        turns = order.sample(list(ready), len(ready))
        rounds.append(
            {name: timed(setting, ready[name], x, branch, repeats[name]) for name in turns}
        )
    for name, one in found.items():
        if name not in ready:
            continue
        one.ms = statistics.median(r[name] for r in rounds)
        other = AGAINST.get(name)
        if other in ready:
            one.against, one.ratios = other, [r[name] / r[other] for r in rounds]
    say(f"{kind} {dim} {norm}: " + ", ".join(f"{n} {found[n].ms:.2f} ms" for n in ready))
    return list(found.values())


def timed(setting: Setting, side: Side, x: Tensor, branch: Tensor, repeats: int) -> float:
    """Milliseconds of a forward and a backward, of `repeats` in a row."""
    if setting.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            side.step(setting, x, branch)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    # of one thread the time that it ran, which neighbours do not lengthen
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    for _ in range(repeats):
        side.step(setting, x, branch)
    return 1e3 * (clock() - begun) / repeats


class Allocated(TorchDispatchMode):
    """Every storage that an operation returns, but those that were given; weakly."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes of those that somebody still holds."""
        gc.collect()
        return sum(size for weak, size in self.seen.values() if not weak.expired())


def kept_bytes(setting: Setting, side: Side, x: Tensor, branch: Tensor) -> int:
    """Bytes that are alive after a forward: saved for the backward, and the outputs."""
    given = [x, branch, *side.modules.parameters()]
    if side.block is not side.modules:
        return saved_bytes(lambda: side.forward(setting, x, branch), given)
    with Allocated(given) as allocated:
        out = side.forward(setting, x, branch)
    size = allocated.alive()
    del out
    return size


def saved_bytes(forward: Callable[[], tuple[Tensor, ...]], given: Sequence[Tensor]) -> int:
    """The same of a compiled block, whose operations nobody sees: storages that autograd saves, and
    the outputs."""
    known = {t.untyped_storage()._cdata for t in given}
    sizes: dict[int, int] = {}

    def note_size(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(note_size, lambda tensor: tensor):
        out = forward()
    for tensor in out:
        note_size(tensor)
    return sum(sizes.values())
