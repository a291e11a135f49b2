"""The preprocessing that a published checkpoint was evaluated with, as timm writes it down.

Why: the same weights lose a point with another crop or another mean. timm keeps the settings of
every checkpoint (`pretrained_cfg`), and Hugging Face's config.json carries a copy. Nothing is
downloaded here. Taken are input_size and crop_pct, the settings of training; some checkpoints name
a larger size for testing besides, which is data.image_size and data.crop_pct on the command line
without timm_cfg.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from suite.errors import ConfigError, shown
from tasks.vision.augment import Interpolation


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input. mean, std: one number a channel."""

    image_size: int
    crop_pct: float
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing_of(timm_cfg: str) -> Preprocessing:
    """What timm says of a checkpoint: its name, or the path of a Hugging Face config.json.

    Raises ConfigError for an unknown name, a file that is not one, and for what is not supported.
    """
    where = f"data.timm_cfg={shown(timm_cfg)}"
    if timm_cfg.endswith(".json") or "/" in timm_cfg:
        found = from_file(Path(timm_cfg).expanduser(), where)
    else:
        found = from_timm(timm_cfg, where)
    if found.get("crop_mode", "center") != "center":
        raise ConfigError(
            f"{where}: its crop_mode is {found['crop_mode']}; only center is supported"
        )
    interpolation = found.get("interpolation", "bicubic")
    if interpolation not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"{where}: its interpolation is {interpolation}; supported: bilinear, bicubic"
        )
    try:
        channels, height, width = (int(n) for n in found["input_size"])
        made = Preprocessing(
            image_size=height,
            crop_pct=float(found["crop_pct"]),
            interpolation=interpolation,
            mean=tuple(float(v) for v in found["mean"]),
            std=tuple(float(v) for v in found["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: needs input_size, crop_pct, mean and std as timm writes them ({reason})"
        ) from None
    if (channels, width, len(made.mean), len(made.std)) != (3, height, 3, 3):
        raise ConfigError(f"{where}: needs square images of 3 channels, has {found['input_size']}")
    if not (height > 0 and 0 < made.crop_pct <= 1 and min(made.std) > 0):
        raise ConfigError(
            f"{where}: needs a size above 0, a crop_pct above 0, 1 at most, and std above 0"
        )
    return made


def from_timm(name: str, where: str) -> dict[str, Any]:
    """timm's own record of a checkpoint such as resnet50.a1_in1k; the tag may be left out."""
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f'{where} needs timm: pip install "dyt-suite[timm]"; or give the path of a config.json'
        ) from None
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a known model with an unknown tag
        found = None
    if found is None:
        known = timm.list_pretrained() + timm.list_models()
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ConfigError(
            f"{where}: timm {timm.__version__} has no such checkpoint.{hint} "
            "timm.list_pretrained() lists all; a path to a config.json will do too"
        )
    record: dict[str, Any] = found.to_dict()
    return record


def from_file(path: Path, where: str) -> Mapping[str, Any]:
    """The pretrained_cfg section of a config.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise ConfigError(
            f"{where}: cannot be read ({reason}); give the path of a config.json that is on this "
            "machine, or the name of a checkpoint in timm such as resnet50.a1_in1k"
        ) from None
    section = content.get("pretrained_cfg") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(
            f"{where}: has no pretrained_cfg section; expected the config.json of a timm model"
        )
    return section
