"""Broken files: what each kind does under data.on_error, and that the others do not notice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import (
    CLIPS,
    KNOWN_BEFORE,
    PICTURES,
    corrupt_exif,
    speech,
    write_clip,
    write_genome,
)
from photographs import write_tree

from suite.data import SuiteDataModule, lost_worker, too_many
from suite.errors import ConfigError, DataError
from suite.train import main
from tasks.dna.genome import GenomeOptions, build_genome
from tasks.dna.genomic_benchmarks import GenomicBenchmarksOptions, build_genomic_benchmarks
from tasks.dna.nucleotide_transformer import (
    NucleotideTransformerOptions,
    build_nucleotide_transformer,
)
from tasks.language.text import TextOptions, build_text
from tasks.speech.manifest import ManifestOptions, build_manifest
from tasks.vision.folder import FolderSplit, ImageFolderOptions, build_image_folder

TINY = [
    "norm=layernorm",
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "model.in_chans=3",
    "model.image_size=32",
    "model.patch_size=8",
    "data=image_folder",
    "data.image_size=32",
    "data.root=photos",
    "data.batch_size=8",
    "data.on_error=skip",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


# --- pictures -------------------------------------------------------------------------------------


def pictures(**changes: Any) -> FolderSplit:
    options = ImageFolderOptions(root="photos", image_size=32, cache="none", **changes)
    split: Any = build_image_folder(options, seed=0).train
    return split


@pytest.mark.parametrize("kind", list(PICTURES))
def test_a_broken_picture_is_named_or_skipped_and_no_other_row_changes(kind: str) -> None:
    write_tree(Path("photos"), train=4, val=1)
    whole = pictures()
    rows = list(range(len(whole)))
    before, place = whole.fetch(rows, epoch=0, train=True)["image"], 5
    harm, words = PICTURES[kind]
    harm(Path(whole.path_of(place)))
    with pytest.raises(DataError) as caught:
        pictures().fetch(rows, epoch=0, train=True)
    line = str(caught.value)
    assert words in line
    assert whole.path_of(place) in line
    assert "data.on_error=skip" in line
    assert "\n" not in line
    after = pictures(on_error="skip").fetch(rows, epoch=0, train=True)
    assert after["valid"].tolist() == [i != place for i in rows]
    kept = after["valid"]
    assert torch.equal(after["image"][kept], before[kept])


def test_a_picture_with_nonsense_for_exif_is_read_as_without() -> None:
    write_tree(Path("photos"), train=2, val=1)
    before = pictures().fetch([0, 1], epoch=0, train=False)["image"]
    corrupt_exif(Path(pictures().path_of(1)))
    assert torch.equal(pictures().fetch([0, 1], epoch=0, train=False)["image"], before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_picture_that_may_not_be_read_is_skipped() -> None:
    write_tree(Path("photos"), train=2, val=1)
    Path(pictures().path_of(1)).chmod(0)
    valid = pictures(on_error="skip").fetch([0, 1], epoch=0, train=True)["valid"]
    assert valid.tolist() == [True, False]


def run(folder: str, *tokens: str) -> dict[str, Any]:
    """result.json of a run that ends well, and its last weights."""
    given = {token.partition("=")[0]: token for token in (*TINY, *tokens, f"run.dir={folder}")}
    assert main(list(given.values())) == 0
    result = json.loads(Path(folder, "result.json").read_text())
    state = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)["state_dict"]
    return {"result": result, "weights": state}


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["result"]["steps"] == two["result"]["steps"]
    assert one["result"]["metrics"] == two["result"]["metrics"]
    assert one["result"]["loss"] == two["result"]["loss"]
    assert [k for k, v in one["weights"].items() if not torch.equal(v, two["weights"][k])] == []


def test_a_run_with_broken_files_is_one_in_which_their_rows_are_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit by bit, whatever the rows hold: once zeros of unreadable files, once good pictures."""
    broken = ["train/bag/3.jpg", "train/coat/0.jpg", "val/dress/1.jpg"]
    write_tree(Path("photos"))
    plain = FolderSplit.fetch

    def masked(self: FolderSplit, indices: list[int], **how: Any) -> dict[str, torch.Tensor]:
        batch = plain(self, indices, **how)
        paths = [Path(self.path_of(i)).as_posix() for i in indices]
        batch["valid"] &= torch.tensor([not path.endswith(tuple(broken)) for path in paths])
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(FolderSplit, "fetch", masked)
        wanted = run("masked")
    for name in broken:
        Path("photos", name).write_bytes(b"")
    for workers in (0, 2):
        found = run(f"broken{workers}", f"data.num_workers={workers}")
        same(found, wanted)
        unreadable = found["result"]["data"]["unreadable"]
        assert {split: (u["count"], u["of"]) for split, u in unreadable.items()} == {
            "train": (2, 64),
            "val": (1, 24),
            "test": (1, 24),
        }
        assert [Path(p).name for p in unreadable["train"]["files"]] == ["3.jpg", "0.jpg"]


