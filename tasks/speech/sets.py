"""Lists of audio files, or clips in hand -> the three splits of a set.

Here is decided what is left out and said once: files that cannot be used and clips that are too
short; for CTC also those that have no transcript, are too long, or have fewer frames than their
letters need (no alignment exists, so their loss is infinite).

Shapes: N files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from suite.cache import cache_folder
from suite.data import DataInfo, Splits, too_many
from suite.errors import ConfigError, shown
from tasks.speech.audio import SAMPLE_RATE, AudioError, UnreadableError, check_format
from tasks.speech.clips import Clips, FileClips
from tasks.speech.index import Headers, load_headers
from tasks.speech.split import REPAIR, AudioOptions, AudioSplit, Places
from tasks.speech.text import LABELS, normalise
from tasks.speech.wav2vec2 import frames_of

LITTLE_KEPT = 0.9  # of the audio, when clips are cropped to like length


@dataclass(frozen=True)
class Listing:
    """N files that a data set consists of.

    label: what the list is called. names: relative paths, unique. paths: the files. texts: raw
    transcripts, or None. wheres: file and line of each, for messages, where there is one.
    """

    label: str
    names: Sequence[str]
    paths: Sequence[str]
    texts: Sequence[str] | None = None
    wheres: Sequence[str] | None = None


@dataclass(frozen=True)
class Part:
    """The clips of one split: those of `clips` whose numbers are in `places`."""

    clips: Clips
    places: Places

    @classmethod
    def whole(cls, clips: Clips) -> Part:
        """All of the clips."""
        return cls(clips, np.arange(len(clips.lengths), dtype=np.int64))

    def but(self, places: Places) -> Part:
        """Other places of the same clips."""
        return Part(self.clips, places)


@dataclass(frozen=True)
class About:
    """What DataInfo says of a set."""

    name: str
    license: str
    source: str
    synthetic: bool = False


# --- files ----------------------------------------------------------------------------------------


def file_clips(listing: Listing, *, name: str, options: AudioOptions, words: bool) -> FileClips:
    """The files of a listing as clips; what is wrong with some of them is in `faults`.

    Raises ConfigError where words are needed and there are none.
    """
    try:
        headers = load_headers(
            listing.paths,
            name=name,
            label=listing.label,
            cache=cache_folder(options.cache, kind="audio-index"),
        )
    except UnreadableError as error:
        raise ConfigError(f"data={name}: {error}; nothing of this kind is skipped") from None
    at = [f" ({shown(where)})" for where in listing.wheres or ()] or [""] * len(listing.paths)
    faults = {i: f"{reason}{at[i]}; {REPAIR}" for i, reason in headers.faults.items()}
    faults |= format_faults(listing, headers, options)
    texts: list[str] | None = None
    if words:
        if listing.texts is None:
            raise ConfigError(
                f"data={name}: {shown(listing.label)} has no transcripts; CTC needs them"
            )
        texts = [letters_of(listing, i, faults) for i in range(len(listing.paths))]
    samples = headers.samples.copy()
    samples[list(faults)] = 0
    return FileClips(
        listing.paths,
        names=listing.names,
        samples=samples,
        rates=headers.rates,
        texts=texts,
        faults=dict(sorted(faults.items())),
    )


def format_faults(listing: Listing, headers: Headers, options: AudioOptions) -> dict[int, str]:
    """The files whose rate or channels the options do not allow."""
    odd = np.flatnonzero((headers.rates != SAMPLE_RATE) | (headers.channels != 1))
    faults = {}
    for i in set(odd.tolist()) - set(headers.faults):
        try:
            check_format(
                listing.paths[i],
                rate=int(headers.rates[i]),
                channels=int(headers.channels[i]),
                resample=options.resample,
                mix_channels=options.mix_channels,
            )
        except AudioError as error:
            faults[i] = error.reason
    return faults


def letters_of(listing: Listing, i: int, faults: dict[int, str]) -> str:
    """The normalised transcript of file i; one that has other characters is a fault."""
    assert listing.texts is not None, "a listing without transcripts"
    try:
        return normalise(listing.texts[i])
    except ValueError as error:
        where = f" ({shown(listing.wheres[i])})" if listing.wheres is not None else ""
        faults.setdefault(i, f"its transcript{where} cannot be spelt: {error}")
        return ""


def by_hash(names: Sequence[str], share: float) -> tuple[Places, Places]:
    """The places of what is left and of `share`, chosen by a hash of every name.

    Why not a shuffle: it depends on the number of files, and one more would move all others.
    """
    digests = b"".join(
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in names
    )
    draws = np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64
    return np.flatnonzero(draws >= share), np.flatnonzero(draws < share)


# --- splits ---------------------------------------------------------------------------------------


def make_splits(
    parts: Mapping[str, Part],
    *,
    about: About,
    options: AudioOptions,
    seed: int,
    words: bool,
    notes: Sequence[str] = (),
) -> Splits:
    """The splits "train", "val" and "test" of `parts`, without what cannot be used.

    words: batches hold transcripts, for CTC. Raises ConfigError if nothing is left of a split, or
    if its transcripts hold no words.
    """
    if words and not options.pad:
        raise ConfigError(
            "data.pad=false crops training clips to like length, and CTC needs all that a "
            "transcript says; leave data.pad out"
        )
    splits, said = {}, list(notes)
    for split, part in parts.items():
        kept, faulty, out = keep(part, split=split, name=about.name, options=options, words=words)
        said += out
        splits[split] = AudioSplit(
            part.clips,
            kept,
            name=about.name,
            options=options,
            seed=seed,
            train=split == "train",
            words=words,
            left_out=[part.clips.path(i) for i in faulty],
        )
    train = splits["train"]
    if train.cropped and train.share < LITTLE_KEPT:
        said.append(
            f"data.pad=false keeps {train.share:.0%} of the training audio, cropped to the "
            "shortest clip of each bucket; a smaller data.batch_seconds keeps more"
        )
    info = describe(splits, about=about, words=words, notes=said)
    return Splits(splits["train"], splits["val"], splits["test"], info)


def keep(
    part: Part, *, split: str, name: str, options: AudioOptions, words: bool
) -> tuple[Places, list[int], list[str]]:
    """The places of a part that can be used, those that are faulty, and a note on the others.

    Raises ConfigError for the first that is faulty with on_error=fail, if too many are with
    on_error=skip, or if none is left.
    """
    places, clips, reasons = part.places, part.clips, []
    faulty = [int(i) for i in places if int(i) in clips.faults] if clips.faults else []
    if faulty:
        more = f"; {len(faulty) - 1:,} more clips are faulty" if len(faulty) > 1 else ""
        first = f"{shown(clips.path(faulty[0]))}: {clips.faults[faulty[0]]}"
        if options.on_error == "fail":
            raise ConfigError(f"data={name}: {first}{more}")
        first = first.removesuffix(f"; {REPAIR}")
        if why := too_many(len(faulty), len(part.places), limit=options.skip_limit):
            raise ConfigError(f"data={name}: {split}: {why}; the first is {first}")
        reasons.append(f"{len(faulty):,} faulty (the first: {first})")
        places = np.setdiff1d(places, np.array(faulty))
    short = clips.lengths[places] < options.min_samples
    if short.any():
        reasons.append(f"{short.sum():,} shorter than data.min_seconds={options.min_seconds:g}")
    places = places[~short]
    if words:
        places, more_reasons = keep_alignable(
            part.but(places), split=split, name=name, options=options
        )
        reasons += more_reasons
    if len(part.places) and not len(places):
        raise ConfigError(
            f"data={name}: none of the {len(part.places):,} clips of {split} can be used: "
            + "; ".join(reasons)
        )
    out = len(part.places) - len(places)
    total = len(part.places)
    note = f"{split}: {out:,} of {total:,} clips left out: {'; '.join(reasons)}"
    return places, faulty, [note] * bool(out)


def keep_alignable(
    part: Part, *, split: str, name: str, options: AudioOptions
) -> tuple[Places, list[str]]:
    """The places whose transcript CTC can align, and why the others are left out.

    Training clips above crop_seconds are left out, evaluation keeps them: an error rate is of all
    that was said.
    """
    clips, places, reasons = part.clips, part.places, []
    texts = clips.texts
    assert texts is not None, "a set without transcripts"
    said = np.array([bool(texts[i]) for i in places], dtype=bool)
    if len(said) and not said.any():
        raise ConfigError(
            f"data={name}: {split} has no words in its transcripts; CTC needs them to learn from"
        )
    if not said.all():
        reasons.append(f"{(~said).sum():,} without a transcript")
    places = places[said]
    if split == "train" and options.max_samples is not None:
        long = clips.lengths[places] > options.max_samples
        places = places[~long]
        if long.any():
            reasons.append(f"{long.sum():,} longer than data.crop_seconds={options.crop_seconds:g}")
    needed = np.array([frames_for(texts[i]) for i in places], dtype=np.int64)
    frames = frames_of(torch.from_numpy(clips.lengths[places])).numpy()
    few = frames < needed
    if few.any():
        first = int(np.flatnonzero(few)[0])
        what = (
            f"{shown(clips.path(int(places[first])))}: has {frames[first]} frames, and its "
            f"transcript needs {needed[first]}"
        )
        if options.on_error == "fail":
            raise ConfigError(
                f"data={name}: {what}, so that CTC cannot align them; correct or remove it, or set "
                "data.on_error=skip"
            )
        reasons.append(f"{few.sum():,} with fewer frames than letters (the first: {what})")
    return places[~few], reasons


def frames_for(transcript: str) -> int:
    """The fewest frames that can spell a transcript in CTC: a blank parts two equal letters."""
    letters = np.frombuffer(transcript.encode("ascii"), dtype=np.uint8)
    return len(letters) + int((letters[1:] == letters[:-1]).sum())


def describe(
    splits: Mapping[str, AudioSplit], *, about: About, words: bool, notes: Sequence[str]
) -> DataInfo:
    """What result.json and the models are told."""
    digest = hashlib.sha256()
    for split, part in splits.items():
        digest.update(f"{split} {len(part)}\n".encode())
        for i, place in enumerate(part.places):
            said = part.text_of(i) if words else ""
            line = f"{part.clips.names[place]}\0{part.clips.lengths[place]}\0{said}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    hours = {
        split: round(float(part.clips.lengths[part.places].sum()) / SAMPLE_RATE / 3600, 4)
        for split, part in splits.items()
    }
    return DataInfo(
        name=about.name,
        license=about.license,
        source=about.source,
        sha256=digest.hexdigest(),
        synthetic=about.synthetic,
        sizes={split: len(part) for split, part in splits.items()},
        classes=len(LABELS) if words else None,
        extra={
            "sample_rate": SAMPLE_RATE,
            "hours": hours,
            "labels": LABELS if words else None,
            # whether the rows of a training batch are equally long: then nothing need be masked
            "rectangular": splits["train"].cropped,
            "notes": tuple(notes),
        },
    )
