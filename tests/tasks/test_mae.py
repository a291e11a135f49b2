"""Masked autoencoder: what is hidden, what is asked for, and what reaches the encoder, each against
a plain reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_run import crash_at, main, one_line, result, rows
from test_run import weights as last_weights
from torch import Tensor

from suite.config import load
from suite.data import DataInfo, DataOptions
from suite.errors import ConfigError
from suite.norms import make_norm, norm_modules
from suite.optim import parameter_groups
from tasks.vision import mae
from tasks.vision.fashion_mnist import build_mini
from tasks.vision.mae import MaeTaskOptions, Pretrain, patch_loss
from tasks.vision.mae_model import (
    MODELS,
    TINY,
    MaeOptions,
    MaskedAutoencoder,
    build_mae,
    sincos_positions,
)
from tasks.vision.patches import patchify, unpatchify
from tasks.vision.vit import ViTOptions

pytestmark = pytest.mark.vision

SMALL = {
    "image_size": 12,
    "patch_size": 4,
    "in_chans": 2,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "decoder_dim": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
PATCHES, SEEN = 9, 2  # of SMALL, of which 0.75 are hidden


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(norm: str = "layernorm", **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(norm=make_norm(norm), **{**SMALL, **changes})


def shuffled(norm: str = "layernorm", **changes: Any) -> MaskedAutoencoder:
    """In float64, with every trained parameter off its first value."""
    model = small(norm, **changes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * step)
    return model.eval()


def pictures(count: int = 3, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def noise(count: int = 3, *, seed: int = 3) -> Tensor:
    return torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(seed))


def info(**changes: Any) -> DataInfo:
    extra = {"image_size": 12, "in_chans": 2, "mean": [0.0] * 2, "std": [1.0] * 2}
    made = DataInfo("pictures", "", "", "", True, {"train": 3}, classes=10, extra=extra)
    return dataclasses.replace(made, **changes)


def module(model: MaskedAutoencoder, *, padded: bool = False, **options: Any) -> Pretrain:
    return Pretrain(
        model,
        options=MaeTaskOptions(**options),
        info=info(),
        optim=load(["task=vision/mae"]).settled.optim,
        identity={},
        seed=5,
        nominal=3,
        padded=padded,
    )


def batch(count: int = 3, *, epoch: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "image": pictures(count, dtype=dtype),
        "label": torch.zeros(count, dtype=torch.int64),
        "sample_id": torch.arange(count),
        "epoch": torch.full((count,), epoch),
        "valid": torch.ones(count, dtype=torch.bool),
    }


# --- the reference: one image at a time, one patch at a time --------------------------------------


def plain_norm(x: Tensor, layer: Any) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * layer.weight + layer.bias


def plain_block(x_TC: Tensor, block: Any) -> Tensor:
    heads, dim = block.attn.heads, x_TC.shape[1]
    size = dim // heads
    mixed = plain_norm(x_TC, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = mixed[:, :dim], mixed[:, dim : 2 * dim], mixed[:, 2 * dim :]
    parts = []
    for h in range(heads):
        of = slice(h * size, (h + 1) * size)
        weight = (q[:, of] @ k[:, of].T / math.sqrt(size)).softmax(-1)
        parts.append(weight @ v[:, of])
    x_TC = x_TC + torch.cat(parts, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = plain_norm(x_TC, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x_TC + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def plain_patches(image_CHW: Tensor, size: int) -> list[Tensor]:
    """Of each patch [row, column, channel], row by row of the image."""
    side = image_CHW.shape[-1] // size
    cut = [
        image_CHW[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
        for r in range(side)
        for c in range(side)
    ]
    return [patch.permute(1, 2, 0) for patch in cut]


def plain_loss(
    model: Any, image: Tensor, noise_BN: Tensor, *, keep: int, norm_pix: bool
) -> tuple[Tensor, int]:
    """(sum over hidden patches of the mean squared error, their number)."""
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    total, count = image.new_zeros(()), 0
    for picture, numbers in zip(image, noise_BN.tolist(), strict=True):
        patches = plain_patches(picture, model.patch_size)
        seen = sorted(range(len(patches)), key=lambda n: numbers[n])[:keep]
        tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        for n in seen:
            pixels = patches[n].permute(2, 0, 1)
            token = torch.stack([(pixels * kernel).sum() for kernel in weight]) + bias
            tokens.append(token + model.pos_embed[0, 1 + n])
        x_TC = torch.stack(tokens)
        for block in model.blocks:
            x_TC = plain_block(x_TC, block)
        x_TC = plain_norm(x_TC, model.norm)
        x_TC = x_TC @ model.decoder_embed.weight.T + model.decoder_embed.bias
        filled = [x_TC[0] + model.decoder_pos_embed[0, 0]]
        for n in range(len(patches)):
            token = x_TC[1 + seen.index(n)] if n in seen else model.mask_token[0, 0]
            filled.append(token + model.decoder_pos_embed[0, 1 + n])
        y_TC = torch.stack(filled)
        for block in model.decoder_blocks:
            y_TC = plain_block(y_TC, block)
        y_TC = plain_norm(y_TC, model.decoder_norm)
        drawn = y_TC @ model.decoder_pred.weight.T + model.decoder_pred.bias
        for n, patch in enumerate(patches):
            if n in seen:
                continue
            target = patch.flatten()
            if norm_pix:
                away = target - target.sum() / len(target)
                target = away / (away.square().sum() / (len(target) - 1) + 1e-6).sqrt()
            total = total + (drawn[1 + n] - target).square().sum() / len(target)
            count += 1
    return total, count


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_all_gradients_are_those_of_a_plain_reference(norm_pix: bool) -> None:
    task, given = module(shuffled(), norm_pix_loss=norm_pix), batch()
    out = task.step(given, "train")
    out.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.requires_grad}
    task.model.zero_grad()
    noise_BN = task.noise(given["sample_id"], given["epoch"], "train")
    total, count = plain_loss(task.model, given["image"], noise_BN, keep=SEEN, norm_pix=norm_pix)
    total.backward()
    torch.testing.assert_close(out.loss_sum, total, rtol=1e-10, atol=1e-10)
    assert int(out.count) == count == 3 * (PATCHES - SEEN)
    assert len(found) > 40
    assert {n.partition(".")[0] for n in found} >= {"cls_token", "mask_token"}
    for name, gradient in found.items():
        wanted = task.model.get_parameter(name).grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10, msg=name)
        assert gradient.abs().max() > 0, name


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "seen"),
    [(28, 4, 0.75, 12), (224, 16, 0.75, 49), (224, 16, 0.6, 78), (12, 4, 0.5, 4)],
)
def test_the_published_number_of_patches_stays_visible(
    size: int, patch: int, ratio: float, seen: int
) -> None:
    model = small(image_size=size, patch_size=patch)
    assert model.visible(ratio) == seen
    noise_BN = torch.rand(2, model.patches)
    with torch.no_grad():
        predicted, masked = model(torch.randn(2, 2, size, size), noise_BN, mask_ratio=ratio)
    assert predicted.shape == (2, model.patches, patch * patch * 2)
    assert (~masked).sum(1).tolist() == [seen, seen]
    threshold = noise_BN.sort(dim=1).values[:, seen - 1 : seen]
    assert torch.equal(masked, noise_BN > threshold)


def test_the_order_of_the_visible_patches_does_not_matter() -> None:
    model, image, noise_BN = shuffled(), pictures(), noise()
    order = noise_BN.argsort(dim=1)
    other = noise_BN.clone()
    for row, places in enumerate(order):  # the visible ones swap their numbers, so do two others
        first, second, third, fourth = places[0], places[1], places[4], places[6]
        other[row, first], other[row, second] = noise_BN[row, second], noise_BN[row, first]
        other[row, third], other[row, fourth] = noise_BN[row, fourth], noise_BN[row, third]
    one, other = (model(image, n, mask_ratio=0.75) for n in (noise_BN, other))
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(one[1], other[1])


def test_pixels_of_hidden_patches_never_reach_the_encoder() -> None:
    model, image, noise_BN = shuffled(), pictures(), noise()
    predicted, masked = model(image, noise_BN, mask_ratio=0.75)
    patches = patchify(image, 4)
    filled = torch.full_like(patches, 100.0).where(masked.unsqueeze(-1), patches)
    changed = unpatchify(filled, 4, 2)
    seen_BV = noise_BN.argsort(dim=1)[:, :SEEN]
    tokens = [model.encode(i, seen_BV=seen_BV) for i in (image, changed)]
    assert torch.equal(*tokens)
    assert torch.equal(model(changed, noise_BN, mask_ratio=0.75)[0], predicted)
    at_seen = torch.full_like(patches, 100.0).where(~masked.unsqueeze(-1), patches)
    moved = model.encode(unpatchify(at_seen, 4, 2), seen_BV=seen_BV)
    assert not torch.allclose(moved, tokens[0])


def test_what_the_decoder_draws_of_visible_patches_costs_nothing() -> None:
    task, given = module(shuffled()), batch()
    noise_BN = task.noise(given["sample_id"], given["epoch"], "val")
    predicted, masked = task.model(given["image"], noise_BN, mask_ratio=0.75)
    drawn = predicted.detach().clone()
    wrong = torch.where(masked.unsqueeze(-1), drawn, math.nan)
    off = torch.where(masked.unsqueeze(-1), drawn + 1, drawn)
    plain = float(task.step(given, "val").loss_sum.detach())
    sums = []
    for answer in (drawn, wrong, off):
        task.model.forward = lambda *a, answer=answer, **k: (answer, masked)  # type: ignore
        sums.append(float(task.step(given, "val").loss_sum))
    assert sums[0] == sums[1] == pytest.approx(plain)
    assert sums[2] > sums[0]


def test_masks_follow_seed_epoch_and_image_in_training_and_the_image_alone_in_evaluation() -> None:
    task, ids = module(small()), torch.arange(4)
    epochs = [torch.full((4,), e) for e in (0, 1)]
    first, later = (task.noise(ids, e, "train") for e in epochs)
    assert torch.equal(first, task.noise(ids, epochs[0], "train"))
    assert not torch.equal(first, later)
    assert len({tuple(row.argsort().tolist()) for row in first}) > 1
    assert torch.equal(first[2:], task.noise(ids[2:], epochs[0][2:], "train"))
    val, test = (task.noise(ids, epochs[0], s) for s in ("val", "test"))  # type: ignore[arg-type]
    task.seed = 6
    assert not torch.equal(first, task.noise(ids, epochs[0], "train"))
    assert torch.equal(val, task.noise(ids, epochs[0], "val"))
    assert not torch.equal(val, test)


# --- the loss -------------------------------------------------------------------------------------


def test_a_perfect_answer_costs_nothing_and_a_constant_patch_stays_finite() -> None:
    image = pictures(dtype=torch.float32)
    image[0] = 0.25
    target = patchify(image, 4)
    assert torch.equal(
        patch_loss(target, image, patch_size=4, norm_pix=False), torch.zeros(3, PATCHES)
    )
    mean, var = target.double().mean(-1, keepdim=True), target.double().var(-1, keepdim=True)
    wanted = ((target - mean) / (var + 1e-6).sqrt()).float()
    loss = patch_loss(wanted, image, patch_size=4, norm_pix=True)
    assert torch.isfinite(loss).all()
    assert float(loss.max()) < 1e-10
    zeros = patch_loss(torch.zeros_like(target), image, patch_size=4, norm_pix=True)
    values = SMALL["patch_size"] ** 2 * SMALL["in_chans"]  # an unbiased variance of 1
    torch.testing.assert_close(zeros[1:], torch.full((2, PATCHES), (values - 1) / values))


@pytest.mark.parametrize("norm", ["layernorm", "dyt", "batchnorm"])
def test_padding_rows_count_for_nothing(norm: str) -> None:
    found = []
    for size in (3, 5):
        task, given = module(shuffled(norm).train(), padded=True), batch(5)
        if norm == "batchnorm":
            given["image"][3:] = given["image"][:2] * 50
        else:
            given["image"][3:] = math.nan
        given["valid"][3:] = False
        out = task.step({key: value[:size] for key, value in given.items()}, "train")
        found.append(out)
    torch.testing.assert_close(found[0].loss_sum, found[1].loss_sum, rtol=1e-9, atol=1e-9)
    assert int(found[0].count) == int(found[1].count) == 3 * (PATCHES - SEEN)
    assert int(found[1].units) == 3  # type: ignore[arg-type]


def test_bf16_keeps_the_loss_in_float32_near_that_of_float32() -> None:
    torch.manual_seed(0)
    sums = {}
    for kind in ("float32", "autocast", "bf16"):
        model = small("dyt")
        given = batch(dtype=torch.float32)
        if kind == "bf16":
            model = model.bfloat16()
            given["image"] = given["image"].bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = module(model).step(given, "train")
        assert out.loss_sum.dtype == torch.float32
        out.loss_sum.backward()
        gradient = model.patch_embed.proj.weight.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        sums[kind] = float(out.loss_sum.detach())
    assert sums["autocast"] == pytest.approx(sums["float32"], rel=0.02)
    assert sums["bf16"] == pytest.approx(sums["float32"], rel=0.02)


# --- patches, positions, norms, first weights -----------------------------------------------------


def test_patches_are_row_column_channel_and_come_back() -> None:
    image = pictures()
    patches = patchify(image, 4)
    for b in range(3):
        plain = torch.stack([p.flatten() for p in plain_patches(image[b], 4)])
        assert torch.equal(patches[b], plain)
    assert torch.equal(unpatchify(patches, 4, 2), image)
    with pytest.raises(ValueError, match="patch_size must divide"):
        patchify(image, 5)
    with pytest.raises(ValueError, match="fill a square, got 8"):
        unpatchify(patches[:, :8], 4, 2)
    with pytest.raises(ValueError, match="48 values a patch"):
        unpatchify(patches, 4, 3)


@pytest.mark.parametrize(("dim", "side", "extra"), [(16, 3, 1), (8, 5, 0), (768, 14, 1)])
def test_positions_are_the_published_sines_and_cosines(dim: int, side: int, extra: int) -> None:
    found = sincos_positions(dim, side=side, extra=extra)[0].numpy()
    quarter = dim // 4
    wanted = np.zeros((extra + side * side, dim))
    for row in range(side):
        for column in range(side):
            for axis, place in enumerate((column, row)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    at = axis * 2 * quarter + i
                    wanted[extra + row * side + column, at] = math.sin(angle)
                    wanted[extra + row * side + column, at + quarter] = math.cos(angle)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_positions_are_not_trained_and_both_tokens_are_decayed() -> None:
    model = small()
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["pos_embed", "decoder_pos_embed"]
    groups = parameter_groups(model, weight_decay=0.05, decay_norm=False, lr=1.0)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    held = {id(p) for g in groups for p in g["params"]}
    assert {id(model.cls_token), id(model.mask_token)} <= decayed
    assert not {id(model.pos_embed), id(model.decoder_pos_embed)} & held


def test_layers_run_from_the_embedding_to_the_decoders_head() -> None:
    model = small()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["patch_embed.proj.bias"] == layers["cls_token"] == 0
    assert (layers["blocks.1.mlp.fc1.weight"], layers["norm.weight"]) == (2, 3)
    assert layers["mask_token"] == layers["decoder_embed.weight"] == 3
    assert layers["decoder_blocks.0.norm1.weight"] == 4
    assert layers["decoder_pred.bias"] == layers["decoder_norm.bias"] == max(layers.values()) == 5


@pytest.mark.parametrize(("name", "count"), [("mae_vit_base", 42), ("mae_vit_large", 66)])
def test_all_norms_of_the_published_models_are_the_chosen_one(name: str, count: int) -> None:
    data = info(extra={"image_size": 224, "in_chans": 3})
    with torch.device("meta"):
        model = build_mae(MODELS[name].options, norm=make_norm("dyt"), data=data)
    found = list(norm_modules(model))
    assert len(found) == count
    assert {norm.norm_name for _, norm in found} == {"dyt"}  # type: ignore[union-attr]
    assert sorted({norm.site for _, norm in found}) == ["attn", "ffn", "final"]  # type: ignore
    assert not [m for m in model.modules() if type(m).__name__ == "LayerNorm"]


def test_first_weights_are_the_published_ones() -> None:
    model = small(dim=64, decoder_dim=32, image_size=24)
    proj = model.patch_embed.proj.weight
    bound = math.sqrt(6 / (proj[0].numel() + 64))  # as of a linear layer
    assert 0.95 * bound < float(proj.detach().abs().max()) <= bound
    qkv = model.blocks[0].attn.qkv  # type: ignore[union-attr]
    bound = math.sqrt(6 / (64 + 192))
    assert 0.95 * bound < float(qkv.weight.detach().abs().max()) <= bound  # type: ignore[union-attr]
    assert not qkv.bias.any()
    assert not model.decoder_pred.bias.any()
    assert 0.012 < float(model.cls_token.detach().std()) < 0.03
    assert 0.01 < float(model.mask_token.detach().std()) < 0.03


def test_features_are_the_mean_over_the_patch_tokens() -> None:
    model, image = shuffled(), pictures()
    tokens = model.encode(image)
    assert tokens.shape == (3, 1 + PATCHES, 16)
    torch.testing.assert_close(model.features(image), tokens[:, 1:].sum(1) / PATCHES)
    bare = shuffled(class_token=False)
    assert bare.encode(image).shape == (3, PATCHES, 16)
    torch.testing.assert_close(bare.features(image), bare.encode(image).mean(1))
    assert bare(image, noise(), mask_ratio=0.75)[0].shape == (3, PATCHES, 32)


# --- probes ---------------------------------------------------------------------------------------


class Random:
    """A split of images of noise that notes what is read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, list[list[int]]()

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        self.read.append(indices)
        generator = torch.Generator().manual_seed(sum(indices))
        image = torch.randn(len(indices), 2, 12, 12, generator=generator)
        return {"image": image, "label": torch.tensor(indices) % 2}


