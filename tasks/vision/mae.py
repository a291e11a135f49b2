"""Pre-training by masked autoencoding (He et al., arXiv 2111.06377), and what it gave.

loss = mean over the hidden patches of the mean squared error of their pixels, over all processes
and accumulation steps. With norm_pix_loss each patch is first brought to mean 0 and variance 1,
as published. What is hidden follows from (seed, epoch, image) in training; in evaluation it is the
same for every run. The loss says little of what was learnt, so after the test the encoder's
features are probed (tasks/vision/probe.py), and beside it stand raw pixels and the same network
before its first step. Labels are read for the probes alone.

Shapes: B images, N patches, P values of a patch, F features of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from suite.data import SPLITS, AddressedDataset, Split, SuiteDataModule
from suite.errors import ConfigError
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.randomness import sample_seeds, uniform_grid
from suite.ranks import gather_rows
from suite.registry import TaskSpec
from suite.sampling import address
from suite.train import say
from tasks.vision.data import DATA
from tasks.vision.mae_model import MODELS, MaskedAutoencoder
from tasks.vision.patches import level_and_spread, patchify
from tasks.vision.picture import save_reconstructions
from tasks.vision.probe import knn_accuracy, linear_accuracy

PIXELS_AT_MOST = 1 << 30  # bytes of raw training pixels that are held for their probe
MANY = 100_000  # images of which a probe takes so long that it is announced
PROBES = ("none", "knn", "linear", "both")
PICTURE = "reconstructions.png"
UNTRAINED = "suite_untrained"  # key of a checkpoint


@dataclass(frozen=True)
class MaeTaskOptions:
    """What is asked for, and what is measured after the test.

    mask_ratio: share of the patches that is hidden. norm_pix_loss: predict each patch less its own
        mean, over its own deviation, in place of its pixels.
    probe: accuracies of the encoder's features, left as they are: of the nearest neighbours, of a
        linear classifier, or of both; every image of the data is read for them. The linear one's
        penalty is chosen in validation, which with data.val=folder may be the test's own images.
    knn: how many neighbours vote.
    untrained: probe the network before its first step too, to compare with.
    pictures: test images in reconstructions.png; 0 writes none.
    """

    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    probe: Literal["none", "knn", "linear", "both"] = "both"
    knn: int = 20
    untrained: bool = True
    pictures: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be above 0 and below 1, got {self.mask_ratio}")
        if self.probe not in PROBES:
            raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {self.probe!r}")
        if self.knn < 1:
            raise ValueError(f"knn must be at least 1, got {self.knn}")
        if self.pictures < 0:
            raise ValueError(f"pictures must not be negative, got {self.pictures}")


def patch_loss(predicted_BNP: Tensor, image: Tensor, *, patch_size: int, norm_pix: bool) -> Tensor:
    """Mean squared error of each patch [B, N], in at least float32.

    norm_pix: against the patch less its mean, over the root of its unbiased variance + 1e-6.
    """
    wide = torch.promote_types(predicted_BNP.dtype, torch.float32)
    target_BNP = patchify(image, patch_size).to(wide)
    if norm_pix:
        mean_BN1, spread_BN1 = level_and_spread(target_BNP)
        target_BNP = (target_BNP - mean_BN1) / spread_BN1
    return (predicted_BNP.to(wide) - target_BNP).square().mean(-1)


@dataclass(frozen=True)
class Rows:
    """Features [N, F] and labels [N] of a split's readable images."""

    features: Tensor
    label: Tensor


