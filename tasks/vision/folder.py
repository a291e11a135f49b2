"""Images in class folders: `image_folder` for any tree, `imagenet` for ImageNet-1K.

What the splits are (Layout says which folders there are):

- train, val and test folders: the three of them
- train and val: `val=folder` (the default) takes the val folder for validation and for the test, as
  published ImageNet figures do, so that the test is not unseen; `val=split` takes `val_fraction`
  of train for validation, and the val folder is the test, looked at once
- train and test: `val=split` takes the validation from train
- one folder: `val_fraction` and `test_fraction` of it
- val alone: `val=only`, to evaluate published weights

A share is chosen by a hash of each file's path below the class folders' root, so it is the same on
every machine and new files move no old ones. An image that cannot be decoded ends the run
(`on_error=fail`) or becomes a row that counts for nothing (`on_error=skip`), so that every process
keeps its number of batches.

Shapes: B examples of a batch, S x S pixels.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suite.cache import cache_folder
from suite.data import SKIP_LIMIT, DataInfo, Splits, check_skip_limit
from suite.errors import ConfigError, DataError, shown
from tasks.vision.augment import Augment, EvalTransform, VisionDataOptions
from tasks.vision.decode import DecodeError, ReadError, open_image
from tasks.vision.index import Index, load_index
from tasks.vision.layout import (
    Layout,
    check_classes,
    check_same_classes,
    find_layout,
    listed,
    subfolders,
    val_layout,
)
from tasks.vision.pretrained import Preprocessing, preprocessing_of

IMAGE_SIZE, CROP_PCT = 224, 0.875
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SYNSETS_FILE = Path(__file__).parent / "assets" / "imagenet_synsets.txt"
MOST_WARNINGS = 20  # of a loader's worker
IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageFolderOptions(VisionDataOptions):
    """Settings of class folders.

    root: the folder. image_size: side of what the model sees; None: 224. crop_pct: in evaluation,
    the share of the resized image's shortest side that is kept; None: 0.875.
    mean, std: three numbers, of pixels as shares of 255; None: ImageNet's.
    val: where validation comes from if there is a train folder: the val folder, or a share of
    train; only: there is no train folder, and weights can be evaluated, not trained.
    val_fraction, test_fraction: the shares, where a folder is divided.
    on_error: what a file does that cannot be decoded: end the run, or count for nothing.
    skip_limit: the largest share of a split that may count for nothing.
    cache: folder where indices are kept; None: the user's cache folder; "none": nowhere.
    timm_cfg: take mean, std, crop_pct, interpolation and image_size from the checkpoint of this
    name in timm, or from a Hugging Face config.json.
    """

    crop: Literal["none", "pad", "resized"] = "resized"
    root: str | None = None
    image_size: int | None = None
    crop_pct: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    val: Literal["folder", "split", "only"] = "folder"
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    on_error: Literal["fail", "skip"] = "fail"
    skip_limit: float = SKIP_LIMIT
    cache: str | None = None
    timm_cfg: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0, 1 at most, got {self.crop_pct}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, got {getattr(self, name)}")
        check_skip_limit(self.skip_limit)
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction must be below 1 - test_fraction, {1 - self.test_fraction:g}, to "
                f"leave something for training, got {self.val_fraction}"
            )
        for name, lowest in (("mean", 0.0), ("std", 1e-6)):
            value = getattr(self, name)
            if value is not None and not (len(value) == 3 and all(lowest <= v <= 1 for v in value)):
                raise ValueError(f"{name} must be three numbers from {lowest:g} to 1, got {value}")


class FolderSplit:
    """One split: an index, or those of its places that belong to the split.

    skips: whether rows may turn out to be unreadable (on_error=skip); skip_limit: how many.
    by_class: the samples stand in the order of their classes.
    """

    def __init__(
        self,
        index: Index,
        *,
        name: str,
        options: ImageFolderOptions,
        made: Preprocessing,
        seed: int,
        places: Places | None = None,
    ) -> None:
        self.index, self.name, self.places = index, name, places
        self.by_class = True
        self.labels = torch.from_numpy(index.labels.astype(np.int64))
        self.size = made.image_size
        self.skips, self.skip_limit = options.on_error == "skip", options.skip_limit
        self.augment = Augment(
            options, image_size=made.image_size, mean=made.mean, std=made.std, seed=seed
        )
        self.plain = EvalTransform(
            image_size=made.image_size,
            crop_pct=made.crop_pct,
            interpolation=options.interpolation,
            mean=made.mean,
            std=made.std,
        )
        self.named: set[str] = set()  # files that this process has warned of

    def __len__(self) -> int:
        return len(self.index) if self.places is None else len(self.places)

    def place(self, i: int) -> int:
        """Where sample i stands in the index."""
        return i if self.places is None else int(self.places[i])

    def path_of(self, index: int) -> str:
        """The file of a sample."""
        return self.index.path(self.place(index))

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """{"image": [B, 3, S, S] float32, standardised, "label": [B] int64}; Augment.mix may add.

        With on_error=skip also "valid" [B] bool. What happens to an image in training is a function
        of (seed, epoch, index) alone. Raises DataError with on_error=fail.
        """
        image = torch.zeros(len(indices), 3, self.size, self.size)
        label = self.labels[[self.place(i) for i in indices]]
        valid = torch.ones(len(indices), dtype=torch.bool)
        for row, i in enumerate(indices):
            pixels = self.pixels(i, epoch=epoch, train=train)
            if pixels is None:
                valid[row] = False
            else:
                image[row] = pixels
        batch = {"image": image, "label": label}
        if train:
            batch = self.augment.mix(image, label, ids=indices, epoch=epoch, valid=valid)
        return {**batch, "valid": valid} if self.skips else batch

    def pixels(self, i: int, *, epoch: int, train: bool) -> Tensor | None:
        """Sample i as the model sees it, [3, S, S]; None where it is to be skipped."""
        try:
            picture = open_image(self.path_of(i))
        except ReadError as error:  # a disk that is gone must not pass for a million broken images
            raise DataError(f"data={self.name}: {error}; nothing of this kind is skipped") from None
        except DecodeError as error:
            if not self.skips:
                raise DataError(
                    f"data={self.name}: {error}; repair or remove it, or set data.on_error=skip"
                ) from None
            self.warn(error)
            return None
        if train:
            return self.augment.one(picture, epoch=epoch, sample_id=i)
        return self.plain(picture)

    def warn(self, error: DecodeError) -> None:
        """Name a file that is skipped, once in this process, and not without end."""
        known = len(self.named)
        if error.path in self.named or known > MOST_WARNINGS:
            return
        self.named.add(error.path)
        text = f"{error}; skipped" if known < MOST_WARNINGS else "further files are not named"
        print(f"warning: data={self.name}: {text}", file=sys.stderr, flush=True)


def layout_of(options: ImageFolderOptions, *, name: str) -> Layout:
    """The folders that the options name."""
    find = val_layout if options.val == "only" else find_layout
    return find(options.root, name=name)


def build_image_folder(options: ImageFolderOptions, *, seed: int) -> Splits:
    """The splits of any tree of class folders. Raises ConfigError for what is not one."""
    layout = layout_of(options, name="image_folder")
    return build(layout, options, name="image_folder", seed=seed)


def build_imagenet(options: ImageFolderOptions, *, seed: int) -> Splits:
    """ImageNet-1K (Russakovsky et al., arXiv 1409.0575): 1,000 synset folders in train and val.

    Raises ConfigError for another set of class folders: published weights need this order.
    """
    layout = layout_of(options, name="imagenet")
    if layout.whole or layout.val is None:
        raise ConfigError(
            f"data=imagenet: {shown(str(layout.train))} must hold train and val, each with the "
            "1,000 synset folders; another set of images is data=image_folder"
        )
    wanted, found = synsets(), subfolders(layout.train, name="imagenet")
    if tuple(found) != wanted:
        missing, more = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        parts = [
            f"{listed(names)} {word}"
            for names, word in ((missing, "missing"), (more, "no synset of it"))
            if names
        ]
        raise ConfigError(
            f"data=imagenet: {shown(str(layout.train))} must hold the 1,000 synset folders of "
            f"ImageNet-1K: {'; '.join(parts)}. Another set of images is data=image_folder"
        )
    return build(layout, options, name="imagenet", seed=seed)


def build(layout: Layout, options: ImageFolderOptions, *, name: str, seed: int) -> Splits:
    """The splits of a layout."""
    made = preprocessing(options)
    options = replace(options, interpolation=made.interpolation)
    check_choice(layout, options, name=name)
    cache = cache_folder(options.cache, kind="index")
    indices = {}
    for split in ("train", "val", "test"):
        if (folder := getattr(layout, split)) is not None:
            indices[split] = load_index(folder, name=name, cache=cache)
            check_classes(indices[split], name=name)
            check_same_classes(indices["train"], indices[split], name=name)
    parts, notes = divide(indices, layout, options, name=name)
    if options.timm_cfg is not None:
        notes.append(
            f"preprocessing of {shown(options.timm_cfg)}: {made.image_size} pixels, crop_pct "
            f"{made.crop_pct:g}, {made.interpolation}, mean {made.mean}, std {made.std}"
        )
    splits = {
        split: FolderSplit(index, name=name, options=options, made=made, seed=seed, places=places)
        for split, (index, places) in parts.items()
    }
    sizes = {split: len(part) for split, part in splits.items()}
    info = describe(name, indices, sizes, made, (*layout.notes, *notes))
    return Splits(splits["train"], splits["val"], splits["test"], info)


def check_choice(layout: Layout, options: ImageFolderOptions, *, name: str) -> None:
    """Raise ConfigError where `val` does not fit the folders that there are."""
    root = shown(str(layout.train.parent))
    if layout.val is not None and layout.test is not None and options.val == "split":
        raise ConfigError(
            f"data.val=split: {root} has train, val and test folders, which are the three splits; "
            "leave data.val out"
        )
    if not layout.whole and layout.val is None and options.val == "folder":
        raise ConfigError(
            f"data={name}: {root} has train and test but no val; with data.val=split, "
            "data.val_fraction of train is the validation"
        )


def divide(
    indices: dict[str, Index], layout: Layout, options: ImageFolderOptions, *, name: str
) -> tuple[dict[str, tuple[Index, Places | None]], list[str]]:
    """Which index, and which places of it, each split has, with notes for the user."""
    train, val, test = indices["train"], indices.get("val"), indices.get("test")
    parts: dict[str, tuple[Index, Places | None]]
    if options.val == "only":
        parts = {"train": (train, np.empty(0, np.int64)), "val": (train, None)}
        parts["test"] = parts["val"]
        return parts, [f"validation and test are {shown(train.root)}; there is nothing to train on"]
    if val is not None and (test is not None or options.val == "folder"):
        parts = {
            "train": (train, None),
            "val": (val, None),
            "test": (val if test is None else test, None),
        }
        same = f"the test is {shown(val.root)}, the validation too, as in published figures"
        return parts, [same] if test is None else []
    shares = [options.val_fraction, options.test_fraction if layout.whole else 0.0]
    chosen = dict(zip(("train", "val", "test"), by_hash(train, shares), strict=True))
    kept = np.bincount(train.labels[chosen["train"]], minlength=len(train.classes))
    if not kept.all() or not len(chosen["val"]) or (layout.whole and not len(chosen["test"])):
        raise ConfigError(
            f"data={name}: {shown(train.root)} has too few images ({len(train):,}) to be divided: "
            "a split or a class of train would be empty; add images, or change data.val_fraction"
            + (" and data.test_fraction" if layout.whole else "")
        )
    parts = {split: (train, places) for split, places in chosen.items()}
    words = f"{options.val_fraction:g} of {shown(train.root)} is the validation"
    other = val if test is None else test
    if other is None:
        return parts, [f"{words} and {options.test_fraction:g} the test, by a hash of the paths"]
    parts["test"] = (other, None)
    return parts, [f"{words}, by a hash of the paths; the test is {shown(other.root)}"]


def by_hash(index: Index, shares: Sequence[float]) -> list[Places]:
    """The places of what is left and of each share, chosen by a hash of every file's path.

    Why not a shuffle: it depends on the number of files, and one more would move all others.
    """
    digests = b"".join(hashlib.sha256(index.relative(i)).digest()[:8] for i in range(len(index)))
    draws = np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64
    # share 1 below the first bound, share 2 below the second, the rest above
    bounds = np.cumsum(shares)
    which = np.searchsorted(bounds, draws, side="right")
    parts = [np.flatnonzero(which == part) for part in range(len(shares) + 1)]
    return [parts[-1], *parts[:-1]]


def preprocessing(options: ImageFolderOptions) -> Preprocessing:
    """What the options say, or timm of the checkpoint in timm_cfg.

    Raises ConfigError where both speak and differ.
    """
    own = Preprocessing(
        image_size=options.image_size or IMAGE_SIZE,
        crop_pct=options.crop_pct or CROP_PCT,
        interpolation=options.interpolation,
        mean=tuple(options.mean or IMAGENET_MEAN),
        std=tuple(options.std or IMAGENET_STD),
    )
    if options.timm_cfg is None:
        return own
    made = preprocessing_of(options.timm_cfg)
    given = {name for name in ("image_size", "crop_pct", "mean", "std") if getattr(options, name)}
    if options.interpolation != type(options).interpolation:
        given.add("interpolation")
    for name in sorted(given):
        said, theirs = getattr(own, name), getattr(made, name)
        if said != theirs:
            raise ConfigError(
                f"data.{name}={said}: data.timm_cfg={shown(options.timm_cfg)} says {theirs}; "
                f"leave one of the two out, or set data.{name}=null where a file has it"
            )
    return made


def describe(
    name: str,
    indices: dict[str, Index],
    sizes: dict[str, int],
    made: Preprocessing,
    notes: Sequence[str],
) -> DataInfo:
    """What result.json and the models are told."""
    train = indices["train"]
    published = name == "imagenet"
    notes = list(notes)
    for split, wanted in IMAGENET_SIZES.items() if published else ():
        index = indices[split]
        if len(index) != wanted and sizes["train"] + (split == "val"):
            notes.append(
                f"{shown(index.root)} has {len(index):,} images, the published set {wanted:,}"
            )
    together = "".join(f"{split} {index.sha256}\n" for split, index in indices.items())
    return DataInfo(
        name=name,
        license="ImageNet's terms of access: non-commercial research" if published else "unknown",
        source="https://www.image-net.org" if published else train.root,
        sha256=hashlib.sha256(together.encode()).hexdigest(),
        synthetic=False,
        sizes=sizes,
        classes=len(train.classes),
        extra={
            "image_size": made.image_size,
            "in_chans": 3,
            "class_names": train.classes,
            "mean": made.mean,
            "std": made.std,
            "interpolation": made.interpolation,
            "crop_pct": made.crop_pct,
            "notes": tuple(notes),
        },
    )


def synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1K in the order of its labels, which is sorted."""
    return tuple(SYNSETS_FILE.read_text(encoding="ascii").split())
