"""Image sets that are held in memory: MNIST, Fashion-MNIST, CIFAR.

A split is two arrays. Without augmentation beyond the flip a whole batch is made at once; with it,
each image goes through PIL, as an image from a file would. The validation images are taken from the
published training images by their content, so they are the same whatever the seed, the order in
the files and the versions of libraries; the published test images are the test split.

Shapes: N examples of a split, B of a batch, H x W pixels, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suite.data import DataInfo, Splits
from suite.errors import ConfigError
from tasks.vision.augment import Augment, VisionDataOptions, flips

Bytes = npt.NDArray[np.uint8]
Pair = tuple[Bytes, Bytes]  # images [N, H, W] or [N, H, W, C], labels [N]


@dataclass(frozen=True)
class ArrayDataOptions(VisionDataOptions):
    """Settings of a published set of small images.

    root: the folder that holds it. download: fetch it into root where it is missing.
    """

    root: str | None = None
    download: bool = False


@dataclass(frozen=True)
class Published:
    """What is known of a set, whoever reads it.

    mean, std: one number a channel, of the pixels as shares of 255.
    """

    name: str
    classes: tuple[str, ...]
    license: str
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageSplit:
    """One split in memory.

    images: [N, H, W] or [N, H, W, C] uint8, with H = W; labels: [N]; mean, std: one a channel.
    """

    def __init__(
        self,
        images: Bytes,
        labels: npt.NDArray[Any],
        *,
        options: VisionDataOptions,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.images = torch.tensor(images)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        # [C, 1, 1], to be broadcast over [B, C, H, W]
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std)
        )
        self.flip, self.seed = options.flip, seed
        self.augment = Augment(options, image_size=images.shape[1], mean=mean, std=std, seed=seed)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """{"image": [B, C, H, W] float32, standardised, "label": [B] int64}; Augment.mix may add.

        In training, what happens to an image is a function of (seed, epoch, index) alone.
        """
        ids = torch.tensor(indices, dtype=torch.int64)
        label = self.labels[ids]
        if not train:
            return {"image": self.standardised(ids), "label": label}
        if self.augment.trivial:
            image = self.standardised(ids)
            if self.flip:
                mirrored = flips(self.seed, epoch, ids)
                image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
            return {"image": image, "label": label}
        rows = [self.augment.one(self.picture(i), epoch=epoch, sample_id=i) for i in indices]
        return self.augment.mix(torch.stack(rows), label, ids=indices, epoch=epoch, valid=None)

    def standardised(self, ids: Tensor) -> Tensor:
        """[B, C, H, W] float32 of the images `ids`, as they are."""
        pixels = self.images[ids]
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)

    def picture(self, index: int) -> Any:
        """One image as PIL's, mode L or RGB."""
        from PIL import Image

        return Image.fromarray(self.images[index].numpy())


def make_splits(
    parts: dict[str, Pair],
    *,
    about: Published,
    sha256: str,
    options: VisionDataOptions,
    seed: int,
) -> Splits:
    """Splits and DataInfo of (images, labels) by split name: train, val, test."""
    made = {
        split: ImageSplit(
            images, labels, options=options, mean=about.mean, std=about.std, seed=seed
        )
        for split, (images, labels) in parts.items()
    }
    shape = parts["train"][0].shape
    info = DataInfo(
        name=about.name,
        license=about.license,
        source=about.source,
        sha256=sha256,
        synthetic=False,
        sizes={split: len(part) for split, part in made.items()},
        classes=len(about.classes),
        extra={
            "image_size": shape[1],
            "in_chans": shape[3] if len(shape) == 4 else 1,
            "class_names": about.classes,
            "mean": about.mean,
            "std": about.std,
            "interpolation": options.interpolation,
            "crop_pct": 1.0,
        },
    )
    return Splits(train=made["train"], val=made["val"], test=made["test"], info=info)


def hold_out(train: Pair, *, classes: int, per_class: int) -> dict[str, Pair]:
    """`train` as {"train", "val"}: the last `per_class` images of each class in `content_order`
    are val. Both keep the order of the files."""
    images, labels = train
    orders = content_order(images, labels, classes=classes)
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[np.concatenate([order[-per_class:] for order in orders])] = True
    return {"train": (images[~is_val], labels[~is_val]), "val": (images[is_val], labels[is_val])}


def content_order(
    images: Bytes, labels: npt.NDArray[Any], *, classes: int = 10
) -> list[npt.NDArray[np.int64]]:
    """For each class, the indices of its images in the order of SHA-256 of their pixels.

    A fixed shuffle that needs no random numbers, so it is the same with every library version, and
    equal images are neighbours in it. The embedded subset takes its images from the front, a full
    set its validation images from the back.
    """
    keys = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    order = np.argsort(keys, kind="stable")
    return [order[labels[order] == label] for label in range(classes)]


def content_hash(*pairs: Pair) -> str:
    """SHA-256 of pixels and labels, so that it is the same however the files are packed."""
    digest = hashlib.sha256()
    for images, labels in pairs:
        digest.update(np.ascontiguousarray(images).data)
        digest.update(labels.astype(np.uint8).tobytes())
    return digest.hexdigest()


def root_of(options: ArrayDataOptions, *, name: str, expected: str) -> Path:
    """options.root. Raises ConfigError where it is not given, and says what it must hold."""
    if options.root is None:
        raise ConfigError(
            f"data={name} needs data.root=FOLDER, with {expected}; "
            "with data.download=true it is fetched into that folder"
        )
    return Path(options.root).expanduser()


def through_torchvision(read: Callable[[], Any], *, name: str, root: Path, expected: str) -> Any:
    """What `read` returns; torchvision's and the network's errors become one ConfigError line."""
    try:
        return read()
    except Exception as error:  # torchvision passes on what urllib, tarfile and the files raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data={name}: {root} cannot be used ({reason}). Expected there: {expected}; put the "
            "files there, or set data.download=true where there is a network"
        ) from None
