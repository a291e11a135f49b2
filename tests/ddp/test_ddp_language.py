"""Language models on two processes as on one: tokens that are asked for are counted over all."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_same_training, launch, record

pytestmark = pytest.mark.ddp
SIZES = (7, 11)
MODELS = {
    "llama_tiny": ["model.kv_heads=2", "model.hidden_dim=24", "norm=dyt", "data.documents=join"],
    "gpt2_tiny": ["model.embed_scale=true", "norm=derf", "data.documents=mask"],
}


def arguments(folder: Path, *, model: str, size: int, world: int) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    return [
        f"run.dir={folder}",
        "task=language/lm",
        f"model={model}",
        *MODELS[model],
        "model.dim=16",
        "model.depth=2",
        "model.heads=4",
        "task.sample_tokens=4",
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
        "trainer.max_steps=-1",
        "trainer.check_val_every_n_epoch=1",
        "trainer.val_check_interval=null",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"trainer.devices={world}",
        "run.tensorboard=false",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp-language")
    for world in (1, 2):
        commands = [
            arguments(folder / f"{model}-{size}-{world}", model=model, size=size, world=world)
            for model in MODELS
            for size in SIZES
        ]
        launch(commands, world=world, folder=folder)
    return folder


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_train_as_one(runs: Path, model: str, size: int) -> None:
    one, two = (record(runs / f"{model}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    train = ["train/loss", "train/acc", "grad_norm", "lr"]
    names = ("loss", "count", "acc", "perplexity", "bits_per_byte")
    val, tested = ([f"{split}/{name}" for name in names] for split in ("val", "test"))
    assert_same_training(one, two, names=train + val, tested=tested)
    texts = [(runs / f"{model}-{size}-{world}" / "sample.txt").read_text() for world in (1, 2)]
    assert texts[0] == texts[1]
