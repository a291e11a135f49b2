"""One split of an audio set: its batches, padded or cropped to like length.

A batch is as many clips as `batch_seconds` of padded audio hold, so that a step costs the same
whether its clips are short or long; suite.buckets puts clips of like length together. What a clip
looks like depends on (seed, epoch, index) alone: two norms, or two numbers of processes, are given
the same crops.

Shapes: B examples of a batch, S samples, L letters of a transcript, N clips of the split.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suite.buckets import LengthBuckets
from suite.data import SKIP_LIMIT, DataOptions, check_skip_limit
from suite.errors import DataError
from suite.randomness import uniform
from tasks.speech import text
from tasks.speech.audio import SAMPLE_RATE, AudioError, UnreadableError, Wave
from tasks.speech.clips import Clips

RECEPTIVE = 400  # samples that the first frame of wav2vec 2.0's extractor sees: 25 ms
MOST_WARNINGS = 20  # of a loader's worker
REPAIR = "repair or remove it, or set data.on_error=skip"
EPS = 1e-5  # as in torch's layer_norm, by which fairseq normalises a clip

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AudioOptions(DataOptions):
    """What the options of every audio set have.

    batch_size: the most clips of an optimizer step, over all processes and accumulation steps.
    batch_seconds: the most padded seconds of audio of that step. drop_last: false; every clip is in
        one batch of an epoch.
    crop_seconds: longer clips are cropped, in training at a random place; None: never. For CTC,
        which needs all that its transcript says, longer training clips are left out.
    min_seconds: shorter clips are left out.
    pad: fill up with zeros to the longest clip of a batch; False: crop training clips to the
        shortest of their bucket, as the published pre-training does.
    normalize: zero mean and unit variance in every clip, as large_lv60k was trained.
    resample, mix_channels: take files of another rate than 16 kHz, or of several channels.
    on_error: what a clip does that cannot be used: end the run, or be left out and counted.
    skip_limit: the largest share of a split that may be left out so.
    cache: folder where the lengths of files are kept; None: the user's cache folder; "none":
        nowhere.
    """

    by_length: ClassVar[bool] = True  # suite.checks: batch_size need not divide by the processes

    batch_size: int = 64
    drop_last: bool = False
    batch_seconds: float = 32.0
    crop_seconds: float | None = None
    min_seconds: float = 0.5
    pad: bool = True
    normalize: bool = False
    resample: bool = False
    mix_channels: bool = False
    on_error: Literal["fail", "skip"] = "fail"
    skip_limit: float = SKIP_LIMIT
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_last:
            raise ValueError("drop_last must be false: every clip is in one batch of an epoch")
        check_skip_limit(self.skip_limit)
        shortest = RECEPTIVE / SAMPLE_RATE
        if not (math.isfinite(self.batch_seconds) and self.batch_seconds > 0):
            raise ValueError(f"batch_seconds must be above 0, got {self.batch_seconds}")
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= shortest):
            raise ValueError(
                f"min_seconds must be at least {shortest:g}, one frame of the model, got "
                f"{self.min_seconds}"
            )
        if self.crop_seconds is not None and not (self.min_seconds <= self.crop_seconds < math.inf):
            raise ValueError(
                f"crop_seconds must be a number from min_seconds, {self.min_seconds:g}, got "
                f"{self.crop_seconds}"
            )

    @property
    def batch_text(self) -> str:
        """What an optimizer step holds, for the lines that a run starts with."""
        return f"{self.batch_seconds:g} s of audio"

    @property
    def min_samples(self) -> int:
        """The shortest clip."""
        return math.ceil(self.min_seconds * SAMPLE_RATE)

    @property
    def max_samples(self) -> int | None:
        """What longer clips are cropped to."""
        return None if self.crop_seconds is None else int(self.crop_seconds * SAMPLE_RATE)


class AudioSplit:
    """Those of `clips` whose numbers are in `places`.

    lengths: [N] samples that a batch holds of each. words: batches hold the transcripts, and no
    clip is cropped. by_class: clips are in order of speakers. skips: whether rows may turn out to
    be unreadable (on_error=skip), skip_limit: how many. left_out: files that were already.
    """

    def __init__(
        self,
        clips: Clips,
        places: Places,
        *,
        name: str,
        options: AudioOptions,
        seed: int,
        train: bool,
        words: bool,
        left_out: Sequence[str] = (),
    ) -> None:
        self.clips, self.places, self.name, self.seed = clips, places, name, seed
        self.normalize, self.skip_limit = options.normalize, options.skip_limit
        self.skips, self.left_out = options.on_error == "skip", list(left_out)
        self.vocabulary: str | None = text.LABELS if words else None
        whole = clips.lengths[places]
        longest = None if words else options.max_samples
        self.lengths = whole if longest is None else np.minimum(whole, longest)
        self.buckets: LengthBuckets | None = LengthBuckets(
            self.lengths,
            budget=options.batch_seconds * SAMPLE_RATE,
            max_rows=options.batch_size if train else options.eval_batch_size or options.batch_size,
            seed=seed,
            advice="raise data.batch_seconds (and data.batch_size)"
            + ("" if words else ", or crop the clips with data.crop_seconds"),
        )
        self.cropped = train and not options.pad and not words
        self.share = 1.0  # of the audio that is in the batches
        if self.cropped:
            self.share = float(self.buckets.crop_to.sum() / max(1, self.lengths.sum()))
            self.lengths = self.buckets.crop_to
        self.shortest = options.min_samples
        self.named: set[str] = set()  # files that this process has warned of

    by_class = True

    def __len__(self) -> int:
        return len(self.places)

    def path_of(self, index: int) -> str:
        """The file of a clip."""
        return self.clips.path(int(self.places[index]))

    def text_of(self, index: int) -> str:
        """The transcript of a clip."""
        assert self.clips.texts is not None, "a set without transcripts"
        return self.clips.texts[int(self.places[index])]

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """{"audio": [B, S] float32, zero-padded, "length": [B] int64}.

        For CTC also "target": [B, L] int64 label ids, zero-padded, and "target_length": [B].
        With on_error=skip also "valid" [B] bool; a row that is not is zeros of the least length.
        Raises DataError with on_error=fail.
        """
        starts = self.starts(indices, epoch=epoch) if train else [0] * len(indices)
        # rows that fill a batch up repeat one of its clips: that is read once
        waves = {
            i: self.wave(i, start=s) for i, s in dict(zip(indices, starts, strict=True)).items()
        }
        rows = [waves[i] for i in indices]
        length = torch.tensor(
            [self.filler(i) if w is None else len(w) for i, w in zip(indices, rows, strict=True)]
        )
        audio = torch.zeros(len(indices), int(length.max()) if indices else 0)
        for row, wave in enumerate(rows):
            if wave is not None:
                audio[row, : len(wave)] = torch.from_numpy(wave)
        batch = {"audio": audio, "length": length}
        valid = torch.tensor([wave is not None for wave in rows], dtype=torch.bool)
        if self.vocabulary is not None:
            batch |= self.targets(indices, valid=valid)
        return {**batch, "valid": valid} if self.skips else batch

    def starts(self, indices: list[int], *, epoch: int) -> list[int]:
        """Where each clip's crop begins in this epoch."""
        draws = uniform(self.seed, "crop", epoch, ids=torch.tensor(indices))[:, 0].numpy()
        room = self.clips.lengths[self.places[indices]] - self.lengths[indices]
        found: list[int] = (draws * (room + 1)).astype(np.int64).tolist()
        return found

    def filler(self, index: int) -> int:
        """Zeros that stand for a clip that cannot be read."""
        planned = int(self.lengths[index])
        return planned if self.cropped else min(planned, self.shortest)

    def targets(self, indices: list[int], *, valid: Tensor) -> dict[str, Tensor]:
        """The transcripts as label ids; empty for rows that are not valid."""
        ids = [
            text.encode(self.text_of(i)) if ok else []
            for i, ok in zip(indices, valid.tolist(), strict=True)
        ]
        target = torch.zeros(len(ids), max(map(len, ids), default=0), dtype=torch.int64)
        for row, letters in enumerate(ids):
            target[row, : len(letters)] = torch.tensor(letters, dtype=torch.int64)
        return {"target": target, "target_length": torch.tensor([len(row) for row in ids])}

    def wave(self, index: int, *, start: int) -> Wave | None:
        """What a batch holds of a clip; None where it is to be skipped."""
        place, count = int(self.places[index]), int(self.lengths[index])
        try:
            if not self.normalize:
                return self.clips.read(place, start=start, count=count)
            whole = self.clips.read(place)  # as published: a crop has its clip's mean and variance
        except UnreadableError as error:  # a lost disk must not pass for a million broken files
            raise DataError(f"data={self.name}: {error}; nothing of this kind is skipped") from None
        except AudioError as error:
            if not self.skips:
                raise DataError(f"data={self.name}: {error}; {REPAIR}") from None
            if not Path(error.path).parent.exists():  # with its folder a whole disk may be gone
                raise DataError(f"data={self.name}: {error}, nor does its folder") from None
            self.warn(error)
            return None
        return normalized(whole)[start : start + count]

    def warn(self, error: AudioError) -> None:
        """Name a file that is skipped, once in this process, and not without end."""
        known = len(self.named)
        if error.path in self.named or known > MOST_WARNINGS:
            return
        self.named.add(error.path)
        words = f"{error}; skipped" if known < MOST_WARNINGS else "further files are not named"
        print(f"warning: data={self.name}: {words}", file=sys.stderr, flush=True)


def normalized(wave: Wave) -> Wave:
    """Zero mean and unit variance; silence stays silent."""
    centred = wave - wave.mean(dtype=np.float64)
    scaled: Wave = (centred / np.sqrt(np.square(centred).mean() + EPS)).astype(np.float32)
    return scaled
