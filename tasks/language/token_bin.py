"""`data=token_bin`: token files of any size, memory-mapped, in nanoGPT's layout.

A folder with train.bin, val.bin and perhaps test.bin (see bin_folder), written by
`python -m tasks.language.tokenize` or by one of nanoGPT's prepare.py. Nothing is read whole: ids
are checked against the vocabulary at the start in samples, and in training in every batch, so that
an id beyond the embedding ends in a line that says where it is and not in a CUDA assertion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from suite.cache import cache_folder, keep, recall
from suite.data import SPLITS, DataInfo, Split, Splits
from suite.errors import ConfigError, DataError, shown
from tasks.language.bin_folder import (
    DTYPES,
    FILES,
    META,
    Meta,
    blocks,
    check_file,
    digest_of,
    document_starts,
    first_beyond,
    open_tokens,
    read_meta,
    samples,
    wrong,
)
from tasks.language.encoding import Encoding, encoding_of
from tasks.language.windows import LanguageDataOptions, TokenSplit, encoding_extra

NAME = "token_bin"
Dtype = Literal["auto", "uint16", "uint32"]


@dataclass(frozen=True)
class TokenBinOptions(LanguageDataOptions):
    """Settings of token files.

    root: the folder. dtype: of the ids; auto: as meta.json says, else uint16. vocab_size: how many
    ids there are; null: as meta.json says. end: the id that closes a document, for
    documents=mask and pad (GPT-2: 50256); null: as meta.json says. cache: folder for what a
    scan for documents found; null: the user's cache folder; "none": keep nothing.
    """

    root: str | None = None
    dtype: Dtype = "auto"
    vocab_size: int | None = None
    end: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in get_args(Dtype):
            allowed = ", ".join(get_args(Dtype))
            raise ValueError(f"dtype must be one of {allowed}, got {self.dtype!r}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}")
        if self.end is not None and self.end < 0:
            raise ValueError(f"end must not be negative, got {self.end}")
        if self.end is not None and self.vocab_size is not None and self.end >= self.vocab_size:
            raise ValueError(f"end must be below vocab_size={self.vocab_size}, got {self.end}")


class BinSplit(TokenSplit):
    """The rows of a token file; `fetch` checks their ids.

    Sent to another process it goes as its path: a memory map would go as a copy of all its ids.
    """

    def __init__(self, file: Path, dtype: str, *, vocab_size: int, **settings: Any) -> None:
        super().__init__(open_tokens(file, DTYPES[dtype]), **settings)
        self.file, self.dtype, self.vocab_size = file, dtype, vocab_size
        self._settings = settings

    def __reduce__(self) -> tuple[Callable[..., BinSplit], tuple[Any, ...]]:
        return reopen, (self.file, self.dtype, self.vocab_size, self._settings)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """As TokenSplit's. Raises DataError for an id that is not below vocab_size."""
        batch = super().fetch(indices, epoch=epoch, train=train)
        largest = max((int(batch[key].max()) for key in ("ids", "target")), default=0)
        if largest >= self.vocab_size:
            at = first_beyond(blocks(self.tokens), self.vocab_size)
            place = f"; the first such id, {at[1]:,}, is at position {at[0]:,}" if at else ""
            raise DataError(
                f"data={NAME}: {shown(self.file)} has the id {largest:,}, and the vocabulary has "
                f"{self.vocab_size:,}{place}; set data.vocab_size, or write the file again"
            )
        return batch


def reopen(file: Path, dtype: str, vocab_size: int, settings: dict[str, Any]) -> BinSplit:
    """A split as another process gets it."""
    return BinSplit(file, dtype, vocab_size=vocab_size, **settings)


def outline(options: TokenBinOptions) -> DataInfo:
    """What a model must know of the data, without any file.

    Raises ConfigError where the options do not say the vocabulary's size.
    """
    if options.vocab_size is None:
        raise ConfigError(
            f"data={NAME}: needs data.root=FOLDER with train.bin and val.bin; to try a model "
            "without files data.vocab_size must be given, such as 32000 (LLaMA) or 50257 (GPT-2)"
        )
    return DataInfo(
        name=NAME,
        license="unknown",
        source=options.root or "no files",
        sha256="",
        synthetic=False,
        sizes=dict.fromkeys(SPLITS, 0),
        extra=extra_of(options, vocab_size=options.vocab_size, end=options.end, encoding=None),
    )


