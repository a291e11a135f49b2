"""Sampling from a language model: which id is taken, what the model is shown, and what is left as
it was."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from suite.build import build_parts
from suite.config import load
from suite.errors import ConfigError, DivergedError
from suite.norms import make_norm
from tasks.language.generate import SHORTEST, generate, padded_length
from tasks.language.gpt2 import GPT2, GPT2Options

ROWS = 11


def gpt2(**options: Any) -> GPT2:
    """Weights so far from their first values that every token has another successor."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "hidden_dim": 32, "max_length": 24}
    sizes["tie_head"] = False  # a tied one likes to say its last id again
    model = GPT2(GPT2Options(**(sizes | options)), norm=make_norm("dyt"), vocab_size=ROWS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    return model


class Table(nn.Module):
    """Logits by the last id alone; what it was shown is kept."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(rows))
        self.shown: list[list[int]] = []

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.shown.append(ids_BT[0].tolist())
        return self.logits[ids_BT]


def table(*logits: float) -> Table:
    """The same logits behind every id."""
    return Table([list(logits)] * len(logits))


def cycle(rows: int = 5) -> Table:
    """i + 1 is behind i."""
    return Table((10 * torch.eye(rows).roll(1, dims=1)).tolist())


def sample(model: nn.Module, prompt: list[int], **changes: Any) -> list[int]:
    given: dict[str, Any] = {"count": 12, "seed": 0, "max_length": None, "vocab_size": ROWS}
    return generate(model, prompt, **(given | changes))


def test_at_temperature_zero_every_id_is_the_most_likely_one() -> None:
    model = gpt2()
    found = sample(model, [3, 1], count=40, temperature=0.0, max_length=20)
    ids = [3, 1]
    for _ in range(40):
        with torch.no_grad():
            ids.append(int(model.eval()(torch.tensor([ids[-20:]]))[0, -1].argmax()))
    assert found == ids[2:]
    assert len(set(found)) > 1
    assert found == sample(model, [3, 1], count=40, temperature=0.0, max_length=20, seed=1)


def test_all_processes_go_on_from_what_the_first_one_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And end where it does: logits of two GPUs may differ in a last bit."""
    first = iter([4, 2, 3])
    own: list[int] = []

    def of_first(value: int, *, device: torch.device) -> int:
        own.append(value)
        return next(first)

    monkeypatch.setattr("tasks.language.generate.of_first", of_first)
    assert sample(cycle(), [0], vocab_size=5, temperature=0.0, end=3) == [4, 2]
    assert own == [1, 0, 3]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["data.encoding=characters", "task.prompt=To be \u4f60"], "task.prompt: the character"),
        (
            ["data=token_bin", "data.root=bare", "data.vocab_size=9", "task.prompt=To"],
            "task.prompt: data=token_bin does not say",
        ),
    ],
)
def test_a_prompt_that_is_no_text_of_the_data_is_refused_before_training(
    tokens: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(9000) % 9).astype("<u2").tofile(Path("bare", name))
    config = load(["task=language/lm", "norm=dyt", "trainer.accelerator=cpu", *tokens]).settled
    with pytest.raises(ConfigError, match=said):
        build_parts(config, processes=1)


def test_the_same_seed_gives_the_same_ids_and_moves_no_other_number() -> None:
    model = gpt2()
    torch.manual_seed(7)
    first = sample(model, [3], count=30, seed=5)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    assert sample(model, [3], count=30, seed=5) == first
    assert sample(model, [3], count=30, seed=6) != first
    assert sample(model, [3], count=10, seed=5) == first[:10]


def test_ids_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = [0.0, 1.0, 2.0]
    for temperature in (0.5, 2.0):
        options: dict[str, Any] = {"temperature": temperature, "vocab_size": 3, "max_length": 1}
        ids = sample(table(*logits), [0], count=2000, **options)
        wanted = (torch.tensor(logits) / temperature).softmax(dim=0).tolist()
        seen = Counter(ids)
        for i, share in enumerate(wanted):
            spread = math.sqrt(share * (1 - share) / 2000)
            assert abs(seen[i] / 2000 - share) < 4 * spread, (temperature, i)


def test_a_vanishing_temperature_is_greedy_and_a_large_one_is_uniform() -> None:
    model = table(1.0, 1.1, 0.9)
    assert set(sample(model, [0], count=50, temperature=1e-300, vocab_size=3)) == {1}
    assert len(set(sample(model, [0], count=50, temperature=1e9, vocab_size=3))) == 3


