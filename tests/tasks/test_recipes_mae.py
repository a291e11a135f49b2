"""The recipes of MAE hold the published numbers, and fine-tuning fits pre-training."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from suite import sources
from suite.build import build_norm
from suite.config import Config, diff, load
from suite.data import DataInfo
from suite.norms import norm_modules
from suite.registry import load_task

pytestmark = pytest.mark.vision

NORMS, SIZES = ("layernorm", "dyt"), ("base", "large")
PRETRAIN = [f"{norm}_mae_vit_{size}_imagenet" for norm in NORMS for size in SIZES]
FINETUNE = [name.replace("imagenet", "finetune") for name in PRETRAIN]
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

# DyT, arXiv 2503.10622, Table 2: top-1 after fine-tuning.
TOP1 = {
    ("layernorm", "base"): "83.2",
    ("dyt", "base"): "83.2",
    ("layernorm", "large"): "85.5",
    ("dyt", "large"): "85.4",
}
# FAIR's MAE, PRETRAIN.md and FINETUNE.md; rates are those for 256 images.
PRETRAIN_BLR = 1.5e-4
FINETUNE_OF = {  # blr, layer decay, drop path, epochs
    "base": (5e-4, 0.65, 0.1, 100),
    "large": (1e-3, 0.75, 0.2, 50),
}
PRETRAIN_COMMON: dict[str, Any] = {
    "task.name": "vision/mae",
    "task.mask_ratio": 0.75,
    "task.norm_pix_loss": True,
    "model.patch_size": 16,
    "model.decoder_dim": 512,
    "model.decoder_depth": 8,
    "model.decoder_heads": 16,
    "data.batch_size": 4096,
    "data.crop_scale_min": 0.2,
    "data.randaugment": None,
    "data.erase": 0.0,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "optim.beta2": 0.95,
    "optim.warmup_epochs": 40,
    "optim.min_lr": 0.0,
    "optim.layer_decay": None,
    "trainer.max_epochs": 800,
}
FINETUNE_COMMON: dict[str, Any] = {
    "task.name": "vision/classify",
    "task.label_smoothing": 0.1,
    "model.pool": "avg",
    "model.head_std": 2e-5,
    "data.batch_size": 1024,
    "data.crop_scale_min": 0.08,
    "data.randaugment": "rand-m9-mstd0.5-inc1",
    "data.erase": 0.25,
    "data.mixup": 0.8,
    "data.cutmix": 1.0,
    "optim.beta2": 0.999,
    "optim.warmup_epochs": 5,
    "optim.min_lr": 1e-6,
}
BOTH: dict[str, Any] = {
    "data.name": "imagenet",
    "data.drop_last": True,
    "data.image_size": 224,
    "data.interpolation": "bicubic",
    "data.flip": True,
    "data.crop": "resized",
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.weight_decay": 0.05,
    "optim.decay_norm": False,
    "optim.schedule": "cosine",
    "optim.ema_decay": None,
    "trainer.gradient_clip_val": None,
}
# Parameters with LayerNorm (positions are not learned in pre-training) and norms.
COUNTS = {"base": (111_655_680, 42), "large": (329_239_296, 66)}
COUNTS_FINE = {"base": (86_567_656, 25), "large": (304_326_632, 49)}


@functools.cache
def recipe(name: str) -> Config:
    return load([f"recipe={name}"]).settled


def parts(name: str) -> tuple[str, str]:
    """Norm and size."""
    norm, _, _, size, _ = name.split("_")
    return norm, size


def value(config: Config, key: str) -> Any:
    section, field = key.split(".")
    if field == "name" and section != "optim":
        return getattr(config, f"{section}_name")
    return getattr(getattr(config, section), field)


def header(name: str) -> list[str]:
    text = sources.recipes()[name].read_text(encoding="utf-8")
    return [line[2:] for line in text.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize("name", PRETRAIN + FINETUNE)
def test_a_recipe_of_mae_has_the_published_numbers(name: str) -> None:
    norm, size = parts(name)
    config = recipe(name)
    wanted = {**BOTH, "norm.name": norm}
    if name in PRETRAIN:
        wanted |= {**PRETRAIN_COMMON, "model.name": f"mae_vit_{size}"}
        blr = PRETRAIN_BLR
    else:
        blr, decay, drop, epochs = FINETUNE_OF[size]
        wanted |= {
            **FINETUNE_COMMON,
            "model.name": f"vit_{size}",
            "model.drop_path": drop,
            "optim.layer_decay": decay,
            "trainer.max_epochs": epochs,
        }
    if norm == "dyt":
        wanted |= {"norm.alpha_init": 0.5, "norm.alpha_init_by_site": {}}
    assert {key: value(config, key) for key in wanted} == wanted
    assert config.optim.lr == pytest.approx(blr * config.data.batch_size / 256)


@pytest.mark.parametrize("name", PRETRAIN + FINETUNE)
def test_its_model_has_the_parameters_and_norms_of_its_size(name: str) -> None:
    norm, size = parts(name)
    config = recipe(name)
    known = DataInfo(
        name="imagenet",
        license="none",
        source="test",
        sha256="",
        synthetic=True,
        sizes={"train": 1, "val": 1, "test": 1},
        classes=1000,
        extra={"image_size": 224, "in_chans": 3},
    )
    build = load_task(config.task_name).models[config.model_name].build
    with torch.device("meta"):
        built = build(config.model, norm=build_norm(config), data=known)
    count, norms = (COUNTS if name in PRETRAIN else COUNTS_FINE)[size]
    made = [module.norm_name for _, module in norm_modules(built)]
    assert made == [norm] * norms
    learned = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert learned == count + norms * (norm == "dyt")
    if name in PRETRAIN and norm == "dyt":
        assert f"DyT replaces all {norms} LayerNorms" in " ".join(header(name))


@pytest.mark.parametrize("name", [n for n in PRETRAIN + FINETUNE if n.startswith("dyt")])
def test_it_differs_from_layernorms_in_the_norm_alone(name: str) -> None:
    keys = diff(recipe(name.replace("dyt", "layernorm")), recipe(name))
    assert {key for key in keys if not key.startswith("norm.")} == {"recipe"}


@pytest.mark.parametrize("name", FINETUNE)
def test_a_fine_tuning_names_the_pre_training_of_its_encoder(name: str) -> None:
    start = name.replace("finetune", "imagenet")
    assert f"recipe={start}" in " ".join(header(name))
    for field in ("dim", "depth", "heads", "patch_size", "image_size", "mlp_ratio"):
        assert value(recipe(start), f"model.{field}") == value(recipe(name), f"model.{field}")
    assert recipe(start).norm == recipe(name).norm


@pytest.mark.parametrize("name", PRETRAIN + FINETUNE)
def test_it_opens_with_commands_that_load_and_give_a_gpu_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = 64 if name in PRETRAIN else 32
    assert f"{share} images at a time" in " ".join(header(name))
    one_machine, many = header(name)[:2]
    start = "python -m suite.train "
    assert one_machine.startswith(f"{start}recipe={name} ")
    config = load(shlex.split(one_machine.removeprefix(start))).settled
    assert config.trainer.devices == 8
    assert config.data.batch_size == 8 * config.trainer.accumulate_grad_batches * share

    nodes = int(re.match(r"torchrun --nnodes=(\d+) --nproc_per_node=8 ", many)[1])
    for key, amount in {"LOCAL": 8, "": 8 * nodes, "GROUP": nodes}.items():
        monkeypatch.setenv(f"{key}_WORLD_SIZE".strip("_"), str(amount))
    config = load(shlex.split(many.partition(" -m suite.train ")[2])).settled
    assert (config.recipe, config.trainer.accumulate_grad_batches) == (name, 1)
    assert config.data.batch_size == 8 * nodes * share
    assert (config.model.init_from == "RUN") is (name in FINETUNE)


@pytest.mark.parametrize("name", PRETRAIN + FINETUNE)
def test_it_says_what_was_published_and_that_it_was_not_run(name: str) -> None:
    norm, size = parts(name)
    then = f" after recipe={name.replace('imagenet', 'finetune')}" if name in PRETRAIN else ""
    figure = f"{TOP1[norm, size]} % top-1{then} (arXiv 2503.10622, Table 2)"
    assert f"Expected: {figure}. Not yet run." in sources.opening(sources.recipes()[name])


def test_the_page_has_every_recipe_of_mae_with_its_figure_and_size() -> None:
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].strip("`") in PRETRAIN + FINETUNE:
            found[cells[0].strip("`")] = cells[1:]
    assert set(found) == set(PRETRAIN + FINETUNE)
    for name, cells in found.items():
        norm, size = parts(name)
        count, norms = (COUNTS if name in PRETRAIN else COUNTS_FINE)[size]
        assert cells[0] == TOP1[norm, size]
        assert cells[-2:] == [f"{count + norms * (norm == 'dyt'):,}", "not yet run"]


def test_there_is_a_recipe_for_every_row_of_the_table_and_no_other() -> None:
    assert {*PRETRAIN, *FINETUNE} == {name for name in sources.recipes() if "_mae_vit_" in name}