def in_test(sizes: tuple[int, int, int], *, world: int = 1, rank: int = 0, **data: Any) -> Any:
    """A task in a test of made-up images, as the process `rank` of `world`."""
    splits = dict(zip(("train", "val", "test"), map(Random, sizes), strict=True))
    task: Any = module(small(), pictures=0)
    held = SimpleNamespace(
        splits=SimpleNamespace(**splits), options=DataOptions(**data), limits={"test": None}
    )
    task._trainer = SimpleNamespace(
        datamodule=held,
        world_size=world,
        global_rank=rank,
        precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext),
    )
    return task


def test_a_process_reads_its_share_of_the_evaluation_batch_at_a_time() -> None:
    task = in_test((24, 1, 1), world=4, rank=1, batch_size=64, eval_batch_size=8)
    assert task._rows("train", task._features).label.tolist() == [1] * 6
    assert task._data.splits.train.read == [[1, 5], [9, 13], [17, 21]]
    task = in_test((24, 1, 1), world=4, rank=1, batch_size=12)
    task._rows("train", task._features)
    assert task._data.splits.train.read == [[1, 5, 9], [13, 17, 21]]


def test_data_without_training_images_is_tested_and_not_probed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, values = in_test((0, 4, 4)), {"test/loss": 1.0}
    task.after_evaluation("test", values)
    assert values == {"test/loss": 1.0}
    said = "note: no probe: data=pictures has no training images to compare with"
    assert said in capsys.readouterr().err


