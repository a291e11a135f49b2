"""The recipes hold the numbers of the papers: every one is built and compared with a table."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from suite import sources
from suite import train as entry
from suite.buckets import BucketSampler, LengthBuckets
from suite.build import build_norm
from suite.config import Config, diff, load, to_dict
from suite.data import DataInfo
from suite.norms import norm_modules
from suite.registry import load_task
from suite.sweep import parse_tokens, plan_cells, resolve_config

NORMS = ("layernorm", "dyt", "derf")
MODELS = ("vit_base", "vit_large", "convnext_base", "convnext_large")
NAMES = [f"{norm}_{model}_imagenet" for norm in NORMS for model in MODELS]
SPEECH_SIZES = ("base", "large")
HOURS = ("10h", "100h", "960h")
PRETRAIN = [f"{n}_wav2vec2_{size}_librispeech" for n in NORMS for size in SPEECH_SIZES]
CTC = [f"{n}_wav2vec2_{size}_ctc_{h}" for n in NORMS for size in SPEECH_SIZES for h in HOURS]
SPEECH = PRETRAIN + CTC
DNA_NORMS = {
    "hyenadna": NORMS,
    "caduceus_ps": ("rmsnorm", "dyt", "derf"),
    "caduceus_ph": ("rmsnorm", "dyt", "derf"),
}
HG38 = [f"{n}_{kind}_hg38" for kind, norms in DNA_NORMS.items() for n in norms]
GENOMIC = [name.replace("hg38", "genomic_benchmarks") for name in HG38]
DNA = HG38 + GENOMIC

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

# fairseq 3d262bb25690, examples/wav2vec/config/pretraining: arXiv 2006.11477 as it was trained.
PRETRAIN_COMMON: dict[str, Any] = {
    "task.name": "speech/pretrain",
    "task.mask_prob": 0.65,
    "task.mask_length": 10,
    "task.min_masks": 2,
    "task.mask_equalise": "none",
    "task.negatives": 100,
    "task.logit_temperature": 0.1,
    "task.diversity_weight": 0.1,
    "task.penalty_weight": 10.0,
    "task.temperature_start": 2.0,
    "task.temperature_decay": 0.999995,
    "model.extractor": "group_norm",
    "model.conv_bias": False,
    "model.keep_sites": ("stem", "embed"),
    "model.dropout": 0.1,
    "model.activation_dropout": 0.0,
    "model.input_dropout": 0.1,
    "model.feature_dropout": 0.1,
    "model.feature_grad_mult": 0.1,
    "model.codebooks": 2,
    "model.codes": 320,
    "model.pos_kernel": 128,
    "model.pos_groups": 16,
    "data.name": "librispeech",
    "data.train": "train-clean-100,train-clean-360,train-other-500",
    "data.val": "dev-clean,dev-other",
    "data.min_seconds": 2.0,
    "data.pad": False,
    "data.normalize": False,
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.98,
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.01,
    "optim.decay_norm": True,
    "optim.decay_bias": True,
    "optim.schedule": "polynomial",
    "optim.power": 1.0,
    "optim.min_lr": 0.0,
    "optim.ema_decay": None,
    "trainer.gradient_clip_val": None,
}
# The yaml file of Base, and that of Large in DyT's and Derf's code.
PRETRAIN_OF_SIZE: dict[str, dict[str, Any]] = {
    "base": {
        "task.temperature_end": 0.5,
        "model.attention_dropout": 0.1,
        "model.layer_drop": 0.05,
        "model.code_dim": 256,
        "data.batch_seconds": 1_400_000 * 64 / 16_000,
        "data.crop_seconds": 250_000 / 16_000,
        "optim.lr": 5e-4,
        "optim.warmup_steps": 32_000,
        "trainer.max_steps": 400_000,
    },
    "large": {
        "task.temperature_end": 0.1,
        "model.attention_dropout": 0.0,
        "model.layer_drop": 0.2,
        "model.code_dim": 768,
        "data.batch_seconds": 1_200_000 * 128 / 16_000,
        "data.crop_seconds": 320_000 / 16_000,
        "optim.lr": 3e-4,
        "optim.warmup_steps": 20_000,
        "trainer.max_steps": 250_000,
    },
}
# examples/wav2vec/config/finetuning of the same.
CTC_COMMON: dict[str, Any] = {
    "task.name": "speech/ctc",
    "task.mask_length": 10,
    "task.mask_channel_length": 64,
    "task.decoder": "greedy",
    "model.extractor": "group_norm",
    "model.keep_sites": ("stem", "embed"),
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.activation_dropout": 0.1,
    "model.freeze_extractor": True,
    "data.name": "librispeech",
    "data.val": "dev-other",
    "data.test": "test-other",
    "data.crop_seconds": None,
    "data.pad": True,
    "data.normalize": False,
    "optim.name": "adam",
    "optim.beta1": 0.9,
    "optim.beta2": 0.98,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.schedule": "tri_stage",
    "optim.warmup_fraction": 0.1,
    "optim.warmup_scale": 0.01,
    "optim.hold_fraction": 0.4,
    "optim.decay_fraction": 0.5,
    "optim.final_scale": 0.05,
    "trainer.gradient_clip_val": None,
    "trainer.precision": "bf16-mixed",
}
CTC_KEYS = (
    "data.batch_seconds",
    "trainer.max_steps",
    "optim.lr",
    "task.mask_prob",
    "task.mask_channel_prob",
    "model.layer_drop",
    "task.freeze_updates",
)
CTC_OF: dict[tuple[str, str], tuple[float, ...]] = {  # the values of CTC_KEYS
    ("base", "10h"): (2 * 4 * 200, 20_000, 5e-5, 0.65, 0.5, 0.05, 10_000),
    ("base", "100h"): (2 * 4 * 200, 80_000, 3e-5, 0.65, 0.5, 0.1, 0),
    ("base", "960h"): (8 * 200, 320_000, 1e-4, 0.5, 0.1, 0.1, 0),
    ("large", "10h"): (4 * 5 * 80, 20_000, 1e-4, 0.75, 0.25, 0.1, 10_000),
    ("large", "100h"): (4 * 5 * 80, 80_000, 3e-5, 0.5, 0.5, 0.1, 10_000),
    ("large", "960h"): (24 * 80, 320_000, 3e-5, 0.5, 0.25, 0.1, 10_000),
}
CTC_TRAIN = {
    "10h": "librispeech_finetuning/1h,librispeech_finetuning/9h",
    "100h": "train-clean-100",
    "960h": "train-clean-100,train-clean-360,train-other-500",
}
PRE_NORM = {  # as the code of each paper has it; LayerNorm has DyT's
    "layernorm": {"base": False, "large": True},
    "dyt": {"base": False, "large": True},
    "derf": {"base": True, "large": True},
}
PRECISION = {"layernorm": "bf16-mixed", "dyt": "bf16-mixed", "derf": "32-true"}  # of pre-training
# Parameters with LayerNorm for pre-training and for CTC, and the norms that are replaced.
SPEECH_COUNTS = {"base": (95_044_608, 94_394_013, 25), "large": (317_380_864, 315_458_717, 49)}
LOSS = {
    "layernorm": {"base": "1.95", "large": "1.92"},
    "dyt": {"base": "1.95", "large": "1.91"},
    "derf": {"base": "1.93", "large": "1.90"},
}
# caduceus 0060a6d, configs/experiment/hg38/hg38.yaml: arXiv 2403.03234 as it was trained.
HG38_COMMON: dict[str, Any] = {
    "task.name": "dna/pretrain",
    "data.name": "genome",
    "data.length": 1024,
    "data.shift": 0,
    "data.batch_size": 2**20 // 1024,
    "data.drop_last": True,
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.weight_decay": 0.1,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 10_000 // 10,
    "optim.min_lr": 1e-4,
    "trainer.max_steps": 10_000,
    "trainer.gradient_clip_val": 1.0,
    "trainer.limit_val_batches": 0.125,
}
# genomic_benchmark.yaml of the same, run_genomics_benchmark.sh, and D.1 of the paper.
GENOMIC_COMMON: dict[str, Any] = {
    "task.name": "dna/classify",
    "task.pool": "mean",
    "data.name": "genomic_benchmarks",
    "data.max_length": 512,
    "data.batch_size": 256,
    "data.val_share": 0.1,
    "data.val_seed": None,
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.weight_decay": 0.1,
    "optim.schedule": "cosine",
    "optim.warmup_fraction": 0.01,
    "trainer.max_epochs": 10,
    "trainer.gradient_clip_val": 1.0,
    "run.patience": None,
}
DNA_COMMON: dict[str, Any] = {  # of both, where this suite says what is the same for every norm
    "optim.decay_norm": False,
    "optim.layer_decay": None,
    "optim.ema_decay": None,
    "trainer.precision": "bf16-mixed",
}
# Of each model: its options, then what pre-training and fine-tuning have of their own.
DNA_MODEL: dict[str, dict[str, Any]] = {
    "hyenadna": {
        "model.dim": 256,
        "model.depth": 4,
        "model.hidden_dim": 1024,
        "model.l_max": 1026,
        "model.modulation_shift": 0.0,
        "model.embed_dropout": 0.1,
        "model.dropout": 0.0,
        "model.bidirectional": False,
    },
    "caduceus_ps": {
        "model.dim": 118,
        "model.depth": 4,
        "model.rcps": True,
        "model.rcps_strand_swap": True,
        "model.bidirectional": True,
    },
    "caduceus_ph": {
        "model.dim": 118,
        "model.depth": 4,
        "model.rcps": False,
        "model.rcps_strand_swap": False,
        "model.bidirectional": True,
    },
}
MLM = {"task.objective": "mlm", "task.mask_prob": 0.15, "task.mask_share": 0.8}
HG38_OF: dict[str, dict[str, Any]] = {
    "hyenadna": {
        "task.objective": "causal",
        "task.bos": False,
        "optim.lr": 6e-4,
        "data.rc_augment": True,
    },
    "caduceus_ps": {**MLM, "task.random_share": 0.1, "optim.lr": 8e-3, "data.rc_augment": False},
    "caduceus_ph": {**MLM, "task.random_share": 0.1, "optim.lr": 8e-3, "data.rc_augment": True},
}
GENOMIC_OF: dict[str, dict[str, Any]] = {
    "hyenadna": {"task.conjoin": False, "optim.lr": 6e-4, "data.rc_augment": True},
    "caduceus_ps": {"task.conjoin": None, "optim.lr": 1e-3, "data.rc_augment": False},
    "caduceus_ph": {"task.conjoin": True, "optim.lr": 1e-3, "data.rc_augment": True},
}
# Parameters with the model's own norm: in pre-training (the facts of the published models), with a
# head of two classes; norms; and what a DyT has more than that norm: alpha and, beside an RMSNorm,
# a bias.
DNA_COUNTS = {
    "hyenadna": (3_277_568, 3_277_568 + 2 * 257, 9, 0),
    "caduceus_ps": (470_702, 470_702 + 2 * 119, 5, 118),
    "caduceus_ph": (470_702, 470_702 + 2 * 119, 5, 118),
}
GENOMIC_MEAN = {  # Table 6 of DyT's paper, Derf's table; Ph: Table 1 of Caduceus'
    **{("hyenadna", n): (m, "2503.10622") for n, m in (("layernorm", "85.2"), ("dyt", "85.2"))},
    **{("caduceus_ps", n): (m, "2503.10622") for n, m in (("rmsnorm", "86.9"), ("dyt", "86.9"))},
    ("hyenadna", "derf"): ("85.7", "2512.10938"),
    ("caduceus_ps", "derf"): ("87.3", "2512.10938"),
    ("caduceus_ph", "rmsnorm"): ("86.6", "2403.03234, Table 1"),
}
PS_LR = {  # D.1
    "dummy_mouse_enhancers_ensembl": 2e-3,
    "demo_coding_vs_intergenomic_seqs": 1e-3,
    "demo_human_or_worm": 1e-3,
    "human_enhancers_cohn": 2e-3,
    "human_enhancers_ensembl": 1e-3,
    "human_ensembl_regulatory": 1e-3,
    "human_ocr_ensembl": 2e-3,
    "human_nontata_promoters": 2e-3,
}
WER = {  # per cent on test-clean / test-other
    "layernorm_wav2vec2_base_ctc_10h": "4.3 / 9.5 % WER with a 4-gram",
    "layernorm_wav2vec2_base_ctc_100h": "3.4 / 8.0 % WER with a 4-gram",
    "layernorm_wav2vec2_base_ctc_960h": "3.4 / 8.6 % WER",
}


@functools.cache
def recipe(name: str, *more: str) -> Config:
    files = ["data.fasta=x", "data.bed=x"] if name in HG38 else ["data.root=x"]
    return load([f"recipe={name}", *files, *more]).settled


def parts(name: str) -> tuple[str, str]:
    """(norm, model) of a recipe's name."""
    norm, _, rest = name.partition("_")
    return norm, rest.removesuffix("_imagenet")


