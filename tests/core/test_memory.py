"""What a training takes of the memory, counted by hand for a model of a few parameters; and which
device is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from suite.build import build_data, build_norm
from suite.config import load
from suite.errors import ConfigError
from suite.memory import Need, available_memory, check_memory, need, own_gpu, widths
from suite.registry import load_task
from suite.settings import Config

LM = ["task=language/lm", "norm=dyt", "trainer.accelerator=cpu"]
SHARED = Need(
    parameters=1000,
    of_norms=10,
    largest=300,
    outside=100,
    states=16,
    stored=4,
    compute=4,
    again=False,
    rows=2,
    activations=7,
    processes=4,
    sharded=True,
)


def config_of(*tokens: str) -> Config:
    return load([*LM, *tokens]).settled


def need_of(config: Config, *, processes: int | None = None) -> Need:
    spec, factory = load_task(config.task_name), build_norm(config)
    info = build_data(config, spec).info
    return need(config, spec, factory, info, activations=False, processes=processes)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", (4, 4)),
        ("64-true", (8, 8)),
        ("bf16-mixed", (4, 2)),
        ("16-mixed", (4, 2)),
        ("bf16-true", (2, 2)),
    ],
)
def test_a_precision_says_what_is_stored_and_what_is_computed_with(
    precision: str, expected: tuple[int, int]
) -> None:
    assert widths(precision) == expected


def test_each_process_holds_its_share_and_works_on_whole_units() -> None:
    assert SHARED.held == 16 * 1000 / 4
    assert SHARED.working == 4 * (3 * 300 + 2 * 100)
    assert SHARED.total == 4000 + 4400 + 2 * 7


def test_sixteen_bit_copies_are_of_one_block_where_blocks_are_computed_again() -> None:
    mixed = replace(SHARED, compute=2)
    assert mixed.working == SHARED.working + 2 * 1000
    assert replace(mixed, again=True).working == SHARED.working + 2 * (300 + 100)
    assert replace(mixed, sharded=False).working == 2 * 1000
    assert replace(SHARED, sharded=False).working == 0


@pytest.mark.parametrize(
    ("tokens", "states"),
    [
        (["optim.name=adamw"], 4 * 4),
        (["optim.name=adamw", "optim.ema_decay=0.9"], 4 * 5),
        (["optim.name=adamw", "trainer.precision=bf16-true"], 2 * 4),
        (["optim.name=sgd", "optim.momentum=0.9"], 4 * 3),
        (["optim.name=sgd", "optim.momentum=0"], 4 * 2),
    ],
)
def test_a_parameter_takes_what_optimizer_average_and_precision_make_of_it(
    tokens: list[str], states: int
) -> None:
    assert need_of(config_of(*tokens)).states == states


def test_processes_that_only_the_machine_knows_share_the_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("trainer.strategy=fully_shard", "trainer.devices=auto")
    alone, shared = need_of(config, processes=1), need_of(config, processes=8)
    assert shared.held == alone.held // 8
    # of a machine: its processes have it together
    monkeypatch.setattr("suite.memory.available_memory", lambda config: 8 * (shared.total + 8))
    spec, factory = load_task(config.task_name), build_norm(config)
    info = build_data(config, spec).info
    check_memory(config, spec, factory, info, processes=8)
    monkeypatch.setattr("suite.memory.available_memory", lambda config: 8 * (shared.total - 8))
    with pytest.raises(ConfigError, match="needs at least"):
        check_memory(config, spec, factory, info, processes=8)


def test_a_training_on_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 + device, 2000))
    config = config_of()
    assert available_memory(config) > 2000
    on_gpu = replace(config, trainer=replace(config.trainer, accelerator="gpu"))
    assert available_memory(on_gpu) == 1000


@pytest.mark.parametrize(
    ("devices", "expected"), [(4, 3), ("auto", 3), (-1, 3), ("7,5,2,6", 6), ("1,", 1)]
)
def test_a_process_asks_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: int | str, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu(devices) == expected
