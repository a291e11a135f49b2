"""Broken pictures, clips and bases on two processes as on one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from damage import CLIPS, PICTURES, speech, write_clip, write_genome
from launching import assert_same_training, launch, record
from photographs import write_tree

pytestmark = pytest.mark.ddp
SGD = [
    *("optim.name=sgd", "optim.lr=0.01", "optim.momentum=0.0", "optim.schedule=constant"),
    *("trainer.max_epochs=2", "trainer.max_steps=-1", "trainer.check_val_every_n_epoch=1"),
    *("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "run.tensorboard=false"),
    *("trainer.enable_progress_bar=false", "data.on_error=skip", "norm=dyt"),
]
VISION = [
    *("task=vision/classify", "model.dim=16", "model.depth=1", "model.heads=1", "model.in_chans=3"),
    *("model.image_size=32", "model.patch_size=8", "data=image_folder", "data.image_size=32"),
    *("data.batch_size=2", "data.eval_batch_size=2", "data.num_workers=1"),
]
SPEECH = [
    *("data=manifest", "data.batch_seconds=3", "data.batch_size=4", "model.conv_dim=16"),
    *("model.dim=24", "model.depth=2", "model.heads=2", "model.hidden_dim=32"),
    *("model.pos_kernel=8", "model.pos_groups=2", "model.dropout=0", "model.init_std=0.1"),
]
DNA = [
    *("task=dna/pretrain", "data=genome", "data.length=64", "data.batch_size=2"),
    *("data.eval_batch_size=2", "model.dim=16", "model.depth=1", "data.shift=8"),
]
CASES = ("pictures", "ctc", "pretrain", "genome")


def write_data(folder: Path) -> None:
    """12 + 12 pictures, 24 clips and a small genome, some of each kind broken."""
    write_tree(folder / "photos", train=6, val=3)
    for (harm, _), name in zip(PICTURES.values(), ("bag/1", "coat/0", "dress/5"), strict=False):
        harm(folder / "photos" / "train" / f"{name}.jpg")
    PICTURES["empty"][0](folder / "photos" / "val" / "dress" / "1.jpg")
    wave, rows = speech(), ["path\ttranscript"]
    for i in range(16):
        write_clip(folder / f"{i}.wav", wave[i * 9_000 : i * 9_000 + 9_000 + 300 * i])
        rows.append(f"{i}.wav\tword")
    (folder / "clips.tsv").write_text("\n".join(rows) + "\n")
    for place, kind in ((2, "nan"), (9, "inf"), (11, "empty")):
        CLIPS[kind][0](folder / f"{place}.wav")
    write_genome(folder, bases=1_600, broken={200: b"\xe9", 330: b"!", 1_400: b"\xff"})


def arguments(case: str, *, folder: Path, world: int) -> list[str]:
    own = {
        "pictures": [*VISION, f"data.root={folder / 'photos'}"],
        "ctc": ["task=speech/ctc", *SPEECH, "model.layer_drop=0", "task.mask_prob=0.3"],
        "pretrain": ["task=speech/pretrain", *SPEECH, "model.codes=8", "model.code_dim=8"],
        "genome": [*DNA, f"data.fasta={folder / 'g.fa'}", f"data.bed={folder / 'g.bed'}"],
    }[case]
    if "data=manifest" in own:
        lists = [f"data.{split}={folder / 'clips.tsv'}" for split in ("train", "val")]
        own = [*own, *lists]
    place = [f"run.dir={folder / f'{case}-{world}'}", f"trainer.devices={world}"]
    return [*own, *SGD, f"data.cache={folder / f'cache-{world}'}", *place]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases with one process and with two, started together."""
    folder = tmp_path_factory.mktemp("broken")
    write_data(folder)

    def both(world: int) -> None:
        commands = [arguments(case, folder=folder, world=world) for case in CASES]
        launch(commands, world=world, folder=folder)

    with ThreadPoolExecutor(2) as pool:
        for end in [pool.submit(both, world) for world in (1, 2)]:
            end.result()
    return folder


FOUND = {
    "pictures": {"train": (3, 24), "val": (1, 12), "test": (1, 12)},
    "ctc": {"train": (3, 16), "val": (3, 16), "test": (3, 16)},
    "pretrain": {"train": (3, 16), "val": (3, 16), "test": (3, 16)},
    "genome": {"train": (2, 18), "val": (1, 6), "test": (1, 6)},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_leave_out_what_one_does_and_train_as_one(runs: Path, case: str) -> None:
    """In batches of two, a broken picture or window is all that one of the processes has."""
    one, two = (record(runs / f"{case}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    names = ["train/loss", "grad_norm", "val/loss", "val/count"]
    assert_same_training(one, two, names=names, tested=["test/loss", "test/count"])
    assert one["result"]["steps"] == two["result"]["steps"]
    left_out = one["result"]["data"]["unreadable"]
    assert left_out == two["result"]["data"]["unreadable"]
    assert {s: (u["count"], u["of"]) for s, u in left_out.items()} == FOUND[case]
    assert all(np.isfinite(weights).all() for weights in two["weights"].values())
