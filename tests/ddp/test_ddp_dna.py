"""DNA on two processes as on one: masks, both strands, tied weights, padded rows, all metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_same_training, launch, record

pytestmark = pytest.mark.ddp
SIZES = (7, 11)
MODELS = {
    "hyenadna_tiny_1k": ["model.filter_dim=16", "model.hidden_dim=32", "model.embed_dropout=0"],
    "caduceus_ps_tiny": ["model.state=4", "model.tie_head=true"],
    "caduceus_ph_tiny": ["model.state=4"],
}
NORMS = {"hyenadna_tiny_1k": "dyt", "caduceus_ps_tiny": "rmsnorm", "caduceus_ph_tiny": "derf"}
CASES = [(task, model) for task in ("pretrain", "classify") for model in MODELS]
SEEN = {
    "pretrain": ("bits_per_base", "acc", "perplexity"),
    "classify": ("acc", "mcc", "f1", "auroc", "acc_novel"),
}


def arguments(folder: Path, *, task: str, model: str, size: int, world: int) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    return [
        f"run.dir={folder}",
        f"task=dna/{task}",
        f"model={model}",
        f"norm={NORMS[model]}",
        "data=first",
        f"data.size={size}",
        "data.batch_size=4",
        "data.drop_last=false",
        "model.dim=16",
        "model.depth=2",
        "model.init_std=0.05",
        *MODELS[model],
        *(["task.baselines=false"] if task == "pretrain" else []),
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
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp-dna")
    for world in (1, 2):
        commands = [
            arguments(
                folder / f"{task}-{model}-{size}-{world}",
                task=task,
                model=model,
                size=size,
                world=world,
            )
            for task, model in CASES
            for size in SIZES
        ]
        launch(commands, world=world, folder=folder)
    return folder


@pytest.mark.parametrize(("task", "model"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_train_as_one(runs: Path, task: str, model: str, size: int) -> None:
    one, two = (record(runs / f"{task}-{model}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    train = ["train/loss", "train/acc", "grad_norm", "lr"]
    val = [f"val/{name}" for name in ("loss", "count", *SEEN[task])]
    tested = [name.replace("val", "test") for name in val]
    assert_same_training(one, two, names=train + val, tested=tested)