def test_a_step_without_one_readable_row_leaves_everything_finite() -> None:
    """One class of four is broken, and a batch of two micro-batches of one row meets it alone."""
    write_tree(Path("photos"), broken=[f"train/bag/{k}.jpg" for k in range(16)])
    found = run(
        "a",
        *("data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1"),
        *("data.skip_limit=0.5", "norm=dyt", "run.nonfinite=stop"),
    )
    assert found["result"]["steps"] == 32
    assert found["result"]["data"]["unreadable"]["train"]["count"] == 16
    assert all(torch.isfinite(v).all() for v in found["weights"].values())
    counts = [json.loads(row) for row in Path("a/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row.get("train/loss", 0.0)) for row in counts)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", "none of 64 training examples could be read, such as"),
        ("val", "val: 24 of 24 examples cannot be read, such as"),
    ],
)
def test_a_split_that_is_all_broken_ends_the_run_with_one_line(
    split: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tree(Path("photos"))
    for path in (root / split).rglob("*.jpg"):
        path.write_bytes(b"")
    assert main([*TINY, "run.dir=a", "data.skip_limit=1"]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert words in line
    assert not list(Path().rglob("*.ckpt"))


def test_more_broken_files_than_the_limit_end_the_run_and_name_the_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"train/{name}/{k}.jpg" for name in ("bag", "coat") for k in range(6)]
    write_tree(Path("photos"), broken=names)
    assert main([*TINY, "run.dir=a"]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "of 64 examples cannot be read (data.skip_limit=0.1)" in line
    run("b", "data.skip_limit=0.2")


def test_ten_files_of_a_small_split_are_not_too_many_and_all_of_it_are() -> None:
    assert too_many(10, 20, limit=0.1) is None
    assert too_many(11, 20, limit=0.1) is not None
    assert too_many(11, 110, limit=0.1) is None
    assert too_many(3, 3, limit=1.0) is not None


def test_the_batch_for_calibration_without_a_readable_row_is_one_line() -> None:
    write_tree(Path("photos"), train=1, broken=[f"train/{n}/0.jpg" for n in ("bag", "coat")])
    options = ImageFolderOptions(root="photos", image_size=32, cache="none", on_error="skip")
    splits = build_image_folder(options, seed=0)
    one_class = replace(splits, train=build_one_class(splits.train, [1, 2]))
    data = SuiteDataModule(one_class, options=options, seed=0)
    with pytest.raises(
        DataError, match=r"none of 2 training examples could be read, such as .*bag"
    ):
        data.fixed_batch(8)


def build_one_class(split: Any, places: list[int]) -> Any:
    split.places = np.array(places)
    return split


# --- speech ---------------------------------------------------------------------------------------


@pytest.fixture
def listed() -> Callable[..., Any]:
    """A manifest of 24 clips of real speech, and how to build it."""
    wave = speech()
    rows = ["path\ttranscript"]
    for i in range(24):
        write_clip(Path(f"{i}.wav"), wave[i * 9_000 : i * 9_000 + 9_000 + 40 * i])
        rows.append(f"{i}.wav\tword")
    Path("train.tsv").write_text("\n".join(rows) + "\n")

    def build(**changes: Any) -> Any:
        options = ManifestOptions(train="train.tsv", val="train.tsv", cache="none", **changes)
        return build_manifest(options, seed=0, words=True)

    return build


@pytest.mark.parametrize("kind", list(CLIPS))
def test_a_broken_clip_is_named_or_left_out_and_counted(
    kind: str, listed: Callable[..., Any]
) -> None:
    before = listed().train.fetch(list(range(24)), epoch=0, train=True)
    harm, words = CLIPS[kind]
    harm(Path("7.wav"))
    early = kind in KNOWN_BEFORE
    with pytest.raises(ConfigError if early else DataError) as caught:
        listed().train.fetch([7], epoch=0, train=True)
    assert words in str(caught.value)
    assert "7.wav" in str(caught.value)
    assert "\n" not in str(caught.value)
    splits = listed(on_error="skip")
    train = splits.train
    assert len(train) == (23 if early else 24)
    after = train.fetch(list(range(len(train))), epoch=0, train=True)
    assert after["valid"].sum() == 23
    others = [i for i in range(24) if i != 7]
    for name in ("length", "target", "target_length"):
        assert torch.equal(after[name][after["valid"]], before[name][others])
    assert torch.equal(
        after["audio"][after["valid"]], before["audio"][others][:, : after["audio"].shape[1]]
    )
    data = SuiteDataModule(splits, options=ManifestOptions(), seed=0)
    found = data.unreadable_files()
    assert (found["train"] if early else {"count": 1, "of": 24})["of"] == 24
    assert ("train" in found) == early


def test_silence_is_a_clip_as_any_other(listed: Callable[..., Any]) -> None:
    write_clip(Path("7.wav"), np.zeros(9_000, np.float32))
    batch = listed(on_error="skip", normalize=True).train.fetch([7, 8], epoch=0, train=True)
    assert batch["valid"].all()
    assert torch.isfinite(batch["audio"]).all()


def test_more_broken_clips_than_the_limit_are_refused_before_training(
    listed: Callable[..., Any],
) -> None:
    for i in range(11):
        Path(f"{i}.wav").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train: 11 of 24 .*data\.skip_limit=0\.1.*0\.wav"):
        listed(on_error="skip")
    assert len(listed(on_error="skip", skip_limit=0.5).train) == 13


def test_a_clip_that_is_gone_is_skipped_and_a_folder_that_is_gone_is_not(
    listed: Callable[..., Any],
) -> None:
    train = listed(on_error="skip").train
    here = Path.cwd()
    Path("7.wav").unlink()
    assert train.fetch([7, 8], epoch=0, train=True)["valid"].tolist() == [False, True]
    here.rename(here.with_name("gone"))
    try:
        with pytest.raises(DataError, match="nor does its folder"):
            train.fetch([8], epoch=0, train=True)
    finally:
        here.with_name("gone").rename(here)


# --- bases and texts ------------------------------------------------------------------------------

BASES = {"a letter": b"!", "windows-1252": b"\xe9", "half of a letter": b"\xc3", "nul": b"\0"}


def genome(**changes: Any) -> Any:
    files = {"fasta": "g.fa", "bed": "g.bed", "cache": "none", "length": 64}
    return build_genome(GenomeOptions(**files, **changes), seed=0)


@pytest.mark.parametrize("kind", list(BASES))
def test_a_byte_that_is_no_base_is_named_or_costs_one_window(kind: str) -> None:
    pytest.importorskip("pyfaidx")
    write_genome(Path(), bases=1_600, broken={})
    rows = list(range(18))
    before = genome(rc_augment=False).train.fetch(rows, epoch=0, train=True)["ids"]
    Path("g.fa.fai").unlink()
    write_genome(Path(), bases=1_600, broken={330: BASES[kind]})
    with pytest.raises((ConfigError, DataError)) as caught:
        genome()
    assert "g.fa" in str(caught.value)
    assert "\n" not in str(caught.value)
    splits = genome(rc_augment=False, on_error="skip")
    after = splits.train.fetch(rows, epoch=0, train=True)
    assert after["valid"].tolist() == [i != 5 for i in rows]  # 320 to 384
    assert torch.equal(after["ids"][after["valid"]], before[after["valid"]])
    assert splits.train.path_of(5).endswith("g.fa: chrI:320-384")


def test_lower_case_and_line_ends_of_windows_are_bases_as_any_other() -> None:
    pytest.importorskip("pyfaidx")
    write_genome(Path(), bases=1_600, broken={})
    wanted = genome().train.fetch(list(range(18)), epoch=0, train=True)["ids"]
    text = Path("g.fa").read_bytes().replace(b"chrI", b"CHRI").lower().replace(b"chri", b"chrI")
    Path("g.fa.fai").unlink()
    Path("g.fa").write_bytes(text.replace(b"\n", b"\r\n"))
    found = genome(on_error="skip").train.fetch(list(range(18)), epoch=0, train=True)
    assert found["valid"].all()
    assert torch.equal(found["ids"], wanted)


def transformer(**changes: Any) -> Any:
    return build_nucleotide_transformer(
        NucleotideTransformerOptions(root="nt", task="t", **changes), seed=0
    )


def benchmarks(**changes: Any) -> Any:
    return build_genomic_benchmarks(
        GenomicBenchmarksOptions(root="gb", task="t", cache="none", **changes), seed=0
    )


def texts(**changes: Any) -> Any:
    options = TextOptions(root="texts", encoding="characters", length=16, **changes)
    return build_text(options, seed=0)


def write_labelled() -> dict[str, Path]:
    """Sequences in two classes as FASTA and as one file each, and texts; the files to break."""
    bases = np.random.default_rng(0).choice(list("ACGT"), (40, 30))
    rows = ["".join(row) for row in bases]
    for part in ("train", "test"):
        Path("nt/t").mkdir(parents=True, exist_ok=True)
        lines = [f">{i}|{i % 2}\n{row}\n" for i, row in enumerate(rows)]
        Path(f"nt/t/{part}.fna").write_text("".join(lines))
        for i, row in enumerate(rows):
            Path(f"gb/t/{part}/{i % 2}").mkdir(parents=True, exist_ok=True)
            Path(f"gb/t/{part}/{i % 2}/{i}.txt").write_text(row)
    Path("texts").mkdir()
    for i in range(40):
        Path(f"texts/{i}.txt").write_text("to be or not to be " * 3 + str(i))
    return {
        "transformer": Path("nt/t/train.fna"),
        "benchmarks": Path("gb/t/train/0/6.txt"),
        "texts": Path("texts/6.txt"),
    }


@pytest.mark.parametrize("build", [transformer, benchmarks, texts])
def test_a_sequence_or_text_that_cannot_be_used_is_named_or_left_out_and_counted(
    build: Callable[..., Any],
) -> None:
    file = write_labelled()[build.__name__]
    content = file.read_bytes()
    place = content.index(b">6|0\n") + 5 if build is transformer else 5
    file.write_bytes(content[:place] + b"\xe9" + content[place + 1 :])
    with pytest.raises(ConfigError, match=file.name) as caught:
        build()
    assert "\n" not in str(caught.value)
    splits = build(on_error="skip")
    options: Any = GenomicBenchmarksOptions()
    found = SuiteDataModule(splits, options=options, seed=0).unreadable_files()
    assert list(found) == ["train"]
    assert (found["train"]["count"], found["train"]["of"]) == (1, EXPECTED[build.__name__])
    assert file.name in found["train"]["files"][0]


EXPECTED = {"transformer": 36, "benchmarks": 36, "texts": 40}  # without what validation holds


def test_too_many_sequences_or_texts_that_cannot_be_used_are_refused() -> None:
    write_labelled()
    for i in range(0, 40, 3):
        Path(f"gb/t/train/{i % 2}/{i}.txt").write_bytes(b"\xff")
        Path(f"texts/{i}.txt").write_bytes(b"\xff\xff")
    for build in (benchmarks, texts):
        with pytest.raises(ConfigError, match=r"14 of 40 .*data\.skip_limit=0\.1"):
            build(on_error="skip")


# --- a loader's worker ----------------------------------------------------------------------------


def test_a_worker_that_was_killed_is_one_line_and_other_errors_stay_what_they_are() -> None:
    text = "DataLoader worker (pid 12) is killed by signal: Killed. Details are lost"
    found = lost_worker(RuntimeError(text))
    assert str(found).startswith("DataLoader worker (pid 12) is killed by signal: Killed: ")
    assert "data.num_workers" in str(found)
    assert lost_worker(RuntimeError("CUDA out of memory")) is None
    assert lost_worker(ValueError(text)) is None
