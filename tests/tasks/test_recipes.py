"""The recipes hold the numbers of the papers: every one is built and compared with a table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from suite import sources
from suite import train as entry
from suite.build import build_norm
from suite.config import Config, diff, load, to_dict
from suite.data import DataInfo
from suite.norms import norm_modules
from suite.registry import load_task

NORMS = ("layernorm", "dyt", "derf")
MODELS = ("vit_base", "vit_large", "convnext_base", "convnext_large")
NAMES = [f"{norm}_{model}_imagenet" for norm in NORMS for model in MODELS]

# The published code of DyT (arXiv 2503.10622) and Derf (arXiv 2512.10938), which share these.
COMMON: dict[str, Any] = {
    "task.name": "vision/classify",
    "task.label_smoothing": 0.1,
    "data.name": "imagenet",
    "data.batch_size": 4096,
    "data.drop_last": True,
    "data.val": "folder",
    "data.image_size": 224,
    "data.crop_pct": 0.875,
    "data.interpolation": "bicubic",
    "data.flip": True,
    "data.crop": "resized",
    "data.crop_scale_min": 0.08,
    "data.randaugment": "rand-m9-mstd0.5-inc1",
    "data.color_jitter": 0.0,
    "data.erase": 0.25,
    "data.mixup": 0.8,
    "data.cutmix": 1.0,
    "data.mix_prob": 1.0,
    "data.mix_switch": 0.5,
    "optim.name": "adamw",
    "optim.lr": 4e-3,
    "optim.min_lr": 1e-6,
    "optim.beta1": 0.9,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.decay_norm": False,
    "optim.layer_decay": None,
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 20,
    "optim.ema_decay": 0.9999,
    "trainer.max_epochs": 300,
    "trainer.gradient_clip_val": None,
    "trainer.precision": "32-true",
    "run.matmul_precision": "high",
}
OF_MODEL: dict[str, dict[str, Any]] = {
    "vit_base": {"model.pool": "avg", "optim.beta2": 0.999},
    "vit_large": {"model.pool": "avg", "optim.beta2": 0.95},
    "convnext_base": {
        "model.layer_scale": 1e-6,
        "model.head_init_scale": 1.0,
        "optim.beta2": 0.999,
    },
    "convnext_large": {
        "model.layer_scale": 1e-6,
        "model.head_init_scale": 1.0,
        "optim.beta2": 0.999,
    },
}
OF_NORM: dict[str, dict[str, Any]] = {
    "layernorm": {},
    "dyt": {"norm.alpha_init": 0.5, "norm.alpha_init_by_site": {}},
    "derf": {"norm.alpha_init": 0.5, "norm.alpha_init_by_site": {}, "norm.shift": True},
}
# DyT's code for LayerNorm and DyT, Derf's code for Derf's ViTs.
DROP_PATH = {
    "layernorm": {"vit_base": 0.1, "vit_large": 0.4, "convnext_base": 0.5, "convnext_large": 0.5},
    "dyt": {"vit_base": 0.1, "vit_large": 0.4, "convnext_base": 0.5, "convnext_large": 0.5},
    "derf": {"vit_base": 0.15, "vit_large": 0.5, "convnext_base": 0.5, "convnext_large": 0.5},
}
# Parameters with LayerNorm (timm's counts), and the number of norms.
SIZES = {
    "vit_base": (86_567_656, 25),
    "vit_large": (304_326_632, 49),
    "convnext_base": (88_591_464, 41),
    "convnext_large": (197_767_336, 41),
}
EXTRA_A_NORM = {"layernorm": 0, "dyt": 1, "derf": 2}  # alpha; alpha and shift
# Top-1 in per cent: Table 1 of DyT's paper, the table of Derf's, which has no ConvNeXt.
TOP1 = {
    "layernorm": {
        "vit_base": "82.3",
        "vit_large": "83.1",
        "convnext_base": "83.7",
        "convnext_large": "84.3",
    },
    "dyt": {
        "vit_base": "82.5",
        "vit_large": "83.6",
        "convnext_base": "83.7",
        "convnext_large": "84.4",
    },
    "derf": {"vit_base": "82.8", "vit_large": "83.8"},
}


def recipe(name: str, *more: str) -> Config:
    return load([f"recipe={name}", "data.root=x", *more]).settled


def parts(name: str) -> tuple[str, str]:
    """(norm, model) of a recipe's name."""
    norm, _, rest = name.partition("_")
    return norm, rest.removesuffix("_imagenet")


def lines(name: str) -> list[str]:
    text = sources.recipes()[name].read_text(encoding="utf-8")
    return [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]


def value(config: Config, key: str) -> Any:
    section, _, field = key.partition(".")
    return to_dict(config)[section][field]


def test_there_is_a_recipe_for_every_row_of_the_first_table() -> None:
    assert set(NAMES) <= set(sources.recipes())


