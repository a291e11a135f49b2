"""One image file -> an RGB image of PIL, with every conversion said and tested.

Real trees hold more than RGB JPEGs: ImageNet has grey, CMYK and one PNG that is named .JPEG. For
8-bit images the pixels are those of PIL's convert("RGB"), which torchvision and timm use:

- grey, black and white, palette: the same colours in RGB
- alpha (RGBA, LA, a transparent palette entry): dropped, not blended with a background; the colour
  below a transparent pixel shows
- CMYK and YCCK JPEG: PIL's conversion without a colour profile, Adobe's inversion undone
- animated GIF, PNG or WebP, multi-page TIFF: the first frame
- 16 bits a channel: the high byte. PIL does so for colour; for grey its convert("RGB") clips, and
  nearly every pixel becomes white
- EXIF orientation: not applied, as in torchvision and timm
- 32-bit integers above 65,535 and 32-bit floats: refused, for nothing says which value is white
"""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import shown

# By content, not by name. PIL knows more; some of those run other programs (EPS) or are documents.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# Names that count as images in a folder, in lower case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


# errno of a file of which this much alone is wrong: gone, closed to this user, a link to nothing
OWN_FAULTS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


class ReadError(Exception):
    """A file that the disk or the system does not give: that is no matter of one image."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)} cannot be read ({self.reason})"


class DecodeError(Exception):
    """A file that is no image, or a damaged one, or that is gone from a folder which is there.

    path: of the file; reason: a few words; verb: what cannot be done with it.
    """

    def __init__(self, path: str, reason: str, verb: str = "decoded") -> None:
        super().__init__(path, reason, verb)
        self.path, self.reason, self.verb = path, reason, verb

    def __str__(self) -> str:
        return f"{shown(self.path)} cannot be {self.verb} ({self.reason})"


def open_image(path: str | os.PathLike[str]) -> Any:
    """The image in a file, mode RGB, all of it decoded. Raises DecodeError and ReadError."""
    from PIL import Image, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        # a disk that is gone takes the folder with it, and must not pass for many broken images
        if error.errno in OWN_FAULTS and Path(path).parent.is_dir():
            raise DecodeError(os.fspath(path), reason, "read") from None
        raise ReadError(os.fspath(path), reason) from None
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        reason = f"none of {', '.join(FORMATS)}" if content else "empty file"
    except MemoryError:
        raise
    except Exception as error:  # damaged files make PIL raise SyntaxError, struct.error and more
        reason = str(error) or type(error).__name__
    raise DecodeError(os.fspath(path), " ".join(reason.split()))


def to_rgb(image: Any) -> Any:
    """The decoded image of PIL in mode RGB. Raises ValueError for a mode without a known range."""
    if image.mode == "F":
        raise ValueError("32-bit float pixels: which value is white is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return high_byte(image).convert("RGB")
    image.info.pop("transparency", None)  # PIL would warn; the pixels are the same
    return image.convert("RGB")


def high_byte(image: Any) -> Any:
    """An 8-bit grey image of a grey image of 16 bits."""
    from PIL import Image

    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ValueError("32-bit pixels: which value is white is not known")
    return Image.fromarray((values >> 8).astype(np.uint8))
