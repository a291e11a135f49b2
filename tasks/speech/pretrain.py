"""wav2vec 2.0 pre-training (arXiv 2006.11477): find the quantized frame behind each mask.

loss = InfoNCE / masked frames + diversity_weight * (G V - perplexity) / (G V)
     + penalty_weight * mean(features^2), as fairseq 3d262bb25690 with four differences, so that
the number of processes changes nothing: masks are not thinned to the batch's smallest count
(task.mask_equalise=batch does, each process its own share), the perplexity and the feature penalty
are those of all processes together rather than a mean of each one's, and every process leaves out
the same layers. Under accumulation perplexity and penalty are each micro-batch's, weighted by its
masked frames.

Shapes: B examples, S samples, T frames, M slots for masked frames, C channels, G codebooks, V codes
of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from suite.data import Split
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.randomness import sample_seeds
from suite.ranks import sums_over_ranks
from suite.registry import TaskSpec
from suite.train import say
from tasks.speech import masks
from tasks.speech.alarms import Alarms
from tasks.speech.contrastive import CodePerplexity, chance_bits, info_nce, of_sums, perplexity
from tasks.speech.data import PRETRAIN_DATA
from tasks.speech.models import PRETRAIN_MODELS, ForPretraining
from tasks.speech.reference import PretrainReference
from tasks.speech.wav2vec2 import RATE, frames_of


@dataclass(frozen=True)
class PretrainTaskOptions:
    """Masks, negatives and the weights of the loss; the defaults are the paper's.

    mask_prob: chance of a frame to be masked if spans did not overlap (about half are).
    mask_length: frames of a span. min_masks: fewest spans of an utterance.
    mask_equalise: "batch" thins every utterance to the smallest count of its batch, as fairseq.
    negatives: other masked frames of the utterance to choose from. logit_temperature: of the
    choice.
    temperature_start, temperature_end, temperature_decay: of the Gumbel softmax, times
    temperature_decay after each update.
    """

    mask_prob: float = 0.65
    mask_length: int = 10
    min_masks: int = 2
    mask_equalise: Literal["none", "batch"] = "none"
    negatives: int = 100
    logit_temperature: float = 0.1
    diversity_weight: float = 0.1
    penalty_weight: float = 10.0
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    temperature_decay: float = 0.999995

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob <= 1:
            raise ValueError(f"mask_prob must be above 0, 1 at most, got {self.mask_prob}")
        for name in ("mask_length", "min_masks", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("logit_temperature", "temperature_start", "temperature_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("diversity_weight", "penalty_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.temperature_decay <= 1:
            raise ValueError(
                f"temperature_decay must be above 0, 1 at most, got {self.temperature_decay}"
            )
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end must be at most temperature_start={self.temperature_start}, "
                f"got {self.temperature_end}"
            )


class Pretrain(SuiteModule):
    """Batch: audio [B, S], length [B] in samples, valid [B], sample_id [B], epoch [B]."""

    model: ForPretraining
    carried = ("_window",)

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        groups, codes = self.shape
        self.alarms = Alarms(groups=groups, codes=codes, negatives=self.negatives)
        self._window: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, int]:
        """(G, V) of the quantizer."""
        return self.model.quantizer.codebooks, self.model.quantizer.codes

    @property
    def negatives(self) -> int:
        """Frames to choose from besides the true one."""
        return int(self.options.negatives)

    @property
    def temperature(self) -> float:
        """Of the Gumbel softmax, from the number of updates."""
        o = self.options
        decayed: float = o.temperature_start * o.temperature_decay**self.updates
        return max(decayed, o.temperature_end)

    def step(self, batch: Batch, split: Split) -> StepOutput:
        train = split == "train"
        real_B = batch["valid"].bool()
        # one validation task for all seeds and norms
        where = {"ids": batch["sample_id"], "epoch": batch["epoch"]}
        seed = self.seed if train else 0
        mask_BT, at_BM, used_BM = self._masked(batch, sample_seeds(seed, "mask", **where))
        noise_BMGV = None
        if train:
            grid = (at_BM.shape[1], *self.shape)
            noise_BMGV = masks.gumbel(sample_seeds(seed, "gumbel", **where), *grid)
        out = self.model(
            batch["audio"],
            None if self._full(batch, train=train) else batch["length"],
            mask_BT=mask_BT,
            at_BM=at_BM,
            noise_BMGV=noise_BMGV,
            temperature=self.temperature,
            layers_kept=self._layers_kept() if train else None,
        )
        drawn_BMK = masks.negatives(
            used_BM, count=self.negatives, seeds_B=sample_seeds(seed, "negatives", **where)
        )
        used_BM = used_BM & real_B[:, None] & (used_BM.sum(dim=1) > 1)[:, None]
        contrast = info_nce(
            out.context_BMC,
            out.target_BMC,
            codes_BMG=out.codes_BMG,
            negatives_BMK=drawn_BMK,
            temperature=self.options.logit_temperature,
        )
        return self._output(out, contrast, batch=batch, used_BM=used_BM, split=split)

    def _full(self, batch: Batch, *, train: bool) -> bool:
        """Whether no row has padding, as far as that is known without waiting for the device."""
        length_B = batch["length"]
        if length_B.device.type == "cpu":
            return int(length_B.min()) == batch["audio"].shape[1]
        return train and bool(self.info.extra.get("rectangular"))

    def _masked(self, batch: Batch, seeds_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked frames [B, T], the frames of the slots [B, M], which slots are used [B, M]."""
        o = self.options
        size = int(frames_of(batch["audio"].shape[1]))
        rule = {"prob": o.mask_prob, "span": o.mask_length, "min_spans": o.min_masks}
        frames_B = frames_of(batch["length"])
        mask_BT = masks.span_mask(frames_B, size=size, seeds_B=seeds_B, **rule)
        if o.mask_equalise == "batch":
            mask_BT = masks.thinned(mask_BT, real_B=batch["valid"].bool(), seeds_B=seeds_B + 1)
        most = masks.most_masked(size, **rule)
        if mask_BT.device.type == "cpu":  # reading the count makes nobody wait
            most = max(2, int(mask_BT.sum(dim=1).max()))
        return mask_BT, *masks.slots(mask_BT, most=most)

    def _layers_kept(self) -> Tensor | None:
        depth, prob = self.model.encoder_depth, self.model.layer_drop
        return masks.layers_kept(self.seed, self.updates, depth, prob=prob, device=self.device)

    def _output(
        self, out: Any, contrast: Any, *, batch: Batch, used_BM: Tensor, split: Split
    ) -> StepOutput:
        masked = used_BM.sum()
        info = torch.where(used_BM, contrast.loss_BM, 0.0).sum()
        prob_GV = (out.probs_BMGV * used_BM[..., None, None]).sum(dim=(0, 1))
        penalties, every = self._penalties(out, batch=batch, masked=masked, prob_GV=prob_GV)
        # the value is this process's share, the gradient that of the whole: see suite.ranks
        loss_sum = info + masked * penalties.detach() + every * (penalties - penalties.detach())
        # fairseq counts the likeliest codes, not those that were drawn
        code_GV = counted(out.probs_BMGV.argmax(dim=-1), used_BM, codes=self.shape[1])
        hits, same = ((x * used_BM).sum() for x in (contrast.hit_BM, contrast.same_BM))
        guess_BM = (1 + self.negatives * (1 - contrast.same_BM)).log2()
        logs = {
            "bits": info.detach() / math.log(2),
            "total_bits": loss_sum.detach() / math.log(2),
            "acc": hits,
            "same_codes": same,
            "chance_bits": (guess_BM * used_BM).sum(),
        }
        seconds = (batch["length"] * batch["valid"]).sum() / RATE
        sums = {"code_GV": code_GV, "prob_GV": prob_GV.detach()}
        if split == "train":
            seen = [*sums.values(), torch.stack([info.detach(), same, masked.to(info)])]
            held = self._window or [torch.zeros_like(v) for v in seen]
            self._window = [a.to(b.device) + b for a, b in zip(held, seen, strict=True)]
            return StepOutput(loss_sum, masked, logs=logs, units=seconds)
        return StepOutput(loss_sum, masked, logs=logs, metric_inputs=sums, units=seconds)

    def _penalties(
        self, out: Any, *, batch: Batch, masked: Tensor, prob_GV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted diversity and feature penalties of all processes, and their masked frames."""
        features_BTC = out.features_BTC.float()
        frames_B = out.frames_B * batch["valid"]
        inside_BT = torch.arange(features_BTC.shape[1], device=frames_B.device) < frames_B[:, None]
        squares = torch.where(inside_BT, features_BTC.square().mean(dim=2), 0.0).sum()
        squares, prob_GV, frames, every = sums_over_ranks(squares, prob_GV, frames_B.sum(), masked)
        size = prob_GV.numel()
        diversity = (size - perplexity(prob_GV / every.clamp(min=1))) / size
        mean_square = squares / frames.clamp(min=1)
        o = self.options
        return o.diversity_weight * diversity + o.penalty_weight * mean_square, every

    def metrics(self) -> MetricCollection:
        groups, codes = self.shape
        return MetricCollection(
            {f"{s}_perplexity": CodePerplexity(groups, codes, sums=s) for s in ("code", "prob")},
            compute_groups=False,
        )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if is_main_process():
            groups, codes = self.shape
            say(
                f"chance {chance_bits(self.negatives):.3f} bits = log2({self.negatives + 1}), less "
                "where negatives have the codes of the true frame (val/chance_bits); code "
                f"perplexity is {groups} when collapsed and {groups * codes} when all codes are in "
                "equal use"
            )

    def window_metrics(self) -> dict[str, float]:
        if not self._window:
            return {}
        code_GV, prob_GV, totals = sums_over_ranks(*self._window)
        self._window = []
        found = torch.stack([*totals, of_sums(code_GV), of_sums(prob_GV)])
        info, same, masked, code, prob = found.tolist()
        bits = info / max(masked, 1.0) / math.log(2)
        for text in self.alarms.judge(
            bits=bits, code_perplexity=code, same=same / max(masked, 1.0), updates=self.updates
        ):
            if is_main_process():
                say(f"warning: {text}")
        return {
            "code_perplexity": code,
            "prob_perplexity": prob,
            "temperature": self.temperature,
        }


def counted(codes_BMG: Tensor, used_BM: Tensor, *, codes: int) -> Tensor:
    """How often each code was chosen in used slots. float32 [G, V], whole numbers."""
    groups = codes_BMG.shape[-1]
    number_BMG = codes_BMG + torch.arange(groups, device=codes_BMG.device) * codes
    weight_BMG = used_BM[..., None].expand_as(codes_BMG).float()
    total = torch.zeros(groups * codes, device=codes_BMG.device)
    return total.index_add_(0, number_BMG.flatten(), weight_BMG.flatten()).view(groups, codes)


SPEC = TaskSpec(
    name="speech/pretrain",
    module=Pretrain,
    models=PRETRAIN_MODELS,
    data=PRETRAIN_DATA,
    primary=("bits", "min", "val"),
    unit="seconds of audio",
    keep_sites=("stem", "embed"),
    options=PretrainTaskOptions(),
    reference=PretrainReference,
)