def test_neighbours_are_sought_without_reading_the_validation_images() -> None:
    task, values = in_test((12, 4, 4)), {"test/loss": 1.0}
    task.options = MaeTaskOptions(pictures=0, probe="knn")
    task.after_evaluation("test", values)
    assert set(values) == {"test/loss", "test/knn_acc", "test/knn_acc_pixels"}
    assert task._data.splits.val.read == []
    assert task._data.splits.train.read == [list(range(12))] * 2  # features, and pixels


def test_features_that_do_not_fit_cost_the_linear_probe_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(mae, "linear_accuracy", full)
    task, values = in_test((12, 4, 4)), {"test/loss": 1.0}
    task.after_evaluation("test", values)
    assert set(values) == {"test/loss", "test/knn_acc", "test/knn_acc_pixels"}
    assert "task.probe=knn, or task.probe=none" in capsys.readouterr().err


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"image_size": 30},
        {"image_size": 16},
        {"patch_size": -1},
        {"in_chans": 0},
        {"dim": 770},
        {"dim": 6, "heads": 1},
        {"depth": 0},
        {"heads": 0},
        {"mlp_ratio": math.inf},
        {"mlp_ratio": 0.0},
        {"decoder_dim": 510},
        {"decoder_depth": 0},
        {"decoder_heads": 0},
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must .* got"):
        MaeOptions(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"probe": "all"}, {"knn": 0}]
)
def test_a_wrong_task_option_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must .* got"):
        MaeTaskOptions(**wrong)
    with pytest.raises(ValueError, match=r"^pictures must not be negative, got -1"):
        MaeTaskOptions(pictures=-1)