def speech_parts(name: str) -> tuple[str, str, str | None]:
    """(norm, size, hours of CTC or None) of a recipe's name."""
    norm, _, size, *rest = name.split("_")
    return norm, size, rest[1] if rest[0] == "ctc" else None


def dna_parts(name: str) -> tuple[str, str]:
    """(norm, kind of model) of a recipe's name."""
    norm, _, rest = name.partition("_")
    return norm, rest.removesuffix("_hg38").removesuffix("_genomic_benchmarks")


def dna_count(name: str) -> int:
    """The parameters of a recipe's model."""
    norm, kind = dna_parts(name)
    pretrain, classify, norms, bias = DNA_COUNTS[kind]
    more = 0 if norm in ("layernorm", "rmsnorm") else EXTRA_A_NORM[norm] + bias
    return (pretrain if name in HG38 else classify) + norms * more


def replaced_keys(name: str) -> set[str]:
    """The keys in which a recipe differs from LayerNorm's besides the norm: what its paper's code
    changed with it."""
    norm, size, hours = speech_parts(name)
    keys = {"trainer.precision"} if norm == "derf" and hours is None else set()
    return keys | ({"model.pre_norm"} if norm == "derf" and size == "base" else set())


def info(name: str, **extra: Any) -> DataInfo:
    return DataInfo(name, "", "", "", False, {"train": 1}, **extra)


