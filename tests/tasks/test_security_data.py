"""Data from elsewhere runs nothing and reads nothing but what its own folder or list names."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from suite import train as entry

SMALL = ["trainer.accelerator=cpu", "trainer.max_epochs=1", "run.tensorboard=false"]
SPEECH, DNA, LANGUAGE = "task=speech/pretrain", "task=dna/pretrain", "task=language/lm"


class Payload:
    """Unpickling it makes a file, which shows that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)
    yield
    assert not (tmp_path / "executed").exists(), "code from a file was executed"
    assert not Path("runs").exists(), "something was written"


def refused(capsys: pytest.CaptureFixture[str], *tokens: str) -> str:
    """The one line of an error with exit code 2."""
    code = entry.main([*SMALL, *tokens])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2, lines
    assert len(lines) == 1
    assert lines[0].isprintable()
    return lines[0]


def objects(mark: Path) -> np.ndarray:
    """An array that NumPy can only read by unpickling."""
    held = np.empty(1, object)
    held[0] = Payload(mark)
    return held


def pickled(mark: Path, kind: str) -> bytes:
    """The payload as a pickle, .npy, .npz, gzipped pickle or checkpoint."""
    out = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Payload(mark), out)
    elif kind == "npy":
        np.save(out, objects(mark), allow_pickle=True)
    elif kind == "npz":
        np.savez(out, meta=objects(mark), ids=objects(mark), images=objects(mark))
    elif kind == "gzip":
        out.write(gzip.compress(pickle.dumps(Payload(mark))))
    else:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(Payload(mark), protocol=2))
    return out.getvalue()


IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
IDX += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
CIFAR = [f"cifar-10-batches-py/{n}" for n in ("batches.meta", "test_batch", "data_batch_1")]
FOLDER = [f"{part}/{label}/1" for part in ("train", "val") for label in ("a", "b")]
# the words of the command, "{root}" the attack's folder; the files that hold the payload there
READERS: dict[str, tuple[list[str], list[str]]] = {
    "idx": (["data=fashion_mnist", "data.root={root}"], IDX),
    "idx.gz": (["data=mnist", "data.root={root}"], [f"{name}.gz" for name in IDX]),
    "cifar": (["data=cifar10", "data.root={root}"], CIFAR),
    "images": (["data=image_folder", "data.root={root}"], [f"{n}.png" for n in FOLDER]),
    "text": ([LANGUAGE, "data=text", "data.root={root}"], ["a.txt"]),
    "tokens": (
        [LANGUAGE, "data=token_bin", "data.root={root}"],
        ["train.bin", "val.bin", "meta.pkl", "meta.json"],
    ),
    "tokenizer": (
        [
            *(LANGUAGE, "data=text", "data.root={root}/b", "data.encoding=tokenizer"),
            "data.tokenizer={root}/tokenizer.json",
        ],
        ["tokenizer.json", "b/a.txt"],
    ),
    "manifest": ([SPEECH, "data=manifest", "data.train={root}/a.tsv"], ["a.tsv"]),
    "csv": ([SPEECH, "data=manifest", "data.train={root}/a.csv"], ["a.csv"]),
    "fasta": ([DNA, "data=genome", "data.fasta={root}/a.fa", "data.bed={root}/a.bed"], ["a.fa"]),
    "fai": (
        [DNA, "data=genome", "data.fasta={root}/a.fa", "data.bed={root}/a.bed"],
        ["a.fa", "a.fa.fai", "a.bed"],
    ),
}


@pytest.mark.parametrize("kind", ["pickle", "npy", "npz", "gzip", "checkpoint"])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_data_unpickles(
    reader: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, files = READERS[reader]
    root = tmp_path / "data"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(pickled(tmp_path / "executed", kind))
    line = refused(capsys, *(word.replace("{root}", str(root)) for word in words))
    assert "data" in line


def write_genome(root: Path, *, name: str = "chr1", bed: str | None = None) -> list[str]:
    """A small FASTA file and its BED; the command's words."""
    root.mkdir(exist_ok=True)
    (root / "a.fa").write_text(f">{name}\n" + ("ACGT" * 15 + "\n") * 400)
    rows = [(0, 12000, "train"), (12000, 18000, "valid"), (18000, 24000, "test")]
    lines = "".join(f"{bed or name}\t{start}\t{end}\t{part}\n" for start, end, part in rows)
    (root / "a.bed").write_text(lines)
    return [DNA, "data=genome", f"data.fasta={root / 'a.fa'}", f"data.bed={root / 'a.bed'}"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\x1b[2Jb", "..\x00"])
def test_a_chromosome_is_a_name_and_no_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_genome(tmp_path / "data", bed=name)
    line = refused(capsys, *words)
    assert "no sequence" in line
    beside = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert beside == ["a.bed", "a.fa", "a.fa.fai"]


def test_an_index_is_not_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_genome(tmp_path / "data", bed="chr2")
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "data" / "a.fa.fai").symlink_to(target)
    refused(capsys, *words)
    assert target.read_text() == "kept"


def test_advice_for_the_shell_quotes_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    words = write_genome(root)
    evil = root / "a; touch executed #.fa.gz"
    evil.write_bytes(gzip.compress(b">chr1\nACGT\n"))
    words[2] = f"data.fasta={evil}"
    assert f"gzip -dc '{evil}' > '" in refused(capsys, *words)


@pytest.mark.parametrize("task", ["..", "../other", "/etc", "a/../../b", "."])
@pytest.mark.parametrize("data", ["genomic_benchmarks", "nucleotide_transformer"])
def test_a_set_is_a_name_in_the_root(
    data: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        (tmp_path / "other" / part / "x").mkdir(parents=True)
        (tmp_path / "other" / f"{part}.fna").write_text(">a|0\nACGT\n")
    (tmp_path / "root").mkdir()
    words = ["task=dna/classify", f"data={data}", f"data.root={tmp_path / 'root'}"]
    assert f"data.task={task}: " in refused(capsys, *words, f"data.task={task}")


@pytest.mark.parametrize("content", [b"x" * (1 << 20), b"[" * 10**5, b'{"a": "\\u001b[2J"}'])
def test_what_a_tokenizer_or_a_meta_file_holds_is_data(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.txt").write_text("text " * 1000)
    (root / "tokenizer.json").write_bytes(content)
    given = ["data=text", "data.encoding=tokenizer", f"data.tokenizer={root / 'tokenizer.json'}"]
    assert "tokenizer.json" in refused(capsys, LANGUAGE, f"data.root={root}", *given)


def test_a_cache_from_elsewhere_is_not_unpickled(tmp_path: Path) -> None:
    from suite.cache import recall

    file = tmp_path / "cached.npz"
    file.write_bytes(pickled(tmp_path / "executed", "npz"))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        recall(file)


def test_a_lexicon_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flashlight")
    file = tmp_path / "words"
    file.write_bytes(pickled(tmp_path / "executed", "pickle"))
    words = ["task=speech/ctc", "task.decoder=beam", f"task.lexicon={file}"]
    assert "task.lexicon" in refused(capsys, *words)


def test_json_of_a_folder_of_tokens_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(5000, dtype="<u2").tofile(root / name)
    meta = {"dtype": "uint16", "vocab_size": 70000, "sha256": {"../../etc/passwd": "0"}}
    meta["encoding"] = {"name": "tokenizer", "file": "../../../etc/passwd", "sha256": "0"}
    (root / "meta.json").write_text(json.dumps({**meta, "tokens": {"train": 1}}))
    assert "meta.json" in refused(capsys, LANGUAGE, "data=token_bin", f"data.root={root}")
