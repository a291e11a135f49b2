"""RandAugment (Cubuk et al., arXiv 1909.13719) as the published ImageNet recipes run it.

`rand-m9-mstd0.5-inc1` of ConvNeXt, DeiT and DyT is timm's variant, which is not torchvision's: an
image gets n of 15 operations, drawn with replacement; each is applied with probability 0.5; its
strength is drawn from a normal distribution around m, clipped to 0..10; and with `inc1` every
operation gets more severe as the strength grows. Ranges and signs are those of timm's
auto_augment.py (1.0.31); the tests compare every operation with timm's, pixel for pixel.

Images are PIL, mode RGB or L. What is drawn (`draw`) and what it does (`apply`) are apart, so that
both can be tested alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

MAX_LEVEL = 10
GRAMMAR = (
    "rand-m<0 to 10>[-n<operations>][-mstd<0 to 100>][-p<0 to 1>][-inc1], "
    "for example rand-m9-mstd0.5-inc1"
)


@dataclass(frozen=True)
class Fill:
    """How an operation that moves pixels makes new ones.

    color: of the pixels that come from outside, a value a band; resample: PIL's resampling filter.
    """

    color: int | tuple[int, ...]
    resample: int

    def affine(self, image: Any, *matrix: float) -> Any:
        """The image whose pixel (x, y) is the old one's (ax + by + c, dx + ey + f)."""
        from PIL import Image

        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=self.resample, fillcolor=self.color
        )

    def rotate(self, image: Any, degrees: float) -> Any:
        return image.rotate(degrees, resample=self.resample, fillcolor=self.color)


@dataclass(frozen=True)
class Operation:
    """One row of the policy.

    argument: level -> the operation's argument; None: it has none. Levels go from 0 to 10.
    signed: the effect has two directions: levels go from -10 to 10, their sign is drawn.
    run: (image, argument, fill) -> image.
    """

    run: Callable[[Any, Any, Fill], Any]
    argument: Callable[[float], Any] | None = None
    signed: bool = False


@dataclass(frozen=True)
class Step:
    """One operation as it was drawn."""

    operation: str
    argument: Any


def autocontrast(image: Any, _: Any, fill: Fill) -> Any:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def equalize(image: Any, _: Any, fill: Fill) -> Any:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def invert(image: Any, _: Any, fill: Fill) -> Any:
    from PIL import ImageOps

    return ImageOps.invert(image)


def posterize(image: Any, bits: int, fill: Fill) -> Any:
    """Keep the `bits` highest bits of each value; 0 of them leave a black image.

    So did PIL's own posterize when the recipes were published; it now refuses 0 bits, which level
    10 asks for, so timm's operation raises there.
    """
    mask = 0xFF & ~(0xFF >> bits)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def solarize(image: Any, threshold: int, fill: Fill) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, threshold)


def solarize_add(image: Any, amount: int, fill: Fill) -> Any:
    """Make the darker half of the values brighter by `amount`."""
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def enhance(what: str) -> Callable[[Any, float, Fill], Any]:
    """PIL's Color, Contrast, Brightness or Sharpness; a factor of 1 changes nothing."""

    def run(image: Any, factor: float, fill: Fill) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, what)(image).enhance(factor)

    return run


def shear_x(image: Any, factor: float, fill: Fill) -> Any:
    return fill.affine(image, 1, factor, 0, 0, 1, 0)


def shear_y(image: Any, factor: float, fill: Fill) -> Any:
    return fill.affine(image, 1, 0, 0, factor, 1, 0)


def translate_x(image: Any, share: float, fill: Fill) -> Any:
    return fill.affine(image, 1, 0, share * image.size[0], 0, 1, 0)


def translate_y(image: Any, share: float, fill: Fill) -> Any:
    return fill.affine(image, 1, 0, 0, 0, 1, share * image.size[1])


def rotate(image: Any, degrees: float, fill: Fill) -> Any:
    return fill.rotate(image, degrees)


def factor_away(level: float) -> float:
    """Enhancement that grows with the level, from -10 to 10: 0.1 to 1.9, neutral at 0."""
    return max(0.1, 1.0 + level / MAX_LEVEL * 0.9)


def factor_plain(level: float) -> float:
    """Enhancement of the policy without inc1: 0.1 to 1.9, neutral at level 5."""
    return level / MAX_LEVEL * 1.8 + 0.1


ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")

