"""Shards: what cannot be cut is refused in one line, and what is cut has its whole's values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from suite.build import build_model, build_parts, parameter_count
from suite.config import Config, load
from suite.errors import ConfigError
from suite.initial import init_weights
from suite.norms import make_norm
from suite.registry import load_task
from suite.run import initialise
from suite.sharding import Sharding, check_shardable, cut_states, put, whole, whole_tensors
from suite.train import main

SHARDED = "trainer.strategy=fully_shard"


class Two(nn.Module):
    """Two blocks and a norm, none of them square."""

    def __init__(self, norm: str = "dyt") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.norm = make_norm(norm)(3, site="final")
        init_weights(self)

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        full.normal_(generator=generator)

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.norm(x)
        return y


class Scalar(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))


class Table(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cut(model: nn.Module, **options: object) -> nn.Module:
    sharding = Sharding(0, **options)  # type: ignore[arg-type]
    sharding.apply(model, mesh=init_device_mesh("cpu", (1,)), device=torch.device("cpu"))
    return model


def built(norm: str = "dyt") -> tuple[Two, Two]:
    """The same model with values and without."""
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = Two(norm)
    return Two(norm), empty


@pytest.mark.parametrize("norm", ["dyt", "layernorm"])
def test_a_model_cut_from_nothing_has_the_weights_of_a_whole_one(alone: None, norm: str) -> None:
    whole_one, empty = built(norm)
    cut(empty)
    for (name, expected), found in zip(
        whole_one.named_parameters(), empty.parameters(), strict=True
    ):
        assert isinstance(found, DTensor)
        assert torch.equal(whole(found), expected), name
    x = torch.randn(4, 3)
    assert torch.equal(empty(x), whole_one(x))


def test_a_second_cut_changes_nothing(alone: None) -> None:
    _, model = built()
    cut(model)
    with torch.no_grad():
        next(model.parameters()).fill_(7.0)
    cut(model)
    assert whole(next(model.parameters())).unique().tolist() == [7.0]


def test_weights_of_a_file_go_before_drawn_ones(alone: None) -> None:
    whole_one, empty = built()
    cut(empty, weights={"norm.alpha": torch.tensor([3.0])})
    assert whole(empty.norm.alpha).item() == 3.0
    assert torch.equal(whole(empty.blocks[1].weight), whole_one.blocks[1].weight)


def test_moments_go_to_the_parameters_they_are_of(alone: None) -> None:
    """Groups in another order than the model's, as weight decay makes them."""
    whole_one, empty = built()
    cut(empty)
    saved, into = (
        torch.optim.AdamW([{"params": [*part.parameters()]} for part in (m.norm, m.blocks)])
        for m in (whole_one, empty)
    )
    whole_one(torch.randn(4, 3)).square().sum().backward()
    saved.step()
    into.load_state_dict(cut_states(into, saved.state_dict()))
    expected = saved.state[whole_one.blocks[0].weight]["exp_avg"]
    held = into.state[empty.blocks[0].weight]["exp_avg"]
    assert expected.abs().sum() > 0
    assert torch.equal(whole(held), expected)
    assert isinstance(held, DTensor)


@pytest.mark.parametrize("again", [True, False])
def test_no_sixteen_bit_copy_outlives_a_block_that_is_computed_again(
    alone: None, again: bool
) -> None:
    """Else each process would have a 16-bit copy of the whole model in every forward pass."""
    config = config_of("task=language/lm", "norm=dyt", f"model.checkpoint={again}")
    model = build_parts(config, processes=1).module.model.train()
    cut(model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    mixed = MixedPrecision("bf16-mixed", "cpu")
    with Copies() as copies, mixed.forward_context():
        loss = model(ids).float().sum()
        held = copies.alive()
    of_blocks = sum(p.numel() for unit in model.shard_units() for p in unit.parameters())
    head = model.lm_head.weight.numel()
    assert held == head if again else held > 0.9 * of_blocks
    loss.backward()


class Copies(TorchDispatchMode):
    """Watches 16-bit copies of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default
        if copied and out.dtype == torch.bfloat16 and out.dim() == 2:
            self.made.append((StorageWeakRef(out.untyped_storage()), out.numel()))
        return out

    def alive(self) -> int:
        """Numbers in those that are still there."""
        return sum(size for ref, size in self.made if not ref.expired())


def test_an_optimizer_of_other_parameters_is_refused(alone: None) -> None:
    whole_one, empty = built()
    cut(empty)
    saved = torch.optim.SGD(whole_one.norm.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="has 7 parameters, the checkpoint 3"):
        cut_states(torch.optim.SGD(empty.parameters(), lr=0.1), saved)


def test_another_shape_is_not_put_in() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) where \(3,\)"):
        put(torch.zeros(3), torch.zeros(2, 3))


def test_whole_tensors_keep_what_is_no_tensor() -> None:
    assert whole_tensors({"step": 3, "lr": 0.1}) == {"step": 3, "lr": 0.1}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(2, 2), "has no shard_units and no init_parameter"),
        (Scalar(), "parameters without a dimension (scale)"),
        (Table(), "has buffers (table)"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_shardable(model, name="mine")
    assert said in str(error.value)
    assert "model=mine" in str(error.value)


def config_of(*tokens: str) -> Config:
    return load([*tokens, SHARDED, "trainer.accelerator=cpu"]).settled


def test_a_language_model_to_be_cut_has_no_values_but_a_size() -> None:
    config = config_of("task=language/lm", "norm=dyt")
    parts = build_parts(config, processes=1)
    assert all(p.is_meta for p in parts.module.model.parameters())
    spec, plain = load_task("language/lm"), load(["task=language/lm", "norm=dyt"]).settled
    model = build_model(plain, spec, make_norm("dyt"), parts.data.splits)
    assert parameter_count(parts)[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["task=vision/classify"], "model=vit_fmnist does not say how it is cut"),
        (["task=language/lm", "trainer.precision=16-mixed"], "trainer.precision=16-mixed: with"),
        (["task=language/lm", "trainer.precision=64"], "trainer.precision=64-true: with"),
    ],
)
def test_a_run_that_cannot_be_cut_ends_in_one_line(
    tokens: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*tokens, SHARDED, "trainer.accelerator=cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_calibration_of_a_cut_model_is_refused() -> None:
    parts = build_parts(
        config_of("task=language/lm", "norm=dyt", "norm.alpha_init=calibrated"), processes=1
    )
    with pytest.raises(ConfigError, match="needs the whole model in one process"):
        initialise(parts)
