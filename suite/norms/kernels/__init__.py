"""The seam for fused kernels: which implementation a point-wise norm runs with.

Every norm is plain torch, correct on every device and fused by torch.compile. A fused kernel, where
there is one, is added here as one more answer of `choose_backend`; the layer asks once, when it is
built.
"""

from __future__ import annotations

from typing import Literal

import torch


def choose_backend(requested: str, device: torch.device) -> Literal["eager", "compile"]:
    """What `norm.backend` means on `device`.

    "eager" and "compile" are taken as they are; "auto" is the fastest that works there without
    being asked for, which is plain torch (inside a compiled model it is fused with its neighbours
    all the same).
    Raises ValueError for any other name.
    """
    if requested not in ("auto", "eager", "compile"):
        raise ValueError(f"backend must be one of auto, eager, compile, got {requested!r}")
    del device  # the answer is the same on every device so far
    return "compile" if requested == "compile" else "eager"
