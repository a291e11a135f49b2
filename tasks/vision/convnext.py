"""ConvNeXt (Liu et al., arXiv 2201.03545) with the norm as an argument.

A patch stem, then stages of blocks between downsamplings: a ResNet that borrows the Transformer's
order of things. It is the second model of the DyT paper's first table (arXiv 2503.10622), and the
one in which a norm stands in both layouts: channels first in the stem and before a downsampling,
channels last inside the blocks. Parameter names are those of timm's `convnext_*`, so that published
weights load unchanged.

Shapes: B batch, H and W positions, C channels of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.layers import DropPath, Mlp, drop_path_schedule
from suite.norms import NormFactory
from suite.registry import Choice, ModelOptions
from tasks.vision.shape import image_shape

EPS = 1e-6  # what ConvNeXt was published with; a norm option overrides it
INIT_STD = 0.02


@dataclass(frozen=True)
class ConvNeXtOptions(ModelOptions):
    """Settings of a ConvNeXt. The defaults are ConvNeXt-B, without drop path.

    in_chans: channels of the image.
    dim: channels of the first stage; each stage has twice those of the one before.
    depth1 ... depth4: blocks of each stage; 0 in the third or fourth ends the model before it.
    patch_size: side of the stem's patches; kernel_size: side of the depthwise convolutions.
    mlp_ratio: hidden width of a block's MLP over its channels.
    layer_scale: first value of each block's output scale; null: no such scale.
    head_init_scale: factor on the classifier's first weights.
    drop_path: rate of the last block; it rises linearly from 0 at the first.
    init: "timm" is truncated normal 0.02 and zero biases; "torch" is PyTorch's.
    """

    in_chans: int = 3
    dim: int = 128
    depth1: int = 3
    depth2: int = 3
    depth3: int = 27
    depth4: int = 3
    patch_size: int = 4
    kernel_size: int = 7
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1e-6
    head_init_scale: float = 1.0
    drop_path: float = 0.0
    init: Literal["timm", "torch"] = "timm"

    def __post_init__(self) -> None:
        for name in ("in_chans", "dim", "depth1", "depth2", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("depth3", "depth4"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.depth4 and not self.depth3:
            raise ValueError(f"depth4 must be 0 when depth3 is 0, got {self.depth4}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number, got {self.kernel_size}")
        if not 1 <= self.mlp_ratio * self.dim < math.inf:
            raise ValueError(
                "mlp_ratio must be finite and give the MLP a width of at least 1, "
                f"got {self.mlp_ratio}"
            )
        for name in ("layer_scale", "head_init_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        if self.init not in ("timm", "torch"):
            raise ValueError(f"init must be one of timm, torch, got {self.init!r}")

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage that there is."""
        return tuple(d for d in (self.depth1, self.depth2, self.depth3, self.depth4) if d)

    @property
    def reduction(self) -> int:
        """Pixels a side that one position of the last stage stands for."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


class NormThenConv(nn.Sequential):
    """A channels-first norm and a convolution, in either order; the norm is given the mask."""

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self:
            x_BCHW = layer(x_BCHW) if isinstance(layer, nn.Conv2d) else layer(x_BCHW, mask)
        return x_BCHW


class Block(nn.Module):
    """x + gamma * mlp(norm(depthwise(x)))."""

    def __init__(
        self,
        dim: int,
        *,
        norm: NormFactory,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = norm(dim, site="mixer", eps=EPS)
        self.mlp = Mlp(dim, hidden_dim=int(mlp_ratio * dim))
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        y_BHWC = self.conv_dw(x_BCHW).permute(0, 2, 3, 1)
        y_BHWC = self.mlp(self.norm(y_BHWC, mask))
        if self.gamma is not None:
            y_BHWC = self.gamma * y_BHWC
        return x_BCHW + self.drop_path(y_BHWC.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """A downsampling (not in the first stage), then blocks."""

    def __init__(self, downsample: NormThenConv | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.downsample is not None:
            x_BCHW = self.downsample(x_BCHW, mask)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, mask)
        return x_BCHW


class Head(nn.Module):
    """Mean over the positions, norm, linear."""

    def __init__(self, dim: int, *, norm: NormFactory, classes: int) -> None:
        super().__init__()
        self.norm = norm(dim, site="final", eps=EPS)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fc(self.norm(x_BCHW.mean(dim=(2, 3)), mask))


class ConvNeXt(nn.Module):
    """A ConvNeXt classifier. depths: blocks of each stage; the rest are `ConvNeXtOptions`' fields.

    They are more than ten because they are the published architecture's own knobs.
    """

    def __init__(
        self,
        *,
        norm: NormFactory,
        classes: int,
        in_chans: int = 3,
        dim: int = 128,
        depths: tuple[int, ...] = (3, 3, 27, 3),
        patch_size: int = 4,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        head_init_scale: float = 1.0,
        drop_path: float = 0.0,
        init: Literal["timm", "torch"] = "timm",
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.stem = NormThenConv(
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size),
            norm(dim, site="stem", channels_first=True, eps=EPS),
        )
        rates = iter(drop_path_schedule(drop_path, depth=sum(depths)))
        stages = []
        for i, depth in enumerate(depths):
            width = dim * 2**i
            downsample = None
            if i > 0:
                downsample = NormThenConv(
                    norm(width // 2, site="downsample", channels_first=True, eps=EPS),
                    nn.Conv2d(width // 2, width, 2, stride=2),
                )
            blocks = [
                Block(
                    width,
                    norm=norm,
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dim * 2 ** (len(depths) - 1), norm=norm, classes=classes)
        self._init_weights(init, head_scale=head_init_scale)

    @torch.no_grad()
    def _init_weights(self, init: Literal["timm", "torch"], *, head_scale: float) -> None:
        if init == "timm":
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.trunc_normal_(module.weight, std=INIT_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        self.head.fc.weight.mul_(head_scale)
        self.head.fc.bias.mul_(head_scale)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """image [B, in_chans, height, width] -> logits [B, classes].

        mask: bool [B], True = a real example; norms over the batch leave the others out.
        """
        x_BCHW = self.stem(image, mask)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW, mask)
        return self.head(x_BCHW, mask)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter, for layer-wise learning rates: stem 0, then block by block.

        A downsampling has the depth of the block after it; the head is the last, as in timm.
        """
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        if parts[0] == "head":
            return 1 + sum(self.depths)
        before = sum(self.depths[: int(parts[1])])
        return 1 + before + (int(parts[3]) if parts[2] == "blocks" else 0)


