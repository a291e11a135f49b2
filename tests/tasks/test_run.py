"""Whole runs through the command line's own entry point, on the embedded images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import suite.build
from suite import train as entry

SHORT = [
    "data.batch_size=32",
    "trainer.limit_train_batches=7",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
    "model.dropout=0.1",
    "model.drop_path=0.1",
]


def main(tokens: list[str]) -> int:
    """suite.train's main; a token that comes later replaces an earlier one of the same key."""
    last = {t.partition("=")[0]: t for t in tokens}
    return entry.main(list(last.values()))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


def weights(run: str) -> dict[str, torch.Tensor]:
    content = torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"]


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def result(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "result.json").read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single error line of a failed call."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(lines) == 1
    return lines[0]


class StopAt(Callback):
    """Fails in the middle of a run, as a crash would: after the batch, before the epoch ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("pulled the plug")


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> pytest.MonkeyPatch:
    whole = suite.build.build_callbacks

    def with_stop(*args: Any, **kwargs: Any) -> list[Callback]:
        return [*whole(*args, **kwargs), StopAt(step)]

    monkeypatch.setattr("suite.run.build_callbacks", with_stop)
    return monkeypatch


def test_a_run_leaves_the_whole_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a", "run.tensorboard=true"]) == 0
    found = result("a")
    assert found["status"] == "done"
    assert (found["task"], found["norm"], found["seed"]) == ("vision/classify", "dyt", 0)
    assert found["primary"]["best"] == found["metrics"]["val/acc"]
    assert found["primary"]["test"] == found["metrics"]["test/acc"]
    assert found["data"]["sha256"]
    assert found["data"]["synthetic"] is False
    assert found["steps"] == 21
    assert found["norm_parameters"] == 9 * (1 + 64 + 64)
    names = set().union(*rows("a"))
    assert {"train/loss", "train/acc", "grad_norm", "lr", "throughput/images_per_s"} <= names
    assert {
        "norm/attn/alpha",
        "norm/attn/rms",
        "norm/attn/alpha_rms",
        "norm/attn/saturation",
    } <= names
    assert {"val/loss", "val/acc"} <= names
    assert [r["step"] for r in rows("a") if "val/acc" in r] == [7, 14, 21]
    assert list(Path("a/tensorboard").glob("events*"))
    assert "best val/acc" in capsys.readouterr().out


def test_equal_seeds_give_equal_runs_and_config_yaml_repeats_one() -> None:
    assert main([*SHORT, "run.dir=a", "seed=3"]) == 0
    assert main(["config=a/config.yaml", "run.dir=b"]) == 0
    a, b = weights("a"), weights("b")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crash", [10, 14, 17])
def test_resume_is_bit_equal_to_a_run_that_was_never_interrupted(
    monkeypatch: pytest.MonkeyPatch, workers: int, crash: int
) -> None:
    """Epochs have 7 steps and last.ckpt is written every 3: in mid-epoch, on the last step."""
    common = [
        *SHORT,
        f"data.num_workers={workers}",
        "run.save_every_n_steps=3",
        "optim.ema_decay=0.9",
    ]
    assert main([*common, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        assert main([*common, "run.dir=cut"]) == 1
    assert result("cut")["status"] == "failed"
    assert main(["run.resume=cut"]) == 0
    assert result("cut")["status"] == "done"
    assert result("cut")["steps"] == result("whole")["steps"] == 21
    a, b = weights("whole"), weights("cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert result("cut")["metrics"] == result("whole")["metrics"]


def test_more_steps_than_the_first_run_had_go_on_with_the_next_batches() -> None:
    constant = ["optim.schedule=constant", "optim.warmup_fraction=null"]
    assert (
        main(
            [*SHORT, *constant, "trainer.max_epochs=null", "trainer.max_steps=17", "run.dir=whole"]
        )
        == 0
    )
    assert (
        main([*SHORT, *constant, "trainer.max_epochs=null", "trainer.max_steps=10", "run.dir=cut"])
        == 0
    )
    assert main(["run.resume=cut", "trainer.max_steps=17"]) == 0
    a, b = weights("whole"), weights("cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_that_ends_in_mid_epoch_is_validated_there() -> None:
    assert main([*SHORT, "trainer.max_steps=9", "run.dir=a"]) == 0
    validated = [r["step"] for r in rows("a") if "val/acc" in r]
    assert validated == [7, 9]
    primary = result("a")["primary"]
    values = {r["step"]: r["val/acc"] for r in rows("a") if "val/acc" in r}
    assert primary["last"] == values[9]
    assert primary["best"] == max(values.values())
    assert main([*SHORT, "trainer.max_steps=2", "run.dir=b"]) == 0
    assert result("b")["primary"]["best"] is not None
    assert main(["evaluate=b", "run.eval_split=val"]) == 0


def test_resume_refuses_another_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a"]) == 0
    capsys.readouterr()
    assert main(["run.resume=a", "optim.lr=0.1"]) == 2
    assert "optim.lr" in one_line(capsys)
    assert main(["run.resume=a", "norm=layernorm"]) == 2
    assert "norm" in one_line(capsys)
    assert main(["run.resume=a", "run.dir=b"]) == 2
    assert "its own folder" in one_line(capsys)
    assert not Path("b").exists()


def test_a_run_is_resumed_in_its_folder_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*SHORT, "trainer.max_epochs=1", "run.dir=a"]) == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["run.resume=../a", "trainer.max_epochs=2"]) == 0
    assert result("../a")["steps"] == 14
    assert list(Path.cwd().iterdir()) == []


def test_evaluate_repeats_the_figures_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a"]) == 0
    capsys.readouterr()
    before = sorted(Path("a").rglob("*"))
    assert main(["evaluate=a"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test/acc"] == pytest.approx(result("a")["metrics"]["test/acc"])
    assert printed["test/loss"] == pytest.approx(result("a")["metrics"]["test/loss"], rel=1e-5)
    assert sorted(Path("a").rglob("*")) == before


def test_weights_move_between_runs_but_not_between_norms(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SHORT, "run.dir=a", "norm=dyt"]) == 0
    assert main([*SHORT, "run.dir=b", "norm=dyt", "model.init_from=a"]) == 0
    assert rows("b")[0]["train/loss"] < rows("a")[0]["train/loss"]
    capsys.readouterr()
    assert main([*SHORT, "run.dir=c", "norm=layernorm", "model.init_from=a"]) == 2
    assert "norm=dyt" in one_line(capsys)
    assert not Path("c").exists()
    across = ["norm=layernorm", "model.init_from=a", "model.init_across_norms=true"]
    assert main([*SHORT, "run.dir=d", *across]) == 0
    assert "alpha" in capsys.readouterr().err


def test_files_without_a_record_load_strictly(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    assert main([*SHORT, "run.dir=a", "norm=dyt"]) == 0
    plain = {k.removeprefix("model."): v.clone() for k, v in weights("a").items()}
    save_file(plain, "dyt.safetensors")
    torch.save({"model": plain}, "dyt.pt")
    for file in ("dyt.safetensors", "dyt.pt"):
        assert main([*SHORT, f"run.dir=from-{file}", f"model.init_from={file}"]) == 0
    capsys.readouterr()
    assert main([*SHORT, "run.dir=c", "norm=layernorm", "model.init_from=dyt.pt"]) == 2
    assert "another norm" in one_line(capsys)
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert main([*SHORT, "run.dir=c", "model.init_from=evil.pt"]) == 2
    assert "evil.pt" in one_line(capsys)
    assert not Path("pwned").exists()


def test_a_non_finite_step_stops_the_run_and_names_the_site(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                module.model.blocks[1].norm1.weight.data[0] = float("nan")

    whole = suite.build.build_callbacks
    monkeypatch.setattr("suite.run.build_callbacks", lambda *a, **k: [*whole(*a, **k), Poison()])
    assert main([*SHORT, "run.dir=a", "run.save_every_n_steps=3"]) == 3
    error = one_line(capsys)
    assert "step 5" in error
    assert "blocks.1.norm1 (attn, dyt)" in error
    assert "samples" in error
    assert result("a")["status"] == "diverged"
    assert all(v.isfinite().all() for v in weights("a").values())


def test_dry_run_writes_nothing() -> None:
    assert main([*SHORT, "--dry-run"]) == 0
    assert list(Path.cwd().iterdir()) == []


def test_dry_run_of_a_model_over_the_memory_stays_on_the_meta_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("suite.trial.available_memory", lambda config: 2**30)
    big = ["model=vit_large", "model.image_size=28", "model.in_chans=1", "model.patch_size=7"]
    assert main([*SHORT, *big, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "on the meta device only" in said
    assert "nothing was allocated" in said
    assert list(Path.cwd().iterdir()) == []


def test_a_model_over_the_memory_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("suite.memory.available_memory", lambda config: 2**20)
    assert main(SHORT) == 2
    said = capsys.readouterr().err
    assert "needs at least" in said
    assert "0.0 GiB are available" in said


def test_calibrated_alphas_are_in_the_checkpoint_and_survive_a_resume() -> None:
    assert main([*SHORT, "run.dir=a", "norm.alpha_init=calibrated", "trainer.max_epochs=1"]) == 0
    alphas = {k: v for k, v in weights("a").items() if k.endswith("alpha")}
    assert len({round(float(v), 3) for v in alphas.values()}) > 3
    first = rows("a")[0]
    for site in ("attn", "ffn", "final"):
        assert first[f"norm/{site}/alpha_rms"] == pytest.approx(1.0, abs=0.15)


def test_all_norms_start_from_the_same_loss_scale_and_batches() -> None:
    for norm in ("layernorm", "batchnorm"):
        assert main([*SHORT, f"run.dir={norm}", f"norm={norm}", "trainer.max_steps=2"]) == 0
    assert [r["step"] for r in rows("layernorm")] == [r["step"] for r in rows("batchnorm")]


def test_gradient_clipping_bounds_the_update() -> None:
    clip = [
        "optim.name=sgd",
        "optim.momentum=0.0",
        "optim.weight_decay=0.0",
        "optim.schedule=constant",
    ]
    steps = [
        "optim.warmup_fraction=null",
        "optim.lr=1.0",
        "trainer.max_steps=1",
        "trainer.gradient_clip_val=0.01",
    ]
    assert main([*SHORT, *clip, *steps, "run.dir=a"]) == 0
    assert main([*SHORT, *clip, *steps, "run.dir=b", "optim.lr=1e-9"]) == 0
    a, b = weights("a"), weights("b")
    moved = torch.sqrt(sum(((a[k] - b[k]).double() ** 2).sum() for k in a))
    assert float(moved) == pytest.approx(0.01, rel=1e-3)
    assert rows("a")[0]["grad_norm"] > 0.01


def test_a_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.max_steps=1"]) == 0
    before = Path("a/result.json").read_bytes()
    assert main([*SHORT, "run.dir=a"]) == 2
    assert "run.dir=a" in one_line(capsys)
    assert Path("a/result.json").read_bytes() == before
    assert main([*SHORT, "trainer.max_steps=1"]) == 0
    assert main([*SHORT, "trainer.max_steps=1"]) == 0
    assert len(list(Path("runs/vision/classify").iterdir())) == 2


def test_batchnorm_does_not_see_the_padding_of_the_last_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven images in one padded batch of 32 train as in an unpadded batch of 7."""
    whole = suite.build.build_data

    def seven(*args: Any, **kwargs: Any) -> Any:
        splits = whole(*args, **kwargs)
        train = splits.train
        train.images, train.labels = train.images[:7], train.labels[:7]
        return splits

    monkeypatch.setattr("suite.build.build_data", seven)
    common = ["norm=batchnorm", "trainer.max_epochs=2", "optim.name=sgd", "data.flip=false"]
    common += ["model.dropout=0.0", "model.drop_path=0.0", "trainer.limit_train_batches=1.0"]
    assert main([*SHORT, *common, "data.batch_size=7", "run.dir=a"]) == 0
    assert main([*SHORT, *common, "data.batch_size=32", "data.drop_last=false", "run.dir=b"]) == 0
    a, b = weights("a"), weights("b")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)
