"""Speech on two processes as on one: masks, negatives, noise, dropped layers and all losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_same_training, launch, record

pytestmark = pytest.mark.ddp
SIZES = (7, 11)
NORMS = ("layernorm", "dyt")
TINY = [
    "model.conv_dim=16",
    "model.dim=24",
    "model.depth=3",
    "model.heads=2",
    "model.hidden_dim=32",
    "model.pos_kernel=8",
    "model.pos_groups=2",
    "model.dropout=0",
    "model.layer_drop=0.5",
    "model.init_std=0.1",
]
CTC = ["task.mask_prob=0.3", "task.mask_channel_prob=0.3", "task.mask_channel_length=4"]
PRETRAIN = ["model.codes=8", "model.code_dim=8", "task.negatives=20"]
SEEN = {
    "pretrain": ("bits", "total_bits", "acc", "code_perplexity", "prob_perplexity"),
    "ctc": ("wer", "cer", "blank_share"),
}


def arguments(folder: Path, *, task: str, size: int, norm: str, world: int) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    return [
        f"run.dir={folder}",
        f"task=speech/{task}",
        f"norm={norm}",
        "data=first",
        f"data.size={size}",
        "data.batch_seconds=16",
        "optim.name=sgd",
        "optim.lr=0.01",
        "optim.momentum=0.0",
        "optim.weight_decay=0.1",
        "optim.schedule=constant",
        "trainer.max_epochs=2",
        "trainer.max_steps=-1",
        "trainer.check_val_every_n_epoch=1",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"trainer.devices={world}",
        "run.tensorboard=false",
        *TINY,
        *(PRETRAIN if task == "pretrain" else CTC),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp-speech")
    for world in (1, 2):
        commands = [
            [
                *arguments(folder / name, task=task, size=size, norm=norm, world=world),
                "data.pad=true",
            ]
            for task in ("pretrain", "ctc")
            for norm in NORMS
            for size in SIZES
            for name in [f"{task}-{norm}-{size}-{world}"]
        ]
        cropped = arguments(
            folder / f"cropped-{world}", task="pretrain", size=11, norm="dyt", world=world
        )
        commands.append([*cropped, "data.pad=false", "data.crop_seconds=1"])
        frozen = arguments(
            folder / f"frozen-{world}", task="ctc", size=11, norm="layernorm", world=world
        )
        commands.append([*frozen, "task.freeze_updates=3", "model.freeze_extractor=true"])
        if world == 1:
            plain = ["task.diversity_weight=0", "task.penalty_weight=0"]
            for name, shares in (("alone", 1), ("accumulated", 2)):
                whole = arguments(folder / name, task="pretrain", size=11, norm="dyt", world=1)
                commands.append([*whole, *plain, f"trainer.accumulate_grad_batches={shares}"])
        launch(commands, world=world, folder=folder)
    return folder


def compared(task: str) -> dict[str, list[str]]:
    """The names to compare of a task."""
    train = ["train/loss", "grad_norm", "lr"]
    if task == "pretrain":
        train += [f"train/{name}" for name in SEEN[task]]
    val = [f"val/{name}" for name in ("loss", "count", *SEEN[task])]
    return {"names": train + val, "tested": [name.replace("val", "test") for name in val]}


@pytest.mark.parametrize("task", ["pretrain", "ctc"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_with_dropped_layers_train_as_one(
    runs: Path, task: str, norm: str, size: int
) -> None:
    one, two = (record(runs / f"{task}-{norm}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    assert_same_training(one, two, **compared(task))


def test_cropped_clips_train_as_one(runs: Path) -> None:
    assert_same_training(
        *(record(runs / f"cropped-{world}") for world in (1, 2)), **compared("pretrain")
    )


def test_a_frozen_encoder_stays_and_thaws_on_two_processes_as_on_one(runs: Path) -> None:
    assert_same_training(*(record(runs / f"frozen-{world}") for world in (1, 2)), **compared("ctc"))


def test_the_contrastive_loss_does_not_depend_on_accumulation(runs: Path) -> None:
    names = ["train/bits", "grad_norm", "val/bits"]
    one, two = record(runs / "alone"), record(runs / "accumulated")
    assert_same_training(one, two, names=names, tested=["test/bits"])
