"""Language models cut over two gloo processes train, measure and go on as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import assert_same_training, launch, record

pytestmark = pytest.mark.ddp
SHARDED = "trainer.strategy=fully_shard"
# an odd number of ids and of hidden channels: the processes hold different numbers of rows
LLAMA = ["model=llama_tiny", "model.kv_heads=1", "model.hidden_dim=21", "model.embed_scale=true"]
GPT2 = ["model=gpt2_tiny", "model.hidden_dim=21", "model.max_length=24", "norm=dyt"]
ADAM = ["optim.name=adamw", "optim.lr=0.003", "optim.ema_decay=0.5"]
RECIPE = [
    "recipe=dyt_llama_7b",  # scaled down; its alphas, embedding scale, checkpointing and decay stay
    "model.kv_heads=1",
    "model.hidden_dim=21",
    "model.vocab_size=null",
    "optim.min_lr=0",
    "trainer.strategy=auto",
    "trainer.precision=32-true",
    "run.compile=false",
    "run.save_every_n_steps=null",
]
CASES = {
    "recipe": RECIPE,
    "dyt": [*LLAMA, "norm=dyt"],
    "rmsnorm": [*LLAMA, "norm=rmsnorm"],
    "clipped": [*LLAMA, "norm=dyt", "trainer.gradient_clip_val=0.3"],
    "tied": [*GPT2, "trainer.gradient_clip_val=0.02", "trainer.gradient_clip_algorithm=value"],
    "accumulated": [*LLAMA, "norm=dyt", "trainer.accumulate_grad_batches=2"],
    "averaged": [*LLAMA, "norm=rmsnorm", *ADAM, "model.checkpoint=true"],
}


def arguments(folder: Path, *extra: str, world: int, epochs: int = 2) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    tokens = [
        f"run.dir={folder}",
        "task=language/lm",
        "task.sample_tokens=4",
        "data=first",
        "data.size=11",
        "data.length=24",
        "data.batch_size=4",
        "data.eval_batch_size=4",
        "data.drop_last=false",
        "model.dim=16",
        "model.depth=2",
        "model.heads=2",
        "model.init_std=0.1",
        "optim.name=sgd",
        "optim.lr=0.1",
        "optim.momentum=0.0",
        "optim.weight_decay=0.1",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.warmup_fraction=null",
        f"trainer.max_epochs={epochs}",
        "trainer.max_steps=-1",
        "trainer.gradient_clip_val=null",
        "trainer.val_check_interval=null",
        "trainer.check_val_every_n_epoch=1",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"trainer.devices={world}",
        "run.tensorboard=false",
        *extra,
    ]
    return [f"{key}={value}" for key, value in dict(t.split("=", 1) for t in tokens).items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case with one process and cut over two, and resumed runs; what two wrote, one reads."""
    folder = tmp_path_factory.mktemp("fsdp")
    adam = CASES["averaged"]
    one = [arguments(folder / f"{name}-1", *extra, world=1) for name, extra in CASES.items()]
    one.append(arguments(folder / "alone", *CASES["clipped"], SHARDED, world=1))
    one.append(arguments(folder / "half-1", *adam, world=1, epochs=1))
    launch(one, world=1, folder=folder)
    start = f"model.init_from={folder / 'averaged-1' / 'checkpoints' / 'last.ckpt'}"
    two = [
        arguments(folder / f"{name}-2", *extra, SHARDED, world=2) for name, extra in CASES.items()
    ]
    two += [
        arguments(folder / "half-2", *adam, SHARDED, world=2, epochs=1),
        resumed(folder / "half-2", *adam, SHARDED, world=2),
        resumed(folder / "half-1", *adam, SHARDED, world=2),
        arguments(folder / "half-3", *adam, SHARDED, world=2, epochs=1),
        arguments(folder / "begun-2", *CASES["rmsnorm"], start, SHARDED, world=2, epochs=1),
    ]
    launch(two, world=2, folder=folder)
    begun = arguments(folder / "begun-1", *CASES["rmsnorm"], start, world=1, epochs=1)
    launch([resumed(folder / "half-3", *adam, world=1), begun], world=1, folder=folder)
    return folder


def resumed(folder: Path, *extra: str, world: int) -> list[str]:
    return [*arguments(folder, *extra, world=world), f"run.resume={folder}"]


NAMES = ("train/loss", "train/acc", "grad_norm", "lr", "val/loss", "val/acc", "val/perplexity")
TESTED = ("test/loss", "test/acc", "test/bits_per_byte", "test/count")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_the_weights_train_as_one(runs: Path, case: str) -> None:
    one, two = (record(runs / f"{case}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    assert one["result"]["parameters"] == two["result"]["parameters"]
    assert list(one["weights"]) == list(two["weights"])
    assert_same_training(one, two, names=NAMES, tested=TESTED)


def test_one_process_can_hold_all_the_shards(runs: Path) -> None:
    one, alone = record(runs / "clipped-1"), record(runs / "alone")
    assert_same_training(one, alone, names=NAMES, tested=TESTED)


@pytest.mark.parametrize("half", ["half-1", "half-2", "half-3"])
def test_a_run_goes_on_with_as_many_processes_as_there_are(runs: Path, half: str) -> None:
    """half-1: one process, then two; half-2: two, then two; half-3: two, then one."""
    whole, found = record(runs / "averaged-1"), record(runs / half)
    assert found["result"]["steps"] == whole["result"]["steps"] == 6
    for each in (whole, found):  # both halves end with a test
        each["rows"] = [row for row in each["rows"] if "test/loss" not in row]
    assert_same_training(whole, found, names=NAMES, tested=TESTED)


def test_what_two_processes_leave_off_they_take_up_bit_by_bit(runs: Path) -> None:
    whole, found = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("averaged-2", "half-2")
    )
    for key in ("state_dict", "current_model_state"):
        for name, tensor in whole[key].items():
            assert torch.equal(found[key][name], tensor), (key, name)
    moments = whole["optimizer_states"][0]["state"]
    assert moments
    for number, state in moments.items():
        for name, tensor in state.items():
            assert torch.equal(found["optimizer_states"][0]["state"][number][name], tensor)


def test_weights_of_a_file_are_cut_as_drawn_ones_are(runs: Path) -> None:
    one, two = (record(runs / f"begun-{world}") for world in (1, 2))
    assert one["rows"][0]["train/loss"] < record(runs / "rmsnorm-1")["rows"][0]["train/loss"]
    assert_same_training(one, two, names=NAMES, tested=TESTED)
