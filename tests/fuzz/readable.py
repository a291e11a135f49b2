"""A small folder of each kind of data that a user can point at, and the command line that reads it.

`SOURCES` has for each name what writes the folder and the tokens; `{root}` in a token is the
folder. Every file of it is then damaged in turn.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suite.config import load
from suite.data import SPLITS
from suite.registry import load_task

LETTERS = "ACGT"


@dataclass(frozen=True)
class Source:
    """write: makes the files. tokens: of the command line. cached: damage what a start kept too."""

    write: Callable[[Path], None]
    tokens: tuple[str, ...]
    cached: bool = False

    def reader(self, root: Path) -> Callable[[], None]:
        """Builds the data and reads some of each split, as a run would."""
        config = load([token.replace("{root}", str(root)) for token in self.tokens]).settled
        choice = load_task(config.task_name).data[config.data_name]

        def read() -> None:
            splits = choice.build(config.data, seed=0)
            for name in SPLITS:
                split: Any = getattr(splits, name)
                few = list(range(min(len(split), 3)))
                if few:
                    split.fetch(few, epoch=0, train=name == "train")

        return read


def generator() -> np.random.Generator:
    """The same numbers each time."""
    return np.random.default_rng(0)


def bases(length: int, *, seed: int = 0) -> str:
    """A random sequence."""
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), length))


# --- vision ---------------------------------------------------------------------------------------


def write_images(root: Path) -> None:
    """An image folder: two classes, PNG, JPEG, WebP and a 16-bit grey one."""
    from PIL import Image

    draw = generator()
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            pixels = draw.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "a.png")
            Image.fromarray(pixels).save(folder / "b.jpg", progressive=label == "dog")
            if split == "train":
                Image.fromarray(pixels).save(folder / "c.webp")
                Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "d.png")


def write_cifar(root: Path) -> None:
    """What could be CIFAR-10's unpacked archive, were its files the published ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"\x80\x04}\x94.")


