"""Small timm models of many families and the norms that they hold, for the tests of model=timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from suite.data import DataInfo  # noqa: E402
from suite.norms import make_norm  # noqa: E402
from tasks.vision.timm_model import TimmModel, TimmOptions, build_timm  # noqa: E402

torch.set_num_threads(1)
CREATE: Callable[..., nn.Module] = timm.create_model

LAYER, LAYER_2D = "timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNorm2d"
TORCH_LAYER = "torch.nn.modules.normalization.LayerNorm"
BATCH, BATCH_ACT = (
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
)
RMS_2D = "timm.layers.norm.RmsNorm2d"
TINY_VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3}
TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
CONVOLUTIONAL = ("convnext", "resnet", "regnet", "mobilenet", "test_efficientnet")
PRE_NORM = {("attn", LAYER): 2, ("ffn", LAYER): 2}
CONVNEXT_SITES = {"stem": 1, "downsample": 3, "mixer": 4, "final": 1}

# name -> (image size, what makes it small, how many norms are replaced by site and type)
FAMILIES: dict[str, tuple[int, dict[str, Any], dict[tuple[str, str], int]]] = {
    "vit_tiny_patch16_224": (32, TINY_VIT, {**PRE_NORM, ("final", LAYER): 1}),
    "deit_tiny_patch16_224": (32, TINY_VIT, {**PRE_NORM, ("final", LAYER): 1}),
    "deit_tiny_distilled_patch16_224": (32, TINY_VIT, {**PRE_NORM, ("final", LAYER): 1}),
    "beit_base_patch16_224": (32, TINY_VIT, {**PRE_NORM, ("final", LAYER): 1}),
    "eva02_base_patch14_224": (  # with a norm inside the MLP
        28,
        TINY_VIT,
        {("attn", LAYER): 2, ("ffn", LAYER): 4, ("final", LAYER): 1},
    ),
    "convnext_tiny": (
        32,
        TINY_CONVNEXT,
        {
            ("stem", LAYER_2D): 1,
            ("downsample", LAYER_2D): 3,
            ("mixer", LAYER): 4,
            ("final", LAYER_2D): 1,
        },
    ),
    "convnext_atto": (  # conv_mlp=True: channels first everywhere
        32,
        TINY_CONVNEXT,
        {(site, LAYER_2D): count for site, count in CONVNEXT_SITES.items()},
    ),
    "convnext_atto_rms": (
        32,
        TINY_CONVNEXT,
        {(site, RMS_2D): count for site, count in CONVNEXT_SITES.items()},
    ),
    "swin_tiny_patch4_window7_224": (
        56,
        {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8},
        {
            ("embed", TORCH_LAYER): 1,
            ("attn", TORCH_LAYER): 2,
            ("ffn", TORCH_LAYER): 2,
            ("downsample", TORCH_LAYER): 1,
            ("final", TORCH_LAYER): 1,
        },
    ),
    "mixer_s32_224": (
        32,
        {},
        {("attn", TORCH_LAYER): 8, ("ffn", TORCH_LAYER): 8, ("final", TORCH_LAYER): 1},
    ),
    "resnet26d": (
        32,
        {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
        {("stem", BATCH): 3, ("mixer", BATCH): 12, ("downsample", BATCH): 4},
    ),
    "resnetv2_50": (
        32,
        {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)},
        {("mixer", BATCH_ACT): 12, ("final", BATCH_ACT): 1},
    ),
    "test_efficientnet": (
        32,
        {},
        {("stem", BATCH_ACT): 1, ("mixer", BATCH_ACT): 11, ("final", BATCH_ACT): 1},
    ),
    "mobilenetv3_small_050": (32, {}, {("stem", BATCH_ACT): 1, ("mixer", BATCH_ACT): 33}),
    "regnetx_002": (
        32,
        {},
        {("stem", BATCH_ACT): 1, ("mixer", BATCH_ACT): 39, ("downsample", BATCH_ACT): 4},
    ),
    "maxvit_tiny_rw_224": (
        56,
        {"embed_dim": (32, 32), "depths": (1, 1), "stem_width": 8},
        {
            ("stem", BATCH_ACT): 1,
            ("mixer", BATCH_ACT): 6,
            ("attn", LAYER): 4,
            ("ffn", LAYER): 4,
            ("final", LAYER_2D): 1,
        },
    ),
}


def info(size: int, *, chans: int = 3, classes: int = 3) -> DataInfo:
    return DataInfo(
        name="photos",
        license="",
        source="",
        sha256="",
        synthetic=True,
        sizes={},
        classes=classes,
        extra={"image_size": size, "in_chans": chans},
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TimmModel]:
    """build(name, norm="dyt", **options): the family of that name, small, from a fixed seed."""

    def build(name: str, norm: str = "dyt", **options: Any) -> TimmModel:
        size, changes, _ = FAMILIES[name]
        monkeypatch.setattr(timm, "create_model", partial(CREATE, **changes))
        torch.manual_seed(0)
        options = {"timm_name": name, **options}
        return build_timm(TimmOptions(**options), norm=make_norm(norm), data=info(size))

    return build


def timms_own(name: str) -> nn.Module:
    """The same small model as timm makes it."""
    size, changes, _ = FAMILIES[name]
    arguments: dict[str, Any] = {"num_classes": 3, **changes}
    if not name.startswith(CONVOLUTIONAL):
        arguments["img_size"] = size
    if name.startswith("swin"):
        arguments["drop_path_rate"] = 0.0  # the class's default is 0.1
    torch.manual_seed(0)
    return CREATE(name, **arguments)


def batch(name: str, count: int = 4, *, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of the family's size, and labels."""
    size = size or FAMILIES[name][0]
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=numbers), torch.arange(count) % 3
