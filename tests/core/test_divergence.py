"""What silent divergence is said to be, and what is noise. The curves are of real runs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from suite.divergence import DivergenceWatch

# vision/classify with its defaults, 2 epochs, a window of 10 steps
NORMAL = [2.333, 2.096, 1.607, 1.294, 1.021, 0.967, 0.947, 0.911, 0.861]
NORMAL += [0.782, 0.765, 0.727, 0.716, 0.691, 0.691, 0.695, 0.559, 0.672]
# the same with optim.lr=3
DIVERGED = [2.333, 45.467, 216.774, 282.955, 342.503, 289.998, 177.112, 227.861, 157.633]
DIVERGED += [169.964, 68.626, 34.493, 19.993, 6.322, 3.899, 2.631, 2.379, 2.33]


def watch(
    losses: Iterable[float], *, found: DivergenceWatch | None = None, start: int = 0, **more: Any
) -> tuple[DivergenceWatch, list[str]]:
    """The watch after these windows, and what it said. more: of the module."""
    said: list[str] = []
    found = found or DivergenceWatch(said.append)
    found.warn = said.append
    for step, loss in enumerate(losses, start):
        module: Any = SimpleNamespace(updates=10 * step, **more)
        found.on_window(module, {"train/loss": loss}, 1.0)
    return found, said


def noisy(level: float, noise: float, count: int, *, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0.0, noise) for _ in range(count)]


def test_a_normal_training_gives_no_warning() -> None:
    assert watch(NORMAL)[1] == []


def test_a_learning_rate_that_is_much_too_large_is_said_once() -> None:
    (text,) = watch(DIVERGED)[1]
    assert text.startswith("step 20: train/loss is 45.47, was 2.333 at its best and 2.333 at first")
    assert "training diverges. Lower optim.lr" in text


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_alone_gives_no_warning(noise: float) -> None:
    """Ten thousand windows of a loss that has stopped falling, of ten seeds."""
    for seed in range(10):
        falling = [4.0 * 0.9**i for i in range(40)]
        flat = noisy(1.0, noise, 1000, seed=seed)
        curve = [1.0 + f + x - 1.0 for f, x in zip(falling, flat, strict=False)] + flat
        assert watch(curve)[1] == []


def test_a_spike_of_one_window_and_a_nan_are_not_a_level() -> None:
    assert watch([*NORMAL, 40.0, 0.66, float("nan"), 0.67, 0.65, float("inf"), 0.66])[1] == []


def test_a_first_step_that_was_easy_by_chance_is_no_best_to_climb_from() -> None:
    """As in a warm-up that is long: the loss stands still above its first window."""
    assert watch([2.30, *noisy(2.33, 0.01, 200)])[1] == []
    assert len(watch([2.30, *noisy(2.33, 0.01, 20), *noisy(9.0, 0.1, 5)])[1]) == 1


def test_a_loss_that_has_climbed_back_is_said_and_again_after_it_recovered() -> None:
    """Half of what it had fallen by, which is far above the noise."""
    back = noisy(1.8, 0.05, 5)
    fine = noisy(0.65, 0.05, 5)
    _, said = watch([*NORMAL, *back, *fine, *back])
    assert len(said) == 2
    assert all("was 0.6" in text for text in said)


def test_a_loss_below_zero_is_judged_alike() -> None:
    assert watch([-1.0 - x for x in (0.0, 0.5, 1.0, 1.5, 1.6, 1.7, 1.7, 1.8, 1.8, 1.8)])[1] == []
    falling = [-1.0, -1.5, -2.0, -2.4, -2.6, -2.8, -2.9, -2.9, -3.0, -3.0, -3.0, -3.0]
    assert len(watch([*falling, -1.0, -0.5, 0.5, 3.0])[1]) == 1


def test_an_alpha_that_grows_tenfold_is_said_with_its_site() -> None:
    said: list[str] = []
    found = DivergenceWatch(said.append)
    module: Any = SimpleNamespace(updates=7)
    for ffn in (0.5, 2.0, 4.9, 5.1, 6.0):
        found.on_window(module, {"norm/ffn/alpha": ffn, "norm/attn/alpha": 0.5}, 1.0)
    (text,) = said
    assert text.startswith("step 7: norm/ffn/alpha is 5.1, 0.5 at first: it runs away")
    found.on_window(module, {"norm/ffn/alpha": 1.0, "norm/attn/alpha": 0.001}, 1.0)
    assert "norm/attn/alpha is 0.001" in said[1]


def test_a_measure_that_a_task_declares_has_a_floor() -> None:
    said: list[str] = []
    found = DivergenceWatch(said.append)
    module: Any = SimpleNamespace(updates=3, collapse_watch={"train/code_perplexity": 4.0})
    for value in (100.0, 4.1, 3.9, 2.0):
        found.on_window(module, {"train/code_perplexity": value}, 1.0)
    (text,) = said
    assert text.startswith("step 3: train/code_perplexity is 3.9, below 4: it has collapsed")


@pytest.mark.parametrize("cut", [1, 3, 12, 18])
def test_a_resumed_run_says_what_one_that_was_not_interrupted_says(cut: int) -> None:
    curve = [*NORMAL, 1.9, 1.8, 1.7, 1.9]
    whole, expected = watch(curve)
    first, said = watch(curve[:cut])
    state = json.loads(json.dumps(first.state_dict()))  # plain values
    again = DivergenceWatch(said.append)
    again.load_state_dict(state)
    again, later = watch(curve[cut:], found=again, start=cut)
    assert said + later == expected
    assert again.state_dict() == whole.state_dict()
    assert len(expected) == 1
