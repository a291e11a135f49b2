"""Classification of sequences: cross-entropy, accuracy, MCC, F1 and AUROC of a whole split.

The task of GenomicBenchmarks (doi:10.1186/s12863-023-01123-8) and of the Nucleotide Transformer's
set, from a pre-training (`model.init_from=RUN`) or from scratch. Where a model was published to be
asked about both strands (Caduceus-Ph) their logits are averaged in evaluation, unless what a
sequence is depends on its strand, as it does for splice sites.

Shapes: B sequences, L positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from suite.data import Split
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.registry import TaskSpec
from suite.train import say
from tasks.dna.dna_model import ForClassification
from tasks.dna.heads import Pool
from tasks.dna.labelled import LABELLED_DATA
from tasks.dna.models import CLASSIFY_MODELS
from tasks.dna.tokens import PAD, other_strand

NO_CLASS = -1  # the target of a row that counts for nothing


@dataclass(frozen=True)
class ClassifyOptions:
    """How a sequence is judged.

    pool: a sequence is judged by the mean over its positions, as published, or by the last one,
        from which each other lies at a distance of its own: for sequences that are aligned.
    conjoin: average the logits of both strands in evaluation; null: where the model was published
        so and the data is not strand-specific.
    label_smoothing: share of the target that is spread over all classes, in training only.
    """

    pool: Pool = "mean"
    conjoin: bool | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {self.pool!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )


class NovelAccuracy(Metric):
    """Accuracy over the sequences that are not in the training set; no number if there are none."""

    full_state_update = False
    hits: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("hits", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, novel: Tensor) -> None:
        """preds [B, K], target [B], novel bool [B]."""
        self.hits += ((preds.argmax(-1) == target) & novel).sum()
        self.count += novel.sum()

    def compute(self) -> Tensor:
        """The share of hits."""
        return self.hits.float() / self.count


class Classify(SuiteModule):
    """Batch: ids [B, L] padded at the end, label [B], valid [B], sample_id [B]; in evaluation also
    novel [B]: the sequence is not in the training set."""

    model: ForClassification

    @property
    def strand_specific(self) -> bool:
        """Whether a sequence and its reverse complement may be of different classes."""
        return bool(self.info.extra.get("strand_specific"))

    @property
    def conjoins(self) -> bool:
        """Whether evaluation asks about both strands."""
        wanted = self.options.conjoin
        return self.model.conjoins and not self.strand_specific if wanted is None else bool(wanted)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        both = self.model.body.strands == 2 or self.conjoins
        if both and self.strand_specific and is_main_process():
            say(
                "warning: what a sequence is depends on its strand in this data, and the model "
                "gives both strands one answer; take a model without rcps (caduceus_ph_tiny, "
                "hyenadna_tiny), with task.conjoin=false"
            )

    def step(self, batch: Batch, split: Split) -> StepOutput:
        ids_BL, label, valid = batch["ids"], batch["label"], batch["valid"].bool()
        mask_BL = ids_BL != PAD
        if self.padded and self.training:
            mask_BL = mask_BL & valid.unsqueeze(1)
        logits_BK = self.model(ids_BL, mask_BL, pool=self.options.pool)
        if self.conjoins and split != "train":
            others_BK = self.model(other_strand(ids_BL), mask_BL, pool=self.options.pool)
            logits_BK = (logits_BK + others_BK) / 2
        smoothing = self.options.label_smoothing if split == "train" else 0.0
        loss_B = F.cross_entropy(logits_BK, label, reduction="none", label_smoothing=smoothing)
        loss = loss_B.where(valid, 0.0).sum()
        units = (ids_BL != PAD).sum()
        if split == "train":
            hits = (logits_BK.argmax(-1) == label) & valid
            return StepOutput(loss, valid.sum(), logs={"acc": hits.sum()}, units=units)
        inputs = {
            # torchmetrics would choose batch by batch whether these are logits
            "preds": logits_BK.softmax(-1),
            # rows that are not valid stay: it cannot gather what a process has none of
            "target": label.where(valid, NO_CLASS),
            "novel": batch.get("novel", valid) & valid,
        }
        return StepOutput(loss, valid.sum(), metric_inputs=inputs, units=units)

    def metrics(self) -> MetricCollection:
        classes = self.info.classes
        of: Any = {"num_classes": classes, "ignore_index": NO_CLASS}
        return MetricCollection(
            {
                "acc": MulticlassAccuracy(**of, average="micro"),
                "mcc": MulticlassMatthewsCorrCoef(**of),
                "f1": MulticlassF1Score(**of, average="macro"),
                "auroc": MulticlassAUROC(**of, average="macro"),
                "acc_novel": NovelAccuracy(),
            },
            compute_groups=False,
        )


SPEC = TaskSpec(
    name="dna/classify",
    module=Classify,
    models=CLASSIFY_MODELS,
    data=LABELLED_DATA,
    primary=("acc", "max", "val"),
    unit="bases",
    options=ClassifyOptions(),
)
