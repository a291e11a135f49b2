"""What is kept between starts so that the next is quick: arrays in the user's cache folder.

Plain data alone (NumPy arrays without pickle, and JSON), written at once or not at all. Nothing
depends on it: a file that is missing, damaged or cannot be written costs time and a note.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from suite.safety import check_archive


def cache_folder(option: str | None, *, kind: str) -> Path | None:
    """Where things of a kind are kept: in `option`, else in the user's cache folder; None for the
    word "none".
    """
    if option == "none":
        return None
    if option is not None:
        return Path(option).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "dyt-suite" / kind
    except RuntimeError:  # no home
        return None


def say_once(text: str) -> None:
    """A line on stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def keep(file: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """Write `file`, an .npz; the reason why it could not be written, or None."""
    packed = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays}
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
            temporary = Path(out.name)
            np.savez(out, **packed)  # type: ignore[arg-type]
        temporary.replace(file)  # at once: another process sees the old file or the whole new one
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return error.strerror or str(error)
    return None


def recall(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `keep` wrote: (meta, arrays). Raises FileNotFoundError, and of a damaged file whatever
    its bytes make of zipfile, NumPy and json.
    """
    if file.exists():
        check_archive(file)  # it may be of a folder that others write to
    with np.load(file, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return json.loads(arrays.pop("meta").tobytes()), arrays
