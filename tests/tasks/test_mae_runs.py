"""Whole runs of masked autoencoding and of what is fine-tuned from it: figures, resume, weights
that move, wrong inputs. On the first of the shipped images, so that probes take no time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import crash_at, main, one_line, result, rows, weights
from torch import Tensor

import tasks.vision.data as table

COUNTS = {"train": 256, "val": 64, "test": 64}
SHORT = [
    "data.batch_size=32",
    "data.eval_batch_size=64",
    "optim.lr=1e-3",
    "optim.warmup_fraction=0",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
    "run.norm_stats=false",
]
ENCODER = ["model.patch_size=7", "model.dim=16", "model.depth=1", "model.heads=2"]
DECODER = ["model.decoder_dim=8", "model.decoder_depth=1", "model.decoder_heads=2"]
MAE = ["task=vision/mae", "model=mae_tiny", *ENCODER, *DECODER, *SHORT, "trainer.max_epochs=2"]
FINETUNE = [
    "task=vision/classify",
    "model=vit_fmnist",
    *ENCODER,
    *SHORT,
    "model.class_token=true",
    "model.head_std=2e-5",
    "model.drop_path=0.1",
    "optim.layer_decay=0.75",
    "trainer.max_epochs=1",
]
QUIET = ["task.probe=none", "task.pictures=0"]
STILL = ["optim.lr=1e-30", "optim.weight_decay=0"]
PATCHES, HIDDEN = 16, 12


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    """The shipped images, but only the first of each split."""
    shipped = table.DATA["fashion_mnist_mini"]

    def build(options: Any, *, seed: int) -> Any:
        splits = shipped.build(options, seed=seed)
        for name, count in COUNTS.items():
            part: Any = getattr(splits, name)
            part.images, part.labels = part.images[:count], part.labels[:count]
        return splits

    with pytest.MonkeyPatch.context() as patch:
        few = dataclasses.replace(shipped, build=build)
        patch.setitem(table.DATA, "fashion_mnist_mini", few)
        yield


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training with DyT."""
    folder = tmp_path_factory.mktemp("mae") / "pre"
    assert main([*MAE, "norm=dyt", f"run.dir={folder}"]) == 0
    return folder


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def best(run: Path | str) -> dict[str, Tensor]:
    """The weights that an evaluation of a run, and a start from it, take."""
    file = Path(run) / "checkpoints" / "best.ckpt"
    return torch.load(file, weights_only=True)["state_dict"]


