"""What a classifier must know of an image set before it is built: classes, size, channels."""

from __future__ import annotations

from suite.data import DataInfo
from suite.errors import ConfigError


def image_shape(data: DataInfo, *, model: str) -> tuple[int, int, int]:
    """(classes, pixels a side, channels) of `data`. model: who asks, for the message.

    Raises ConfigError for a set without labels or images.
    """
    if data.classes is None or not {"image_size", "in_chans"} <= set(data.extra):
        raise ConfigError(
            f"data={data.name}: has no labelled images, which {model} needs. "
            "Choose another data set"
        )
    return data.classes, int(data.extra["image_size"]), int(data.extra["in_chans"])
