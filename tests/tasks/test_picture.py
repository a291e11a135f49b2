"""The picture of reconstructions: its columns, its pixels, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from suite.errors import ConfigError
from tasks.vision.fashion_mnist import MINI_FILE, MINI_PIXELS, read_mini
from tasks.vision.patches import patchify
from tasks.vision.picture import GAP, STRIP, save_reconstructions

pytestmark = pytest.mark.vision

GREY = 128


def clothes(count=2):
    """Shipped photographs as the model gets them, their bytes, and which patches are hidden."""
    pixels = torch.from_numpy(read_mini(MINI_FILE)["test_images"][:count])
    mean, std = MINI_PIXELS[:1], MINI_PIXELS[1:]
    image = (pixels[:, None].float() / 255 - mean[0]) / std[0]
    order = torch.rand(count, 49, generator=torch.Generator().manual_seed(0)).argsort(1)
    return pixels.numpy(), {
        "image_BCHW": image,
        "masked_BN": order < 36,
        "patch_size": 4,
        "mean": mean,
        "std": std,
    }


def cell(page, row, column, side):
    """The pixels of one image of the page."""
    top, left = STRIP + row * (side + GAP), column * (side + GAP)
    return page[top : top + side, left : left + side]


def test_the_columns_are_image_masked_drawn_and_drawn_with_the_visible_patches(tmp_path):
    pixels, given = clothes()
    black = torch.full((2, 49, 16), -given["mean"][0] / given["std"][0])
    save_reconstructions(tmp_path / "a.png", predicted_BNP=black, norm_pix=False, **given)
    page = np.asarray(Image.open(tmp_path / "a.png"))
    assert page.shape == (STRIP + 2 * 112 + GAP + STRIP, 4 * 112 + 3 * GAP)
    hidden = given["masked_BN"].reshape(2, 7, 7).numpy().repeat(16, 1).repeat(16, 2)
    for row in range(2):
        image, masked, drawn, pasted = (cell(page, row, column, 112) for column in range(4))
        assert np.array_equal(image, pixels[row].repeat(4, 0).repeat(4, 1))
        assert np.array_equal(masked, np.where(hidden[row], GREY, image))
        assert not drawn.any()
        assert np.array_equal(pasted, np.where(hidden[row], 0, image))
    for column in range(3):
        left = (column + 1) * (112 + GAP) - GAP
        assert (page[STRIP:-STRIP, left : left + GAP] == 255).all()
    assert (page[:STRIP] < 128).any()
    assert (page[-STRIP:] < 128).any()  # why visible patches are drawn badly


def test_perfectly_predicted_normalised_patches_give_the_image_back(tmp_path):
    _, given = clothes()
    true = patchify(given["image_BCHW"], 4)
    target = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
    save_reconstructions(tmp_path / "a.png", predicted_BNP=target, norm_pix=True, **given)
    page = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    for row in range(2):
        assert np.abs(cell(page, row, 2, 112) - cell(page, row, 0, 112)).max() <= 1
    assert page.shape[0] == STRIP + 2 * 112 + GAP + 2 * STRIP
    below = page[-2 * STRIP :]
    assert (below[:STRIP] < 128).any()
    assert (below[STRIP:] < 128).any()  # the line on what was given
    ink = (below < 128).any(0).nonzero()[0]
    assert 0 < int(ink.min()) < int(ink.max()) < page.shape[1] - 1  # whole lines fit


def test_colour_images_of_full_size_keep_their_pixels_and_channels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 128, 128), generator=generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    image = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    save_reconstructions(
        tmp_path / "a.png",
        image_BCHW=image,
        masked_BN=torch.zeros(1, 64, dtype=torch.bool),
        predicted_BNP=patchify(image, 16),
        patch_size=16,
        mean=mean.tolist(),
        std=std.tolist(),
        norm_pix=False,
    )
    page = np.asarray(Image.open(tmp_path / "a.png"))
    for column in range(4):
        assert np.array_equal(cell(page, 0, column, 128), pixels[0].permute(1, 2, 0).numpy())


def test_a_prediction_that_is_not_a_number_is_drawn_black(tmp_path):
    _, given = clothes()
    broken = torch.full((2, 49, 16), float("nan"))
    save_reconstructions(tmp_path / "a.png", predicted_BNP=broken, norm_pix=True, **given)
    assert not cell(np.asarray(Image.open(tmp_path / "a.png")), 0, 2, 112).any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_BCHW": torch.zeros(2, 2, 28, 28)}, "image_BCHW must be one image or more"),
        ({"image_BCHW": torch.zeros(2, 1, 28, 24)}, "image_BCHW must be square"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean and std must have 1 numbers"),
        ({"patch_size": 5}, "patch_size must divide"),
        ({"masked_BN": torch.zeros(2, 48, dtype=torch.bool)}, r"masked_BN must be \[2, 49\]"),
        ({"predicted_BNP": torch.zeros(2, 49, 15)}, r"predicted_BNP must be \[2, 49, 16\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, change, text):
    _, given = clothes()
    whole = {**given, "predicted_BNP": torch.zeros(2, 49, 16), **change}
    with pytest.raises(ValueError, match=f"^{text}"):
        save_reconstructions(tmp_path / "a.png", norm_pix=False, **whole)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    _, given = clothes()
    path = tmp_path / "no" / "a.png"
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        save_reconstructions(path, predicted_BNP=torch.zeros(2, 49, 16), norm_pix=False, **given)
    assert "\n" not in str(caught.value)