COMMON = {
    "AutoContrast": Operation(autocontrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    "Rotate": Operation(rotate, lambda level: level / MAX_LEVEL * 30.0, signed=True),
    "SolarizeAdd": Operation(solarize_add, lambda level: min(128, int(level / MAX_LEVEL * 110))),
    "ShearX": Operation(shear_x, lambda level: level / MAX_LEVEL * 0.3, signed=True),
    "ShearY": Operation(shear_y, lambda level: level / MAX_LEVEL * 0.3, signed=True),
    "TranslateX": Operation(translate_x, lambda level: level / MAX_LEVEL * 0.45, signed=True),
    "TranslateY": Operation(translate_y, lambda level: level / MAX_LEVEL * 0.45, signed=True),
}
INCREASING = {
    **COMMON,
    "Posterize": Operation(posterize, lambda level: 4 - int(level / MAX_LEVEL * 4)),
    "Solarize": Operation(solarize, lambda level: 256 - min(256, int(level / MAX_LEVEL * 256))),
    **{name: Operation(enhance(name), factor_away, signed=True) for name in ENHANCE},
}
ORIGINAL = {
    **COMMON,
    "Posterize": Operation(posterize, lambda level: int(level / MAX_LEVEL * 4)),
    "Solarize": Operation(solarize, lambda level: min(256, int(level / MAX_LEVEL * 256))),
    **{name: Operation(enhance(name), factor_plain) for name in ENHANCE},
}


@dataclass(frozen=True)
class Policy:
    """What a string like `rand-m9-mstd0.5-inc1` says.

    magnitude, std: of the level, before it is clipped to 0..10; count: operations an image;
    probability: that a drawn operation is applied; increasing: which table of operations.
    """

    magnitude: int
    count: int = 2
    std: float = 0.0
    probability: float = 0.5
    increasing: bool = False

    @property
    def operations(self) -> dict[str, Operation]:
        return INCREASING if self.increasing else ORIGINAL

    def draw(self, rng: Random) -> list[Step]:
        """The operations of one image, in order; as many draws as `rng` gives, in a fixed order."""
        names = list(self.operations)
        chosen = [rng.choice(names) for _ in range(self.count)]
        return [self.draw_step(name, rng) for name in chosen if rng.random() < self.probability]

    def draw_step(self, name: str, rng: Random) -> Step:
        """Operation `name` with an argument for a level around the magnitude."""
        operation = self.operations[name]
        level = rng.gauss(self.magnitude, self.std) if self.std else float(self.magnitude)
        level = max(0.0, min(level, float(MAX_LEVEL)))
        if operation.argument is None:
            return Step(name, None)
        sign = -1.0 if operation.signed and rng.random() < 0.5 else 1.0
        return Step(name, operation.argument(sign * level))

    def apply(self, image: Any, steps: list[Step], *, fill: Fill) -> Any:
        """The image after `steps`."""
        for step in steps:
            image = self.operations[step.operation].run(image, step.argument, fill)
        return image


FIELDS: dict[str, tuple[str, Callable[[str], Any], str, float]] = {
    "m": ("magnitude", int, r"\d+", MAX_LEVEL),
    "n": ("count", int, r"\d+", 100),
    "mstd": ("std", float, r"\d+(\.\d+)?", 100.0),
    "p": ("probability", float, r"\d+(\.\d+)?", 1.0),
    "inc": ("increasing", lambda text: text == "1", r"[01]", 1),
}


def parse(text: str) -> Policy:
    """The policy that `text` names. Raises ValueError that says what is wrong and what is taken."""
    head, *parts = text.split("-")
    if head != "rand":
        raise ValueError(f"must begin with rand-, got {text!r}; write {GRAMMAR}")
    found: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)([\d.]+)", part)
        key, value = match.groups() if match else (part, "")
        if key not in FIELDS:
            raise ValueError(f"has an unknown part {part!r} in {text!r}; write {GRAMMAR}")
        name, kind, pattern, high = FIELDS[key]
        if not re.fullmatch(pattern, value) or float(value) > high:
            raise ValueError(f"has a wrong value {part!r} in {text!r}; write {GRAMMAR}")
        if name in found:
            raise ValueError(f"has {key} twice in {text!r}; write {GRAMMAR}")
        found[name] = kind(value)
    if "magnitude" not in found:
        raise ValueError(f"has no magnitude in {text!r}; write {GRAMMAR}")
    return Policy(**found)
