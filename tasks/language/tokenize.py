"""A corpus -> a folder for data=token_bin (`python -m tasks.language.tokenize`).

Which split a document is in depends on its text alone (and on --split-seed): a text that is there
twice is on one side twice, so that nothing of the validation has been trained on word for word.
nanoGPT's prepare.py shuffles documents instead, and lets equal ones fall on both sides.

The files do not depend on --workers, nor on how often the command was stopped and started again.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from suite.errors import ConfigError, DataError, shown
from suite.train import complain
from tasks.language.bin_folder import META
from tasks.language.bin_progress import Display
from tasks.language.bin_workers import Characters, Encoder, Job, in_order
from tasks.language.bin_writer import (
    FORMAT,
    PARTS,
    TOKENIZER,
    VERSION,
    Writer,
    foreign_names,
    read_json,
    sha256_of,
)
from tasks.language.corpus import Position, Source, list_sources, pieces
from tasks.language.encoding import ByteEncoding, CharEncoding, Encoding, id_dtype, load_tokenizer
from tasks.language.tokenize_cli import HELP, Settings, parse

SAVE_SECONDS = 5.0  # how often the disk gets everything
NAMED = 1000  # files that meta.json names


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. A mistake is one line on stderr, never a
    traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    try:
        return run(parse(words))
    except (ConfigError, DataError) as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from where this one stopped")
        return 130


def run(settings: Settings) -> int:
    """Do what the command line says; the exit code."""
    sources = list_sources(settings.input, suffixes=settings.suffix)
    check_places(settings, sources)
    encoding = known_encoding(settings)
    asked = asked_for(settings, sources)
    if (meta := finished(settings.out)) is not None:
        check_same(meta, asked, settings.out)
        shutil.rmtree(settings.out / PARTS, ignore_errors=True)
        print(f"{shown(settings.out)} is done already\n{summary(settings.out, meta)}")
        return 0
    if strange := foreign_names(settings.out):
        raise ConfigError(
            f"--out {shown(settings.out)} has other things in it "
            f"({shown(', '.join(strange[:3]))}); name a new folder"
        )
    total = sum(source.size for source in sources)
    with Writer(settings.out) as writer, Display(total) as display, asked_to_stop():
        if finished(settings.out) is not None:  # by another process, between the look and the lock
            raise ConfigError(f"--out {shown(settings.out)} was just written by another process")
        plan = begin(settings, asked, sources, encoding, writer, display)
        write_all(settings, plan, sources, writer, display)
        check_splits(settings, writer)
        listed = [{"name": s.name, "bytes": s.size} for s in sources[:NAMED]]
        about = plan | {"sources": {"files": len(sources), "bytes": total, "first": listed}}
        meta = writer.finish(about, itemsize=np.dtype(plan["dtype"]).itemsize)
    print(summary(settings.out, meta))
    return 0


# --- before anything is written -------------------------------------------------------------------


def check_places(settings: Settings, sources: list[Source]) -> None:
    """Raise ConfigError for places and documents that cannot be."""
    given, out = settings.input.resolve(), settings.out.resolve()
    if given.is_dir() and out.is_relative_to(given):
        raise ConfigError(
            f"--out {shown(settings.out)} lies in the folder that is read; name another"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {shown(settings.out)} is a file; name a new folder")
    if len(sources) == 1 and not sources[0].json and settings.document == "file":
        raise ConfigError(
            f"{shown(settings.input)} is one document, and no document is in two splits; say what "
            "else is a document, --document paragraph (up to a blank line) or --document line"
        )


def known_encoding(settings: Settings) -> Encoding | None:
    """The encoding; None for characters, which have to be found. Raises ConfigError."""
    if settings.encoding == "characters":
        return None
    if settings.tokenizer is None:
        encoding: Encoding = ByteEncoding()
    else:
        encoding = load_tokenizer(settings.tokenizer)
    check_end(settings, encoding)
    if encoding.end is None and settings.end is None:
        raise ConfigError(
            f"{shown(settings.tokenizer)} has no token that ends a document; say its id with --end"
        )
    return encoding


def check_end(settings: Settings, encoding: Encoding) -> None:
    """Raise ConfigError for an id that there is not."""
    if settings.end is not None and settings.end >= encoding.vocab_size:
        raise ConfigError(
            f"--end {settings.end}: must be below the {encoding.vocab_size:,} ids that there are"
        )


def asked_for(settings: Settings, sources: list[Source]) -> dict[str, Any]:
    """What the bytes of the result depend on: none but a command that asks for it may go on."""
    files = hashlib.sha256()
    for source in sources:
        files.update(f"{source.name!r} {source.size} {source.mtime} ".encode())
    tokenizer = None if settings.tokenizer is None else sha256_of(settings.tokenizer)
    return {
        "arguments": {
            "encoding": settings.encoding,
            "tokenizer": tokenizer,
            "val-share": settings.val_share,
            "test-share": settings.test_share,
            "split-seed": settings.split_seed,
            "document": settings.document,
            "text-key": settings.text_key,
            "suffix": ",".join(settings.suffix) if settings.input.is_dir() else None,
            "end": settings.end,
        },
        "input": files.hexdigest(),
    }


def finished(out: Path) -> dict[str, Any] | None:
    """meta.json of a folder that is done; None of one that is not, or is another's."""
    if not (out / META).is_file():
        return None
    meta = read_json(out / META)
    if meta is None or meta.get("format") != FORMAT:
        return None
    if meta.get("version") != VERSION:
        raise ConfigError(
            f"--out {shown(out)} was written by another version of this; name a new folder"
        )
    return meta


