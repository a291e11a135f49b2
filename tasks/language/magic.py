"""What a file is that is no text, by its first bytes.

A picture that is read as text trains a model without a word.
"""

from __future__ import annotations

import re

MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive (or a .docx, .epub, .npz or PyTorch file, which are such)",
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "a Parquet table",
    b"\x93NUMPY": "a NumPy array",
    b"RIFF": "a sound or an image (RIFF)",
    b"OggS": "a sound (Ogg)",
    b"fLaC": "a sound (FLAC)",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "an SQLite database",
    b"\xff\xfe": "UTF-16 text (iconv -f UTF-16 -t UTF-8 converts it)",
    b"\xfe\xff": "UTF-16 text (iconv -f UTF-16 -t UTF-8 converts it)",
}  # fmt: skip
PICKLE = re.compile(rb"\x80[\x02-\x05]")


def kind_of(head: bytes) -> str | None:
    """What a file that begins with `head` is; None: it may be text."""
    for magic, kind in MAGIC.items():
        # letters may begin a text too: they need a NUL to be believed
        if head.startswith(magic) and (b"\0" in head or not magic.isalnum()):
            return kind
    return "a pickle" if PICKLE.match(head) else None
