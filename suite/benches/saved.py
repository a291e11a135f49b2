"""How a measurement is kept: benchmarks/<device>/<name>.json, .md and pictures.

A figure without the machine, the driver and the versions that it was measured with cannot be
compared with another, so every file says them, and the folder is named after the device. The date
is the day alone: the hour says nothing about a figure. A measurement that is repeated on the same
device replaces the older one; each file is written whole under another name and then renamed, so
that a reader sees the old one or the new one and never half of it.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from suite.errors import ConfigError, shown
from suite.metrics import hardware, write_json

FOLDER = "benchmarks"
PACKAGES = ("dyt-suite", "torch", "triton", "lightning", "timm", "transformers")
PEERS = ("liger-kernel", "quack-kernels", "apex")  # said only where they are installed

Draw = Callable[[Path], None]


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return str(hardware()["cpu"])
    return device.type


def device_slug(device: torch.device) -> str:
    """The device as a folder's name: "nvidia-h100-80gb-hbm3"; a CPU with the number of threads,
    on which its times depend: "cpu-intel-xeon-processor-1-thread"."""
    name = device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"cpu {name} {threads} thread{'s' * (threads != 1)}"
    name = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def header(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, as plain values for JSON; None for what the machine has not."""
    found = {name: _version(name) for name in PACKAGES}
    found |= {name: text for name in PEERS if (text := _version(name))}
    return {
        "device": device_name(device),
        "driver": _driver(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": found,
    }


def header_lines(header: Mapping[str, Any]) -> list[str]:
    """The same as a Markdown list."""
    shown_versions = [f"{name} {text}" for name, text in header["versions"].items() if text]
    device = f"{header['device']}, {header['threads']} thread{'s' * (header['threads'] != 1)}"
    if header["cuda"]:
        device = (
            f"{header['device']}, driver {header['driver'] or 'unknown'}, CUDA {header['cuda']}"
        )
    software = [f"Python {header['python']}", *shown_versions]
    return [
        f"- device: {device}",
        f"- software: {', '.join(software)}, {header['system']}",
        f"- measured: {header['date']}",
    ]


def check_folder(device: torch.device) -> None:
    """Raise ConfigError where `keep` could not write: better before measuring than after it."""
    folder = Path(FOLDER) / device_slug(device)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(folder, "not a folder" if not there.is_dir() else "no permission")


def _unwritable(folder: Path, why: str | None) -> ConfigError:
    return ConfigError(
        f"--save: {shown(folder)} cannot be written ({why}); "
        "run it in a folder that can, or leave --save out"
    )


def keep(
    name: str,
    *,
    device: torch.device,
    result: Mapping[str, Any],
    markdown: str,
    command: str,
    pictures: Mapping[str, Draw] | None = None,
) -> Path:
    """Write <name>.json, <name>.md and a PNG a picture below benchmarks/ in the current folder.

    result: what was measured; the header is added to it unless it has one. markdown: follows the
    command and the header. pictures: file name without .png -> what draws it to a path; linked at
    the end of the page. Returns the folder. Raises ConfigError where it cannot be written.
    """
    folder = Path(FOLDER) / device_slug(device)
    pictures = pictures or {}
    head = result.get("header") or header(device)
    links = [f"![{picture}]({picture}.png)" for picture in pictures]
    page = "\n".join(["```sh", command, "```", "", *header_lines(head), "", markdown.strip()])
    page = "\n\n".join([page, *links]) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture, draw in pictures.items():
            _whole(folder / f"{picture}.png", draw)
        write_json(folder / f"{name}.json", {"command": command, "header": head, **result})
        _whole(folder / f"{name}.md", lambda path: _write(path, page))
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    return folder


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _whole(path: Path, write: Draw) -> None:
    """`write` makes a draft with the same suffix, which then takes the name of `path`."""
    draft = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    """Version of NVIDIA's driver, as its own tool says it; torch only knows the API's."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None
