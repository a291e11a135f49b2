"""Masked autoencoders on two processes as on one: masks, hidden patches of both, probes."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_same_training, launch, record

pytestmark = pytest.mark.ddp
SIZES = (7, 11)
NORMS = ("layernorm", "dyt")


def arguments(folder: Path, *, norm: str, size: int, world: int) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    return [
        f"run.dir={folder}",
        "task=vision/mae",
        f"norm={norm}",
        "model.patch_size=7",
        "model.dim=16",
        "model.depth=2",
        "model.heads=2",
        "model.decoder_dim=16",
        "model.decoder_depth=1",
        "model.decoder_heads=2",
        "task.knn=3",
        "task.pictures=3",
        "data=first",
        f"data.size={size}",
        "data.batch_size=4",
        "data.drop_last=false",
        "optim.name=sgd",
        "optim.lr=0.05",
        "optim.momentum=0.0",
        "optim.weight_decay=0.1",
        "optim.schedule=constant",
        "trainer.max_epochs=2",
        "trainer.check_val_every_n_epoch=1",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"trainer.devices={world}",
        "run.tensorboard=false",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both norms, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp-mae")
    for world in (1, 2):
        commands = [
            arguments(folder / f"{norm}-{size}-{world}", norm=norm, size=size, world=world)
            for norm in NORMS
            for size in SIZES
        ]
        launch(commands, world=world, folder=folder)
    return folder


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_train_as_one(runs: Path, norm: str, size: int) -> None:
    one, two = (record(runs / f"{norm}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    probes = [f"test/{name}" for name in ("knn_acc", "knn_acc_pixels", "knn_acc_untrained")]
    linear = [f"test/{name}" for name in ("linear_acc", "linear_acc_untrained")]
    assert_same_training(
        one,
        two,
        names=["train/loss", "grad_norm", "lr", "val/loss", "val/count"],
        tested=["test/loss", "test/count", *probes, *linear],
    )
    assert (runs / f"{norm}-{size}-2" / "reconstructions.png").is_file()
