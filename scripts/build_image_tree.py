"""Build a folder that is shaped like ImageNet, from generated images.

    python scripts/build_image_tree.py OUT --images 20000 --classes 100 --broken 0.01 --seed 0

For benchmarks of decoding and tests of faults only: nothing can be learnt from an accuracy on it.
It makes OUT/train/<class>/*.JPEG and OUT/val/<class>/*.JPEG (a twentieth of the images, one of each
class or more). An image is a mosaic of enlarged photographs from the embedded Fashion-MNIST subset,
of one kind of clothes a class, tinted and grained, so that it has the size (about 500 x 375, 50 to
110 KB at quality 90) and costs the decoding time of a photograph of ImageNet. With --broken that
share of the files cannot be decoded; OUT/broken.txt lists them. Equal arguments and versions of
Pillow give equal files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PHOTOS = Path(__file__).parents[1] / "tasks" / "vision" / "assets" / "fashion_mnist_mini.npz"
KINDS = 10  # of clothes
SIZES = ((500, 375), (375, 500), (500, 333), (500, 400), (480, 360))  # width, height
TILE = 125
QUALITY = 90
GRAIN = 16.0  # standard deviation of the noise, chosen for the size of the files
CHUNK = 64  # images of one piece of work
FAULTS = ("cut short", "empty", "text", "without a header")


@dataclass(frozen=True)
class Plan:
    """One image to write. fault: what is wrong with the file; None: nothing."""

    path: Path
    label: int
    key: tuple[int, ...]
    fault: str | None


@lru_cache(maxsize=1)
def photos() -> tuple[Bytes, list[Any], npt.NDArray[np.float32]]:
    """The photographs [N, 28, 28], the indices of each kind, and a field of noise to cut from."""
    with np.load(PHOTOS, allow_pickle=False) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    kinds = [np.flatnonzero(labels == kind) for kind in range(KINDS)]
    noise = np.random.default_rng(0).normal(0, GRAIN, (1024, 1024, 3)).astype(np.float32)
    return images, kinds, noise


def draw(label: int, rng: np.random.Generator) -> Any:
    """An image of class `label` as PIL's."""
    from PIL import Image

    images, kinds, noise = photos()
    width, height = SIZES[rng.integers(len(SIZES))]
    across, down = -(-width // TILE), -(-height // TILE)
    chosen = images[rng.choice(kinds[label % KINDS], (down, across))]
    mosaic = chosen.swapaxes(1, 2).reshape(down * 28, across * 28)
    grey = Image.fromarray(mosaic).resize((across * TILE, down * TILE), Image.Resampling.BICUBIC)
    tint = np.random.default_rng(label).uniform(0.5, 1.0, 3) * rng.uniform(0.8, 1.0, 3)
    floor = rng.uniform(10, 60, 3)
    shade = np.asarray(grey, dtype=np.float32)[:height, :width, None] * tint.astype(np.float32)
    top, left = rng.integers(1024 - height), rng.integers(1024 - width)
    pixels = shade * 0.8 + floor.astype(np.float32)
    pixels += noise[top : top + height, left : left + width]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(plan: Plan) -> int:
    """Write one file; returns its bytes."""
    if plan.fault == "empty":
        plan.path.write_bytes(b"")
    elif plan.fault == "text":
        plan.path.write_text("<html><body>404 Not Found</body></html>\n", encoding="utf-8")
    else:
        draw(plan.label, np.random.default_rng(plan.key)).save(plan.path, "JPEG", quality=QUALITY)
    if plan.fault == "cut short":
        content = plan.path.read_bytes()
        plan.path.write_bytes(content[: len(content) // 2])
    elif plan.fault == "without a header":
        plan.path.write_bytes(plan.path.read_bytes()[512:])
    return plan.path.stat().st_size


def write_all(plans: list[Plan]) -> int:
    return sum(map(write, plans))


def plan_tree(root: Path, *, images: int, classes: int, broken: float, seed: int) -> list[Plan]:
    """The files of the tree, classes in turn, and which of them are broken and how."""
    val = max(classes, images // 20)
    rng = np.random.default_rng((seed, 0))
    faulty = set(rng.choice(images, round(images * broken), replace=False).tolist())
    plans = []
    for i in range(images):
        split, place = ("val", i) if i < val else ("train", i - val)
        label = place % classes
        name = f"n{label:08d}"
        path = root / split / name / f"{name}_{place // classes}.JPEG"
        fault = FAULTS[i % len(FAULTS)] if i in faulty else None
        plans.append(Plan(path, label, (seed, 1, i), fault))
    return plans


def build(plans: list[Plan], *, workers: int) -> Iterator[tuple[int, int]]:
    """Write the files; yields the files written so far and the bytes of the last chunk."""
    for folder in {plan.path.parent for plan in plans}:
        folder.mkdir(parents=True)
    chunks = [plans[i : i + CHUNK] for i in range(0, len(plans), CHUNK)]
    files = 0
    with ProcessPoolExecutor(workers) as pool:
        for chunk, size in zip(chunks, pool.map(write_all, chunks), strict=True):
            files += len(chunk)
            yield files, size


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=lines[0])
    parser.add_argument("out", type=Path, help="a folder that is empty or does not exist")
    parser.add_argument("--images", type=int, default=20_000, help="of both splits together")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--broken", type=float, default=0.0, help="share of files, from 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.classes < 1 or options.workers < 1 or options.seed < 0:
        parser.error("--classes and --workers must be at least 1, --seed 0 or more")
    if options.images < 2 * options.classes:
        parser.error("--images must be at least twice --classes: one of each class in each split")
    if not 0 <= options.broken <= 1:
        parser.error(f"--broken must be from 0 to 1, got {options.broken}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is not an empty folder; name a new one")
    return options


def main() -> None:
    o = arguments()
    plans = plan_tree(o.out, images=o.images, classes=o.classes, broken=o.broken, seed=o.seed)
    total = 0
    for files, size in build(plans, workers=o.workers):
        total += size
        print(f"\r{files:,} of {len(plans):,} files", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    faults = [f"{p.path.relative_to(o.out).as_posix()}\t{p.fault}\n" for p in plans if p.fault]
    if faults:
        (o.out / "broken.txt").write_text("".join(faults), encoding="utf-8")
    print(
        f"{o.out}: {len(plans):,} files in {o.classes} classes, {len(faults)} of them broken, "
        f"{total / len(plans) / 1024:.0f} KB each on average"
    )


if __name__ == "__main__":
    main()