class Pretrain(SuiteModule):
    """Batch: image [B, C, H, W], valid [B], sample_id [B], epoch [B]; a label is not looked at."""

    model: MaskedAutoencoder

    def __init__(self, model: MaskedAutoencoder, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.untrained: dict[str, float] = {}
        ratio, patches = self.options.mask_ratio, model.patches
        if not 0 < model.visible(ratio) < patches:
            raise ConfigError(
                f"task.mask_ratio={ratio}: of {patches} patches {model.visible(ratio)} would stay "
                "visible; at least one has to be, and one hidden: take another mask_ratio or a "
                "smaller model.patch_size"
            )
        if self.options.norm_pix_loss and model.decoder_pred.out_features < 2:
            raise ConfigError(
                "task.norm_pix_loss=true: a patch of one value has no variance; take "
                "model.patch_size=2 or more, or task.norm_pix_loss=false"
            )

    def step(self, batch: Batch, split: Split) -> StepOutput:
        valid = batch["valid"].bool()
        image = batch["image"].where(valid[:, None, None, None], 0.0)
        real = valid if self.padded and self.training else None
        noise_BN = self.noise(batch["sample_id"], batch["epoch"], split)
        predicted_BNP, masked_BN = self.model(
            image, noise_BN, mask_ratio=self.options.mask_ratio, mask=real
        )
        loss_BN = patch_loss(
            predicted_BNP,
            image,
            patch_size=self.model.patch_size,
            norm_pix=self.options.norm_pix_loss,
        )
        asked_BN = masked_BN & valid.unsqueeze(1)
        # not by a product: a loss that is no number where nothing is asked must not count
        return StepOutput(loss_BN.where(asked_BN, 0.0).sum(), asked_BN.sum(), units=valid.sum())

    def noise(self, sample_id: Tensor, epoch: Tensor, split: Split) -> Tensor:
        """[B, N]: the patches with the smallest numbers stay visible."""
        train = split == "train"
        seed, stream = (self.seed, "mask") if train else (0, f"mask_{split}")
        seeds_B = sample_seeds(seed, stream, ids=sample_id, epoch=epoch)
        return uniform_grid(seeds_B, self.model.patches)

    # -- what it gave ---------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.global_step or not self.options.untrained or not self._probes():
            return
        if self._started_from():
            say("note: no probe of the untrained network: this run starts from trained weights")
            return
        self.untrained = self._probed()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[UNTRAINED] = dict(self.untrained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.untrained = dict(checkpoint.get(UNTRAINED, {}))

    def after_evaluation(self, split: Split, values: dict[str, float]) -> None:
        if split != "test":
            return
        self._draw()
        if not self._probes():
            if self.options.probe != "none":
                say("note: no probe: trainer.limit_test_batches tests a part of the images")
            return
        if lacking := self._lacking():
            say(f"note: no probe: data={self.info.name} has no {lacking}")
            return
        found = self._probed()
        before = {f"{name}_untrained": value for name, value in self.untrained.items()}
        found |= self._probed_pixels() | before
        values.update({f"test/{name}": value for name, value in found.items()})
        if is_main_process():
            say_probes(found)

    def _probes(self) -> bool:
        """Whether to probe: not where only a part of the test split, or nothing, is tested."""
        limit = self._data.limits.get("test")
        whole = limit is None or (isinstance(limit, float) and limit == 1)
        return self.options.probe != "none" and whole

    def _lacking(self) -> str:
        """What the data would have to have for a probe; empty if it has all."""
        if self.info.classes is None:
            return "labels"
        return "" if len(self._data.splits.train) else "training images to compare with"

    def _started_from(self) -> Any:
        """The weights that the run was told to start from."""
        return ((self.identity.get("config") or {}).get("model") or {}).get("init_from")

    @property
    def _data(self) -> SuiteDataModule:
        data: SuiteDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _probed(self) -> dict[str, float]:
        """Accuracies of the encoder as it is; on other processes than the main one empty."""
        if self._lacking():
            return {}
        assert self.info.classes is not None
        wanted: tuple[Split, ...] = ("train", "test") if self.options.probe == "knn" else SPLITS
        if (count := len(self._data.splits.train)) > MANY:
            say(f"probing {count:,} training images; task.probe=none leaves it out")
        rows = {split: self._rows(split, self._features) for split in wanted}
        found: dict[str, float] = {}
        if not is_main_process():
            return found
        try:
            if self.options.probe in ("knn", "both"):
                found["knn_acc"] = self._knn(rows["train"], rows["test"])
            if self.options.probe in ("linear", "both"):
                parts = [p for s in SPLITS for p in (rows[s].features, rows[s].label)]
                linear = linear_accuracy(*parts, classes=self.info.classes)
                found["linear_acc"] = linear.test_acc
                found["linear_penalty"] = linear.penalty  # at an edge of its grid: look twice
        except ValueError as error:  # features that are no numbers
            say(f"warning: no probe: {error}")
        except torch.OutOfMemoryError:  # the run is worth more than its probe
            say(
                "warning: no probe: the features do not fit into the device's memory; take "
                "task.probe=knn, or task.probe=none"
            )
        return found

    def _probed_pixels(self) -> dict[str, float]:
        """The nearest neighbours of raw pixels."""
        if self.options.probe not in ("knn", "both"):
            return {}
        size, chans = (int(self.info.extra[k]) for k in ("image_size", "in_chans"))
        if 4 * chans * size**2 * len(self._data.splits.train) > PIXELS_AT_MOST:
            say("note: no probe of raw pixels: the training images do not fit into 1 GiB")
            return {}
        rows = [self._rows(split, lambda image: image.flatten(1)) for split in ("train", "test")]
        return {"knn_acc_pixels": self._knn(*rows)} if is_main_process() else {}

    def _knn(self, train: Rows, test: Rows) -> float:
        assert self.info.classes is not None
        return knn_accuracy(
            train.features,
            train.label,
            test.features,
            test.label,
            k=self.options.knn,
            classes=self.info.classes,
        )

    def _features(self, image: Tensor) -> Tensor:
        dtype = self.model.mask_token.dtype
        with self.trainer.precision_plugin.forward_context():
            return self.model.features(image.to(dtype)).float()

    def _rows(self, split: Split, of_image: Callable[[Tensor], Tensor]) -> Rows:
        """`of_image` [B, F] of a split's images, not augmented, in their order, on every process.

        Each process reads every world-size-th image.
        """
        data, training = self._data, self.model.training
        total, world = len(getattr(data.splits, split)), self.trainer.world_size
        mine = list(range(self.global_rank, total, world))
        # of all processes together, as in evaluation: a share of it fits into this one's memory
        size = -(-(data.options.eval_batch_size or data.options.batch_size) // world)
        held = []
        self.model.eval()
        # Lightning tests in inference mode, whose tensors no optimizer of a probe could use
        with torch.inference_mode(False), torch.no_grad():
            for batch in images(data, split, mine or [0], size=size):
                features = of_image(batch["image"].to(self.device))
                extra = torch.stack((batch["label"], batch["valid"].long()), dim=1)
                held.append(torch.cat((features, extra.to(features)), dim=1))
            rows = gather_rows(torch.cat(held)[: len(mine)], total=total)
        self.model.train(training)
        rows = rows[rows[:, -1] > 0]
        rows = rows.cpu() if rows.device.type == "mps" else rows  # which has no float64
        return Rows(rows[:, :-2], rows[:, -2].long())

    def _draw(self) -> None:
        """reconstructions.png of the first test images, masked as in the test."""
        folder = getattr(self, "folder", None)
        count = min(self.options.pictures, len(self._data.splits.test))
        if folder is None or not count or not is_main_process():
            return
        batch = next(iter(images(self._data, "test", list(range(count)), size=count)))
        image, noise_BN = batch["image"], self.noise(batch["sample_id"], batch["epoch"], "test")
        dtype = self.model.mask_token.dtype
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            predicted_BNP, masked_BN = self.model(
                image.to(self.device, dtype),
                noise_BN.to(self.device),
                mask_ratio=self.options.mask_ratio,
            )
        ok, chans = batch["valid"], image.shape[1]
        if not ok.any():
            return
        try:
            save_reconstructions(
                folder / PICTURE,
                image_BCHW=image[ok],
                masked_BN=masked_BN.cpu()[ok],
                predicted_BNP=predicted_BNP.float().cpu()[ok],
                patch_size=self.model.patch_size,
                mean=self.info.extra.get("mean", [0.0] * chans),
                std=self.info.extra.get("std", [1.0] * chans),
                norm_pix=self.options.norm_pix_loss,
            )
        except (ConfigError, ValueError) as error:  # figures are worth more than a picture
            say(f"warning: no {PICTURE}: {error}")


def images(data: SuiteDataModule, split: Split, indices: list[int], *, size: int) -> Any:
    """Batches of `size` of these images, not augmented, read by data.num_workers."""
    chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
    return DataLoader(
        AddressedDataset(getattr(data.splits, split), train=False),
        sampler=[address(chunk, size=len(chunk), epoch=0) for chunk in chunks],
        batch_size=None,
        num_workers=data.options.num_workers if len(chunks) > 1 else 0,
        generator=torch.Generator(),  # its own: the loader must not draw from the global one
    )


def say_probes(found: dict[str, float]) -> None:
    """A line for each probe: the encoder, and what it has to beat."""
    for probe, words in (("knn_acc", "nearest neighbours"), ("linear_acc", "linear classifier")):
        if probe not in found:
            continue
        beside = [
            f"{what} {found[f'{probe}_{key}']:.4f}"
            for key, what in (("untrained", "untrained network"), ("pixels", "raw pixels"))
            if math.isfinite(found.get(f"{probe}_{key}", math.nan))
        ]
        shown = f" ({', '.join(beside)})" if beside else ""
        say(f"probe  {words}: test accuracy {found[probe]:.4f}{shown}")


SPEC = TaskSpec(
    name="vision/mae",
    module=Pretrain,
    models=MODELS,
    data=DATA,
    primary=("loss", "min", "val"),
    unit="images",
    options=MaeTaskOptions(),
)