def test_a_ratio_that_leaves_nothing_to_see_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.mask_ratio=0\.95: of 9 patches 0 would stay"):
        module(small(), mask_ratio=0.95)
    with pytest.raises(ConfigError, match=r"task\.norm_pix_loss=true: a patch of one value"):
        module(small(patch_size=1, in_chans=1))


def test_images_of_another_size_are_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"Set model\.image_size=12 model\.in_chans=2, or"):
        build_mae(TINY, norm=make_norm("dyt"), data=info())
    for size in (1, 2, 7, 16, 20, 224):
        with pytest.raises(ConfigError, match="Set model") as error:
            build_mae(
                MaeOptions(patch_size=16),
                norm=make_norm("dyt"),
                data=info(extra={"image_size": size, "in_chans": 1}),
            )
        changes = dict(re.findall(r"model\.(\w+)=(\d+)", str(error.value)))
        if size > 1:  # what it says to set can be set
            MaeOptions(**{name: int(value) for name, value in changes.items()})
    with pytest.raises(ConfigError, match="has no images"):
        build_mae(TINY, norm=make_norm("dyt"), data=info(extra={}))


# --- whole runs -----------------------------------------------------------------------------------

RUN = [
    "task=vision/mae",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "model.patch_size=7",
    "data.batch_size=64",
    "optim.lr=1e-3",
    "optim.warmup_fraction=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=2",
    "run.tensorboard=false",
    "run.norm_stats=false",
]


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped images, but only the first of each split, so that probes take no time."""
    import tasks.vision.data as table

    def build(options: Any, *, seed: int) -> Any:
        splits = build_mini(options, seed=seed)
        for name, count in (("train", 256), ("val", 64), ("test", 64)):
            part: Any = getattr(splits, name)
            part.images, part.labels = part.images[:count], part.labels[:count]
        return splits

    shipped = table.DATA["fashion_mnist_mini"]
    monkeypatch.setitem(table.DATA, "fashion_mnist_mini", dataclasses.replace(shipped, build=build))


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_run_says_what_pre_training_gave_and_draws_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "run.dir=a", "norm=dyt"]) == 0
    said, found = capsys.readouterr().err, result("a")
    assert (found["status"], found["primary"]["name"]) == ("done", "loss")
    assert found["primary"]["test"] == found["metrics"]["test/loss"]
    assert found["throughput"]["unit"] == "images"
    m = found["metrics"]
    names = ("knn_acc", "knn_acc_untrained", "knn_acc_pixels", "linear_acc", "linear_acc_untrained")
    for name in names:
        assert 0 <= m[f"test/{name}"] <= 1
    assert m["test/knn_acc_pixels"] > 0.4
    assert m["test/count"] == 64 * 12  # of 16 patches 4 stay visible
    assert f"test accuracy {m['test/knn_acc']:.4f} (untrained network" in said
    assert Path("a/reconstructions.png").read_bytes()[:4] == b"\x89PNG"
    train = [row["train/loss"] for row in rows("a") if "train/loss" in row]
    assert train[-1] < train[0]


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_resumed_run_still_knows_the_untrained_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "run.dir=a"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        assert main([*RUN, "run.dir=b", "run.save_every_n_steps=2"]) == 1
    assert main(["run.resume=b"]) == 0
    content = torch.load("b/checkpoints/last.ckpt", weights_only=True)
    untrained = content["suite_untrained"]
    assert set(untrained) == {"knn_acc", "linear_acc", "linear_penalty"}
    m = result("b")["metrics"]
    assert m["test/knn_acc_untrained"] == pytest.approx(untrained["knn_acc"])
    whole = result("a")["metrics"]
    assert {k: v for k, v in m.items() if "acc" in k} == {
        k: v for k, v in whole.items() if "acc" in k
    }
    capsys.readouterr()
    assert main(["evaluate=a"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test/knn_acc"] == pytest.approx(whole["test/knn_acc"])
    assert printed["test/loss"] == pytest.approx(whole["test/loss"], rel=1e-5)
    assert "test/knn_acc_untrained" not in printed  # nobody measured it in this process


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_part_of_the_test_split_is_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "run.dir=a", "trainer.limit_test_batches=1", "task.pictures=0"]) == 0
    assert not [name for name in result("a")["metrics"] if "knn" in name or "linear" in name]
    assert not Path("a/reconstructions.png").exists()
    assert "note: no probe: trainer.limit_test_batches" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_classifier_starts_from_a_pre_trained_encoder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ViTOptions(dim=16, depth=1, heads=2, patch_size=7, image_size=28, in_chans=1)
    shape = [
        f"model.{key}={getattr(options, key)}"
        for key in ("dim", "depth", "heads", "patch_size", "image_size", "in_chans")
    ]
    tune = [
        "task=vision/classify",
        "model=vit_fmnist",
        *shape,
        "model.class_token=true",
        "model.head_std=2e-5",
        *[token for token in RUN if not token.startswith(("task=", "model."))],
        "optim.layer_decay=0.65",
        "trainer.max_steps=2",
    ]
    assert main([*RUN, "run.dir=a", "norm=dyt", "task.probe=none"]) == 0
    capsys.readouterr()
    assert main([*tune, "run.dir=b", "norm=dyt", "model.init_from=a", "optim.lr=1e-30"]) == 0
    said = capsys.readouterr().err
    assert "left out of the masked autoencoder: mask_token, decoder_pos_embed" in said
    assert "starts fresh: fc_norm, head" in said
    before, after = last_weights("a"), last_weights("b")
    shared = [name for name in after if ".blocks." in name or "patch_embed" in name]
    assert len(shared) > 10
    for name in shared:
        torch.testing.assert_close(after[name], before[name])
    assert float(after["model.head.weight"].std()) < 1e-4
    assert main([*tune, "run.dir=c", "norm=layernorm", "model.init_from=a"]) == 2
    line = one_line(capsys)
    assert "dyt" in line
    assert "layernorm" in line
    across = ["norm=layernorm", "model.init_from=a", "model.init_across_norms=true"]
    assert main([*tune, "run.dir=d", *across]) == 0
    said = capsys.readouterr().err
    assert "across norms:" in said
    assert "norm1.alpha" in said
    assert main([*RUN, "run.dir=e", "norm=dyt", "model.init_from=b"]) == 2
    assert "weights of a classifier" in one_line(capsys)
