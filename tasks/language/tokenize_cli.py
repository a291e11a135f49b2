"""What `python -m tasks.language.tokenize` takes: its arguments, checked, and its help."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, cast

from suite.errors import ConfigError
from tasks.language.corpus import Cut

SUFFIXES = ".txt,.txt.gz,.jsonl,.jsonl.gz"

Name = Literal["bytes", "characters", "tokenizer"]

HELP = f"""\
Make token files for data=token_bin: train.bin, val.bin, perhaps test.bin, and meta.json.

usage: python -m tasks.language.tokenize INPUT --out FOLDER [--encoding NAME] [--tokenizer FILE]
           [--val-share S] [--test-share S] [--split-seed N] [--document WHAT] [--suffix LIST]
           [--text-key KEY] [--end ID] [--broken WHAT] [--workers N]

INPUT             a text file, a folder of text files, or JSON lines (.jsonl), each also as .gz; a
                  line of JSON is a document
--out FOLDER      a new folder, or one that this command has begun
--encoding NAME   bytes (the default), characters (those of INPUT, which is read twice) or tokenizer
--tokenizer FILE  a tokenizer.json of Hugging Face; needs pip install "dyt-suite[tokenizers]"
--val-share S     share of the documents that is the validation; 0.005
--test-share S    share that is the test; 0: the validation is the test too
--split-seed N    another number puts other documents there; 0
--document WHAT   what a document of a text file is: file (the default), paragraph (what stands
                  between blank lines) or line
--suffix LIST     ends of the names to take of a folder; {SUFFIXES}
--text-key KEY    the field of JSON lines that holds the text; text
--end ID          the id put after each document; left out: the encoding's own
--broken WHAT     stop (the default) at a document that is not UTF-8 or not JSON, or skip it
--workers N       processes; left out: as many as there are CPUs. The files do not depend on it

A document is in the split that the hash of its text says, so equal documents are in the same one.
Ids are uint16 where there are at most 65,536 of them, else uint32. The command may be stopped or
killed: started again it goes on, and the files are the same to the bit. A folder that is done is
left as it is, and so is one of other things.
exit codes: 0 done, 1 error while running, 2 a mistake in the command, 130 interrupted

examples
  python -m tasks.language.tokenize shakespeare.txt --out tokens --document paragraph \\
      --encoding characters --val-share 0.1
  python -m tasks.language.tokenize books --out tokens --suffix .txt,.md
  python -m tasks.language.tokenize openwebtext.jsonl.gz --out tokens --tokenizer tokenizer.json \\
      --workers 16
then
  python -m suite.train task=language/lm data=token_bin data.root=tokens"""


@dataclass(frozen=True)
class Settings:
    """The command line, checked. Everything but out, workers and broken shapes the files."""

    input: Path
    out: Path
    encoding: Name = "bytes"
    tokenizer: Path | None = None
    val_share: float = 0.005
    test_share: float = 0.0
    split_seed: int = 0
    document: Cut = "file"
    suffix: tuple[str, ...] = tuple(SUFFIXES.split(","))
    text_key: str = "text"
    end: int | None = None
    broken: Literal["stop", "skip"] = "stop"
    workers: int = 1


class Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse(words: Sequence[str]) -> Settings:
    """The settings that the words say. Raises ConfigError."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoding", choices=("bytes", "characters", "tokenizer"))
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--val-share", type=float, default=0.005)
    parser.add_argument("--test-share", type=float, default=0.0)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--document", choices=("file", "paragraph", "line"), default="file")
    parser.add_argument("--suffix", default=SUFFIXES)
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--end", type=int)
    parser.add_argument("--broken", choices=("stop", "skip"), default="stop")
    parser.add_argument("--workers", type=int, default=cpus())
    given = parser.parse_args(list(words))
    check_numbers(given)
    encoding: Name = given.encoding or ("tokenizer" if given.tokenizer else "bytes")
    if (encoding == "tokenizer") != (given.tokenizer is not None):
        raise ConfigError(
            "--encoding tokenizer needs --tokenizer FILE, a tokenizer.json"
            if encoding == "tokenizer"
            else f"--encoding {encoding} takes no --tokenizer; leave one of them out"
        )
    suffix = tuple(part.strip().lower() for part in given.suffix.split(",") if part.strip())
    if not suffix:
        raise ConfigError("--suffix must be a list such as .txt,.md")
    return Settings(
        input=given.input.expanduser(),
        out=given.out.expanduser(),
        encoding=encoding,
        tokenizer=None if given.tokenizer is None else given.tokenizer.expanduser(),
        val_share=given.val_share,
        test_share=given.test_share,
        split_seed=given.split_seed,
        document=cast(Cut, given.document),
        suffix=suffix,
        text_key=given.text_key,
        end=given.end,
        broken=given.broken,
        workers=given.workers,
    )


def check_numbers(given: argparse.Namespace) -> None:
    """Raise ConfigError for a number that cannot be."""
    if not 0 < given.val_share < 1:
        raise ConfigError(f"--val-share must be above 0 and below 1, got {given.val_share}")
    if not 0 <= given.test_share < 1:
        raise ConfigError(f"--test-share must be at least 0 and below 1, got {given.test_share}")
    if given.val_share + given.test_share >= 1:
        raise ConfigError(
            f"--val-share {given.val_share} and --test-share {given.test_share} leave nothing to "
            "train on; together they must be below 1"
        )
    if given.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {given.workers}")
    if given.end is not None and given.end < 0:
        raise ConfigError(f"--end must not be negative, got {given.end}")


def cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
