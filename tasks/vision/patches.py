"""Images as rows of patches and back, and which images fit a model that cuts them up.

The order is that of the published MAE (arXiv 2111.06377): patches run row by row; within a patch
the values run over row, column, channel, so that a linear map of a published file reads and writes
what it was trained on.

Shapes: B images, C channels, H x W pixels, N patches, P values of a patch (patch_size^2 x C).
"""

from __future__ import annotations

import math
from typing import Protocol

from einops import rearrange
from torch import Tensor

from suite.data import DataInfo
from suite.errors import ConfigError

PIXEL_EPS = 1e-6  # of the variance of a patch, published


def patchify(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """image [B, C, H, W] -> [B, N, P]. Raises ValueError where the sides are no multiples."""
    height, width = image_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size must divide the image's sides, got {patch_size} for {height} x {width}"
        )
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches_BNP: Tensor, patch_size: int, chans: int) -> Tensor:
    """[B, N, P] -> the square image [B, C, H, W]. Raises ValueError for what is none."""
    count, values = patches_BNP.shape[-2:]
    side, wanted = math.isqrt(count), patch_size**2 * chans
    if side * side != count:
        raise ValueError(f"patches_BNP must fill a square, got {count} patches")
    if values != wanted:
        raise ValueError(
            f"patches_BNP must have {wanted} values a patch "
            f"({patch_size} x {patch_size} x {chans}), got {values}"
        )
    return rearrange(
        patches_BNP, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch_size, q=patch_size
    )


def level_and_spread(patches_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and root of unbiased variance + 1e-6, of each patch [B, N, 1]: what norm_pix_loss
    takes out of its targets."""
    mean, var = patches_BNP.mean(-1, keepdim=True), patches_BNP.var(-1, keepdim=True)
    return mean, (var + PIXEL_EPS).sqrt()


class PatchOptions(Protocol):
    """Options of a model that cuts images into patches."""

    @property
    def image_size(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def patch_size(self) -> int: ...


def check_images(options: PatchOptions, data: DataInfo) -> None:
    """Raise a ConfigError that says what to set unless the model takes the data's images."""
    size, chans = int(data.extra["image_size"]), int(data.extra["in_chans"])
    if (options.image_size, options.in_chans) == (size, chans):
        return
    patch = options.patch_size
    if size % patch or size == patch:
        patch = max(p for p in (16, 8, 7, 4, 2, 1) if size % p == 0 and (p < size or p == 1))
    wanted = {"image_size": size, "in_chans": chans, "patch_size": patch}
    changes = " ".join(f"model.{k}={v}" for k, v in wanted.items() if getattr(options, k) != v)
    raise ConfigError(
        f"model: takes images of {options.in_chans} x {options.image_size} x {options.image_size}, "
        f"but data={data.name} has {chans} x {size} x {size}. "
        f"Set {changes}, or choose another data set"
    )