@pytest.mark.parametrize("name", NAMES)
def test_its_numbers_are_the_published_ones(name: str) -> None:
    norm, model = parts(name)
    config = recipe(name)
    wanted = {**COMMON, **OF_MODEL[model], **OF_NORM[norm]}
    wanted |= {"model.name": model, "norm.name": norm, "model.drop_path": DROP_PATH[norm][model]}
    assert {key: value(config, key) for key in wanted} == wanted
    assert config.data.eval_batch_size <= 1.5 * config.data.batch_size


@pytest.mark.parametrize("name", NAMES)
def test_its_model_has_the_published_parameters_and_norms(name: str) -> None:
    norm, model = parts(name)
    config = recipe(name)
    spec = load_task(config.task_name)
    info = DataInfo(
        name="imagenet",
        license="",
        source="",
        sha256="",
        synthetic=False,
        sizes={"train": 1_281_167},
        classes=1000,
        extra={"image_size": config.data.image_size, "in_chans": 3},
    )
    build = spec.models[config.model_name].build
    with torch.device("meta"):
        built = build(config.model, norm=build_norm(config), data=info)
    count, norms = SIZES[model]
    made: list[Any] = [module for _, module in norm_modules(built)]
    assert len(made) == norms
    assert {module.norm_name for module in made} == {norm}
    assert sum(p.numel() for p in built.parameters()) == count + norms * EXTRA_A_NORM[norm]


@pytest.mark.parametrize("model", MODELS)
def test_the_norms_of_a_model_differ_in_nothing_but_the_norm_and_derfs_drop_path(
    model: str,
) -> None:
    configs = {norm: recipe(f"{norm}_{model}_imagenet") for norm in NORMS}
    for norm in ("dyt", "derf"):
        changed = {k for k in diff(configs["layernorm"], configs[norm]) if k[:5] != "norm."}
        allowed = {"model.drop_path"} if norm == "derf" and model.startswith("vit") else set()
        assert changed == {"recipe"} | allowed


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_commands_that_load_and_give_each_gpu_64_images(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_machine, many = lines(name)[:2]
    start = "python -m suite.train "
    assert one_machine.startswith(f"{start}recipe={name} ")
    config = load(shlex.split(one_machine.removeprefix(start))).settled
    shares = config.trainer.devices * config.trainer.accumulate_grad_batches
    assert (config.trainer.devices, config.data.batch_size / shares) == (8, 64)

    launcher, _, words = many.partition(" -m suite.train ")
    found = re.search(r"^torchrun --nnodes=(\d+) --nproc_per_node=(\d+) ", launcher + " ")
    assert found is not None
    nodes, local = int(found[1]), int(found[2])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("WORLD_SIZE", str(local * nodes))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    config = load(shlex.split(words)).settled
    assert (config.recipe, config.trainer.accumulate_grad_batches) == (name, 1)
    assert config.data.batch_size / (config.trainer.devices * config.trainer.num_nodes) == 64


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_paper_got_and_that_it_was_not_run(name: str) -> None:
    norm, model = parts(name)
    said = sources.opening(sources.recipes()[name])
    figure = TOP1[norm].get(model)
    if figure is None:
        assert "Expected: none published. Not yet run." in said
    else:
        table = r"2512.10938" if norm == "derf" else r"2503.10622, Table 1"
        assert f"Expected: {figure} % top-1 (arXiv {table}). Not yet run." in said


@pytest.mark.parametrize("name", NAMES)
def test_it_names_the_drop_path_of_both_codes(name: str) -> None:
    _, model = parts(name)
    text = sources.recipes()[name].read_text(encoding="utf-8")
    line = next(x for x in text.splitlines() if x.strip().startswith("drop_path:"))
    assert f"DyT's code: {DROP_PATH['dyt'][model]}" in line
    if model.startswith("vit"):
        assert f"Derf's: {DROP_PATH['derf'][model]}" in line
    else:
        assert "Derf's code has no ConvNeXt" in line


PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_commands_of_the_page_on_recipes_load() -> None:
    start = "python -m suite.train "
    commands = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(start)]
    assert commands
    for line in commands:
        config = load(shlex.split(line.removeprefix(start), comments=True)).settled
        assert config.recipe in NAMES


def test_the_page_on_recipes_has_every_recipe_with_its_figure() -> None:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].strip("`") in NAMES:
            rows[cells[0].strip("`")] = cells[1:]
    assert set(rows) == set(NAMES)
    for name, cells in rows.items():
        norm, model = parts(name)
        assert cells[0] == TOP1[norm].get(model, "none published")
        assert cells[1] == str(DROP_PATH[norm][model])
        count, norms = SIZES[model]
        assert cells[2] == f"{count + norms * EXTRA_A_NORM[norm]:,}"
        assert cells[-1] == "not yet run"


def test_a_run_sets_the_precision_of_float32_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_float32_matmul_precision()
    small = ["model.depth=1", "data.batch_size=8", "data.eval_batch_size=8"]
    try:
        for chosen in ("high", "highest"):
            tokens = [*small, "trainer.accelerator=cpu", f"run.matmul_precision={chosen}"]
            assert entry.main([*tokens, "--dry-run"]) == 0
            assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
