"""What happens to an image between its file and the model, in training and in evaluation.

Training follows the recipe of ConvNeXt and DyT, in timm's order: random resized crop, flip,
RandAugment (or colour jitter), standardising, random erasing (Zhong et al., arXiv 1708.04896), then
Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of pairs. The operations are torchvision's
v2.functional; the draws are ours. Why not torchvision's transforms: they draw from torch's global
generator, so an image would depend on its worker and on what came before it. Here every draw is a
function of (seed, epoch, sample id), so resuming, other workers and other batches change nothing.

Shapes: B examples of a batch, C channels, H x W pixels. Images go in as PIL, mode RGB or L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from suite.data import DataOptions
from suite.randomness import derive, generator, uniform
from tasks.vision.randaugment import Fill, Policy, parse

Interpolation = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]

ASPECT = (3 / 4, 4 / 3)  # width to height of a resized crop
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)  # height to width of an erased box
TRIES = 10  # for a box that fits


@dataclass(frozen=True)
class VisionDataOptions(DataOptions):
    """Settings of an image data set; all but `flip` are off unless asked for.

    flip: mirror half of the training images, other ones each epoch.
    crop: none; pad: a border of zeros and a crop back to the size (CIFAR); resized: a crop of
        random size and aspect ratio, resized (ImageNet).
    crop_pad: pixels of the border. crop_scale_min: least share of the area that a crop keeps.
    randaugment: rand-m<magnitude>[-n<operations>][-mstd<std>][-p<probability>][-inc1]
    color_jitter: strength of random brightness, contrast and saturation; without randaugment only.
    erase: probability that a box of an image is replaced by noise.
    mixup, cutmix: parameter of the Beta distribution of the mixing weight; 0: not used.
    mix_prob: share of the pairs that are mixed. mix_switch: share of CutMix where both are used.
    interpolation: how images are resized.
    """

    flip: bool = True
    crop: Literal["none", "pad", "resized"] = "none"
    crop_pad: int = 4
    crop_scale_min: float = 0.08
    randaugment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.crop_pad <= 256:
            raise ValueError(f"crop_pad must be from 1 to 256, got {self.crop_pad}")
        if not 0 < self.crop_scale_min <= 1:
            raise ValueError(
                f"crop_scale_min must be above 0, 1 at most, got {self.crop_scale_min}"
            )
        for name in ("erase", "mix_prob", "mix_switch", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
            if value and not self.drop_last:
                raise ValueError(
                    f"{name} needs drop_last=true: the rows that fill up a last batch have no "
                    "partner to be mixed with"
                )
        if self.randaugment is not None:
            try:
                parse(self.randaugment)
            except ValueError as error:
                raise ValueError(f"randaugment {error}") from None
            if self.color_jitter:
                raise ValueError(
                    f"color_jitter must be 0 with randaugment, got {self.color_jitter}: the "
                    "published recipes name both, and their code then leaves the jitter out"
                )

    @property
    def in_pairs(self) -> bool:
        """Whether examples are mixed, so that each process must get an even number of them."""
        return self.mixup > 0 or self.cutmix > 0


class Augment:
    """The training transform of one data set. mean, std: a number a channel, of pixels in 0..1."""

    def __init__(
        self,
        options: VisionDataOptions,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.options, self.image_size, self.seed = options, image_size, seed
        self.mean, self.std = list(mean), list(std)
        self.policy: Policy | None = parse(options.randaugment) if options.randaugment else None
        resample = {"bilinear": 2, "bicubic": 3}[options.interpolation]  # PIL's own numbers
        color = tuple(min(255, round(255 * m)) for m in mean)
        self.fill = Fill(color if len(color) > 1 else color[0], resample)
        self.mixes = options.mixup > 0 or options.cutmix > 0

    @property
    def trivial(self) -> bool:
        """Nothing but the flip is on: a data set in memory may flip a whole batch at once."""
        o = self.options
        return o.crop == "none" and not (o.randaugment or o.color_jitter or o.erase or self.mixes)

    def one(self, image: Any, *, epoch: int, sample_id: int) -> Tensor:
        """[C, H, W] float32, augmented and standardised; a function of the arguments alone."""
        from torchvision.transforms.v2 import functional as F

        o, rng = self.options, Random(derive(self.seed, "augment", epoch, sample_id))
        image = self.crop(image, rng)
        if o.flip and flips(self.seed, epoch, torch.tensor([sample_id])).item():
            image = F.horizontal_flip(image)
        if self.policy is not None:
            image = self.policy.apply(image, self.policy.draw(rng), fill=self.fill)
        elif o.color_jitter:
            image = jitter(image, strength=o.color_jitter, rng=rng)
        pixels = standardise(image, mean=self.mean, std=self.std)
        if rng.random() < o.erase:
            noise = generator(self.seed, "erase", epoch, sample_id)
            erase(pixels, draw_erasing(self.image_size, self.image_size, rng), noise)
        return pixels

    def crop(self, image: Any, rng: Random) -> Any:
        """The image at `image_size`, cropped as the options say."""
        from torchvision.transforms.v2 import functional as F

        o, size = self.options, self.image_size
        if o.crop == "resized":
            top, left, height, width = draw_crop(image.size, rng, scale_min=o.crop_scale_min)
            return F.resized_crop(
                image, top, left, height, width, [size, size], interpolation(o.interpolation)
            )
        image = fit(image, shortest=size, size=size, how=o.interpolation)
        if o.crop == "pad":
            top, left = rng.randint(0, 2 * o.crop_pad), rng.randint(0, 2 * o.crop_pad)
            image = F.crop(F.pad(image, [o.crop_pad]), top, left, size, size)
        return image

    def mix(
        self,
        image: Tensor,
        label: Tensor,
        *,
        ids: Sequence[int],
        epoch: int,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The batch with rows (0, 1), (2, 3), ... mixed, if Mixup or CutMix is on.

        image: [B, C, H, W], written to. label: [B] int64. ids: of the rows. valid: [B] bool; a row
        that is not valid is no partner. Returns image and label, and with mixing label_b [B] int64
        and lam [B] float32, so that the loss is lam * CE(label) + (1 - lam) * CE(label_b). Label
        smoothing goes into CE: that equals smoothing the mixed target.
        """
        if not self.mixes:
            return {"image": image, "label": label}
        label_b, lam = label.clone(), torch.ones(len(label))
        for i in range(0, len(label) - 1, 2):
            if valid is not None and not bool(valid[i] & valid[i + 1]):
                continue
            rng = Random(derive(self.seed, "mix", epoch, ids[i]))
            lam[i : i + 2] = self.mix_pair(image[i : i + 2], rng)
            label_b[i : i + 2] = label[i : i + 2].flip(0)
        return {"image": image, "label": label, "label_b": label_b, "lam": lam}

    def mix_pair(self, pair: Tensor, rng: Random) -> float:
        """Mix the two images [2, C, H, W] in place; returns the weight that each keeps."""
        o = self.options
        if rng.random() >= o.mix_prob:
            return 1.0
        cut = o.cutmix > 0 and (o.mixup == 0 or rng.random() < o.mix_switch)
        alpha = o.cutmix if cut else o.mixup
        lam = rng.betavariate(alpha, alpha)
        if not cut:
            pair.copy_(lam * pair + (1 - lam) * pair.flip(0))
            return lam
        height, width = pair.shape[-2:]
        box = cut_box(height, width, lam, y=rng.randrange(height), x=rng.randrange(width))
        top, bottom, left, right = box
        pair[:, :, top:bottom, left:right] = pair[:, :, top:bottom, left:right].flip(0)
        return 1 - (bottom - top) * (right - left) / (height * width)


