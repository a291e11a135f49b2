"""act(drop(norm(x))) as one module, for timm's norms with an activation inside.

The norm itself gets a class that goes on after its forward, as timm's BatchNormAct2d goes on after
BatchNorm2d's. A container around it would rename its parameters (`bn1.weight` to `bn1.norm.weight`)
and no published state dict would load any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn


class Activated(nn.Module):
    """The part of the class that `activated` makes: what follows the norm, `drop` and `act`."""

    plain: type[nn.Module]
    drop: Callable[[Tensor], Tensor]
    act: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x as the norm takes it -> the same shape. Further arguments, such as mask, are the
        norm's."""
        return self.act(self.drop(super().forward(x, *args, **kwargs)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by the norm's own class, which can be imported."""
        return _blank, (self.plain,), self.__dict__


def activated(norm: nn.Module, *, drop: nn.Module, act: nn.Module) -> nn.Module:
    """`norm`, in place, with drop and act behind it. Raises ValueError if it has its own."""
    for name in ("drop", "act"):
        if hasattr(norm, name):
            raise ValueError(f"{type(norm).__name__} has an attribute called {name} of its own")
    plain: Any = type(norm)
    norm.__class__ = _class(plain)
    norm.add_module("drop", drop)
    norm.add_module("act", act)
    return norm


@cache
def _class(plain: Any) -> type[Any]:
    return type(
        f"{plain.__name__}Act", (Activated, plain), {"plain": plain, "__doc__": plain.__doc__}
    )


def _blank(plain: Any) -> Any:
    cls: Any = _class(plain)
    return cls.__new__(cls)
