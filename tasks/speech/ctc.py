"""wav2vec 2.0 with CTC: fine-tuned from a pre-training, or trained from scratch.

Sources: arXiv 2006.11477, section 3.3; CTC: Graves et al., 2006, doi:10.1145/1143844.1143891.

loss = sum of -log p(transcript | audio) / utterances, over all processes and accumulation steps, as
fairseq 3d262bb25690 with sentence_avg. Spans of frames and of channels are masked in training; both
and the layers that are left out follow from (seed, epoch or step, utterance). Word and character
error rates are of the whole split.

Shapes: B utterances, S samples, T frames, C channels, V labels, L letters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from suite.data import Split
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.randomness import sample_seeds
from suite.registry import TaskSpec
from suite.train import say
from tasks.speech import masks
from tasks.speech.beam import Beam
from tasks.speech.data import CTC_DATA
from tasks.speech.models import CTC_MODELS, ForCTC
from tasks.speech.text import BLANK, collapse
from tasks.speech.wav2vec2 import RATE, frames_of
from tasks.speech.wer import CharErrors, ErrorRate, WordErrors

MIN_MASKS = 2  # fewest spans of frames of an utterance, as in fairseq
BLANK_ALARM, LETTERS_ALARM = 0.98, 1.0  # share of frames; letters of a hypothesis


@dataclass(frozen=True)
class CTCTaskOptions:
    """Masks, freezing and decoding.

    mask_prob, mask_length: frames; mask_channel_prob, mask_channel_length: channels; each the
        chance of one to be masked if spans of that length did not overlap. The paper's tables give
        it for a span's start, which is this divided by the length.
    freeze_updates: for so many updates only the head learns.
    decoder: greedy takes each frame's likeliest label; beam searches, with the extra packages.
    lm: of beam: a KenLM file over the lexicon's words, or over letters without a lexicon.
    lexicon: of beam: a text file, a word and its letters a line.
    beam: hypotheses that are kept. lm_weight, word_score: what a word's log probability weighs, and
        what is added for a word.
    samples: pairs of reference and hypothesis to show after an evaluation.
    """

    mask_prob: float = 0.65
    mask_length: int = 10
    mask_channel_prob: float = 0.5
    mask_channel_length: int = 64
    freeze_updates: int = 0
    decoder: Literal["greedy", "beam"] = "greedy"
    lm: str | None = None
    lexicon: str | None = None
    beam: int = 50
    lm_weight: float = 2.0
    word_score: float = -1.0
    samples: int = 3

    def __post_init__(self) -> None:
        for name in ("mask_prob", "mask_channel_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("mask_length", "mask_channel_length", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("freeze_updates", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("lm_weight", "word_score"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)}")
        for name in ("lm", "lexicon"):
            if getattr(self, name) is not None and self.decoder != "beam":
                raise ValueError(f"{name} is for task.decoder=beam: set that, or leave it out")


def ctc_loss(
    log_probs_BTV: Tensor, frames_B: Tensor, *, target_BL: Tensor, target_length_B: Tensor
) -> Tensor:
    """-log p(transcript) of each row, [B], in float32; 0 where the frames are too few for it.

    Without cuDNN, whose CTC takes other types and padding and gives other figures (fairseq does the
    same). PyTorch's own waits for the device once, to read the lengths, and has a backward pass on
    CUDA that adds in any order: with
    trainer.deterministic=true it is refused, warn lets it pass.
    """
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probs_BTV.transpose(0, 1),
            target_BL,
            frames_B,
            target_length_B,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )


class CTC(SuiteModule):
    """Batch: audio [B, S], length [B] in samples, target [B, L], target_length [B], valid [B],
    sample_id [B], epoch [B]."""

    model: ForCTC

    def __init__(self, model: ForCTC, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        o = self.options
        self.beam: Beam | None = None
        if o.decoder == "beam":
            self.beam = Beam(
                lm=o.lm,
                lexicon=o.lexicon,
                beam=o.beam,
                lm_weight=o.lm_weight,
                word_score=o.word_score,
            )

    @property
    def freezes(self) -> bool:
        """Whether this update moves the head alone."""
        return bool(self.updates < self.options.freeze_updates)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if is_main_process() and (warning := self._untaught()):
            say(f"warning: {warning}")

    def _untaught(self) -> str | None:
        """What to say of weights that are frozen though nobody has trained them."""
        settings = self.identity.get("config", {}).get("model", {})
        if settings.get("init_from") or not settings:
            return None
        if settings.get("freeze_extractor"):
            return (
                "model.freeze_extractor=true without model.init_from: the convolutions keep their "
                "random values; name a pre-training, or set it to false"
            )
        if self.options.freeze_updates:
            return (
                f"task.freeze_updates={self.options.freeze_updates} without model.init_from: for "
                "so long the head reads random features"
            )
        return None

    def frozen(self) -> list[nn.Parameter]:
        return list(self.model.encoder_parameters()) if self.freezes else []

    def step(self, batch: Batch, split: Split) -> StepOutput:
        left_out = self._left_out(batch) if split == "train" else {}
        logits_BTV, frames_B = self.model(batch["audio"], batch["length"], **left_out)
        log_probs_BTV = logits_BTV.float().log_softmax(dim=-1)
        loss_B = ctc_loss(
            log_probs_BTV,
            frames_B,
            target_BL=batch["target"],
            target_length_B=batch["target_length"],
        )
        valid_B = batch["valid"]
        # not by a product: a loss that is no number in a padding row must not count
        loss_sum = torch.where(valid_B.bool(), loss_B, 0.0).sum()
        seconds = (batch["length"] * valid_B).sum() / RATE
        if split == "train":
            return StepOutput(loss_sum, valid_B.sum(), units=seconds)
        real_B = valid_B.bool()
        logs, inputs = self._decoded(
            log_probs_BTV[real_B], frames_B[real_B], batch["target"][real_B]
        )
        return StepOutput(loss_sum, valid_B.sum(), logs=logs, metric_inputs=inputs, units=seconds)

    def _left_out(self, batch: Batch) -> dict[str, Any]:
        """What training leaves out: spans of frames and of channels, layers, gradients."""
        o, model = self.options, self.model
        where = {"ids": batch["sample_id"], "epoch": batch["epoch"]}
        found: dict[str, Any] = {"freeze_encoder": self.freezes}
        if o.mask_prob:
            found["mask_BT"] = masks.span_mask(
                frames_of(batch["length"]),
                size=int(frames_of(batch["audio"].shape[1])),
                prob=o.mask_prob,
                span=o.mask_length,
                min_spans=MIN_MASKS,
                seeds_B=sample_seeds(self.seed, "mask", **where),
            )
        if o.mask_channel_prob:
            channels = len(model.mask_embedding)
            found["channel_mask_BC"] = masks.span_mask(
                torch.full_like(batch["length"], channels),
                size=channels,
                prob=o.mask_channel_prob,
                span=o.mask_channel_length,
                seeds_B=sample_seeds(self.seed, "channel_mask", **where),
            )
        depth, prob = model.encoder_depth, model.layer_drop
        found["layers_kept"] = masks.layers_kept(
            self.seed, self.updates, depth, prob=prob, device=self.device
        )
        return found

    def _decoded(
        self, log_probs_BTV: Tensor, frames_B: Tensor, target_BL: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums of an evaluation, and what the error rates compare."""
        ids_BT = log_probs_BTV.argmax(dim=-1)
        real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < frames_B[:, None]
        blanks_B = ((ids_BT == BLANK) & real_BT).sum(dim=1) / frames_B.clamp(min=1)
        if self.beam is None:
            preds_BL = collapse(ids_BT, frames_B)
        else:
            preds_BL = self.beam(log_probs_BTV, frames_B)
        logs = {"blank_share": blanks_B.sum(), "hyp_letters": (preds_BL != BLANK).sum()}
        return logs, {"preds": preds_BL, "target": target_BL}

    def metrics(self) -> MetricCollection:
        shown = self.options.samples
        return MetricCollection(
            {"wer": WordErrors(shown=shown), "cer": CharErrors()}, compute_groups=False
        )

    def after_evaluation(self, split: Split, values: dict[str, float]) -> None:
        if not is_main_process():
            return
        collection: Any = self.split_metrics[split]
        words: ErrorRate = collection["wer"]
        for reference, hypothesis in words.pairs:
            say(f"{split}: {reference} | {hypothesis or '(nothing)'}")
        warning = blank_alarm(
            values[f"{split}/blank_share"], letters=values[f"{split}/hyp_letters"]
        )
        if warning:
            say(f"warning: {warning}")


def blank_alarm(share: float, *, letters: float) -> str | None:
    """What to say of a network that answers with the blank alone; None for any other.

    share: of frames whose likeliest label is the blank. letters: of the mean hypothesis. A network
    that has learnt to read is near the first, never the second: its letters are short peaks.
    """
    if share < BLANK_ALARM or letters > LETTERS_ALARM:
        return None
    return (
        f"the network still says only blank ({100 * share:.1f} % of the frames, {letters:.1f} "
        "letters a hypothesis), so the error rate stays at 1; it is usual for some hundred updates "
        "from scratch; if it lasts, train longer, raise optim.lr or lower task.mask_prob"
    )


SPEC = TaskSpec(
    name="speech/ctc",
    module=CTC,
    models=CTC_MODELS,
    data=CTC_DATA,
    primary=("wer", "min", "val"),
    unit="seconds of audio",
    keep_sites=("stem", "embed"),
    options=CTCTaskOptions(),
)