def lines(name: str) -> list[str]:
    text = sources.recipes()[name].read_text(encoding="utf-8")
    return [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]


def value(config: Config, key: str) -> Any:
    section, _, field = key.partition(".")
    return to_dict(config)[section][field]


def test_there_is_a_recipe_for_every_row_of_the_tables_and_no_other() -> None:
    elsewhere = ("_mae_vit_", "_llama_", "_gpt2_")  # test_recipes_mae.py, test_recipes_language.py
    here = {name for name in sources.recipes() if not any(part in name for part in elsewhere)}
    assert {*NAMES, *SPEECH, *DNA} == here


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
    shape = {"image_size": config.data.image_size, "in_chans": 3}
    build = spec.models[config.model_name].build
    with torch.device("meta"):
        built = build(
            config.model, norm=build_norm(config), data=info("imagenet", classes=1000, extra=shape)
        )
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


@pytest.mark.parametrize("name", SPEECH)
def test_a_speech_recipes_numbers_are_the_published_ones(name: str) -> None:
    norm, size, hours = speech_parts(name)
    config = recipe(name)
    if hours is None:
        wanted = {**PRETRAIN_COMMON, **PRETRAIN_OF_SIZE[size]}
        wanted["trainer.precision"] = PRECISION[norm]
    else:
        wanted = {**CTC_COMMON, **dict(zip(CTC_KEYS, CTC_OF[size, hours], strict=True))}
        wanted["data.train"] = CTC_TRAIN[hours]
    wanted |= {"model.name": f"wav2vec2_{size}", "norm.name": norm, **OF_NORM[norm]}
    wanted["model.pre_norm"] = PRE_NORM[norm][size]
    assert {key: value(config, key) for key in wanted} == wanted
    # the seconds alone decide how many clips a step takes
    assert config.data.batch_size * config.data.min_seconds >= config.data.batch_seconds