class EvalTransform:
    """PIL image -> [C, H, W] float32, nothing random: timm's evaluation transform.

    The shortest side becomes floor(image_size / crop_pct), then the centre is cut out.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_pct: float,
        interpolation: Interpolation,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.image_size, self.shortest = image_size, math.floor(image_size / crop_pct)
        self.interpolation: Interpolation = interpolation
        self.mean, self.std = list(mean), list(std)

    def __call__(self, image: Any) -> Tensor:
        image = fit(image, shortest=self.shortest, size=self.image_size, how=self.interpolation)
        return standardise(image, mean=self.mean, std=self.std)


def flips(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """[B] bool: which of the samples `ids` are mirrored in `epoch`."""
    return uniform(seed, "flip", epoch, ids=ids)[:, 0] < 0.5


def interpolation(name: Interpolation) -> Any:
    """torchvision's constant of that name."""
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(name)


def fit(image: Any, *, shortest: int, size: int, how: Interpolation) -> Any:
    """Resize the shortest side to `shortest` and cut out the centre, size x size."""
    from torchvision.transforms.v2 import functional as F

    if image.size == (size, size) and shortest == size:
        return image
    return F.center_crop(F.resize(image, [shortest], interpolation=interpolation(how)), [size])


def standardise(image: Any, *, mean: list[float], std: list[float]) -> Tensor:
    """[C, H, W] float32 of a PIL image: pixels in 0..1, less the mean, by the deviation."""
    from torchvision.transforms.v2 import functional as F

    pixels = F.pil_to_tensor(image).float().div_(255)
    return F.normalize(pixels, mean, std, inplace=True)


def jitter(image: Any, *, strength: float, rng: Random) -> Any:
    """Brightness, contrast and saturation by factors around 1, in random order."""
    from torchvision.transforms.v2 import functional as F

    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    rng.shuffle(steps)
    for step in steps:
        image = step(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def draw_crop(size: tuple[int, int], rng: Random, *, scale_min: float) -> Box:
    """(top, left, height, width) of a crop whose area and aspect ratio are random.

    size: (width, height). Where TRIES draws do not fit, the largest centre crop that the aspect
    ratios allow.
    """
    width, height = size
    for _ in range(TRIES):
        area = rng.uniform(scale_min, 1.0) * width * height
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_erasing(height: int, width: int, rng: Random) -> Box | None:
    """(top, left, height, width) of the box to erase; None where TRIES draws do not fit."""
    for _ in range(TRIES):
        area = rng.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(rng.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


def erase(pixels: Tensor, box: Box | None, noise: torch.Generator) -> None:
    """Put normal noise in a box of the standardised pixels [C, H, W], in place."""
    if box is not None:
        top, left, height, width = box
        pixels[:, top : top + height, left : left + width].normal_(generator=noise)


def cut_box(height: int, width: int, lam: float, *, y: int, x: int) -> Box:
    """(top, bottom, left, right) of CutMix's box around (y, x): a share of 1 - lam of the image,
    less what hangs over the edge. Odd sides lose a pixel, as in timm when the recipes ran."""
    h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    return (
        max(0, y - h // 2),
        min(height, y + h // 2),
        max(0, x - w // 2),
        min(width, x + w // 2),
    )
