"""Steps with a NaN or an infinity: left out to the bit, blamed on the right one, never saved."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from spoiled import Late, NaNGradient, Run, spoiled
from torch import Tensor

from suite.build import quiet
from suite.culprits import Suspect, blame
from suite.data import AddressedDataset
from suite.ema import WeightEMA
from suite.errors import DivergedError
from suite.nonfinite import NonFiniteGuard, gate, nonfinite
from suite.optim import build_optimizer, schedule, warmup_steps
from suite.randomness import derive

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    quiet()


def written_out(run: Run, *, without: set[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimizer state of a plain loop that takes no step on the batches `without`."""
    parts, config = run.parts, run.config
    module, total = parts.module, 6
    addresses = list(parts.data.train_sampler(rank=0, world_size=1))
    optimizer = build_optimizer(module.model, config.optim, fused=bool(config.optim.fused))
    factor = schedule(
        config.optim, total=total, warmup=warmup_steps(config.optim, total=total, per_epoch=total)
    )
    dataset = AddressedDataset(parts.data.splits.train, train=True)
    module.model.train()
    for position in range(total):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * factor(position)
        if position in without:
            continue
        torch.manual_seed(derive(config.seed, "step", position, 0))
        optimizer.zero_grad()
        out = module.step(dataset[addresses[position]], "train")
        (out.loss_sum / module.nominal).backward()
        optimizer.step()
    return module.model.state_dict(), optimizer.state_dict()["state"]