@pytest.mark.parametrize("name", SPEECH)
def test_a_speech_recipes_model_has_the_parameters_and_norms_of_its_size(name: str) -> None:
    norm, size, hours = speech_parts(name)
    config = recipe(name)
    build = load_task(config.task_name).models[config.model_name].build
    with torch.device("meta"):
        built = build(config.model, norm=build_norm(config), data=info("librispeech"))
    pretrain, ctc, norms = SPEECH_COUNTS[size]
    made: list[Any] = [module.norm_name for _, module in norm_modules(built)]
    assert sorted(made) == sorted(["groupnorm", "layernorm", *[norm] * norms])
    count = (pretrain if hours is None else ctc) + norms * EXTRA_A_NORM[norm]
    assert sum(p.numel() for p in built.parameters()) == count


@pytest.mark.parametrize("name", [n for n in SPEECH if not n.startswith("layernorm")])
def test_a_speech_recipe_differs_from_layernorms_in_the_norm_and_in_lines_that_say_so(
    name: str,
) -> None:
    base = f"layernorm_{name.partition('_')[2]}"
    keys = diff(recipe(base), recipe(name))
    assert {k for k in keys if k[:5] != "norm."} == {"recipe"} | replaced_keys(name)
    for key in replaced_keys(name):
        field = key.partition(".")[2]
        for shown in (base, name):
            text = sources.recipes()[shown].read_text(encoding="utf-8")
            (line,) = [x for x in text.splitlines() if x.strip().startswith(f"{field}:")]
            assert "Derf's" in line.partition("#")[2]


