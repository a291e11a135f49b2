"""A PNG of what a masked autoencoder saw and drew, in the columns of MAE (arXiv 2111.06377).

The loss says how far off the pixels are on average, and not whether shapes came back. Each row of
the picture is an image: as it is, with the masked patches grey, as the decoder drew all of it, and
with the visible patches put back. The loss is on masked patches alone, so what the decoder draws
where the image was visible has never been trained and usually looks worse.

Shapes: B images, C channels, H x W pixels, N patches, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from suite.errors import ConfigError
from tasks.vision.patches import level_and_spread, patchify, unpatchify

SMALLEST = 112  # pixels that an image's longer side has in the picture, at least
GAP = 4  # pixels of the lines between images
GREY, LINE, PAPER, INK = 0.5, 1.0, 255, 0  # shares of full brightness; bytes
STRIP = 16  # pixels of a line of text
UNASKED = "reconstruction: noise where a patch was visible, for only hidden ones count"
GIVEN = "norm_pix_loss: each drawn patch is given its true mean and contrast"


def save_reconstructions(
    path: Path | str,
    *,
    image_BCHW: Tensor,
    masked_BN: Tensor,
    predicted_BNP: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> None:
    """Write the PNG: original, masked, reconstruction, reconstruction with the visible patches.

    image_BCHW: as the model gets it, normalised by mean and std (one a channel), 1 or 3 channels,
        square. masked_BN: True where a patch was hidden. predicted_BNP: the decoder's output.
    norm_pix: it predicts patches with mean 0 and variance 1, as with norm_pix_loss. They are then
        brought back with the mean and standard deviation of the true patch, which the model did not
        know: the brightness and the contrast of each drawn patch are given, only its pattern is
        predicted. A second line below the images says so.

    Images below 112 pixels are enlarged by a whole factor, each pixel to a square. Raises
    ValueError for shapes that do not fit each other, ConfigError where path cannot be written.
    """
    from PIL import Image  # at need: no run but one that draws wants it

    check(image_BCHW, masked_BN, predicted_BNP, patch_size=patch_size, mean=mean, std=std)
    cells = columns(
        image_BCHW.detach().float().cpu(),
        masked_BN.detach().bool().cpu(),
        predicted_BNP.detach().float().cpu(),
        patch_size=patch_size,
        mean=mean,
        std=std,
        norm_pix=norm_pix,
    )
    hidden = float(masked_BN.float().mean())
    names = ["image", f"masked ({hidden:.0%})", "reconstruction", "hidden drawn in"]
    grid = tiled(torch.stack(cells, dim=1))
    below = [UNASKED, GIVEN] if norm_pix else [UNASKED]
    strips = [written(names, width=grid.shape[1]), grid]
    strips += [written([line], width=grid.shape[1]) for line in below]
    chans = grid.shape[2]
    page = np.concatenate([np.broadcast_to(x, (*x.shape[:2], chans)) for x in strips])
    picture = Image.fromarray(page[..., 0] if chans == 1 else page)
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error})") from None


def columns(
    image_BCHW: Tensor,
    masked_BN: Tensor,
    predicted_BNP: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> list[Tensor]:
    """The four columns, [B, C, H, W] each, in shares of full brightness from 0 to 1."""
    true_BNP = patchify(image_BCHW, patch_size)
    if norm_pix:
        mean_BN1, spread_BN1 = level_and_spread(true_BNP)
        predicted_BNP = predicted_BNP * spread_BN1 + mean_BN1

    chans = image_BCHW.shape[1]
    hidden_BN1 = masked_BN.unsqueeze(-1)
    pasted_BNP = torch.where(hidden_BN1, predicted_BNP, true_BNP)
    cover_BCHW = unpatchify(hidden_BN1.expand_as(true_BNP), patch_size, chans)
    mean_C11, std_C11 = (torch.tensor(list(x)).reshape(-1, 1, 1) for x in (mean, std))

    def bright(normalised_BCHW: Tensor) -> Tensor:
        return (normalised_BCHW * std_C11 + mean_C11).nan_to_num(0.0).clamp(0, 1)

    original = bright(image_BCHW)
    masked = torch.where(cover_BCHW, torch.tensor(GREY), original)
    drawn, pasted = (
        bright(unpatchify(patches, patch_size, chans)) for patches in (predicted_BNP, pasted_BNP)
    )
    return [original, masked, drawn, pasted]


def tiled(cells: Tensor) -> np.ndarray:
    """cells [B, columns, C, H, W] -> bytes [height, width, C], enlarged, lines between images."""
    factor = max(1, -(-SMALLEST // max(cells.shape[-2:])))
    big = cells.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    lined = torch.nn.functional.pad(big, (0, GAP, 0, GAP), value=LINE)
    rows, across, chans, height, width = lined.shape
    page = lined.permute(0, 3, 1, 4, 2).reshape(rows * height, across * width, chans)
    return (page[:-GAP, :-GAP] * 255).round().to(torch.uint8).numpy()


def written(names: Sequence[str], *, width: int) -> np.ndarray:
    """Each name in the middle of its share of the width, bytes [STRIP, width, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    strip = Image.new("L", (width, STRIP), PAPER)
    pen = ImageDraw.Draw(strip)
    cell = (width + GAP) / len(names)
    for i, name in enumerate(names):
        left, top, right, bottom = pen.textbbox((0, 0), name, font=font)
        x = i * cell + (cell - GAP - (right - left)) / 2 - left
        y = (STRIP - (bottom - top)) / 2 - top
        pen.text((round(x), round(y)), name, fill=INK, font=font)
    return np.asarray(strip)[..., None]


def check(
    image_BCHW: Tensor,
    masked_BN: Tensor,
    predicted_BNP: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Raises ValueError for arguments that do not fit each other."""
    if image_BCHW.ndim != 4 or len(image_BCHW) < 1 or image_BCHW.shape[1] not in (1, 3):
        raise ValueError(
            f"image_BCHW must be one image or more of 1 or 3 channels, got {list(image_BCHW.shape)}"
        )
    chans = image_BCHW.shape[1]
    if image_BCHW.shape[2] != image_BCHW.shape[3]:
        raise ValueError(f"image_BCHW must be square, got {list(image_BCHW.shape[2:])}")
    if len(mean) != chans or len(std) != chans:
        raise ValueError(
            f"mean and std must have {chans} numbers, one a channel, got {len(mean)} and {len(std)}"
        )
    wanted = patchify(image_BCHW, patch_size).shape
    if masked_BN.shape != wanted[:2]:
        raise ValueError(f"masked_BN must be {list(wanted[:2])}, got {list(masked_BN.shape)}")
    if predicted_BNP.shape != wanted:
        raise ValueError(f"predicted_BNP must be {list(wanted)}, got {list(predicted_BNP.shape)}")
