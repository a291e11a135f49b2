"""Every task x model x norm keeps the contract.

A new norm or model is picked up with no edit here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import chosen_norms

from suite.build import build_model
from suite.config import Config, load
from suite.data import DataInfo, SuiteDataModule
from suite.module import SuiteModule
from suite.norms import (
    NORMS,
    SITES,
    NormFactory,
    foreign_norms,
    make_norm,
    norm_modules,
    norm_parameters,
)
from suite.registry import TaskSpec, load_task, task_names

# What makes a full-size model small enough for a test and fit for the task's embedded data, by the
# beginning of the model's name.
WAV2VEC2 = {
    "conv_dim": 16,
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "hidden_dim": 32,
    "pos_kernel": 8,
    "pos_groups": 2,
}
DNA: dict[str, dict[str, Any]] = {
    "hyenadna_": {
        "dim": 16,
        "depth": 2,
        "hidden_dim": 32,
        "filter_dim": 16,
        "l_max": 1026,
        "embed_std": 1.0,
        "init_std": 0.2,
        "checkpoint": False,
    },
    "caduceus_": {"dim": 16, "depth": 2, "state": 4, "embed_std": 1.0, "init_std": 0.2},
}
MAE = {
    "image_size": 28,
    "in_chans": 1,
    "patch_size": 7,
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama_": {
        "dim": 24,
        "depth": 2,
        "heads": 4,
        "kv_heads": 2,
        "hidden_dim": 32,
        "vocab_size": None,
        "embed_scale": True,
        "init_std": 0.2,
        "checkpoint": False,
    },
    "gpt2_": {
        "dim": 24,
        "depth": 2,
        "heads": 4,
        "vocab_size": None,
        "embed_scale": True,
        "init_std": 0.2,
        "max_length": 256,
        "checkpoint": False,
    },
}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "vision/classify": {
        "vit_": {
            "image_size": 28,
            "in_chans": 1,
            "patch_size": 7,
            "dim": 48,
            "depth": 2,
            "heads": 3,
        },
        "convnext_": {
            "in_chans": 1,
            "patch_size": 4,
            "dim": 16,
            "depth1": 1,
            "depth2": 1,
            "depth3": 1,
            "depth4": 0,
            "layer_scale": 0.5,
            "init": "torch",
        },
        "timm": {"timm_name": "test_efficientnet"},
    },
    "speech/pretrain": {"wav2vec2_": {**WAV2VEC2, "codes": 8, "code_dim": 8}},
    "speech/ctc": {"wav2vec2_": WAV2VEC2},
    "dna/pretrain": DNA,
    "dna/classify": DNA,
    "vision/mae": {"mae_": MAE},
    "language/lm": LANGUAGE,
}
BATCH = {
    "vision/classify": 16,
    "speech/pretrain": 4,
    "speech/ctc": 4,
    "dna/pretrain": 4,
    "dna/classify": 6,
    "vision/mae": 16,
    "language/lm": 2,
}
SMALL = {"vit_fmnist", "convnext_fmnist", "mae_tiny"}  # made for 28 x 28 grey images
RATE = {"dna/classify": 1e-2, "language/lm": 1e-2}  # where twelve steps of 3e-3 are too short a way
PER_EXAMPLE = {
    "vision/classify",
    "speech/ctc",
    "dna/classify",
}  # tasks whose loss is a mean of examples


def tiny(task: str, model: str) -> dict[str, Any]:
    """The overrides of a model."""
    return next(values for start, values in TINY[task].items() if model.startswith(start))


def different(task: str) -> list[str]:
    """The models that are not the same when made small: one of those that differ in size alone."""
    found: dict[str, str] = {}
    for model, choice in load_task(task).models.items():
        small = replace(choice.options, **tiny(task, model))
        found.setdefault(f"{choice.build} {small}", model)
    return list(found.values())


@dataclass
class Case:
    """One task x model x norm, built small on real data."""

    spec: TaskSpec
    config: Config
    factory: NormFactory
    module: SuiteModule
    batch: dict[str, torch.Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    cells = [
        pytest.param(
            (task, model, norm),
            marks=[
                getattr(pytest.mark, task.split("/")[0]),
                pytest.mark.xdist_group(f"{task}-{model}"),
            ],
            id=f"{task}-{model}-{norm}",
        )
        for task in task_names()
        for model in different(task)
        for norm in chosen_norms(metafunc.config, list(NORMS))
        # refused, see test_dna_pretrain
        if NORMS[norm].causal or not load_task(task).models[model].causal
    ]
    metafunc.parametrize("cell", cells, scope="module", indirect=True)


_splits: dict[str, Any] = {}


def build(task: str, model: str, norm: str) -> Case:
    spec = load_task(task)
    config = load([f"task={task}", f"model={model}", f"norm={norm}"]).settled
    config = replace(config, model=replace(config.model, **tiny(task, model)))
    if task not in _splits:
        _splits[task] = spec.data[config.data_name].build(config.data, seed=0)
    splits, factory = _splits[task], make_norm(norm, config.norm)
    network = build_model(config, spec, factory, splits)
    module = spec.module(
        network,
        options=config.task,
        info=splits.info,
        optim=config.optim,
        identity={"norm": factory.describe()},
        seed=0,
        nominal=BATCH[task],
    )
    batch = SuiteDataModule(splits, options=config.data, seed=0).fixed_batch(BATCH[task])
    module.initialise(batch)
    return Case(spec, config, factory, module, batch)


@pytest.fixture(scope="module")
def cell(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    return build(*request.param)


def test_norms_are_the_chosen_one_at_known_sites(cell: Case) -> None:
    found = list(norm_modules(cell.module.model))
    assert found
    assert foreign_norms(cell.module.model, cell.factory, keep_sites=cell.spec.keep_sites) == []
    assert {norm.site for _, norm in found} <= set(SITES)


def test_every_parameter_gets_a_finite_gradient(cell: Case) -> None:
    cell.module.train().zero_grad()
    out = cell.module.step(cell.batch, "train")
    out.loss_sum.backward()
    bad = [
        name
        for name, p in cell.module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert bad == []
    if cell.spec.name in PER_EXAMPLE:
        assert float(out.count) == BATCH[cell.spec.name]
    assert float(out.count) > 0


def test_other_parameters_do_not_depend_on_the_norm(cell: Case) -> None:
    task, model = cell.config.task_name, cell.config.model_name
    ours = build(task, model, cell.config.norm_name).module.model
    reference = build(task, model, "layernorm").module.model.state_dict()
    of_norms = set(norm_parameters(ours))
    others = {k: p for k, p in ours.named_parameters() if k not in of_norms}
    assert others
    assert [k for k, p in others.items() if not torch.equal(p, reference[k])] == []


def test_loss_falls_on_one_repeated_batch(cell: Case) -> None:
    module = build(cell.config.task_name, cell.config.model_name, cell.config.norm_name).module
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE.get(cell.spec.name, 3e-3))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        out = module.step(cell.batch, "train")
        (out.loss_sum / out.count).backward()
        optimizer.step()
        losses.append(float(out.loss_sum.detach()) / float(out.count))
    assert losses[-1] < 0.97 * losses[0]


def test_metric_names_match_the_schema(cell: Case) -> None:
    module = cell.module.eval()
    with torch.no_grad():
        out = module.step(cell.batch, "val")
    collection = module.metrics()
    collection.update(**out.metric_inputs)
    name, direction, split = cell.spec.primary
    assert name in collection.compute() or name in out.logs or name == "loss"
    assert direction in ("max", "min")
    assert split == "val"
    assert all("/" not in key for key in (*out.logs, *collection.keys()))


def test_padding_rows_count_for_nothing(cell: Case) -> None:
    module = cell.module.eval()
    half = {k: v.clone() for k, v in cell.batch.items()}
    middle = BATCH[cell.spec.name] // 2
    half["valid"][middle:] = 0
    with torch.no_grad():
        masked = module.step(half, "val")
        alone = module.step({k: v[:middle] for k, v in cell.batch.items()}, "val")
    assert float(masked.count) == float(alone.count)
    torch.testing.assert_close(masked.loss_sum, alone.loss_sum, rtol=1e-5, atol=1e-5)


def test_state_dict_round_trips_to_equal_outputs(cell: Case) -> None:
    fresh = build(cell.config.task_name, cell.config.model_name, cell.config.norm_name).module
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(0.1)
    fresh.load_state_dict(cell.module.state_dict())
    with torch.no_grad():
        expected = cell.module.eval().step(cell.batch, "val").loss_sum
        assert torch.equal(fresh.eval().step(cell.batch, "val").loss_sum, expected)


@pytest.mark.parametrize("norm", ["layernorm", "dyt", "derf", "batchnorm"])
def test_full_size_models_build_on_the_meta_device(norm: str) -> None:
    for task in task_names():
        spec = load_task(task)
        info = DataInfo(
            "x",
            "",
            "",
            "",
            True,
            {},
            classes=10,
            extra={"image_size": 224, "in_chans": 3, "vocab_size": 257},
        )
        factory = make_norm(norm)
        for name, choice in spec.models.items():
            extra = {"image_size": 28, "in_chans": 1} if name in SMALL else {}
            data = replace(info, extra={**info.extra, **extra})
            options = choice.options
            if name == "timm":
                options = replace(options, timm_name="convnext_base")
            with torch.device("meta"):
                model = choice.build(options, norm=factory, data=data)
            assert foreign_norms(model, factory, keep_sites=spec.keep_sites) == []