def test_only_the_most_likely_ids_are_taken_with_top_k() -> None:
    model = table(0.0, 0.3, 0.2, 0.1, 0.3)
    options: dict[str, Any] = {"count": 200, "temperature": 5.0, "vocab_size": 5}
    assert set(sample(model, [0], top_k=3, **options)) == {1, 2, 4}
    assert set(sample(model, [0], top_k=1, **options)) == {1}  # the lowest of equals, as greedy
    assert set(sample(model, [0], top_k=99, **options)) == set(range(5))
    assert sample(model, [0], top_k=5, **options) == sample(model, [0], **options)


def test_rows_that_pad_the_vocabulary_are_never_taken() -> None:
    model = table(0.0, 1.0, 99.0, 99.0)
    for temperature in (0.0, 3.0):
        ids = sample(model, [0], count=50, temperature=temperature, vocab_size=2)
        assert set(ids) <= {0, 1}
    with pytest.raises(ValueError, match="vocab_size must be at most the model's 4 rows, got 5"):
        sample(model, [0], vocab_size=5)


def test_it_stops_at_the_end_which_is_left_out() -> None:
    options: dict[str, Any] = {"temperature": 0.0, "vocab_size": 5}
    assert sample(cycle(), [1], end=4, **options) == [2, 3]
    assert sample(cycle(), [4, 1], count=1, end=4, **options) == [2]
    assert sample(cycle(), [3], end=4, **options) == []
    assert len(sample(cycle(), [1], end=None, **options)) == 12
    assert sample(cycle(), [1], count=0, **options) == []


def test_the_model_is_shown_the_last_tokens_of_the_window() -> None:
    model = cycle()
    sample(model, [0, 1, 2, 3], count=4, temperature=0.0, max_length=3, vocab_size=5)
    assert model.shown == [[1, 2, 3], [2, 3, 4], [3, 4, 0], [4, 0, 1]]
    long, short = gpt2(), [0, 1, 2, 3, 4, 5]
    cut = sample(long, short, temperature=0.0, max_length=4)
    assert cut == sample(long, short[-4:], temperature=0.0, max_length=4)
    assert cut != sample(long, short, temperature=0.0)


def test_a_text_may_be_longer_than_the_model_s_positions() -> None:
    model = gpt2()
    ids = sample(model, [1], count=40)
    assert len(ids) == 40
    assert ids == sample(model, [1], count=40, max_length=24)
    assert ids == sample(model, [1], count=40, max_length=99)


def test_a_long_text_meets_few_shapes() -> None:
    model = cycle()
    sample(model, [0], count=100, vocab_size=5)
    assert {len(ids) for ids in model.shown} == {16, 32, 64, 128}
    model = cycle()
    sample(model, [0], count=100, vocab_size=5, max_length=40)
    assert {len(ids) for ids in model.shown} == {16, 32, 40}
    for length in range(1, 200):
        assert length <= padded_length(length, longest=None) <= max(SHORTEST, 2 * length)


def test_every_module_is_left_in_the_mode_that_it_was_in() -> None:
    model = gpt2(dropout=0.5).train()
    frozen = model.transformer.h[1]
    frozen.eval()
    before = [module.training for module in model.modules()]
    assert sample(model, [1], seed=3) == sample(model, [1], seed=3)  # no dropout in between
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="rows"):
        sample(model, [1], vocab_size=ROWS + 1)
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_logits_that_are_not_finite_are_said_to_be_so() -> None:
    with pytest.raises(DivergedError, match="logits are not finite"):
        sample(table(0.0, math.nan), [0], vocab_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "^count must be at least 0, got -1$"),
        ({"temperature": -0.1}, "^temperature must be 0 or a finite number above, got -0.1$"),
        ({"temperature": math.nan}, "^temperature must be"),
        ({"temperature": math.inf}, "^temperature must be"),
        ({"top_k": 0}, "^top_k must be at least 1, got 0$"),
        ({"max_length": 0}, "^max_length must be at least 1, got 0$"),
        ({"vocab_size": 0}, "^vocab_size must be at least 1, got 0$"),
        ({"end": 5}, "^end must be from 0 to 4, got 5$"),
        ({"prompt_ids": []}, "^prompt_ids must hold at least one id"),
        ({"prompt_ids": [1, 5]}, "^prompt_ids must be from 0 to 4, got 5$"),
        ({"prompt_ids": [-1]}, "^prompt_ids must be from 0 to 4, got -1$"),
    ],
)
def test_an_argument_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    model = cycle()
    given: dict[str, Any] = {"vocab_size": 5, "prompt_ids": [0]} | changes
    with pytest.raises(ValueError, match=message):
        sample(model, given.pop("prompt_ids"), **given)
    assert model.shown == []