def extra_of(
    options: TokenBinOptions,
    *,
    vocab_size: int,
    end: int | None,
    encoding: Encoding | None,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """DataInfo.extra of token files."""
    return {
        "vocab_size": vocab_size,
        "length": options.length,
        "documents": options.documents,
        **encoding_extra(encoding),
        "end": end,
        "notes": list(notes),
    }


def build_token_bin(options: TokenBinOptions, *, seed: int) -> Splits:
    """The splits of a folder. Raises ConfigError for one that cannot be used.

    DataInfo.sha256 is of sizes, ends and meta.json alone: see bin_folder.digest_of.
    """
    folder = folder_of(options)
    meta = read_meta(folder)
    dtype = dtype_of(options, meta, folder)
    files, notes = files_of(folder)
    for split, file in files.items():
        check_file(file, DTYPES[dtype], tokens=meta.tokens.get(split), length=options.length)
    vocab_size = vocab_size_of(options, meta, folder, files["train"], dtype)
    notes += [check_ids(files, dtype, vocab_size)]
    end = end_of(options, meta, vocab_size, folder)
    encoding, said = encoding_in(folder, meta, vocab_size)
    splits: dict[Split, BinSplit] = {
        split: BinSplit(
            file,
            dtype,
            vocab_size=vocab_size,
            starts=starts_of(file, dtype, options, end),
            length=options.length,
            documents=options.documents,
            shift=options.shift and split == "train",
            seed=seed,
        )
        for split, file in files.items()
    }
    if "test" not in splits:
        splits["test"] = splits["val"]
    info = DataInfo(
        name=NAME,
        license="unknown",
        source=str(folder),
        sha256=digest_of(list(files.values()), meta.content),
        synthetic=False,
        sizes={split: len(splits[split]) for split in SPLITS},
        extra=extra_of(
            options, vocab_size=vocab_size, end=end, encoding=encoding, notes=(*notes, *said)
        ),
    )
    return Splits(splits["train"], splits["val"], splits["test"], info)


def folder_of(options: TokenBinOptions) -> Path:
    """data.root, which must be a folder."""
    if options.root is None:
        raise ConfigError(
            f"data={NAME}: needs data.root=FOLDER with train.bin and val.bin; "
            "python -m tasks.language.tokenize writes one of a text"
        )
    folder = Path(options.root).expanduser().absolute()
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise wrong(folder, f"{kind}; data.root must be a folder with train.bin and val.bin")
    return folder


def files_of(folder: Path) -> tuple[dict[Split, Path], list[str]]:
    """The file of each split that has one, and notes."""
    files = {split: folder / FILES[split] for split in SPLITS if (folder / FILES[split]).exists()}
    for split in ("train", "val"):
        if split not in files:
            unfinished = (folder / "parts").is_dir()
            what = (
                "a tokenization that has not ended; the command that began it goes on with it"
                if unfinished
                else f"train.bin and val.bin are needed, and {FILES[split]} is missing"
            )
            raise wrong(folder, f"holds no token files that can be used: {what}")
    if "test" in files:
        return files, []
    return files, ["the validation is the test too: there is no test.bin"]


def dtype_of(options: TokenBinOptions, meta: Meta, folder: Path) -> str:
    """The name of the ids' type."""
    if options.dtype == "auto":
        return meta.dtype or "uint16"
    if meta.dtype not in (None, options.dtype):
        raise wrong(
            folder / META,
            f"says dtype {meta.dtype}, and data.dtype={options.dtype}; leave data.dtype out",
        )
    return options.dtype


def vocab_size_of(
    options: TokenBinOptions, meta: Meta, folder: Path, train: Path, dtype: str
) -> int:
    """How many ids there are: never guessed, as the largest id of a file may lack the last ones."""
    if options.vocab_size is None and meta.vocab_size is None:
        tokens = open_tokens(train, DTYPES[dtype])
        largest = max(int(ids.max()) for _, ids in samples(tokens))
        raise wrong(
            folder,
            f"has no {META} that says how many ids there are (nanoGPT's meta.pkl is never opened); "
            f"set data.vocab_size: GPT-2 has 50257, and the largest id seen here is {largest}",
        )
    if options.vocab_size is None or options.vocab_size == meta.vocab_size:
        return int(meta.vocab_size or 0)
    if meta.vocab_size is not None:
        raise wrong(
            folder / META,
            f"says vocab_size {meta.vocab_size}, and data.vocab_size={options.vocab_size}; leave "
            "data.vocab_size out (model.vocab_size may be larger)",
        )
    return options.vocab_size


def check_ids(files: dict[Split, Path], dtype: str, vocab_size: int) -> str:
    """A note that says how much was looked at. Raises ConfigError for an id that is too large."""
    seen = total = 0
    for file in files.values():
        tokens = open_tokens(file, DTYPES[dtype])
        for start, ids in samples(tokens):
            seen += ids.nbytes
            if (found := first_beyond(iter([(start, ids)]), vocab_size)) is not None:
                raise wrong(
                    file,
                    f"has the id {found[1]:,} at position {found[0]:,}, and the vocabulary has "
                    f"{vocab_size:,}; data.vocab_size or data.dtype is another one",
                )
        total += tokens.nbytes
    if seen == total:
        return f"all ids are below {vocab_size:,}"
    return (
        f"the ids of {seen / 1e6:,.0f} of {total / 1e6:,.0f} MB are below {vocab_size:,} (both "
        "ends of each file and places between); the others are checked in every batch"
    )


def end_of(options: TokenBinOptions, meta: Meta, vocab_size: int, folder: Path) -> int | None:
    """The id that closes a document; what the command line says counts more than meta.json."""
    end = meta.end if options.end is None else options.end
    if end is None and options.documents != "join":
        raise wrong(
            folder,
            f"does not say which id closes a document, and data.documents={options.documents} "
            "needs it; set data.end, such as data.end=50256 (GPT-2), or data.documents=join",
        )
    if end is not None and end >= vocab_size:
        raise ConfigError(f"data.end={end}: must be below the {vocab_size:,} ids that there are")
    return end


def encoding_in(folder: Path, meta: Meta, vocab_size: int) -> tuple[Encoding | None, list[str]]:
    """What turns ids into text, and notes: training does not need it, so a broken one is said."""
    without = "no bits per byte and no text are shown"
    if meta.encoding is None:
        return None, [f"{without}: no {META} says what the ids stand for"]
    try:
        encoding = encoding_of(dict(meta.encoding), folder=folder)
    except ConfigError as error:
        return None, [f"{without}: {error}"]
    if encoding.vocab_size != vocab_size:
        return None, [f"{without}: the encoding in {META} has {encoding.vocab_size:,} ids"]
    return encoding, []


def starts_of(file: Path, dtype: str, options: TokenBinOptions, end: int | None) -> np.ndarray:
    """Where documents begin; [0] for join, which need not know. Kept for files that stay as they
    are. Raises ConfigError where a training file has no end of a document.
    """
    if options.documents == "join" or end is None:
        return np.zeros(1, np.int64)
    stat = file.stat()
    key = f"1 {file} {stat.st_size} {stat.st_mtime_ns} {dtype} {end}"
    cache = cache_folder(options.cache, kind="documents")
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    kept = None if cache is None else cache / f"{name}.npz"
    starts = None if kept is None else recall_starts(kept, stat.st_size // DTYPES[dtype].itemsize)
    if starts is None:
        starts = document_starts(open_tokens(file, DTYPES[dtype]), end)
        if kept is not None:
            keep(kept, {}, {"starts": starts})
    if len(starts) == 1 and file.name == FILES["train"]:
        raise wrong(
            file,
            f"has one document: the id {end} closes none within it; set data.end to the id that "
            "does, or data.documents=join",
        )
    return starts


def recall_starts(kept: Path, tokens: int) -> np.ndarray | None:
    """What an earlier start found, or None."""
    try:
        starts = recall(kept)[1]["starts"]
        sound = starts.dtype == np.int64 and starts.ndim == 1 and starts[0] == 0
        return starts if sound and starts[-1] < tokens else None
    except Exception:  # there is none, or a damaged one: see suite.cache.recall
        return None
