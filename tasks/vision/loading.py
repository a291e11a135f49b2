"""The loop over class folders that everyone writes: what `suite.bench loading` compares with.

torchvision's ImageFolder, torchvision's random transforms and a DataLoader, nothing of the suite.
It does the operations that the data options ask for, with equal probabilities and other draws, in
the order of the suite's first epoch, so that both read the same files. torchvision has no
RandAugment like timm's, so that policy is the suite's on both sides.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate

from suite.errors import ConfigError
from suite.randomness import generator
from tasks.vision.augment import ASPECT, ERASE_AREA, ERASE_ASPECT, Augment, interpolation
from tasks.vision.folder import ImageFolderOptions, preprocessing
from tasks.vision.layout import find_layout


class Policy:
    """RandAugment as a transform that draws from Python's generator. augment: whose policy."""

    def __init__(self, augment: Augment) -> None:
        self.augment = augment

    def __call__(self, image: Any) -> Any:
        policy = self.augment.policy
        assert policy is not None
        steps = policy.draw(random.Random(random.getrandbits(63)))
        return policy.apply(image, steps, fill=self.augment.fill)


class Mixing:
    """A batch by default_collate, then Mixup or CutMix, as torchvision's documentation does it."""

    def __init__(self, options: ImageFolderOptions, *, classes: int) -> None:
        from torchvision.transforms import v2

        ways: list[Any] = []
        if options.mixup:
            ways.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
        if options.cutmix:
            ways.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
        self.mix = v2.RandomApply([v2.RandomChoice(ways)], p=options.mix_prob)

    def __call__(self, rows: list[Any]) -> Any:
        return self.mix(*default_collate(rows))


def plain_loader(options: Any, *, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """(image [B, 3, S, S], label) batches of one epoch. Raises ConfigError for data of other kinds.

    All of the folder's images: a share of it that data.val=split sets aside is read too.
    """
    if not isinstance(options, ImageFolderOptions):
        raise ConfigError(
            "data: suite.bench loading compares decoding, so it takes data=image_folder or "
            "data=imagenet with data.root=FOLDER"
        )
    from torchvision.datasets import ImageFolder

    folder = find_layout(options.root, name="image_folder").train
    dataset = ImageFolder(str(folder), transform=plain_transform(options))
    mixes = options.mixup > 0 or options.cutmix > 0
    collate = Mixing(options, classes=len(dataset.classes)) if mixes else None
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        sampler=RandomSampler(dataset, generator=generator(seed, "order", 0)),
        num_workers=options.num_workers,
        drop_last=True,
        collate_fn=collate,
    )


def plain_transform(options: ImageFolderOptions) -> Any:
    """The training transform of the options out of torchvision's own."""
    from torchvision.transforms import v2

    made = preprocessing(options)
    size, how = made.image_size, interpolation(made.interpolation)
    steps: list[Any] = []
    if options.crop == "resized":
        scale = (options.crop_scale_min, 1.0)
        steps.append(v2.RandomResizedCrop(size, scale=scale, ratio=ASPECT, interpolation=how))
    else:
        steps += [v2.Resize(size, interpolation=how), v2.CenterCrop(size)]
    if options.crop == "pad":
        steps.append(v2.RandomCrop(size, padding=options.crop_pad))
    if options.flip:
        steps.append(v2.RandomHorizontalFlip())
    if options.randaugment:
        steps.append(
            Policy(Augment(options, image_size=size, mean=made.mean, std=made.std, seed=0))
        )
    if options.color_jitter:
        steps.append(v2.ColorJitter(*[options.color_jitter] * 3))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize(mean=list(made.mean), std=list(made.std)))
    if options.erase:
        steps.append(
            v2.RandomErasing(p=options.erase, scale=ERASE_AREA, ratio=ERASE_ASPECT, value="random")
        )
    return v2.Compose(steps)
