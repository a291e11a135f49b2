"""Labelled training and test sequences -> the three splits of a set.

Validation is a share of each class of the training set, and never the test set: Caduceus's papers
hold back a tenth with five seeds (arXiv:2403.03234, D.1), HyenaDNA's own script chooses the best
epoch on the test set (arXiv:2306.15794, A.3). Equal sequences stay on one side, and so do reverse
complements where the label does not depend on the strand; those of the test set that the training
set has too are not `novel`, so that a score without them can be told.

Shapes: N sequences, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from suite.data import DataInfo, Splits
from suite.errors import ConfigError
from suite.randomness import uniform
from tasks.dna.sequences import Ints, LabelledOptions, LabelledSplit, Sequences


@dataclass(frozen=True)
class About:
    """What DataInfo says of a set.

    classes: their names, in order of the labels. strand_specific: the label depends on the strand.
    task: which of several sets that `data=` has under this name. extra: more of what a task or a
    report may want to know.
    """

    name: str
    license: str
    source: str
    classes: Sequence[str]
    strand_specific: bool
    task: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def make_splits(
    train: Sequences,
    test: Sequences,
    *,
    about: About,
    options: LabelledOptions,
    seed: int,
    sha256: str | None = None,
    notes: Sequence[str] = (),
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> Splits:
    """The splits of a set whose training and test sequences are known.

    left_out: names of sequences of "train" and "test" that could not be used.
    sha256: of the source; None: that of the sequences. Raises ConfigError for fewer than two
    classes, a class without sequences in either, an empty sequence, a class too small to divide,
    and for reverse complements that are asked for where the label depends on the strand.
    """
    check_strand(about, options)
    check_classes(train, test, about=about)
    digest = sha256 if sha256 is not None else content_sha256(train, test, about.classes)
    said, gone = list(notes), left_out or {}
    if options.max_length is not None:
        said += cut_note(train, test, options.max_length)
        train, test = train.cut(options.max_length), test.cut(options.max_length)
    both = not about.strand_specific
    train_keys, test_keys = train.keys(both_strands=both), test.keys(both_strands=both)
    known = set(train_keys)
    novel = np.array([key not in known for key in test_keys])
    val_seed = options.val_seed if options.val_seed is not None else seed
    held = held_back(train_keys, train.labels, about=about, share=options.val_share, seed=val_seed)
    said += repeat_notes(train_keys, train.labels, novel, about=about)
    augment = both if options.rc_augment is None else options.rc_augment
    splits = {
        "train": LabelledSplit(
            train.take(~held), seed=seed if augment else None, left_out=gone.get("train", ())
        ),
        "val": LabelledSplit(train.take(held), novel=np.ones(int(held.sum()), bool)),
        "test": LabelledSplit(test, novel=novel, left_out=gone.get("test", ())),
    }
    info = DataInfo(
        name=about.name if about.task is None else f"{about.name}/{about.task}",
        license=about.license,
        source=about.source,
        sha256=digest,
        synthetic=False,
        sizes={name: len(split) for name, split in splits.items()},
        classes=len(about.classes),
        extra={
            "length": int(max(train.lengths.max(), test.lengths.max())),
            "strand_specific": about.strand_specific,
            "class_names": list(about.classes),
            "test_novel": int(novel.sum()),
            **({"task": about.task} if about.task is not None else {}),
            **about.extra,
            "notes": said,
        },
    )
    return Splits(splits["train"], splits["val"], splits["test"], info)


def check_strand(about: About, options: LabelledOptions) -> None:
    """Raise ConfigError for an augmentation that would change what the label means."""
    if about.strand_specific and options.rc_augment:
        raise ConfigError(
            f"data.rc_augment=true: the classes of data={about.name} are defined on one strand, "
            "and a reverse complement has another; leave data.rc_augment out"
        )


def check_classes(train: Sequences, test: Sequences, *, about: About) -> None:
    """Raise ConfigError unless there are two classes and all have sequences in both."""
    if len(about.classes) < 2:
        raise ConfigError(
            f"data={about.name}: there is one class alone ({', '.join(about.classes)}); "
            "a classifier needs two or more"
        )
    for part, sequences in (("train", train), ("test", test)):
        counts = np.bincount(sequences.labels, minlength=len(about.classes))
        if not counts.all():
            missing = about.classes[int(np.flatnonzero(counts == 0)[0])]
            raise ConfigError(
                f"data={about.name}: {part} has no sequence of the class {missing!r}; "
                "every class needs some in train and in test"
            )
        if not sequences.lengths.all():
            number = int(np.flatnonzero(sequences.lengths == 0)[0])
            raise ConfigError(
                f"data={about.name}: sequence {number + 1} of {part} is empty; remove it"
            )


def held_back(
    keys: Sequence[bytes], labels: Ints, *, about: About, share: float, seed: int
) -> np.ndarray:
    """[N] which are for validation: `share` of each class, equal sequences on one side.

    Raises ConfigError for a class that has fewer than two different sequences.
    """
    numbers: dict[bytes, int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    sizes = np.bincount(group)
    class_of = np.full(len(numbers), -1)
    class_of[group[::-1]] = labels[::-1]  # of a sequence with two classes: that of its first
    draws = uniform(seed, "val", ids=torch.arange(len(numbers)))[:, 0].numpy()
    chosen = np.zeros(len(numbers), bool)
    for label, name in enumerate(about.classes):
        groups = np.flatnonzero(class_of == label)
        if len(groups) < 2:
            raise ConfigError(
                f"data={about.name}: train has {len(groups)} different sequence(s) of the class "
                f"{name!r}, too few to hold one back for validation; it needs 2 or more"
            )
        wanted = max(1, round(share * int(sizes[groups].sum())))
        order = groups[np.argsort(draws[groups], kind="stable")]
        chosen[first_that_fit(order, sizes, wanted)] = True
    return chosen[group]


def first_that_fit(order: np.ndarray, sizes: np.ndarray, wanted: int) -> list[int]:
    """Groups in this order, none that would exceed `wanted` sequences; one and not all of them."""
    taken: list[int] = []
    left = wanted
    for each in order[:-1].tolist():
        if sizes[each] <= left:
            taken.append(each)
            left -= int(sizes[each])
        if not left:
            break
    return taken or [int(order[np.argmin(sizes[order])])]


# --- what is said ---------------------------------------------------------------------------------


def cut_note(train: Sequences, test: Sequences, longest: int) -> list[str]:
    """How many sequences max_length cuts."""
    lengths = np.concatenate([train.lengths, test.lengths])
    cut = int((lengths > longest).sum())
    if not cut:
        return []
    return [
        f"data.max_length={longest} cuts {cut:,} of {len(lengths):,} sequences "
        f"(the longest has {lengths.max():,} bases)"
    ]


def repeat_notes(
    keys: Sequence[bytes], labels: Ints, novel: np.ndarray, *, about: About
) -> list[str]:
    """What is in both train and test, and what is in train under two classes."""
    or_other = "" if about.strand_specific else ", or as their reverse complement,"
    notes = []
    if known := int((~novel).sum()):
        notes.append(
            f"{known:,} of {len(novel):,} test sequences are{or_other} in the training set too"
        )
    classes: dict[bytes, int] = {}
    pairs = zip(keys, labels.tolist(), strict=True)
    twice = {key for key, label in pairs if classes.setdefault(key, label) != label}
    if twice:
        notes.append(f"{len(twice):,} training sequences occur under two classes")
    return notes


def content_sha256(train: Sequences, test: Sequences, classes: Sequence[str]) -> str:
    """Of every sequence and its class, as they were found."""
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for sequences in (train, test):
        digest.update(sequences.lengths.tobytes() + sequences.labels.tobytes())
        digest.update(np.ascontiguousarray(sequences.ids[sequences.covered]).data)
    return digest.hexdigest()
