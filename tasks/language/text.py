"""The user's own texts as data: `data=text`, a file or a folder of them.

Each file is a document. Whole documents go to a split, by a hash of their path, so that a split
does not depend on the order of a listing; one file alone is cut in three, its end held out, as
random pieces of one text have the sentences around them in training. Copies of a document stay on
one side. All is read into memory: a large text is for `python -m tasks.language.tokenize`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from suite.data import SKIP_LIMIT, SPLITS, Split, Splits, check_skip_limit
from suite.errors import ConfigError, shown
from tasks.language.encoding import ByteEncoding, CharEncoding, Encoding
from tasks.language.text_files import Document, endings, name_bytes, read_all
from tasks.language.tokenizer_file import load_tokenizer
from tasks.language.windows import About, LanguageDataOptions, join_documents, token_splits

NAME = "text"
LARGE = 200_000_000  # bytes; above it ids should not be made anew for each run
VAL_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class TextOptions(LanguageDataOptions):
    """Settings of texts in files.

    root: a text file, or a folder that is searched with all below it; folders train, val (valid,
    validation) and test in it are the splits. suffixes: of the files that are taken from a folder,
    separated by commas. encoding: bytes; characters, those of training; or tokenizer, with
    tokenizer: a tokenizer.json. val_share, test_share: parts of the bytes that are held out where
    no folders say it; a test_share of 0 makes the validation the test too. split_seed: of the
    choice of documents, apart from the run's seed. on_error: what a file does that is no text: end
    the run, or be left out and counted; skip_limit: the largest share of the files that may be.
    """

    root: str | None = None
    suffixes: str = ".txt,.md,.text"
    encoding: Literal["bytes", "characters", "tokenizer"] = "bytes"
    tokenizer: str | None = None
    val_share: float = 0.05
    test_share: float = 0.05
    split_seed: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    skip_limit: float = SKIP_LIMIT

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("bytes", "characters", "tokenizer")
        if self.encoding not in allowed:
            raise ValueError(f"encoding must be one of {', '.join(allowed)}, got {self.encoding!r}")
        if self.tokenizer is not None and self.encoding != "tokenizer":
            raise ValueError(
                f"tokenizer is for data.encoding=tokenizer, got encoding={self.encoding!r}; set "
                "it, or leave data.tokenizer out"
            )
        if self.tokenizer is None and self.encoding == "tokenizer":
            raise ValueError("tokenizer must name a tokenizer.json where encoding is tokenizer")
        check_skip_limit(self.skip_limit)
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must be above 0 and below 1, got {self.val_share}")
        if not 0 <= self.test_share < 1 or self.val_share + self.test_share >= 1:
            raise ValueError(
                "test_share must be at least 0 and with val_share below 1, got "
                f"{self.test_share} and {self.val_share}"
            )
        if not endings(self.suffixes) or any(len(s) < 2 for s in endings(self.suffixes)):
            raise ValueError(f"suffixes must be like '.txt,.md', got {self.suffixes!r}")


Parts = dict[Split, list[Document]]


def build_text(options: TextOptions, *, seed: int) -> Splits:
    """The splits of the user's texts. Raises ConfigError for files that cannot be used."""
    if options.root is None:
        raise ConfigError("data=text: needs data.root=PATH, a text file or a folder of them")
    root = Path(options.root).expanduser()
    documents, notes, left_out, listed = read_all(
        root,
        suffixes=options.suffixes,
        utf8=options.encoding != "bytes",
        on_error=options.on_error,
        limit=options.skip_limit,
    )
    folders = split_folders(root)
    if root.is_file():
        parts = cut(documents[0], options)
    elif folders:
        parts, said = by_folders(documents, folders, root=root, options=options)
        notes += said
    elif len(documents) == 1:
        parts = cut(documents[0], options)
    else:
        parts, said = by_documents(documents, options, where=root)
        notes += said
    if not parts["test"]:
        parts["test"] = parts["val"]
        notes.append("the validation is the test too: there is no text for a test")
    encoding = encoding_for(parts, options)
    splits = token_splits(
        {
            split: join_documents(
                [encoding.encode(each.content) for each in parts[split]], encoding=encoding
            )
            for split in SPLITS
        },
        about=About(
            NAME, license="of the user's files", source=str(root), sha256=digest(documents)
        ),
        options=options,
        seed=seed,
        encoding=encoding,
        vocab_size=encoding.vocab_size,
        notes=notes + size_notes(parts, documents),
    )
    train: Any = splits.train  # which split they would have been in is not known of all
    train.left_out, train.listed = tuple(left_out), listed
    return splits


