"""How many kernels torch.compile writes for a function, without building them.

Inductor is stopped when a graph's code is written, and the function runs by plain torch, so that
counting takes seconds where building C++ takes minutes. A kernel is a function that the written
code launches. On a CPU it may hold several loops over memory, one after another, which Inductor
counts too: a reduction, which needs a second loop, shows there.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch

KERNEL = re.compile(r"^(\w+) = async_compile\.(?:cpp_pybinding|triton)\(", re.MULTILINE)


class _WrittenError(Exception):
    """Inductor has written its code; nobody builds it."""


def uncached() -> AbstractContextManager[Any]:
    """While it lasts Inductor writes what it may have written before."""
    from torch._inductor import config

    stack = ExitStack()
    stack.enter_context(config.patch(fx_graph_cache=False))
    stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
    return stack


def launched(code: str) -> int:
    """How many kernels the written code launches. Two that are alike are one function in Triton,
    launched twice."""
    calls = (re.findall(rf"^\s*{name}(?:\.run)?\(", code, re.M) for name in KERNEL.findall(code))
    return sum(len(found) for found in calls)


def unbuilt(forward: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """`forward` cut into a forward and a backward as torch.compile does, computed by plain torch.

    counts: on its first call and backward "forward", "backward" (kernels) and "loops" are added.
    It is to be called within `uncached`.
    """
    from functorch.compile import make_boxed_func
    from torch._inductor import metrics
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    def inner(graph: Any, example: Any, **how: Any) -> Any:
        plain = copy.deepcopy(graph)
        metrics.reset()
        texts = []

        def stop(lowering: Any) -> Any:
            code, _ = lowering.codegen()
            texts.append(getattr(code, "value", code))
            raise _WrittenError

        try:
            with patch.object(GraphLowering, "compile_to_module", stop):
                compile_fx_inner(graph, example, **how)
        except Exception:
            if not texts:  # else it is ours, which Inductor has wrapped
                raise
        counts["backward" if how.get("is_backward") else "forward"] += launched(texts[0])
        counts["loops"] += metrics.generated_kernel_count
        return make_boxed_func(plain.forward)

    def backend(graph: Any, example: Any) -> Any:
        return compile_fx(graph, example, inner_compile=inner)

    return torch.compile(forward, dynamic=False, backend=backend)


def count_kernels(forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Counter[str]:
    """The kernels of `forward`, which returns tensors, and of its backward."""
    counts: Counter[str] = Counter(forward=0, backward=0, loops=0)
    torch._dynamo.reset()
    with uncached():
        out = unbuilt(forward, counts)(*inputs)
        torch.autograd.backward(list(out), [t.detach() for t in out])
    torch._dynamo.reset()
    return counts
