"""Image classification: cross-entropy, top-1 and top-5 accuracy.

The task of the first table of DyT (arXiv 2503.10622) and of Derf (arXiv 2512.10938).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from suite.data import Split
from suite.module import Batch, StepOutput, SuiteModule
from suite.registry import TaskSpec
from tasks.vision import convnext, timm_model, vit
from tasks.vision.data import DATA
from tasks.vision.loading import plain_loader
from tasks.vision.reference import ClassifyReference
from tasks.vision.vit import ViT, scale_embedding


@dataclass(frozen=True)
class ClassifyOptions:
    """label_smoothing: share of the target that is spread over all classes, in training only."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )


def cross_entropy(logits: Tensor, label: Tensor, *, smoothing: float) -> Tensor:
    """logits [B, classes], label [B] -> [B], in float32."""
    return F.cross_entropy(logits.float(), label, reduction="none", label_smoothing=smoothing)


def mixed(batch: Batch, of_label: Callable[[Tensor], Tensor]) -> Tensor:
    """`of_label` for the soft target lam * label + (1 - lam) * label_b; both [B].

    Cross-entropy is linear in its target, so this equals the loss of the mixed, smoothed target
    without its [B, classes]. Where nothing was mixed it is `of_label(label)`.
    """
    value = of_label(batch["label"])
    if "lam" not in batch:
        return value
    lam = batch["lam"].to(value.dtype)
    return lam * value + (1.0 - lam) * of_label(batch["label_b"])


class Classify(SuiteModule):
    """Batch: image [B, C, H, W], label [B], valid [B], sample_id [B].

    Where Mixup or CutMix is on also label_b [B] and lam [B], the second label and the first's
    share.
    """

    def step(self, batch: Batch, split: Split) -> StepOutput:
        mask = batch["valid"].bool() if self.padded and self.training else None
        logits = self.model(batch["image"], mask)
        smoothing = self.options.label_smoothing if split == "train" else 0.0
        loss = mixed(batch, lambda label: cross_entropy(logits, label, smoothing=smoothing))
        valid = batch["valid"]
        if split == "train":
            hits = mixed(batch, lambda label: (logits.argmax(-1) == label).float())
            logs = {"acc": (hits * valid).sum()}
            return StepOutput((loss * valid).sum(), valid.sum(), logs=logs)
        real = valid.bool()
        return StepOutput(
            (loss * valid).sum(),
            valid.sum(),
            metric_inputs={"preds": logits[real], "target": batch["label"][real]},
        )

    def metrics(self) -> MetricCollection:
        classes = self.info.classes
        top = {"acc": 1, "acc_top5": 5} if classes and classes > 5 else {"acc": 1}
        return MetricCollection(
            {
                name: MulticlassAccuracy(num_classes=classes, top_k=k, average="micro")
                for name, k in top.items()
            },
            compute_groups=False,
        )

    @property
    def initialises(self) -> bool:
        return self.scales or super().initialises

    @property
    def scales(self) -> bool:
        """Whether the model asks for an embedding of RMS 1."""
        return isinstance(self.model, ViT) and self.model.embed_rms

    def initialise(self, batch: Batch) -> dict[str, float]:
        """Bring the embedding to RMS 1 where the model asks for it, then calibrate the norms."""
        if isinstance(self.model, ViT) and self.scales:
            scale_embedding(self.model, batch["image"])
        return super().initialise(batch)


SPEC = TaskSpec(
    name="vision/classify",
    module=Classify,
    models={**vit.MODELS, **convnext.MODELS, **timm_model.MODELS},
    data=DATA,
    primary=("acc", "max", "val"),
    unit="images",
    options=ClassifyOptions(),
    plain_loader=plain_loader,
    reference=ClassifyReference,
)
