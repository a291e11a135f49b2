"""The generated tree, and `suite.bench loading`: what both sides read, prints and refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from suite import bench
from tasks.vision.folder import ImageFolderOptions, build_image_folder
from tasks.vision.loading import plain_loader

pytestmark = pytest.mark.vision

ROOT = Path(__file__).parents[2]


def build_tree(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_image_tree.py", out, "--workers", "1",
         *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trees") / "whole"
    done = build_tree(out, "--images", "24", "--classes", "3")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def broken_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trees") / "broken"
    done = build_tree(out, "--images", "24", "--classes", "3", "--broken", "0.5")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(tree: Path, *more: str) -> list[str]:
    return [
        "loading", "data=image_folder", f"data.root={tree}", "data.image_size=16",
        "data.batch_size=4", "data.cache=none", "trainer.accelerator=cpu", *more,
    ]  # fmt: skip


def options(tree: Path, **more: Any) -> ImageFolderOptions:
    return ImageFolderOptions(root=str(tree), image_size=16, batch_size=4, cache="none", **more)


def files_of(tree: Path) -> dict[str, int]:
    return {
        split: len(list((tree / split).glob("n*/*.JPEG"))) for split in ("train", "val")
    }  # fmt: skip


def test_the_generated_tree_has_the_shape_of_imagenet(tree: Path) -> None:
    assert files_of(tree) == {"train": 21, "val": 3}
    assert [len(list((tree / s).iterdir())) for s in ("train", "val")] == [3, 3]
    assert not (tree / "broken.txt").exists()
    for path in tree.glob("*/*/*.JPEG"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 333 <= min(image.size) <= max(image.size) <= 500
        assert 20_000 < path.stat().st_size < 200_000


def test_the_files_that_are_listed_as_broken_and_no_others_cannot_be_decoded(
    broken_tree: Path,
) -> None:
    listed = {line.split("\t")[0] for line in (broken_tree / "broken.txt").read_text().splitlines()}
    assert files_of(broken_tree) == {"train": 21, "val": 3}
    assert len(listed) == 12
    for path in broken_tree.glob("*/*/*.JPEG"):
        try:
            with Image.open(path) as image:
                image.load()
            decoded = True
        except OSError:
            decoded = False
        assert decoded is (path.relative_to(broken_tree).as_posix() not in listed)


def test_equal_arguments_give_equal_trees(tree: Path, tmp_path: Path) -> None:
    assert build_tree(tmp_path / "a", "--images", "24", "--classes", "3").returncode == 0
    for path in tree.rglob("*.JPEG"):
        assert (tmp_path / "a" / path.relative_to(tree)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is not an empty folder"),
        (["--images", "5", "--classes", "3"], "--images must be at least twice --classes"),
        (["--broken", "1.5"], "--broken must be from 0 to 1"),
        (["--classes", "0"], "--classes and --workers must be at least 1"),
    ],
)
def test_the_builder_refuses_what_it_cannot_build(
    tree: Path, arguments: list[str], said: str
) -> None:
    before = files_of(tree)
    done = build_tree(tree, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert files_of(tree) == before


def test_both_sides_read_the_same_images_in_the_same_order(tree: Path) -> None:
    from suite.data import SuiteDataModule

    chosen = options(tree, flip=False, crop="none")
    splits = build_image_folder(chosen, seed=3)
    ours = list(SuiteDataModule(splits, options=chosen, seed=3).train_dataloader())
    plain = list(plain_loader(chosen, seed=3))
    assert len(ours) == len(plain) == 5
    for batch, (image, label) in zip(ours, plain, strict=True):
        assert torch.equal(batch["label"], label)
        torch.testing.assert_close(batch["image"], image, rtol=0, atol=1e-5)


def test_the_plain_loop_does_every_operation_that_is_asked_for(tree: Path) -> None:
    chosen = options(
        tree, randaugment="rand-m9-mstd0.5-inc1", erase=1.0, mixup=0.8, cutmix=1.0, crop="pad"
    )
    image, target = next(iter(plain_loader(chosen, seed=0)))
    assert image.shape == (4, 3, 16, 16)
    assert target.shape == (4, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    transform = str(plain_loader(options(tree, color_jitter=0.4), seed=0).dataset.transform)
    for name in ("RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "Normalize"):
        assert name in transform


@pytest.mark.parametrize("workers", [0, 1])
def test_it_reports_both_speeds_and_their_ratio(
    tree: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tokens(tree, "images=7", f"data.num_workers={workers}", "--json")
    assert bench.main(argv) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    ratios = sorted(r["ours"] / r["plain"] for r in found["rounds"])
    assert found["ratio"] == {"median": ratios[2], "min": ratios[0], "max": ratios[4]}
    assert (found["bench"], found["unit"], found["data"]) == ("loading", "images", "image_folder")
    assert (found["batches"], found["batch_size"], found["num_workers"]) == (2, 4, workers)
    assert min(found["ours_per_s"], found["plain_per_s"]) > 0
    assert captured.err.count("round ") == 5


def test_the_text_is_five_lines(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(tokens(tree, "images=4")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["loading", "start", "ours", "plain", "ratio"]
    assert "median of 5 rounds of 4 images" in lines[4]


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    """The one line of a refused command, after its rounds."""
    assert bench.main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert [line for line in lines[:-1] if not line.startswith("round ")] == []
    return lines[-1]


def test_mistakes_are_one_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["loading"], "data=image_folder"),
        (["loading", "data=image_folder"], "data.root"),
        (["loading", "rounds=2"], "rounds=2"),
        (["loading", "--dry-run"], "suite.bench loading"),
        (tokens(tree, "images=1000"), "images=1000"),
        (tokens(tree, "data.num_workers=5"), "images=2000"),
    ):
        assert said in mistake(argv, capsys, code=2)


def test_a_broken_file_ends_it_with_one_line(
    broken_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tokens(broken_tree, "data.on_error=skip")
    assert "every file can be decoded" in mistake(argv, capsys, code=1)


def test_a_task_without_a_plain_loader_says_so(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import suite.loading
    from tasks.vision.classify import SPEC

    without = dataclasses.replace(SPEC, plain_loader=None)
    monkeypatch.setattr(suite.loading, "load_task", lambda name: without)
    assert "no plain loader" in mistake(tokens(tree), capsys, code=2)


def test_help_says_how_it_measures_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from suite import bench; code = bench.main(['loading', '--help']); "
        "assert not {'torch', 'lightning', 'omegaconf'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "scripts/build_image_tree.py" in done.stdout