@pytest.mark.parametrize("name", CTC)
def test_a_fine_tuning_names_its_pre_training_whose_norms_stand_where_its_own_do(name: str) -> None:
    norm, size, _ = speech_parts(name)
    (start,) = (x for x in PRETRAIN if speech_parts(x)[:2] == (norm, size))
    assert any(f"recipe={start}." in line for line in lines(name))
    for field in ("pre_norm", "extractor", "conv_bias", "keep_sites", "dim", "depth"):
        assert value(recipe(start), f"model.{field}") == value(recipe(name), f"model.{field}")


def seconds_a_gpu(command: str) -> float:
    """Padded seconds of audio that a GPU takes at a time with a command."""
    config = load(shlex.split(command.partition(" -m suite.train ")[2])).settled
    gpus = config.trainer.devices * config.trainer.num_nodes
    return float(config.data.batch_seconds / (gpus * config.trainer.accumulate_grad_batches))


@pytest.mark.parametrize("name", SPEECH)
def test_a_speech_recipe_opens_with_commands_that_give_a_gpu_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, size, hours = speech_parts(name)
    one_machine, many = lines(name)[:2]
    assert one_machine.startswith(f"python -m suite.train recipe={name} ")
    assert " trainer.devices=8" in one_machine
    said, share = " ".join(lines(name)), seconds_a_gpu(one_machine)
    if hours is not None:
        assert " model.init_from=RUN " in one_machine
        assert f"here {share:g} a GPU at a time" in said
        return
    assert f"takes {PRETRAIN_OF_SIZE[size]['data.batch_seconds'] / 3600:.2f} hours of audio" in said
    assert f"a GPU takes {share:g} s at a time" in said
    for key, amount in {"LOCAL_WORLD_SIZE": 8, "WORLD_SIZE": 64, "GROUP_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(key, str(amount))
    assert many.startswith("torchrun --nnodes=8 --nproc_per_node=8 ")
    assert f" recipe={name} " in many
    assert seconds_a_gpu(many) == share


@pytest.mark.parametrize("name", PRETRAIN[:2] + CTC[:6:2])
def test_8_and_64_gpus_train_on_the_same_clips_in_an_update(name: str) -> None:
    data = recipe(name).data
    longest = data.crop_seconds or 24.5
    seconds = np.random.default_rng(0).uniform(2.0, longest, size=4_000)
    buckets = LengthBuckets(
        (seconds * 16_000).astype(np.int64),
        budget=data.batch_seconds * 16_000,
        max_rows=data.batch_size,
        seed=0,
    )

    def update(gpus: int, accumulate: int) -> list[int]:
        found: list[int] = []
        for rank in range(gpus):
            dealt = iter(
                BucketSampler(
                    buckets,
                    accumulate=accumulate,
                    rank=rank,
                    world_size=gpus,
                    limit=None,
                    position=lambda: 0,
                )
            )
            batches = [next(dealt) for _ in range(accumulate)]
            found += [i for batch in batches for i in batch.indices[: batch.valid]]
        return sorted(found)

    first = update(8, 8)
    assert first == update(64, 1) == sorted(buckets.epoch(0)[0])
    assert len(first) * seconds[first].max() <= data.batch_seconds


@pytest.mark.parametrize("name", SPEECH)
def test_a_speech_recipe_says_what_was_published_and_that_it_was_not_run(name: str) -> None:
    norm, size, hours = speech_parts(name)
    if hours is None:
        paper = "2512.10938" if norm == "derf" else "2503.10622"
        figure = f"{LOSS[norm][size]} validation loss (arXiv {paper})"
        said = " ".join(lines(name))
        assert "is not stated by the papers" in said
        assert 'val/total_bits is fairseq\'s "loss", val/bits its "loss_0"' in said
    else:
        figure = WER.get(name, "none published")
    opening = sources.opening(sources.recipes()[name])
    assert f"Expected: {figure}. Not yet run." in opening


@pytest.mark.parametrize("name", DNA)
def test_a_dna_recipes_numbers_are_the_published_ones(name: str) -> None:
    norm, kind = dna_parts(name)
    config = recipe(name)
    own = {**HG38_COMMON, **HG38_OF[kind]} if name in HG38 else GENOMIC_COMMON | GENOMIC_OF[kind]
    wanted = {**DNA_COMMON, **DNA_MODEL[kind], **own, **OF_NORM.get(norm, {}), "norm.name": norm}
    assert {key: value(config, key) for key in wanted} == wanted
    if name in HG38:
        assert config.optim.warmup_scale * config.optim.lr == pytest.approx(1e-6, rel=1e-4)
    else:
        assert config.optim.min_lr == pytest.approx(0.1 * config.optim.lr)


@pytest.mark.parametrize("name", DNA)
def test_a_dna_recipes_model_has_the_parameters_and_norms_of_its_size(name: str) -> None:
    norm, kind = dna_parts(name)
    config = recipe(name)
    build = load_task(config.task_name).models[config.model_name].build
    with torch.device("meta"):
        built = build(
            config.model,
            norm=build_norm(config),
            data=info("x", classes=2, extra={"length": config.model.l_max})
            if kind == "hyenadna"
            else info("x", classes=2),
        )
    made: list[Any] = [module.norm_name for _, module in norm_modules(built)]
    assert made == [norm] * DNA_COUNTS[kind][2]
    assert sum(p.numel() for p in built.parameters()) == dna_count(name)


@pytest.mark.parametrize("name", [n for n in DNA if dna_parts(n)[0] in ("dyt", "derf")])
def test_a_dna_recipe_differs_from_that_of_the_models_own_norm_in_the_norm_alone(name: str) -> None:
    base = f"{DNA_NORMS[dna_parts(name)[1]][0]}_{name.partition('_')[2]}"
    assert {k for k in diff(recipe(base), recipe(name)) if k[:5] != "norm."} == {"recipe"}


@pytest.mark.parametrize("name", GENOMIC)
def test_a_dna_fine_tuning_names_the_pre_training_of_its_very_model(name: str) -> None:
    start = name.replace("genomic_benchmarks", "hg38")
    assert f"recipe={start}." in " ".join(lines(name))
    keys = {k for k in diff(recipe(start), recipe(name)) if k.startswith(("model.", "norm."))}
    assert keys == set()


@pytest.mark.parametrize("name", DNA)
def test_a_dna_recipe_opens_with_commands_that_load_and_says_what_was_published(name: str) -> None:
    norm, kind = dna_parts(name)
    start = f"python -m suite.train recipe={name} "
    commands = [line for line in lines(name) if line.startswith("python -m suite.train")]
    assert all(line.startswith(start) for line in commands)
    for line in commands:
        config = load(shlex.split(line.removeprefix("python -m suite.train "))).settled
        if name in HG38:
            shares = config.trainer.devices * config.trainer.accumulate_grad_batches
            assert config.data.batch_size / shares == 128
        else:
            assert (config.model.init_from, config.data.task) == ("RUN", "human_nontata_promoters")
    assert len(commands) == (2 if name in HG38 else 1)
    mean = GENOMIC_MEAN.get((kind, norm)) if name in GENOMIC else None
    figure = "none published" if mean is None else f"{mean[0]} % mean top-1 (arXiv {mean[1]})"
    assert f"Expected: {figure}. Not yet run." in sources.opening(sources.recipes()[name])


PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def rows(names: list[str]) -> dict[str, list[str]]:
    """Name -> cells of each line of the page's tables that is about a recipe."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].strip("`") in names:
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_the_commands_of_the_page_on_recipes_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "python -m suite.train "
    commands = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(start)]
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"evaluate=(\S+)", "\n".join(commands)):
        (tmp_path / file).touch()
    assert {"vision", "speech", "dna", "language"} == {
        load(shlex.split(line.removeprefix(start), comments=True)).settled.task_name.split("/")[0]
        for line in commands
    }


def test_the_page_on_recipes_has_every_recipe_with_its_figure() -> None:
    found = rows(NAMES)
    assert set(found) == set(NAMES)
    for name, cells in found.items():
        norm, model = parts(name)
        assert cells[0] == TOP1[norm].get(model, "none published")
        assert cells[1] == str(DROP_PATH[norm][model])
        count, norms = SIZES[model]
        assert cells[2] == f"{count + norms * EXTRA_A_NORM[norm]:,}"
        assert cells[-1] == "not yet run"


def test_the_page_on_recipes_has_every_speech_recipe_with_its_figure() -> None:
    found = rows(SPEECH)
    assert set(found) == set(SPEECH)
    for name, cells in found.items():
        norm, size, hours = speech_parts(name)
        pretrain, ctc, norms = SPEECH_COUNTS[size]
        layers = "pre-norm" if PRE_NORM[norm][size] else "post-norm"
        if hours is None:
            shown = [LOSS[norm][size], layers, PRECISION[norm]]
        else:
            shown = [WER.get(name, "none published").replace(" % WER", ""), layers]
        count = (pretrain if hours is None else ctc) + norms * EXTRA_A_NORM[norm]
        assert cells == [*shown, f"{count:,}", "not yet run"]


def test_the_page_on_recipes_has_every_dna_recipe_with_its_figure() -> None:
    found = rows(DNA)
    assert set(found) == set(DNA)
    for name, cells in found.items():
        norm, kind = dna_parts(name)
        mean = GENOMIC_MEAN.get((kind, norm)) if name in GENOMIC else None
        assert cells[0] == ("none published" if mean is None else mean[0])
        lr, own = ("6e-4", "8e-3") if name in HG38 else ("6e-4", "1e-3 or 2e-3")
        if name in HG38:
            model = DNA_MODEL[kind]
            assert cells[1] == f"{model['model.depth']} x {model['model.dim']}"
            inside = "in the network" if kind == "caduceus_ps" else "by augmentation"
            assert cells[3] == inside
        assert cells[-3 if name in GENOMIC else 2] == (lr if kind == "hyenadna" else own)
        assert cells[-2:] == [f"{dna_count(name):,}", "not yet run"]


def test_the_sweeps_of_the_page_run_every_task_with_its_rate_and_length() -> None:
    start = "python -m suite.sweep recipe="
    commands = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(start)]
    found: dict[str, dict[tuple[str, int], tuple[float, float, int]]] = {}
    folders: set[str] = set()
    for line in commands:
        words, _, out = line.partition(" --out ")
        if "genomic_benchmarks " not in words:
            continue
        assert out not in folders
        folders.add(out)
        for cell in plan_cells(parse_tokens(shlex.split(words)[3:]), resolve=resolve_config):
            config = cell.config
            key = (config["data"]["task"], config["seed"])
            runs = found.setdefault(config["recipe"], {})
            assert key not in runs
            rates = (config["optim"]["lr"], config["optim"]["min_lr"])
            runs[key] = (*rates, config["data"]["max_length"])
    rates = {"derf_hyenadna": dict.fromkeys(PS_LR, 6e-4), "derf_caduceus_ps": PS_LR}
    assert set(found) == {f"{name}_genomic_benchmarks" for name in rates}
    for name, by_task in rates.items():
        wanted = {
            (task, seed): (lr, pytest.approx(0.1 * lr), 1024 if "mouse" in task else 512)
            for task, lr in by_task.items()
            for seed in range(5)
        }
        assert found[f"{name}_genomic_benchmarks"] == wanted


def test_windows_that_gpus_take_at_a_time_add_up_to_the_batch_of_dna() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("windows of 1,024 bases at a time |")[2]
    table = text.partition("\n\n")[0]
    found = re.findall(r"^\| (\d+)[^|]* \| (\d+) \| (\d+)[^|]* \|$", table, flags=re.M)
    assert len(found) == 7
    assert {int(gpus) * int(steps) * int(share) for gpus, steps, share in found} == {1024}


def test_what_gpus_take_at_a_time_adds_up_to_the_batch() -> None:
    shares = [r"(\d+) \| ([\d.]+)"] * 2 + [r"([\d.-]+) \| ([\d.-]+)"]
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+) \| " + r" \| ".join(shares) + r" \|$", text, flags=re.M)
    assert len(found) == 8
    for gpus, *cells in found:
        for i, total in enumerate((5600, 9600, 1600)):
            accumulate, seconds = cells[2 * i : 2 * i + 2]
            if accumulate != "-":
                assert int(gpus) * int(accumulate) * float(seconds) == total


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
