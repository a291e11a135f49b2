"""Whole runs on folders of photographs: augmentation, resume, broken files, published weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from photographs import NAMES, write_tree
from safetensors.torch import save_file
from test_run import crash_at, main, one_line, result, weights

from suite.errors import DataError
from tasks.vision.folder import ImageFolderOptions, build_image_folder

CONVNEXT = [
    "model=convnext_fmnist",
    "model.in_chans=3",
    "model.dim=8",
    "model.depth1=1",
    "model.depth2=1",
    "model.drop_path=0.1",
]
AUGMENTED = [
    "data=image_folder",
    "data.image_size=32",
    "data.crop=resized",
    "data.randaugment=rand-m9-mstd0.5-inc1",
    "data.erase=0.25",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "task.label_smoothing=0.1",
]
SHORT = [
    *CONVNEXT,
    *AUGMENTED,
    "data.batch_size=8",
    "data.eval_batch_size=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=4",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


def test_resume_within_an_augmented_epoch_is_bit_equal_for_any_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 steps an epoch; pulled at step 11, saved at 9 and resumed there, with 2 workers or none."""
    write_tree(Path("photos"))
    common = [*SHORT, "data.root=photos", "run.save_every_n_steps=3", "optim.ema_decay=0.9"]
    assert main([*common, "run.dir=whole"]) == 0
    for workers, after in ((2, 2), (0, 0)):
        with monkeypatch.context() as patch:
            crash_at(patch, 11)
            run = f"cut{workers}"
            assert main([*common, f"run.dir={run}", f"data.num_workers={workers}"]) == 1
        assert main([f"run.resume={run}", f"data.num_workers={after}"]) == 0
        a, b = weights("whole"), weights(run)
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []
        assert result(run)["metrics"] == result("whole")["metrics"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_ends_the_run_and_is_named(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(Path("photos"), broken=["train/bag/3.jpg"])
    tokens = [*SHORT, "data.root=photos", "run.dir=a", f"data.num_workers={workers}"]
    tokens += ["norm.alpha_init=0.5", "data.on_error=fail"]
    assert main(tokens) == 1
    line = one_line(capsys)
    assert "photos/train/bag/3.jpg" in line
    assert "data.on_error=skip" in line
    if Path("a/result.json").is_file():
        assert result("a")["status"] == "failed"
        assert "photos/train/bag/3.jpg" in result("a")["error"]


@pytest.mark.parametrize("workers", [0, 2])
def test_with_skip_broken_files_are_counted_and_change_no_other_row(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(Path("photos"), broken=["train/bag/3.jpg", "train/coat/0.jpg", "val/coat/1.jpg"])
    tokens = [*SHORT, "data.root=photos", "run.dir=a", f"data.num_workers={workers}"]
    assert main([*tokens, "data.on_error=skip"]) == 0
    found = result("a")
    assert found["steps"] == 16
    unreadable = found["data"]["unreadable"]
    assert unreadable["train"]["count"] == 2
    assert [Path(p).name for p in unreadable["train"]["files"]] == ["3.jpg", "0.jpg"]
    assert unreadable["val"]["count"] == 1
    assert found["metrics"]["val/count"] == 23
    assert "could not be read and were left out" in capsys.readouterr().err


def test_what_could_not_be_read_is_known_after_a_crash_and_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tree(Path("photos"), broken=["train/bag/3.jpg", "val/coat/1.jpg"])
    common = [*SHORT, "data.root=photos", "data.on_error=skip", "run.dir=cut"]
    with monkeypatch.context() as patch:
        crash_at(patch, 11)
        assert main(common) == 1
    assert result("cut")["data"]["unreadable"]["train"]["count"] == 1
    assert main(["run.resume=cut", "trainer.max_steps=9"]) == 0
    found = result("cut")["data"]["unreadable"]
    assert {split: u["count"] for split, u in found.items()} == {"train": 1, "val": 1, "test": 1}


def test_a_run_that_could_read_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"train/{name}/{k}.jpg" for name in NAMES for k in range(16)]
    write_tree(Path("photos"), broken=names)
    assert main([*SHORT, "data.root=photos", "data.on_error=skip", "run.dir=a"]) == 1
    line = one_line(capsys)
    assert "of 64 examples cannot be read" in line
    assert "data.skip_limit" in line
    assert result("a")["status"] == "failed"


def test_a_file_that_is_gone_is_skipped_and_a_folder_that_is_gone_is_not() -> None:
    """A disk that disappears must not pass for a set of broken images."""
    root = write_tree(Path("photos"))
    options = ImageFolderOptions(root=str(root), image_size=32, on_error="skip")
    train = build_image_folder(options, seed=0).train
    assert train.fetch([0, 1], epoch=0, train=True)["valid"].all()
    Path(train.path_of(1)).unlink()
    assert train.fetch([0, 1], epoch=0, train=True)["valid"].tolist() == [True, False]
    shutil.rmtree(Path(train.path_of(1)).parent)
    with pytest.raises(DataError, match=r"1\.jpg cannot be read \(No such file or directory\)"):
        train.fetch([1, 0], epoch=0, train=True)


def published(name: str, file: Path, **options: Any) -> torch.nn.Module:
    """timm's model with random weights far from its start, saved as published ones are."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_file(model.state_dict(), file)
    return model


def timm_accuracy(model: torch.nn.Module, root: Path, config: dict[str, Any]) -> float:
    """Top-1 over the val folder with timm's own preprocessing."""
    from PIL import Image

    transform = timm.data.create_transform(**config, is_training=False)
    hits = []
    for label, folder in enumerate(sorted((root / "val").iterdir())):
        for file in sorted(folder.iterdir()):
            with torch.no_grad():
                logits = model(transform(Image.open(file).convert("RGB"))[None])
            hits.append(int(logits.argmax()) == label)
    return sum(hits) / len(hits)


def evaluated(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


PREPROCESSING = {
    "input_size": (3, 64, 64),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
}


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_published_weights_are_evaluated_as_timm_does(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tree(Path("photos"))
    if family == "vit":
        sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
        model = published("vit_base_patch16_224", Path("w.safetensors"), **sizes)
        ours = ["model=vit_base", "model.dim=48", "model.depth=2", "model.heads=3"]
        ours += ["model.image_size=64", "model.pool=cls"]
    else:
        sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
        model = published("convnext_base", Path("w.safetensors"), **sizes)
        ours = ["model=convnext_base", "model.dim=8"]
        ours += [f"model.depth{k}=1" for k in (1, 2, 3, 4)]
    config = {"architecture": "x", "pretrained_cfg": PREPROCESSING}
    Path("config.json").write_text(json.dumps(config))
    data = ["data=image_folder", "data.root=photos", "data.timm_cfg=config.json"]
    tokens = ["evaluate=w.safetensors", *ours, *data, "norm=layernorm", "trainer.accelerator=cpu"]
    expected = timm_accuracy(model, root, PREPROCESSING)
    Path("config.yaml").write_text("arch: somebody else's")  # is not taken for a run's
    for place in ([], ["data.root=photos/val", "data.val=only"]):
        assert main([*tokens, "data.eval_batch_size=8", *place]) == 0
        found = evaluated(capsys)
        assert found["test/acc"] == pytest.approx(expected)
        assert found["test/count"] == 24
    assert not Path("runs").exists()


def test_a_val_folder_alone_can_be_evaluated_and_not_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write_tree(Path("photos"))
    tokens = [*SHORT, f"data.root={root}", "run.dir=a"]
    assert main([*tokens, "data.val=only"]) == 2
    assert "there is nothing to train on" in one_line(capsys)
    shutil.rmtree(root / "train")
    assert main(tokens) == 2
    assert "set data.val=only" in one_line(capsys)
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["norm=layernorm"], "The file is for model.pool=cls"),
        (["norm=dyt", "model.pool=cls"], "trained with another norm: choose that norm"),
        (["norm=layernorm", "model.pool=cls", "model.depth=3"], "missing blocks.2"),
        (["norm=layernorm", "model=convnext_tiny"], "these are not weights of this model"),
    ],
)
def test_weights_of_another_model_say_what_they_are_for(
    tokens: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(Path("photos"))
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    published("vit_base_patch16_224", Path("w.safetensors"), **sizes)
    small = ["model.dim=48", "model.depth=2", "model.heads=3", "model.image_size=64"]
    if "model=convnext_tiny" in tokens:
        small = []
    data = ["data=image_folder", "data.root=photos", "data.image_size=64", "data.batch_size=8"]
    model = ["model=vit_base", *small]
    assert main(["evaluate=w.safetensors", *model, *data, *tokens]) == 2
    assert words in one_line(capsys)
