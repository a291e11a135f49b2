"""Point-wise norms whose output is computed again in the backward pass instead of being kept.

y = weight * f(alpha * x + shift) + bias is a function of one element, so y, and all that the
formula saves on the way, can be made again from x, which the backward needs anyway. The linear
layers behind the norm are what keeps y: q, k and v, gate and up.

    with recompute_norms(model):
        loss = model(batch)
    loss.backward()

No model is changed: while the context is open, hooks of saved tensors (torch.autograd.graph.
saved_tensors_hooks) look at everything that autograd saves. What lies in the storage of a norm's
output (the output, its views and reshapes), or was saved by the norm itself, is replaced by a note
of how to make it; the first that is asked for in the backward makes all, with the operations of the
forward, so that gradients have the same bits, and each is freed once its last user has had it.

Autocast casts a float32 y in every linear layer anew, and saves a copy that nobody could recognise.
While the context is open linear layers and convolutions are therefore handed the cast, made from y
just before them: the same cast at the same place, so values and gradients keep their bits. Handing
out y itself in 16 bits would not do: the gradients of q, k and v would be summed in 16 bits, and
what follows in float32 (a pooling) would see rounded values.

Left alone, that is saved as ever: outputs that were changed in place, other norms, attention behind
q and k norms under autocast, what a checkpointed region saves inside, whatever torch.compile has
taken over (its partitioner decides for itself what to keep). Refused in the backward,
by a RuntimeError: an input or a parameter that was changed in place in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from suite.norms.pointwise import PointwiseNorm

CASTING = (nn.Linear, nn.modules.conv._ConvNd)  # their input is cast by autocast
OUTPUT = "output"

# Which part of a norm's call: the output, its cast (dtype, size, stride, offset), or the i-th
# tensor that the norm saved.
Part = str | tuple[Any, ...] | int


def recompute_norms(model: nn.Module) -> Recompute:
    """A context in which the outputs of `model`'s point-wise norms are not kept for the backward.

    It goes around the forward pass; the backward may be inside or after it. It may be entered many
    times, so one for the whole training is enough. Without point-wise norms it does nothing.
    """
    return Recompute(model)


class Recompute:
    """See `recompute_norms`. Everything a call of a norm needs to be repeated lives in the graph:
    nothing stays here when the context is closed."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(_uncompiled(model))
        # exact types: a subclass may draw random numbers, as one with dropout behind it does
        self.norms = [m for m in modules if type(m) is PointwiseNorm]
        self.casting = [m for m in modules if isinstance(m, CASTING)] if self.norms else []
        self.known: dict[int, _Known] = {}
        self.inside: _Call | None = None
        self.handles: list[Any] = []
        self.hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Recompute:
        if self.hooks is not None:
            raise RuntimeError("recompute_norms is already open; close it before it is entered")
        if not self.norms or torch.compiler.is_compiling():
            return self
        for norm in self.norms:
            self.handles.append(norm.register_forward_pre_hook(self._before))
            # first, so that it sees the norm's own output; always, so that no error leaves it open
            self.handles.append(
                norm.register_forward_hook(self._after, prepend=True, always_call=True)
            )
        self.handles += [m.register_forward_pre_hook(self._cast) for m in self.casting]
        self.hooks = saved_tensors_hooks(self._pack, _unpack)
        self.hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hooks, self.hooks = self.hooks, None
        if hooks is not None:
            hooks.__exit__()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.known.clear()
        self.inside = None

    def _before(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """A norm begins: what is saved from here on is its own."""
        if torch.compiler.is_compiling():
            return
        self.inside = None
        x: Any = args[0] if args else None
        if torch.is_grad_enabled() and type(x) in (Tensor, nn.Parameter):
            assert isinstance(norm, PointwiseNorm)
            self.inside = _Call(norm, x, self._pack(x.detach()))

    def _after(self, norm: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        """A norm is done: its output may be recognised from here on."""
        if torch.compiler.is_compiling():
            return
        call, self.inside = self.inside, None
        for key in [key for key, known in self.known.items() if known.storage.expired()]:
            del self.known[key]
        if call is None or type(y) is not Tensor or not y.requires_grad or not _whole(y):
            return
        if y.untyped_storage()._cdata not in call.given:
            call.stride, call.size = y.stride(), y.size()
            self._know(y, call, OUTPUT)

    def _know(self, y: Tensor, call: _Call, part: Part) -> None:
        storage = y.untyped_storage()
        self.known[storage._cdata] = _Known(StorageWeakRef(storage), y, call, part)

    def _cast(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A linear layer begins: autocast's cast of a norm's output, where it can be recognised."""
        if torch.compiler.is_compiling() or not args or type(args[0]) is not Tensor:
            return None
        y, kind = args[0], args[0].device.type
        if y.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return None
        known = self._find(y)
        if known is None or known.part != OUTPUT or not torch.is_grad_enabled():
            return None
        dtype = torch.get_autocast_dtype(kind)
        cast = y.to(dtype)
        if dtype != y.dtype and _whole(cast):
            part = (dtype, y.size(), y.stride(), y.storage_offset())
            self._know(cast, known.call, part)
        return (cast, *args[1:])

    def _find(self, tensor: Tensor) -> _Known | None:
        """What `tensor` is, if it lies in a norm's output that nobody has changed."""
        known = self.known.get(_address(tensor))
        if known is None or known.version != tensor._version or known.dtype != tensor.dtype:
            return None
        return known

    def _pack(self, tensor: Tensor) -> _Kept | _Handle:
        known = self._find(tensor)
        if known is not None:
            return _Handle(known.call, known.part, tensor)
        return _Kept(tensor) if self.inside is None else self.inside.pack(tensor)


class _Known:
    """A storage that can be made again. The weak reference keeps its address from being reused."""

    __slots__ = ("call", "dtype", "part", "storage", "version")

    def __init__(self, storage: StorageWeakRef, y: Tensor, call: _Call, part: Part) -> None:
        self.storage, self.call, self.part = storage, call, part
        self.version, self.dtype = y._version, y.dtype


class _Kept:
    """A tensor that is saved as it is. With hooks autograd checks no version: it is done here.

    Detached: a hook may be given a node's own output, which would hold the node that holds it.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def unpack(self) -> Tensor:
        _check_version(self.tensor, self.version)
        return self.tensor


class _Handle:
    """Stands for a saved tensor: a view of a part of a norm's call."""

    __slots__ = ("call", "layout", "part", "turn")

    def __init__(self, call: _Call, part: Part, tensor: Tensor) -> None:
        self.call, self.part, self.turn = call, part, -1
        self.layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        call.users(part).alive += 1

    def unpack(self) -> Tensor:
        return self.call.value(self).as_strided(*self.layout)

    def __del__(self) -> None:
        self.call.leave(self)


class _Users:
    """Of one part: handles that are alive; how many of them were unpacked in this turn."""

    __slots__ = ("alive", "seen", "turn")

    def __init__(self) -> None:
        self.alive = self.seen = self.turn = 0


class _Call:
    """One call of a norm: what it was given, and what of it has been made again.

    x: packed, as it may be another norm's output. given: storages of x and of the parameters.
    """

    def __init__(self, norm: PointwiseNorm, x: Tensor, packed: _Kept | _Handle) -> None:
        self.norm, self.x, self.x_needs_grad = norm, packed, x.requires_grad
        held = norm._parameters.items()
        self.parameters = {name: (p, p._version) for name, p in held if p is not None}
        self.given = {_address(x), *(_address(p) for p, _ in self.parameters.values())}
        self.stride: tuple[int, ...] = ()
        self.size: tuple[int, ...] = ()
        self.saved: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]] = []
        self.parts: dict[Part, _Users] = {}
        self.made: dict[Part, Tensor] = {}

    def pack(self, tensor: Tensor) -> _Kept | _Handle:
        """What the norm saves while it runs."""
        address = _address(tensor)
        if address in self.given or address == 0:
            return _Kept(tensor)
        self.saved.append(_form(tensor))
        return _Handle(self, len(self.saved) - 1, tensor)

    def users(self, part: Part) -> _Users:
        return self.parts.setdefault(part, _Users())

    def value(self, handle: _Handle) -> Tensor:
        """What `handle` stands for; forgotten here when its last user has had it."""
        if handle.part not in self.made:
            self.make()
        value, users = self.made[handle.part], self.parts[handle.part]
        if handle.turn != users.turn:
            handle.turn = users.turn
            users.seen += 1
        self._settle(handle.part, users)
        return value

    def leave(self, handle: _Handle) -> None:
        """A saved tensor was given up, as autograd does behind every node."""
        users = self.parts[handle.part]
        users.alive -= 1
        users.seen -= handle.turn == users.turn
        self._settle(handle.part, users)

    def _settle(self, part: Part, users: _Users) -> None:
        if users.seen == users.alive:
            self.made.pop(part, None)
            users.turn, users.seen = users.turn + 1, 0

    def make(self) -> None:
        """Repeat the call and keep what somebody still waits for."""
        x = self.x.unpack()
        for parameter, version in self.parameters.values():
            _check_version(parameter, version)
        given = {_address(x), *(_address(p) for p, _ in self.parameters.values())}
        saved: list[Tensor] = []

        def collect(tensor: Tensor) -> None:
            if _address(tensor) not in given and _address(tensor) != 0:
                saved.append(tensor.detach())

        # with gradients, as in the forward: the same operations, and they save the same
        with torch.enable_grad(), saved_tensors_hooks(collect, _refuse):
            y = self._run(x.detach().requires_grad_(self.x_needs_grad)).detach()
        if [_form(tensor) for tensor in saved] != self.saved or y.stride() != self.stride:
            raise RuntimeError(
                "recompute_norms: a norm does other operations in the backward than it did in the "
                "forward; leave recompute off"
            )
        for part, users in self.parts.items():
            if users.alive:
                self.made[part] = saved[part] if isinstance(part, int) else _part(y, part)

    def _run(self, x: Tensor) -> Tensor:
        """The norm with the parameters that it had; without its hooks."""
        then: dict[str, Tensor] = {
            name: parameter for name, (parameter, _) in self.parameters.items()
        }
        if all(getattr(self.norm, name) is tensor for name, tensor in then.items()):
            y: Tensor = self.norm.forward(x)
            return y
        return torch.func.functional_call(self.norm, then, (x,))


def _uncompiled(module: nn.Module) -> Iterator[nn.Module]:
    """Every module that torch.compile has not taken over, with those inside it."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    if compiled or isinstance(module, torch._dynamo.OptimizedModule):
        return
    yield module
    for child in module.children():
        yield from _uncompiled(child)


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tensor.type()} {list(tensor.shape)} is at version {tensor._version}; "
            f"expected version {version} instead"
        )


def _address(tensor: Tensor) -> int:
    """Of the storage; 0 for a tensor that has none (sparse ones)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _whole(y: Tensor) -> bool:
    """Whether y fills its storage."""
    return bool(y.storage_offset() == 0 and y.untyped_storage().nbytes() == y.numel() * y.itemsize)


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.size(), tensor.stride()


def _part(y: Tensor, part: Part) -> Tensor:
    """The output, or a cast of it."""
    if not isinstance(part, tuple):
        return y
    dtype, *layout = part
    return y.as_strided(*layout).to(dtype)


def _unpack(packed: _Kept | _Handle) -> Tensor:
    return packed.unpack()


def _refuse(packed: None) -> Tensor:
    raise AssertionError("the graph of a repeated norm is never walked")