def write_mnist(root: Path) -> None:
    """The four files, with their headers and far too few values."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        for what, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
            (folder / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(header + bytes(99)))


def write_config_json(root: Path) -> None:
    """Images, and a timm config.json that says how they become a model's input."""
    write_images(root)
    made = {"input_size": [3, 8, 8], "crop_pct": 0.9, "interpolation": "bicubic"}
    said = made | {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_mode": "center"}
    (root / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": said}))


# --- speech ---------------------------------------------------------------------------------------


def sound(seconds: float, *, seed: int) -> np.ndarray:
    """Quiet noise at 16 kHz."""
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def write_clips(root: Path) -> list[str]:
    """Seven clips in four formats; their names."""
    import soundfile

    root.mkdir(parents=True, exist_ok=True)
    names = [*(f"{i}.wav" for i in range(3)), *(f"{i}.flac" for i in range(3, 6)), "6.ogg"]
    if "MP3" in soundfile.available_formats():
        names.append("7.mp3")
    for i, name in enumerate(names):
        soundfile.write(root / name, sound(0.5 + 0.05 * i, seed=i), 16_000)
    return names


def write_table(root: Path) -> None:
    """A table of clips with their transcripts, for each of two splits."""
    names = write_clips(root)
    rows = [f"{name}\tONE TWO" for i, name in enumerate(names)]
    (root / "train.tsv").write_text("\n".join(["path\ttranscript", *rows[:4]]), encoding="utf-8")
    lines = [row.replace("\t", ",") for row in rows[4:]]
    (root / "val.csv").write_text("\n".join(["path,transcript", *lines]))


def write_fairseq(root: Path) -> None:
    """fairseq's lists, with letters beside them."""
    names = write_clips(root)
    for split, part in (("train", names[:4]), ("val", names[4:])):
        rows = [f"{name}\t{8000 + 800 * i}" for i, name in enumerate(part)]
        (root / f"{split}.tsv").write_text("\n".join([str(root), *rows]))
        (root / f"{split}.ltr").write_text("\n".join("O N E | T W O |" for _ in part))


def write_librispeech(root: Path) -> None:
    """Two folders of LibriSpeech with one chapter each."""
    import soundfile

    for number, folder in enumerate(("train-clean-100", "dev-other"), 1):
        chapter = root / "LibriSpeech" / folder / str(number) / "7"
        chapter.mkdir(parents=True)
        stems = [f"{number}-7-{i:04d}" for i in range(4)]
        for i, stem in enumerate(stems):
            soundfile.write(chapter / f"{stem}.flac", sound(0.5, seed=i), 16_000)
        text = "".join(f"{stem} ONE TWO\n" for stem in stems)
        (chapter / f"{number}-7.trans.txt").write_text(text)


# --- DNA ------------------------------------------------------------------------------------------


def write_genome(root: Path) -> None:
    """A FASTA file of two sequences, and the intervals of three splits."""
    lines = []
    for number in (1, 2):
        text = bases(900, seed=number)
        lines += [f">chr{number} some words", *(text[i : i + 60] for i in range(0, 900, 60))]
    (root / "g.fa").write_text("\n".join(lines) + "\n")
    rows = ["chr1\t0\t600\ttrain", "chr2\t0\t400\ttrain", "chr1\t600\t900\tvalid"]
    (root / "g.bed").write_text("\n".join([*rows, "chr2\t500\t900\ttest"]) + "\n")


def write_benchmark(root: Path) -> None:
    """GenomicBenchmarks' folders of text files."""
    for part in ("train", "test"):
        for label in ("negative", "positive"):
            folder = root / "some_set" / part / label
            folder.mkdir(parents=True)
            for i in range(5):
                text = bases(40 + i, seed=hash_of(part, label, i))
                (folder / f"{i}.txt").write_text(text)


def hash_of(*parts: object) -> int:
    """A seed that differs between parts."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(repr(parts)))


def write_transformer(root: Path) -> None:
    """The Nucleotide Transformer's FASTA files."""
    folder = root / "enhancers"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        rows = [f">s{i}|{i % 2}\n{bases(50, seed=hash_of(part, i))}" for i in range(10)]
        (folder / f"{part}.fna").write_text("\n".join(rows) + "\n")


# --- language -------------------------------------------------------------------------------------


def write_texts(root: Path) -> None:
    """Three folders of text."""
    line = "To be, or not to be: that is the question \u2014 na\u00efve.\n"
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        for i in range(2):
            (root / split / f"{i}.txt").write_text(f"{i} " + line * 8, encoding="utf-8")


def write_tokenizer(root: Path) -> None:
    """Texts with a byte-level tokenizer.json."""
    import tokenizers

    write_texts(root)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(["to be or not to be, that is the question"] * 5, trainer)
    (root / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")


def write_bins(root: Path) -> None:
    """Token files with their meta.json."""
    counts = {"train": 2000, "val": 300}
    for split, count in counts.items():
        ids = generator().integers(0, 300, count).astype("<u2")
        ids[::50] = 299
        (root / f"{split}.bin").write_bytes(ids.tobytes())
    meta = {"dtype": "uint16", "vocab_size": 300, "end": 299, "tokens": counts}
    (root / "meta.json").write_text(json.dumps(meta))


def write_bare_bins(root: Path) -> None:
    """nanoGPT's token files, of which nothing says what they hold."""
    write_bins(root)
    (root / "meta.json").unlink()


SMALL = ("data.batch_size=2", "data.cache={root}/kept")
CLASSIFY = ("task=vision/classify", "model=vit_tiny", "model.image_size=16")
CTC = ("task=speech/ctc", "data.batch_size=4")
LM = ("task=language/lm", "data.batch_size=2", "data.length=16")
DNA = ("task=dna/classify", "data.batch_size=2", "data.val_share=0.3")
GENOME = ("task=dna/pretrain", "data=genome", "data.length=64", "data.fasta={root}/g.fa")
MANIFEST = (*CTC, "data=manifest", "data.cache={root}/kept")
SOURCES: dict[str, Source] = {
    "images": Source(
        write_images,
        (*CLASSIFY, "data=image_folder", "data.image_size=16", "data.root={root}", *SMALL),
        cached=True,
    ),
    "images skipped": Source(
        write_images,
        (
            *(*CLASSIFY, "data=image_folder", "data.image_size=16", "data.root={root}", *SMALL),
            *("data.on_error=skip",),
        ),
    ),
    "timm config.json": Source(
        write_config_json,
        (
            *(*CLASSIFY, "data=image_folder", "data.root={root}", *SMALL),
            *("data.timm_cfg={root}/config.json",),
        ),
    ),
    "mnist": Source(write_mnist, (*CLASSIFY, "data=mnist", "data.root={root}")),
    "cifar": Source(write_cifar, (*CLASSIFY, "data=cifar10", "data.root={root}")),
    "table of clips": Source(
        write_table,
        (*MANIFEST, "data.train={root}/train.tsv", "data.val={root}/val.csv"),
        cached=True,
    ),
    "fairseq": Source(
        write_fairseq, (*MANIFEST, "data.train={root}/train.tsv", "data.val={root}/val.tsv")
    ),
    "librispeech": Source(
        write_librispeech,
        (
            *(*CTC, "data=librispeech", "data.root={root}", "data.cache={root}/kept"),
            *("data.train=train-clean-100", "data.val=dev-other", "data.test=null"),
        ),
    ),
    "genome": Source(
        write_genome,
        (*GENOME, "data.bed={root}/g.bed", *SMALL),
        cached=True,
    ),
    "genomic benchmarks": Source(
        write_benchmark, (*DNA, "data=genomic_benchmarks", "data.root={root}/some_set", *SMALL[1:])
    ),
    "nucleotide transformer": Source(
        write_transformer,
        (*DNA, "data=nucleotide_transformer", "data.root={root}", "data.task=enhancers"),
    ),
    "texts": Source(write_texts, (*LM, "data=text", "data.root={root}")),
    "characters": Source(
        write_texts, (*LM, "data=text", "data.root={root}", "data.encoding=characters")
    ),
    "tokenizer.json": Source(
        write_tokenizer,
        (
            *(*LM, "data=text", "data.root={root}", "data.encoding=tokenizer"),
            *("data.tokenizer={root}/tokenizer.json",),
        ),
    ),
    "token bins": Source(
        write_bins, (*LM, "data=token_bin", "data.root={root}", "data.cache={root}/kept")
    ),
    "documents of bins": Source(
        write_bins,
        (
            *(*LM, "data=token_bin", "data.root={root}", "data.cache={root}/kept"),
            *("data.documents=mask",),
        ),
        cached=True,
    ),
    "bare token bins": Source(
        write_bare_bins,
        (*LM, "data=token_bin", "data.root={root}", "data.vocab_size=300", "data.cache=none"),
    ),
}
UNUSABLE = ("mnist", "cifar")  # as written here they are refused: their files are too large to make
