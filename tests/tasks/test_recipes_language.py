"""The recipes of LLaMA and GPT-2 hold the published numbers, and their models build."""

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

pytestmark = pytest.mark.language

LLAMA_SIZES, LLAMA_NORMS = ("7b", "13b", "34b", "70b"), ("rmsnorm", "dyt")
LLAMA = [f"{norm}_llama_{size}" for size in LLAMA_SIZES for norm in LLAMA_NORMS]
GPT2 = [f"{norm}_gpt2_124m" for norm in ("layernorm", "rmsnorm", "dyt", "derf")]
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

# DyT, arXiv 2503.10622: loss and score of RMSNorm and DyT (Table 4), alpha (Table 10), and its
# README's rates.
LOSS = {
    "7b": ("1.59", "1.60", "0.513", "0.513"),
    "13b": ("1.53", "1.54", "0.529", "0.529"),
    "34b": ("1.50", "1.50", "0.536", "0.536"),
    "70b": ("1.45", "1.45", "0.549", "0.549"),
}
ALPHA = {"7b": (0.8, 0.2), "13b": (0.6, 0.15), "34b": (0.2, 0.05), "70b": (0.2, 0.05)}
RATE = {"7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4}
# Meta's 6,738,415,616, 13,015,864,320 and 68,976,648,192; Code Llama's 34 B with 32,000 ids.
PARAMETERS = {
    "7b": (6_738_415_616, 65),
    "13b": (13_015_864_320, 81),
    "34b": (33_743_970_304, 97),
    "70b": (68_976_648_192, 161),
}
TOKENS, BATCH_TOKENS = 200e9, 2**22
LLAMA_COMMON: dict[str, Any] = {
    "task.name": "language/lm",
    "model.vocab_size": 32_000,
    "model.norm_bias": False,
    "model.tie_head": False,
    "model.checkpoint": True,
    "data.name": "token_bin",
    "data.vocab_size": 32_000,
    "data.length": 4096,
    "data.drop_last": True,
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.weight_decay": 0.1,
    "optim.decay_norm": True,
    "optim.decay_bias": True,
    "optim.schedule": "cosine",
    "trainer.strategy": "fully_shard",
    "trainer.precision": "bf16-mixed",
    "trainer.gradient_clip_val": 1.0,
    "run.compile": "default",
}
# nanoGPT's, and Derf's, arXiv 2512.10938.
GPT2_LOSS = {"layernorm": "2.94", "rmsnorm": "2.95", "dyt": "2.97", "derf": "2.94"}
GPT2_PARAMETERS = 124_373_760  # 50,304 rows, no biases
GPT2_COMMON: dict[str, Any] = {
    "task.name": "language/lm",
    "model.name": "gpt2_124m",
    "model.dim": 768,
    "model.depth": 12,
    "model.heads": 12,
    "model.vocab_size": 50_304,
    "model.bias": False,
    "model.gelu": "exact",
    "model.dropout": 0.0,
    "data.name": "token_bin",
    "data.vocab_size": 50_257,
    "data.length": 1024,
    "data.batch_size": 491_520 // 1024,
    "data.drop_last": True,
    "optim.name": "adamw",
    "optim.lr": 6e-4,
    "optim.min_lr": 6e-5,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.weight_decay": 0.1,
    "optim.decay_norm": False,
    "optim.decay_bias": False,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 2000,
    "trainer.max_steps": 300_000,
    "trainer.precision": "bf16-mixed",
    "trainer.gradient_clip_val": 1.0,
    "run.compile": "default",
}


@functools.cache
def recipe(name: str) -> Config:
    return load([f"recipe={name}"]).settled


def parts(name: str) -> tuple[str, str]:
    """Norm and size."""
    norm, _, size = name.split("_")
    return norm, size


def value(config: Config, key: str) -> Any:
    section, field = key.split(".")
    if field == "name" and section != "optim":
        return getattr(config, f"{section}_name")
    return getattr(getattr(config, section), field)


def header(name: str) -> list[str]:
    text = sources.recipes()[name].read_text(encoding="utf-8")
    return [line[2:] for line in text.splitlines() if line.startswith("# ")]


def extra(name: str) -> int:
    """Parameters that a norm has beside RMSNorm's or LayerNorm's weight, with the scalar."""
    norm, size = parts(name)
    norms = PARAMETERS[size][1] if name in LLAMA else 25
    return {"dyt": norms + 1, "derf": 2 * norms + 1}.get(norm, 0)


@pytest.mark.parametrize("name", LLAMA)
def test_a_llama_recipe_has_the_published_numbers(name: str) -> None:
    norm, size = parts(name)
    config = recipe(name)
    wanted = {
        **LLAMA_COMMON,
        "model.name": f"llama_{size}",
        "norm.name": norm,
        "optim.lr": RATE[size],
        "model.embed_scale": norm == "dyt",
    }
    if norm == "dyt":
        attention, others = ALPHA[size]
        wanted |= {"norm.alpha_init": others, "norm.alpha_init_by_site": {"attn": attention}}
    assert {key: value(config, key) for key in wanted} == wanted
    assert config.data.batch_size * config.data.length == BATCH_TOKENS
    steps = config.trainer.max_steps
    assert (steps - 1) * BATCH_TOKENS < TOKENS <= steps * BATCH_TOKENS
    assert config.optim.warmup_steps == min(2000, steps // 20)
    assert config.optim.min_lr == pytest.approx(0.1 * config.optim.lr)


@pytest.mark.parametrize("name", GPT2)
def test_a_gpt2_recipe_has_the_published_numbers(name: str) -> None:
    norm, _ = parts(name)
    config = recipe(name)
    wanted = {**GPT2_COMMON, "norm.name": norm, "model.embed_scale": norm in ("dyt", "derf")}
    assert {key: value(config, key) for key in wanted} == wanted
    if norm in ("dyt", "derf"):  # within the ranges that Derf's paper searched
        assert config.norm.alpha_init in (0.1, 0.3, 0.5, 1.0)
        assert config.norm.alpha_init_by_site["attn"] in (0.5, 1.0, 2.0, 4.0)
    if norm == "derf":
        assert config.norm.shift is True


@pytest.mark.parametrize("name", LLAMA + GPT2)
def test_its_model_has_the_parameters_and_norms_of_its_size(name: str) -> None:
    norm, size = parts(name)
    config = recipe(name)
    known = DataInfo(
        name="token_bin",
        license="none",
        source="test",
        sha256="",
        synthetic=True,
        sizes={"train": 1, "val": 1, "test": 1},
        classes=None,
        extra={"vocab_size": config.data.vocab_size, "length": config.data.length},
    )
    build = load_task(config.task_name).models[config.model_name].build
    with torch.device("meta"):
        built = build(config.model, norm=build_norm(config), data=known)
    count, norms = PARAMETERS[size] if name in LLAMA else (GPT2_PARAMETERS, 25)
    made = dict(norm_modules(built))
    assert [module.norm_name for module in made.values()] == [norm] * norms
    assert sum(p.numel() for p in built.parameters()) == count + extra(name)
    assert not any(getattr(module, "bias", None) is not None for module in made.values())
    if norm == "dyt":
        starts = {module.site: module.alpha_init for module in made.values()}
        others, attention = config.norm.alpha_init, config.norm.alpha_init_by_site["attn"]
        assert starts == {"attn": attention, "ffn": others, "final": others}


@pytest.mark.parametrize("name", [n for n in LLAMA + GPT2 if parts(n)[0] in ("dyt", "derf")])
def test_it_differs_from_the_models_own_norm_in_the_norm_and_the_embeddings_scalar(
    name: str,
) -> None:
    own = name.replace(parts(name)[0], "rmsnorm" if name in LLAMA else "layernorm")
    keys = {k for k in diff(recipe(own), recipe(name)) if not k.startswith("norm.")}
    assert keys == {"recipe", "model.embed_scale"}


@pytest.mark.parametrize("name", LLAMA + GPT2)
def test_it_opens_with_commands_that_load_and_give_a_gpu_the_rows_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = 2 if name in LLAMA else 12
    assert f" {share} rows at a time" in " ".join(header(name))
    commands = [line for line in header(name) if " -m suite.train " in line]
    launched = [line for line in commands if line.startswith("torchrun")]
    assert len(launched) == (2 if name in LLAMA else 1)
    for line in launched:
        nodes = int(re.match(r"torchrun --nnodes=(\d+) --nproc_per_node=8 ", line)[1])
        with monkeypatch.context() as patch:
            for key, amount in {"LOCAL": 8, "": 8 * nodes, "GROUP": nodes}.items():
                patch.setenv(f"{key}_WORLD_SIZE".strip("_"), str(amount))
            config = load(shlex.split(line.partition(" -m suite.train ")[2])).settled
        assert config.recipe == name
        steps = config.trainer.accumulate_grad_batches
        assert config.data.batch_size == 8 * nodes * steps * share
    (alone,) = set(commands) - set(launched)
    loaded = load(shlex.split(alone.partition(" -m suite.train ")[2]))
    if name in LLAMA:
        assert loaded.action == "dry_run"
    else:
        trainer = loaded.settled.trainer
        shares = trainer.devices * trainer.accumulate_grad_batches
        assert loaded.settled.data.batch_size == shares * share


@pytest.mark.parametrize("name", LLAMA + GPT2)
def test_it_says_what_was_published_and_that_it_was_not_run(name: str) -> None:
    norm, size = parts(name)
    if name in LLAMA:
        figure = f"{LOSS[size][norm == 'dyt']} training loss (arXiv 2503.10622, Table 4)"
    else:
        figure = f"{GPT2_LOSS[norm]} validation loss (arXiv 2512.10938, Table 12)"
    assert f"Expected: {figure}. Not yet run." in sources.opening(sources.recipes()[name])


def test_the_page_has_every_language_recipe_with_its_figure_and_size() -> None:
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].strip("`") in LLAMA + GPT2:
            found[cells[0].strip("`")] = cells[1:]
    assert set(found) == set(LLAMA + GPT2)
    for name, cells in found.items():
        norm, size = parts(name)
        if name in LLAMA:
            dyt = norm == "dyt"
            assert cells[:2] == [LOSS[size][dyt], LOSS[size][2 + dyt]]
            alphas = " / ".join(f"{alpha:g}" for alpha in ALPHA[size]) if dyt else "-"
            assert cells[2:4] == [alphas, f"{RATE[size]:.1e}".replace("e-0", "e-")]
            count = PARAMETERS[size][0]
        else:
            assert cells[0] == GPT2_LOSS[norm]
            count = GPT2_PARAMETERS
        assert cells[-2:] == [f"{count + extra(name):,}", "not yet run"]


def test_rows_that_gpus_take_at_a_time_add_up_to_the_batch() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for title, batch in (("rows of 4,096 tokens at a time |", 1024), ("rows of 1,024 |", 480)):
        table = text.partition(title)[2].partition("\n\n")[0]
        found = re.findall(r"^\| (\d+)[^|]* \| (\d+) \| (\d+) \|", table, flags=re.M)
        assert len(found) >= 3
        assert {int(gpus) * int(steps) * int(rows) for gpus, steps, rows in found} == {batch}


def test_there_is_a_recipe_for_every_row_of_the_tables_and_no_other() -> None:
    found = {name for name in sources.recipes() if "_llama_" in name or "_gpt2_" in name}
    assert {*LLAMA, *GPT2} == found
