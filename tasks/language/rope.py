"""Rotary positions (Su et al., arXiv 2104.09864): attention sees differences of angles.

Channel i of a head's first half and channel i of its second half are one pair, turned by
position * theta^(-2i / D). That is Hugging Face's layout; Meta's own files pair neighbours, and
differ from it by a permutation of the rows of q_proj and k_proj.

The angles are computed where they are used, from nothing but the shape, the device and theta: there
is no buffer, so nothing has to be filled in after a model was built on the meta device, and none is
cast with the model or, as an input of a sharded block, by FSDP's mixed precision. They are in
float32 or wider under any autocast: in bfloat16 positions above 256 are no longer told apart.

Shapes: T positions, D channels of a head, F = D / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(head_dim: int, *, theta: float, like: Tensor) -> Tensor:
    """[F]: radians a position, from 1 down to nearly 1 / theta, in float32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent_F = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    return 1.0 / theta**exponent_F


def rotary(length: int, *, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of every position's angles, in float32 or wider, on the device of like."""
    f_F = frequencies(head_dim, theta=theta, like=like)
    position_T1 = torch.arange(length, device=like.device, dtype=f_F.dtype).unsqueeze(1)
    angle_TF = position_T1 * f_F  # no matmul: autocast would have it in 16 bits
    angle_TD = torch.cat((angle_TF, angle_TF), dim=-1)
    return angle_TD.cos(), angle_TD.sin()


def rotate(x: Tensor, *, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x [..., T, D] turned by its positions' angles, in their dtype; returned in its own."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos_TD + turned * sin_TD).to(x.dtype)