def check_same(before: Mapping[str, Any], asked: Mapping[str, Any], out: Path) -> None:
    """Raise ConfigError unless the folder was begun with what is asked for now."""
    was, now = before.get("arguments", {}), asked["arguments"]
    differ = [
        f"--{key} was {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key]
    ]
    if not differ and before.get("input") != asked["input"]:
        differ = ["the files of the input have changed"]
    if differ:
        raise ConfigError(
            f"--out {shown(out)} is of another command: {shown('; '.join(differ))}. Name a new "
            "folder, or delete that one"
        )


# --- the work -------------------------------------------------------------------------------------


def begin(
    settings: Settings,
    asked: dict[str, Any],
    sources: list[Source],
    encoding: Encoding | None,
    writer: Writer,
    display: Display,
) -> dict[str, Any]:
    """The plan: the one that the folder has, or a new one. Raises ConfigError."""
    if (plan := writer.plan()) is not None:
        check_same(plan, asked, settings.out)
        display.line(f"goes on with {shown(settings.out)}")
        return plan
    if encoding is None:
        encoding = CharEncoding(find_characters(settings, sources, display))
        check_end(settings, encoding)
    if settings.tokenizer is not None:
        shutil.copyfile(settings.tokenizer, writer.parts / TOKENIZER)
    plan = {
        "dtype": np.dtype(id_dtype(encoding.vocab_size)).name,
        "vocab_size": encoding.vocab_size,
        "end": encoding.end if settings.end is None else settings.end,
        "encoding": encoding.describe(),
        **asked,
    }
    writer.set_plan(plan)
    return plan


def find_characters(settings: Settings, sources: list[Source], display: Display) -> str:
    """Every character of the corpus, which is read for it. Raises ConfigError if there is none."""
    found: set[str] = set()
    given = pieces(sources, cut=settings.document, start=Position())
    display.begin(0)
    work = in_order(Characters, (settings.text_key,), given, workers=settings.workers)
    with closing(work):
        for piece, characters in work:
            found |= characters
            display.show(piece.read, f"{len(found):,} characters")
    if not found:
        raise ConfigError(f"{shown(settings.input)} has no text")
    return "".join(sorted(found))


def write_all(
    settings: Settings,
    plan: Mapping[str, Any],
    sources: list[Source],
    writer: Writer,
    display: Display,
) -> None:
    """Write every piece that is not written yet."""
    writer.resume()
    if writer.progress.whole:
        return
    job = Job(
        encoding=plan["encoding"],
        folder=writer.parts,
        end=plan["end"],
        val_share=settings.val_share,
        test_share=settings.test_share,
        split_seed=settings.split_seed,
        text_key=settings.text_key,
        skip_broken=settings.broken == "skip",
    )
    itemsize = np.dtype(plan["dtype"]).itemsize
    given = pieces(sources, cut=settings.document, start=writer.progress.position)
    display.begin(writer.progress.read)
    saved = monotonic()
    try:
        with closing(in_order(Encoder, (job,), given, workers=settings.workers)) as work:
            for piece, encoded in work:
                writer.add(encoded, after=piece.after, read=piece.read)
                now = writer.progress
                tokens, texts = sum(now.sizes.values()) // itemsize, sum(now.documents.values())
                display.show(piece.read, f"{tokens:,} tokens in {texts:,} documents")
                if monotonic() - saved >= SAVE_SECONDS:
                    writer.save()
                    saved = monotonic()
    finally:
        writer.save()  # also when a document is broken, or the user stops it


def check_splits(settings: Settings, writer: Writer) -> None:
    """Raise ConfigError where a split that was asked for got no document, and take all away."""
    now = writer.progress
    total = sum(now.documents.values())
    shares = {
        "train": 1 - settings.val_share - settings.test_share,
        "val": settings.val_share,
        "test": settings.test_share,
    }
    for split, share in shares.items():
        if share > 0 and not now.documents[split]:
            writer.remove()
            raise ConfigError(
                f"{shown(settings.input)} has {total:,} documents, and none of them fell into "
                f"{split}, whose share is {share:g}; choose other shares (--val-share, "
                "--test-share), another --split-seed or smaller documents (--document)"
            )


@contextmanager
def asked_to_stop() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is, so that what is done is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(out: Path, meta: Mapping[str, Any]) -> str:
    """What is in the folder, and how to train on it."""
    lines = [
        f"{split:<6}{tokens:>16,} tokens in {meta['documents'][split]:,} documents"
        for split, tokens in meta["tokens"].items()
    ]
    for key in ("empty", "broken"):
        if meta[key]:
            lines.append(f"left out: {meta[key]:,} {key} documents")
    lines.append(f"{meta['dtype']}, {meta['vocab_size']:,} ids, {meta['end']} ends a document")
    lines.append(f"python -m suite.train task=language/lm data=token_bin data.root={shown(out)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
