"""Pre-training on a genome: the next base (HyenaDNA) or masked bases (Caduceus).

Sources: HyenaDNA, arXiv 2306.15794, section 3; Caduceus, arXiv 2403.03234, section 4.3.

loss = sum of -log p(base) / bases that are asked for, over all processes and accumulation steps;
padding, N and special tokens are never asked for. What is masked follows from (seed, epoch,
window) in training; in evaluation it is the same for every run. Bits per base are the loss over
log 2, so that 2 bits is what one pays who knows nothing. At the end a network stands beside Markov
models of the same genome (tasks/dna/markov.py), a masked one with the bases that it was shown as
[MASK] alone.

Shapes: B windows, L positions, V rows of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.data import Split
from suite.errors import ConfigError, DataError
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.randomness import sample_seeds, uniform_grid
from suite.registry import TaskSpec
from suite.train import say
from tasks.dna.baselines import compare
from tasks.dna.dna_model import ForPretraining
from tasks.dna.genome import GENOME_DATA
from tasks.dna.models import PRETRAIN_MODELS
from tasks.dna.tokens import BOS, MASK, PAD, A, is_base

LN2 = math.log(2)


@dataclass(frozen=True)
class PretrainOptions:
    """What is asked for.

    objective: causal asks for every base, given those before it; mlm for masked ones, given all
        others; auto is causal where the model is.
    bos: of causal: a [BOS] stands before the window, so that its first base is asked for too. The
        published code has none.
    mask_prob: of mlm: share of the bases that are asked for. Of those mask_share become [MASK],
        random_share a random base, the others stay.
    baselines: compare with Markov models after the test, where the genome is small enough.
    """

    objective: Literal["auto", "causal", "mlm"] = "auto"
    bos: bool = True
    mask_prob: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    baselines: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob <= 1:
            raise ValueError(f"mask_prob must be above 0 and at most 1, got {self.mask_prob}")
        for name in ("mask_share", "random_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share plus random_share must be at most 1, got "
                f"{self.mask_share + self.random_share:g}"
            )


def mask_bases(
    ids_BL: Tensor, seeds_B: Tensor, *, prob: float, mask_share: float, random_share: float
) -> tuple[Tensor, Tensor]:
    """(what the network sees [B, L], bool [B, L]: which bases it is asked for).

    A random base is drawn from A, C, G and T, so that a quarter of them stay what they were; the
    published code draws from all 12 ids.
    """
    asked_u, kind_u, base_u = uniform_grid(seeds_B, 3, ids_BL.shape[1]).unbind(1)
    asked_BL = (asked_u < prob) & is_base(ids_BL)
    random_BL = A + (4 * base_u).long()
    seen_BL = ids_BL.where(kind_u >= mask_share + random_share, random_BL)
    seen_BL = seen_BL.where(kind_u >= mask_share, MASK)
    return seen_BL.where(asked_BL, ids_BL), asked_BL


def shifted(ids_BL: Tensor) -> Tensor:
    """What a causal network sees where it is asked for ids: the base before, at first [BOS]."""
    return F.pad(ids_BL[:, :-1], (1, 0), value=BOS)


class Pretrain(SuiteModule):
    """Batch: ids [B, L], valid [B], sample_id [B], epoch [B], of a test where it is known also
    novel [B]: the window shares no stretch of 24 bases with the training set."""

    model: ForPretraining

    def __init__(self, model: ForPretraining, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.is_causal = self._objective() == "causal"

    def _objective(self) -> str:
        wanted = self.options.objective
        if wanted == "causal" and not self.model.causal:
            raise ConfigError(
                "task.objective=causal: this model sees the base that it is asked for; take "
                "task.objective=mlm, or a causal model such as model=hyenadna_tiny"
            )
        return ("causal" if self.model.causal else "mlm") if wanted == "auto" else str(wanted)

    def step(self, batch: Batch, split: Split) -> StepOutput:
        ids_BL = batch["ids"]
        seen_BL, asked_BL, real_BL = self._question(batch, split)
        logits_BLV = self.model(seen_BL, real_BL)
        if self.is_causal and not self.options.bos:
            logits_BLV, ids_BL, asked_BL = logits_BLV[:, :-1], ids_BL[:, 1:], asked_BL[:, 1:]
        asked_BL = asked_BL & batch["valid"].bool().unsqueeze(1)
        # not by a product: a loss that is no number where nothing is asked must not count
        nats_BL = cross_entropy(logits_BLV, ids_BL).where(asked_BL, 0.0)
        hits_BL = (logits_BLV.argmax(-1) == ids_BL) & asked_BL
        nats = nats_BL.sum()
        logs = {"bits_per_base": nats.detach() / LN2, "acc": hits_BL.sum()}
        if split != "train":
            hidden_BL = None if self.is_causal else asked_BL & (seen_BL == MASK)
            logs.update(parts_of(nats_BL, asked_BL, hidden_BL, batch.get("novel")))
        units = (batch["ids"] != PAD).sum()
        return StepOutput(nats, asked_BL.sum(), logs=logs, units=units)

    def _question(self, batch: Batch, split: Split) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what is seen, which bases are asked for, which positions are real), all [B, L]."""
        ids_BL, o = batch["ids"], self.options
        real_BL = self._real(batch)
        if self.is_causal:
            seen_BL = shifted(ids_BL) if o.bos else ids_BL
            return seen_BL, is_base(ids_BL), real_BL
        train = split == "train"
        seeds_B = sample_seeds(
            self.seed if train else 0,
            "mask" if train else f"mask_{split}",
            ids=batch["sample_id"],
            epoch=batch["epoch"],
        )
        shares = {"mask_share": o.mask_share, "random_share": o.random_share}
        seen_BL, asked_BL = mask_bases(ids_BL, seeds_B, prob=o.mask_prob, **shares)
        return seen_BL, asked_BL, real_BL

    def _real(self, batch: Batch) -> Tensor | None:
        """Positions that are not padding; None where there can be none."""
        real_BL = None if self.info.extra.get("padded") is False else batch["ids"] != PAD
        if self.padded and self.training:
            rows_BL = batch["valid"].bool().unsqueeze(1).expand_as(batch["ids"])
            return rows_BL if real_BL is None else real_BL & rows_BL
        return real_BL

    def after_evaluation(self, split: Split, values: dict[str, float]) -> None:
        if not values[f"{split}/count"]:
            drawn = "" if self.is_causal else ", or none was drawn: raise task.mask_prob"
            raise DataError(
                f"{split}: no base is asked for; its windows hold no A, C, G or T{drawn}"
            )
        values[f"{split}/perplexity"] = math.exp(min(values[f"{split}/loss"], 700.0))
        for part in ("novel", "hidden", "hidden_novel"):
            nats = values.pop(f"{split}/{part}_nats", None)
            if nats is not None and (share := values[f"{split}/{part}_share"]):
                values[f"{split}/bits_per_base_{part}"] = nats / share / LN2
        if split == "test" and self.options.baselines and is_main_process():
            self._compare(values)

    def _compare(self, values: dict[str, float]) -> None:
        """Put the Markov baselines beside the figures of a whole test split, and say them."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        limit = data.limits.get("test")
        if limit is not None and (isinstance(limit, int) or limit < 1):  # 1 is one batch
            return
        try:
            found = compare(data.splits, values, causal=self.is_causal)
        except DataError as error:  # in a part of the genome that is in no window
            say(f"warning: no Markov baselines: {error}")
            return
        values.update(found.values)
        for line in found.lines:
            say(line)


def parts_of(
    nats_BL: Tensor, asked_BL: Tensor, hidden_BL: Tensor | None, novel_B: Tensor | None
) -> dict[str, Tensor]:
    """Sums of nats and bases over parts of an evaluation.

    novel: windows that repeat nothing of the training set. hidden: bases shown as [MASK]; of the
    others that are asked for some can be read off, so that only these compare with a model that
    does not see what it is asked for.
    """
    parts = {}
    if novel_B is not None:
        parts["novel"] = asked_BL & novel_B.unsqueeze(1)
    if hidden_BL is not None:
        parts["hidden"] = hidden_BL
        if novel_B is not None:
            parts["hidden_novel"] = hidden_BL & novel_B.unsqueeze(1)
    sums = {}
    for name, part_BL in parts.items():
        sums[f"{name}_nats"] = nats_BL.where(part_BL, 0.0).sum()
        sums[f"{name}_share"] = part_BL.sum()
    return sums


def cross_entropy(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """-log p of each position's id, [B, L], in at least float32."""
    wide = torch.promote_types(logits_BLV.dtype, torch.float32)
    return F.cross_entropy(logits_BLV.to(wide).transpose(1, 2), ids_BL, reduction="none")


SPEC = TaskSpec(
    name="dna/pretrain",
    module=Pretrain,
    models=PRETRAIN_MODELS,
    data=GENOME_DATA,
    primary=("bits_per_base", "min", "val"),
    unit="bases",
    options=PretrainOptions(),
)