def of_test(run: Path | str) -> dict[str, float]:
    """What a run's record says of its test, but for what was measured before training."""
    found = result(str(run))["metrics"]
    return {k: v for k, v in found.items() if k.startswith("test/") and "untrained" not in k}


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What an evaluation wrote to stdout."""
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


# --- pre-training ---------------------------------------------------------------------------------


def test_a_pre_training_leaves_its_loss_its_probes_and_a_picture(pre: Path) -> None:
    found = result(str(pre))
    assert found["status"] == "done"
    assert (found["primary"]["name"], found["primary"]["direction"]) == ("loss", "min")
    assert found["throughput"]["unit"] == "images"
    m = found["metrics"]
    for split in ("val", "test"):
        assert m[f"{split}/count"] == COUNTS[split] * HIDDEN
        assert 0 < m[f"{split}/loss"] < 3  # drawing a patch's mean costs 1
    for probe in ("knn_acc", "knn_acc_untrained", "knn_acc_pixels", "linear_acc"):
        share = m[f"test/{probe}"] * COUNTS["test"]
        assert share == pytest.approx(round(share), abs=1e-3)
        assert 0.1 < m[f"test/{probe}"] <= 1
    assert found["primary"]["test"] == m["test/loss"]
    train = [row["train/loss"] for row in rows(str(pre)) if "train/loss" in row]
    assert train[-1] < train[0]
    with Image.open(pre / "reconstructions.png") as picture:
        page = np.asarray(picture)
    assert page.ndim == 2  # grey images
    assert page.std() > 10


def test_a_pre_training_evaluates_as_it_was_tested(
    pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pre / "reconstructions.png").read_bytes()
    assert main([f"evaluate={pre}"]) == 0
    again = printed(capsys)
    assert {name: again[name] for name in of_test(pre)} == of_test(pre)
    assert "test/knn_acc" in again
    assert (pre / "reconstructions.png").read_bytes() == before
    assert not Path("reconstructions.png").exists()


def test_a_pre_training_goes_on_from_another_one(
    pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*MAE, *STILL, "norm=dyt", "trainer.max_epochs=1", "task.probe=knn"]
    assert main([*more, f"model.init_from={pre}", "run.dir=a"]) == 0
    assert "this run starts from trained weights" in capsys.readouterr().err
    assert "test/knn_acc_untrained" not in result("a")["metrics"]
    for name, value in best("a").items():
        torch.testing.assert_close(value, best(pre)[name], rtol=0, atol=1e-6)
    assert result("a")["metrics"]["test/loss"] == pytest.approx(of_test(pre)["test/loss"])


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_ratio_says_how_many_patches_are_asked_for(ratio: float) -> None:
    few = [*MAE, *QUIET, "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    assert main([*few, f"task.mask_ratio={ratio}", "run.dir=a"]) == 0
    asked = PATCHES - int(PATCHES * (1 - ratio))
    assert result("a")["metrics"]["val/count"] == COUNTS["val"] * asked


# --- resume ---------------------------------------------------------------------------------------

EVERY = ["run.save_every_n_steps=2", "trainer.max_epochs=2"]


def interrupt_and_resume(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of the whole run and of one that a crash cut in the second epoch."""
    assert main([*common, "run.dir=whole"]) == 0
    whole = result("whole")
    crash = whole["steps"] // 2 + 3
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        assert main([*common, "run.dir=cut"]) == 1
    held = torch.load("cut/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert whole["steps"] // 2 < held < crash
    assert main(["run.resume=cut"]) == 0
    assert different(weights("whole"), weights("cut")) == []
    assert Path("cut/checkpoints/last.ckpt").is_file()
    return whole, result("cut")


def test_a_pre_training_resumes_within_an_epoch_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are those of the whole run, and so is what the untrained network was worth."""
    whole, cut = interrupt_and_resume([*MAE, *EVERY, "norm=derf"], monkeypatch)
    assert cut["metrics"] == whole["metrics"]
    assert cut["steps"] == whole["steps"]
    assert "test/knn_acc_untrained" in cut["metrics"]
    drawn = [Path(run, "reconstructions.png").read_bytes() for run in ("whole", "cut")]
    assert drawn[0] == drawn[1]


def test_a_fine_tuning_resumes_within_an_epoch_bit_by_bit(
    pre: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*FINETUNE, *EVERY, "norm=dyt", f"model.init_from={pre}"]
    whole, cut = interrupt_and_resume(common, monkeypatch)
    assert cut["metrics"] == whole["metrics"]


# --- fine-tuning ----------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_encoder_and_says_what_starts_fresh(
    pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*FINETUNE, *STILL, "norm=dyt", f"model.init_from={pre}", "run.dir=tuned"]
    capsys.readouterr()
    assert main(start) == 0
    said = capsys.readouterr().err
    assert "left out of the masked autoencoder: mask_token, decoder_pos_embed" in said
    assert "starts fresh: fc_norm, head" in said
    before, after = best(pre), weights("tuned")
    kept = [name for name in after if not name.startswith(("model.fc_norm.", "model.head."))]
    assert len(kept) > 15
    for name in kept:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    assert float(after["model.head.weight"].std()) < 1e-4
    assert result("tuned")["config"]["optim"]["layer_decay"] == 0.75
    capsys.readouterr()
    assert main(["evaluate=tuned"]) == 0
    again = printed(capsys)
    assert {name: again[name] for name in of_test("tuned")} == of_test("tuned")


def test_layer_decay_moves_early_layers_less(pre: Path) -> None:
    """One step of Adam moves a weight by its learning rate, or nearly."""
    common = [*FINETUNE, "norm=dyt", f"model.init_from={pre}", "optim.weight_decay=0"]
    one = [*common, "model.drop_path=0", "trainer.limit_train_batches=1", "optim.schedule=constant"]
    assert main([*one, "optim.layer_decay=0.1", "optim.eps=1e-16", "run.dir=a"]) == 0
    before, after = best(pre), weights("a")
    names = {"embedding": "model.patch_embed.proj.weight", "block": "model.blocks.0.mlp.fc1.weight"}
    moved = {what: float((after[n] - before[n]).abs().median()) for what, n in names.items()}
    assert moved["block"] == pytest.approx(1e-3 * 0.1, rel=0.02)
    assert moved["embedding"] == pytest.approx(1e-3 * 0.01, rel=0.05)


def test_the_class_token_can_be_left_out_and_pooled(
    pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*FINETUNE, "norm=dyt", "trainer.limit_train_batches=1", f"model.init_from={pre}"]
    assert main([*few, "model.class_token=false", "run.dir=without"]) == 0
    assert "left out, as model.class_token=false: cls_token" in capsys.readouterr().err
    assert main([*few, "model.pool=cls", "run.dir=pooled"]) == 0
    said = capsys.readouterr().err
    assert "starts fresh: head" in said
    assert "fc_norm" not in said
    for run in ("without", "pooled"):
        assert math.isfinite(result(run)["metrics"]["test/loss"])


def test_another_norm_is_refused_and_crossing_is_asked_for(
    pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*FINETUNE, "norm=layernorm", "trainer.limit_train_batches=1", f"model.init_from={pre}"]
    capsys.readouterr()
    assert main([*start, "run.dir=tuned"]) == 2
    line = one_line(capsys)
    assert "norm=dyt" in line
    assert "norm=layernorm" in line
    assert not Path("tuned").exists()
    assert main([*start, "run.dir=tuned", "model.init_across_norms=true"]) == 0
    said = capsys.readouterr().err
    assert "note: across norms" in said
    assert "alpha" in said


# --- wrong inputs ---------------------------------------------------------------------------------


def write_wrong(pre: Path) -> None:
    """Weights that cannot be used; pre is a link to the run."""
    Path("pre").symlink_to(pre)
    content = {name.removeprefix("model."): value for name, value in best(pre).items()}
    encoder = {n: v for n, v in content.items() if not n.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, "encoder.pth")
    odd = dict(encoder, pos_embed=encoder["pos_embed"][:, :-1])
    torch.save({"model": odd}, "odd.pth")
    torch.save({"model": dict(encoder, **{"head.weight": torch.zeros(10, 16)})}, "classifier.pth")
    Path("empty").mkdir()
    Path("text.pth").write_text("no weights")


FROM = "model.init_from=pre"
PRETRAIN = [*MAE, *QUIET, "norm=dyt", "trainer.max_epochs=1"]
TUNE = [*FINETUNE, "norm=dyt"]
WRONG: dict[str, tuple[list[str], list[str], str]] = {
    # the task
    "all hidden": (PRETRAIN, ["task.mask_ratio=1"], "task.mask_ratio=1: must be above 0 and below"),
    "none hidden": (PRETRAIN, ["task.mask_ratio=0"], "task.mask_ratio=0: must be above 0 and"),
    "no patch left": (
        PRETRAIN,
        ["task.mask_ratio=0.95"],
        "task.mask_ratio=0.95: of 16 patches 0 would stay visible",
    ),
    "probe": (PRETRAIN, ["task.probe=k-nn"], "task.probe=k-nn: must be one of"),
    "neighbours": (PRETRAIN, ["task.knn=0"], "task.knn=0: must be at least 1"),
    "pictures": (PRETRAIN, ["task.pictures=-1"], "task.pictures=-1: must not be negative"),
    "one value": (
        PRETRAIN,
        ["model.patch_size=1"],
        "task.norm_pix_loss=true: a patch of one value has no variance",
    ),
    # the model
    "patch": (PRETRAIN, ["model.patch_size=5"], "must be a multiple of patch_size (5)"),
    "one patch": (
        PRETRAIN,
        ["model.patch_size=28"],
        "must be a multiple of patch_size (28), twice",
    ),
    "image": (
        PRETRAIN,
        ["model.image_size=35"],
        "model: takes images of 1 x 35 x 35, but data=fashion_mnist_mini has 1 x 28 x 28. "
        "Set model.image_size=28",
    ),
    "colours": (PRETRAIN, ["model.in_chans=3"], "Set model.in_chans=1"),
    "heads": (PRETRAIN, ["model.heads=3"], "model.dim=16: must be a multiple of heads (3)"),
    "decoder's heads": (PRETRAIN, ["model.decoder_heads=3"], "must be a multiple of decoder_heads"),
    "sines": (
        PRETRAIN,
        ["model.decoder_dim=10"],
        "model.decoder_dim=10: must be a multiple of 4 (sines and cosines of two axes)",
    ),
    "drop path": (PRETRAIN, ["model.drop_path=0.1"], "model.drop_path: no such key"),
    "model": (PRETRAIN, ["model=vit_fmnist"], "model=vit_fmnist"),
    "norm": (PRETRAIN, ["norm=dit"], "Did you mean norm=dyt?"),
    "site": (PRETRAIN, ["norm.alpha_init_by_site.atn=1"], "did you mean 'attn'"),
    "shards": (PRETRAIN, ["trainer.strategy=fully_shard"], "does not say how it is cut"),
    "data": (PRETRAIN, ["data=shakespeare"], "data=shakespeare: no such data"),
    "recipe": (["recipe=dyt_mae_vit_base"], [], "recipe=dyt_mae_vit_base: no such recipe"),
    # weights of pre-training in pre-training
    "nowhere": (PRETRAIN, ["model.init_from=nowhere"], "no such run or file"),
    "empty": (PRETRAIN, ["model.init_from=empty"], "has no checkpoints/best.ckpt"),
    "no weights": (PRETRAIN, ["model.init_from=text.pth"], "text.pth: not a readable checkpoint"),
    "other patches": (
        PRETRAIN,
        [FROM, "model.patch_size=4"],
        "its sizes are other than this model's (patch_size=4): set model.patch_size=7",
    ),
    "other width": (PRETRAIN, [FROM, "model.dim=32"], "(dim=32): set model.dim=16"),
    "other decoder": (
        PRETRAIN,
        [FROM, "model.decoder_dim=16", "model.decoder_depth=2"],
        "set model.decoder_dim=8 model.decoder_depth=1",
    ),
    "other heads": (PRETRAIN, [FROM, "model.heads=4"], "was trained with model.heads=2"),
    "other norm": (PRETRAIN, [FROM, "norm=layernorm"], "norm=dyt"),
    "no class token": (PRETRAIN, [FROM, "model.class_token=false"], "model.class_token=true"),
    "a classifier": (
        PRETRAIN,
        ["model.init_from=classifier.pth"],
        "these are weights of a classifier, not of a masked autoencoder",
    ),
    "half a model": (
        PRETRAIN,
        ["evaluate=encoder.pth"],
        "evaluate=encoder.pth: holds an encoder and no decoder",
    ),
    # and in fine-tuning
    "tuned patches": (TUNE, [FROM, "model.patch_size=4"], "set model.patch_size=7"),
    "tuned width": (TUNE, [FROM, "model.dim=32"], "(dim=32): set model.dim=16"),
    "tuned depth": (TUNE, [FROM, "model.depth=2"], "(depth=2): set model.depth=1"),
    "tuned heads": (TUNE, [FROM, "model.heads=4"], "was trained with model.heads=2"),
    "tuned norm": (TUNE, [FROM, "norm=rmsnorm"], "norm=dyt"),
    "no square": (TUNE, ["model.init_from=odd.pth"], "are no square grid"),
    "no head": (TUNE, ["evaluate=encoder.pth"], "evaluate=encoder.pth: holds an encoder and no"),
    "no fine-tuning": (TUNE, ["evaluate=pre"], "task=vision/classify"),
    "decay": (TUNE, [FROM, "optim.layer_decay=0"], "optim.layer_decay=0: must be above 0"),
    "head": (TUNE, [FROM, "model.head_std=0"], "model.head_std=0: must be above 0"),
}


def files_here() -> list[str]:
    return sorted(str(path) for path in Path.cwd().rglob("*"))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    case: str, pre: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wrong(pre)
    capsys.readouterr()
    base, tokens, words = WRONG[case]
    before = files_here()
    assert main([*base, *tokens, *(["run.dir=run"] if len(base) > 1 else [])]) == 2
    captured = capsys.readouterr()
    lines = [x for x in captured.err.splitlines() if not x.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert captured.out == ""
    assert files_here() == before