def build_convnext(options: ConvNeXtOptions, *, norm: NormFactory, data: DataInfo) -> ConvNeXt:
    """The ConvNeXt of `options` for the images and classes of `data`.

    Raises ConfigError if the channels differ from the data's, or the images are too small, with
    what to set.
    """
    check_images(options, data)
    assert data.classes is not None
    return ConvNeXt(
        norm=norm,
        classes=data.classes,
        in_chans=options.in_chans,
        dim=options.dim,
        depths=options.depths,
        patch_size=options.patch_size,
        kernel_size=options.kernel_size,
        mlp_ratio=options.mlp_ratio,
        layer_scale=options.layer_scale,
        head_init_scale=options.head_init_scale,
        drop_path=options.drop_path,
        init=options.init,
    )


def check_images(options: ConvNeXtOptions, data: DataInfo) -> None:
    """Raise a ConfigError that says what to set unless the model takes the data's images."""
    _, size, chans = image_shape(data, model="a ConvNeXt classifier")
    changes = []
    if options.in_chans != chans:
        changes.append(f"model.in_chans={chans}")
    if options.reduction > size:
        patch = max(1, size // 2 ** (len(options.depths) - 1))
        changes.append(f"model.patch_size={patch}")
        if patch * 2 ** (len(options.depths) - 1) > size:
            changes.append("model.depth4=0")
    if changes:
        raise ConfigError(
            f"model: takes images of {options.in_chans} channels and at least {options.reduction} "
            f"pixels a side, but data={data.name} has {chans} x {size} x {size}. "
            f"Set {' '.join(changes)}, or choose another data set"
        )


FMNIST = ConvNeXtOptions(
    in_chans=1,
    dim=48,
    depth1=2,
    depth2=2,
    depth3=0,
    depth4=0,
    init="torch",
)

MODELS = {
    "convnext_fmnist": Choice(FMNIST, build_convnext, "0.4 M parameters, 28 x 28 grey images"),
    "convnext_tiny": Choice(
        ConvNeXtOptions(dim=96, depth3=9), build_convnext, "ConvNeXt-T, 29 M parameters"
    ),
    "convnext_small": Choice(
        ConvNeXtOptions(dim=96), build_convnext, "ConvNeXt-S, 50 M parameters"
    ),
    "convnext_base": Choice(ConvNeXtOptions(), build_convnext, "ConvNeXt-B, 89 M parameters"),
    "convnext_large": Choice(
        ConvNeXtOptions(dim=192), build_convnext, "ConvNeXt-L, 198 M parameters"
    ),
}
