"""Files inside the package are the ones that were shipped, or are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

from suite.errors import ConfigError


def check_shipped(file: Path, sha256: str, *, name: str) -> None:
    """Raise ConfigError unless `file`, of `data=name`, is there and has this SHA-256."""
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"data={name}: {file} cannot be read ({error.strerror}). Install dyt-suite again"
        ) from None
    if found != sha256:
        raise ConfigError(
            f"data={name}: {file} is not the file that was shipped (its sha256 is {found[:12]}..., "
            f"expected {sha256[:12]}...). Install dyt-suite again"
        )