def assert_same(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        else:
            assert torch.equal(value, b[key]), key


def loss_only(run: Run, loss: Tensor) -> Tensor:
    return loss + INF


def one_gradient(run: Run, loss: Tensor) -> Tensor:
    return loss + NaNGradient.apply(run.parts.module.model.get_parameter("head.bias"))


# -- skip -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["dyt", "batchnorm"])
@pytest.mark.parametrize(
    ("guard", "optim"),
    [
        (NonFiniteGuard, ["optim.name=adamw"]),
        (NonFiniteGuard, ["optim.name=sgd"]),
        (Late, ["optim.name=adamw", "optim.fused=true"]),
        (Late, ["optim.name=sgd", "optim.fused=true"]),
        (Late, ["optim.name=adamw", "optim.fused=false"]),
    ],
)
def test_a_skipped_step_leaves_everything_bit_equal_to_one_that_was_left_out(
    guard: Any, optim: list[str], norm: str
) -> None:
    """The first, a middle and the last step: weights, moments, counters, running statistics."""
    tokens = (f"norm={norm}", *optim)
    bad = {0, 2, 5}
    expected, moments = written_out(Run(*tokens), without=bad)
    run = Run(*tokens, guard=guard("skip"))
    run.damage({run.at(p)[3]: NAN for p in bad}).fit()
    assert run.guard.summary() == {"policy": "skip", "skipped": 3, "steps": [1, 3, 6]}
    assert_same(run.weights, expected)
    assert_same(run.trainer.optimizers[0].state_dict()["state"], moments)
    assert run.trainer.global_step == 6
    train_loss = run.parts.module.train_loss
    assert math.isfinite(train_loss or math.nan)
    assert not hasattr(run.trainer.optimizers[0], "found_inf")


@pytest.mark.parametrize("guard", [NonFiniteGuard, Late])
def test_what_a_task_sums_itself_is_not_spoiled_by_a_bad_step(guard: Any) -> None:
    """Such as the counts of codes, which are logged at a window's end."""

    def run_of(values: dict[int, float]) -> list[Tensor]:
        run = Run("optim.fused=true", "trainer.log_every_n_steps=100", guard=guard("skip"))
        module: Any = run.parts.module
        module.carried, module.counts = ("counts",), []
        step, ends = module.step, list[Tensor]()

        def counting(batch: Any, split: Any) -> Any:
            out = step(batch, split)
            if split == "train":
                seen = batch["image"].sum(dtype=torch.float64)
                module.counts = [seen + sum(module.counts)]
            return out

        def window() -> dict[str, float]:
            ends.extend(module.counts)
            return {}

        module.step, module.window_metrics = counting, window
        run.damage(values).fit()
        return ends

    bad = {Run().at(p)[0]: NAN for p in (0, 3)}
    found, everything = run_of(bad), run_of({})
    assert all(total.isfinite() for total in found)
    assert found[-1] != everything[-1]  # two steps less


@pytest.mark.parametrize("guard", [NonFiniteGuard, Late])
@pytest.mark.parametrize("wrong", [loss_only, one_gradient])
def test_a_loss_or_one_gradient_is_enough(
    guard: Any, wrong: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = written_out(Run("optim.fused=true"), without={2})
    run = Run("optim.fused=true", guard=guard("skip"))
    spoiled(run, run.at(2)[0], wrong).fit()
    assert_same(run.weights, expected)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "non-finite" in x]
    assert line.startswith("warning: non-finite loss or gradient at step 3, epoch 0, rank 0: ")
    assert ("in the loss" if wrong is loss_only else "gradients in head.bias") in line


def test_the_average_does_not_take_what_a_bad_step_did() -> None:
    """With BatchNorm, whose statistics a forward pass alone would spoil."""
    run = Run("norm=batchnorm", "optim.ema_decay=0.5", guard=NonFiniteGuard("skip"))
    run.damage({run.at(2)[3]: INF}).fit()
    (ema,) = [c for c in run.trainer.callbacks if isinstance(c, WeightEMA)]  # type: ignore[attr-defined]
    assert not nonfinite(ema.held)
    assert not nonfinite(run.weights)


def test_the_count_goes_on_in_a_resumed_run_up_to_the_cap() -> None:
    bad = {1, 3}
    first = Run(guard=NonFiniteGuard("skip", limit=3))
    first.damage({first.at(p)[0]: NAN for p in bad}).fit()
    last = "run/checkpoints/last.ckpt"
    again = Run("trainer.max_epochs=2", guard=NonFiniteGuard("skip", limit=3))
    again.damage({first.at(p)[0]: NAN for p in bad})
    with pytest.raises(DivergedError, match=r"run.nonfinite_limit=3 allows 3"):
        again.fit(last)
    assert again.guard.skipped == 4
    assert again.guard.steps[:2] == [2, 4]
    assert all(step > 6 for step in again.guard.steps[2:])


# -- stop and its line ------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [NonFiniteGuard, Late])
def test_a_middle_micro_batch_is_blamed_with_its_sample_and_sites(guard: Any) -> None:
    tokens = ["trainer.accumulate_grad_batches=3", "data.batch_size=9", "optim.fused=true"]
    run = Run(*tokens, guard=guard())
    before = {n: t.clone() for n, t in run.weights.items()}
    culprit = run.at(1)[1]
    run.damage({culprit: NAN})
    with pytest.raises(DivergedError) as found:
        run.fit()
    text = str(found.value)
    assert "non-finite loss or gradient at step 1, epoch 0, rank 0: first non-finite" in text
    assert "batch['image'], then patch_embed.proj" in text
    assert f"; samples {culprit}. There is no checkpoint yet" in text
    assert "\n" not in text
    assert_same(run.weights, before)


def test_the_last_good_checkpoint_is_named() -> None:
    run = Run("run.save_every_n_steps=2")
    run.damage({run.at(4)[0]: NAN})
    with pytest.raises(DivergedError, match=r"step 5.*last good checkpoint is .*last.ckpt"):
        run.fit()
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert not nonfinite(saved["state_dict"])


def test_a_value_that_does_not_come_back_is_said_to_be_so() -> None:
    """Such as from a broken memory, or a callback."""

    class Once(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                module.model.head.bias.grad[0] = NAN

    with pytest.raises(DivergedError, match="finite when its batches are repeated; rank 0 had"):
        Run(extra=(Once(),)).fit()


def test_repeating_a_batch_uses_its_dropout_and_leaves_no_trace() -> None:
    run = Run("norm=batchnorm")
    address = list(run.parts.data.train_sampler(rank=0, world_size=1))[3]
    run.fit()
    module = run.parts.module
    kept = {n: t.clone() for n, t in module.state_dict().items()}
    seen: list[float] = []
    step = module.step

    def noting(batch: Any, split: Any) -> Any:
        out = step(batch, split)
        seen.append(float(out.loss_sum.detach()))
        return out

    module.step = noting  # type: ignore[method-assign]
    blame(module, Suspect(4, 0, range(3, 4)))
    blame(module, Suspect(4, 0, range(3, 4)))
    torch.manual_seed(derive(module.seed, "step", 3, 0))
    data = AddressedDataset(run.parts.data.splits.train, train=True)
    module.model.train()
    assert_same(kept, module.state_dict())
    noting(data[address], "train")
    assert len(seen) == 5  # twice forward and twice with its backward pass
    assert len(set(seen)) == 1


# -- what is saved ----------------------------------------------------------------------------


class Poison(Callback):
    """Spoils what is there at the end of step 4, behind the guard's back."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step != 4:
            return
        head = module.model.head.bias
        (ema,) = [c for c in trainer.callbacks if isinstance(c, WeightEMA)]
        spoil = {
            "weight": head.data,
            "moment": trainer.optimizers[0].state[head]["exp_avg_sq"],
            "average": ema.held["model.head.bias"],
            "statistic": module.model.fc_norm.running_var,
        }
        spoil[self.what][0] = NAN


@pytest.mark.parametrize("what", ["weight", "moment", "average", "statistic"])
def test_nothing_non_finite_is_saved_and_the_file_before_it_stays(what: str) -> None:
    tokens = ["run.save_every_n_steps=2", "optim.ema_decay=0.5", "norm=batchnorm"]
    run = Run(*tokens, extra=(Poison(what),))
    with pytest.raises(DivergedError, match=r"step 4 .*nothing was saved"):
        run.fit()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(Path("run/checkpoints").glob("best*"))


def test_a_mask_of_infinities_is_no_reason_not_to_save() -> None:
    run = Run()
    run.parts.module.model.register_buffer("mask", torch.full((2, 2), -INF))
    run.fit()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_a_sum_that_overflows_is_not_taken_for_an_infinity() -> None:
    large = torch.full((4,), 3e38)
    bad = torch.tensor([1.0, -INF, INF])
    found = {"large": large, "bad": bad, "whole": torch.arange(3), "none": torch.zeros(0)}
    assert nonfinite(found) == ["bad"]
    assert nonfinite({"c": torch.tensor([complex(0, NAN)])}) == ["c"]


# -- gates and scales -------------------------------------------------------------------------


def test_an_optimizer_that_cannot_be_gated_is_not() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    bad = torch.tensor(True)
    assert not gate([torch.optim.AdamW([weight])], bad)
    assert gate([torch.optim.AdamW([weight], fused=True)], bad)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.ones(3)
    assert not gate([sgd], bad)  # its momentum would be what was in memory
    sgd.step()
    assert gate([sgd], bad)
    sgd.add_param_group({"params": [other := torch.nn.Parameter(torch.ones(3))]})
    other.grad = torch.ones(3)
    assert not gate([sgd], bad)
    assert not hasattr(sgd, "found_inf")  # of the update before: it would leave this one out too


def test_a_broken_batch_without_a_message_is_trouble_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run().fit()

    def gone(module: Any, position: int) -> Any:
        raise AssertionError

    monkeypatch.setattr("suite.culprits.rebuilt", gone)
    text = blame(run.parts.module, Suspect(4, 0, range(3, 4)))
    assert "step 4, epoch 0: its batches cannot be repeated (AssertionError:)" in text


def test_a_skipped_step_does_not_read_the_whole_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have a hundred GB: only the line that ends a run names it."""
    monkeypatch.setattr("suite.culprits.newest", lambda folder: 1 / 0)
    run = Run("run.save_every_n_steps=1", guard=NonFiniteGuard("skip"))
    run.damage({run.at(4)[0]: NAN}).fit()
    assert run.guard.skipped == 1


def test_mixed_float16_stops_where_every_step_is_skipped() -> None:
    guard, module = NonFiniteGuard(), Run().parts.module
    trainer: Any = SimpleNamespace(
        precision="16-mixed", global_step=8, current_epoch=0, global_rank=0
    )
    guard.on_fit_start(trainer, module)
    module._trainer, module.batch = trainer, None
    guard.on_window(module, {"train/loss": NAN}, 1.0)
    guard.on_window(module, {"train/loss": 1.0}, 1.0)
    guard.on_window(module, {"train/loss": NAN}, 1.0)
    with pytest.raises(DivergedError, match="step 8"):
        guard.on_window(module, {"train/loss": INF}, 1.0)