def encoding_for(parts: Parts, options: TextOptions) -> Encoding:
    """The encoding that the options name. Raises ConfigError for characters not in training."""
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    if options.encoding == "bytes":
        return ByteEncoding()
    known = {c for each in parts["train"] for c in each.content.decode()}
    for split in ("val", "test"):
        for each in parts[split]:
            text = each.content.decode()
            if strange := set(text) - known:
                first = min(strange, key=text.index)
                raise ConfigError(
                    f"data=text: {split} has {len(strange):,} characters that training does not "
                    f"have, the first {first!r} (U+{ord(first):04X}) in {shown(each.name)}; use "
                    "data.encoding=bytes, which has an id for everything, or another split"
                )
    return CharEncoding("".join(known))


def size_notes(parts: Mapping[Split, Sequence[Document]], documents: list[Document]) -> list[str]:
    """How many documents and bytes each split has; and what to do with very many."""
    said = ", ".join(
        f"{split} {len(parts[split]):,} documents of {size_of(parts[split]):,} bytes"
        for split in SPLITS
    )
    notes = [said]
    if (total := size_of(documents)) > LARGE:
        notes.append(
            f"{total:,} bytes of text are encoded anew at each start; python -m "
            "tasks.language.tokenize does it once, for data=token_bin"
        )
    return notes


def size_of(documents: Iterable[Document]) -> int:
    """Bytes of documents together."""
    return sum(len(each.content) for each in documents)


def digest(documents: Iterable[Document]) -> str:
    """Of names and contents."""
    total = hashlib.sha256()
    for each in documents:
        total.update(name_bytes(each.name) + b"\0" + hashlib.sha256(each.content).digest())
    return total.hexdigest()


# --- splits ---------------------------------------------------------------------------------------


def cut(document: Document, options: TextOptions) -> Parts:
    """One text as three: its beginning is for training, its end for the test."""
    total = len(document.content)
    shares = [options.val_share, options.test_share]
    near = int(total * min(share for share in shares if share > 0) / 4)
    ends = [round(total * (1 - sum(shares))), round(total * (1 - shares[1])), total]
    first, second = (line_end(document.content, end, near=near) for end in ends[:2])
    second = total if options.test_share == 0 else max(first, second)
    pieces = document.content[:first], document.content[first:second], document.content[second:]
    return {
        split: [Document(document.name, piece)] if piece else []
        for split, piece in zip(SPLITS, pieces, strict=True)
    }


def line_end(content: bytes, place: int, *, near: int) -> int:
    """The place after a line's end that is nearest to `place` and at most `near` away; where there
    is none, the first place at or before `place` that is not inside a character."""
    before = content.rfind(b"\n", max(place - near, 0), place) + 1
    after = content.find(b"\n", place, place + near) + 1
    found = [end for end in (before, after) if end]
    if found:
        return min(found, key=lambda end: abs(end - place))
    while 0 < place < len(content) and content[place] & 0xC0 == 0x80:
        place -= 1
    return place


