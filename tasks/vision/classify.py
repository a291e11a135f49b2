"""Image classification: cross-entropy, top-1 and top-5 accuracy.

The task of the first table of DyT (arXiv 2503.10622) and of Derf (arXiv 2512.10938).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from suite.data import Split
from suite.module import Batch, StepOutput, SuiteModule
from suite.registry import TaskSpec
from tasks.vision.data import DATA
from tasks.vision.vit import MODELS, ViT, scale_embedding


@dataclass(frozen=True)
class ClassifyOptions:
    """label_smoothing: share of the target that is spread over all classes, in training only."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )


class Classify(SuiteModule):
    """Batch: image [B, C, H, W], label [B], valid [B], sample_id [B]."""

    def step(self, batch: Batch, split: Split) -> StepOutput:
        mask = batch["valid"].bool() if self.padded and self.training else None
        logits = self.model(batch["image"], mask)
        smoothing = self.options.label_smoothing if split == "train" else 0.0
        loss = F.cross_entropy(
            logits.float(), batch["label"], reduction="none", label_smoothing=smoothing
        )
        valid = batch["valid"]
        if split == "train":
            hits = ((logits.argmax(-1) == batch["label"]).float() * valid).sum()
            return StepOutput((loss * valid).sum(), valid.sum(), logs={"acc": hits})
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

    def initialise(self, batch: Batch) -> dict[str, float]:
        """Bring the embedding to RMS 1 where the model asks for it, then calibrate the norms."""
        if isinstance(self.model, ViT) and self.model.embed_rms:
            scale_embedding(self.model, batch["image"])
        return super().initialise(batch)


SPEC = TaskSpec(
    name="vision/classify",
    module=Classify,
    models=MODELS,
    data=DATA,
    primary=("acc", "max", "val"),
    unit="images",
    options=ClassifyOptions(),
)