def by_documents(
    documents: Sequence[Document], options: TextOptions, *, where: Path
) -> tuple[Parts, list[str]]:
    """Whole documents to a split, equal ones to the same, and notes. Raises ConfigError."""
    same: dict[bytes, list[Document]] = {}
    for each in documents:
        same.setdefault(hashlib.sha256(each.content).digest(), []).append(each)
    groups = sorted(same.values(), key=lambda group: lot(group[0].name, options.split_seed))
    needed = 2 if options.test_share == 0 else 3
    if len(groups) < needed:
        raise ConfigError(
            f"data=text: {shown(where)} has {len(groups)} different documents, and a split by "
            f"documents needs {needed}; join them into one file, which is cut, or sort them into "
            "folders train, val and test"
        )
    total = size_of(documents)
    test = take(groups, total * options.test_share, leave=2) if options.test_share else []
    groups = without(groups, test)
    val = take(groups, total * options.val_share, leave=1)
    train = without(groups, val)
    copies = len(documents) - len(same)
    notes = [f"{copies:,} documents are copies of others; copies are in the same split"]
    chosen = {"train": train, "val": val, "test": test}
    return {
        split: sorted(each for group in chosen[split] for each in group) for split in SPLITS
    }, notes if copies else []


def take(groups: Sequence[list[Document]], wanted: float, *, leave: int) -> list[list[Document]]:
    """Some groups, at least one, of about `wanted` bytes together, in their order; at least `leave`
    stay."""
    taken: list[list[Document]] = []
    total = 0
    for group in groups:
        size = size_of(group)
        if len(taken) < len(groups) - leave and abs(total + size - wanted) < abs(total - wanted):
            taken.append(group)
            total += size
    return taken or [min(groups, key=size_of)]


def without(
    groups: Sequence[list[Document]], taken: Sequence[list[Document]]
) -> list[list[Document]]:
    """The groups that are not taken."""
    names = {group[0].name for group in taken}
    return [group for group in groups if group[0].name not in names]


def lot(name: str, split_seed: int) -> bytes:
    """A document's place in the order in which documents are held out."""
    return hashlib.sha256(f"{split_seed} ".encode() + name_bytes(name)).digest()


def split_folders(root: Path) -> dict[Split, str]:
    """The folders in root that say the split, {} where there are none. Raises ConfigError."""
    vals = [name for name in VAL_FOLDERS if (root / name).is_dir()]
    if len(vals) > 1:
        raise ConfigError(f"data=text: {shown(root)} has {' and '.join(vals)}; keep one of them")
    if not (root / "train").is_dir():
        if vals:
            raise ConfigError(
                f"data=text: {shown(root)} has a folder {vals[0]} and none that is called train; "
                f"make it, or rename {vals[0]}"
            )
        return {}
    found: dict[Split, str] = {"train": "train"}
    if vals:
        found["val"] = vals[0]
    if (root / "test").is_dir():
        found["test"] = "test"
    return found


def by_folders(
    documents: Sequence[Document],
    folders: Mapping[Split, str],
    *,
    root: Path,
    options: TextOptions,
) -> tuple[Parts, list[str]]:
    """The splits that folders say, and notes. Raises ConfigError for a folder without text."""
    parts: Parts = {"train": [], "val": [], "test": []}
    for split, folder in folders.items():
        parts[split] = [each for each in documents if each.name.startswith(f"{folder}/")]
        if not parts[split]:
            raise ConfigError(
                f"data=text: {shown(root / folder)} has no text in files of {options.suffixes}; "
                "put some there, or take the folder away"
            )
    notes = []
    if (left := len(documents) - sum(map(len, parts.values()))) > 0:
        notes.append(f"{left:,} documents in none of {', '.join(folders.values())} are left out")
    if "val" not in folders:
        alone = parts["train"]
        without_test = TextOptions(
            val_share=options.val_share, test_share=0, split_seed=options.split_seed
        )
        if len(alone) == 1:
            held = cut(alone[0], without_test)
        else:
            held, said = by_documents(alone, without_test, where=root / "train")
            notes += said
        parts["train"], parts["val"] = held["train"], held["val"]
        notes.append(f"{options.val_share:g} of train is the validation: there is no folder val")
    return parts, notes + shared(parts)


def shared(parts: Mapping[Split, Sequence[Document]]) -> list[str]:
    """A note where a document of train is evaluated on too."""
    train, notes = {each.content for each in parts["train"]}, []
    for split in ("val", "test"):
        both = [each for each in parts[split] if each.content in train]
        if both:
            notes.append(
                f"{len(both):,} documents of {split} are in train too, the first "
                f"{shown(both[0].name)}: {split} is not unseen"
            )
    return notes
