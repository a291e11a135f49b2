"""Weights between masked autoencoders, published files and classifiers: what is kept, left out,
filled in, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_mae import info
from torch import Tensor

from suite.checkpoint import init_from, read_weights
from suite.errors import ConfigError
from suite.norms import make_norm
from tasks.vision.mae_model import MODELS, MaskedAutoencoder, build_mae
from tasks.vision.mae_weights import interpolated, is_encoder, to_mae, to_vit
from tasks.vision.vit import ViT, ViTOptions

pytestmark = pytest.mark.vision

ENCODER = {"image_size": 12, "patch_size": 4, "in_chans": 1, "dim": 16, "depth": 2, "heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def mae(norm: str = "layernorm", **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(1)
    model = MaskedAutoencoder(norm=make_norm(norm), **{**ENCODER, **DECODER, **changes})
    return shuffled(model)


def vit(norm: str = "layernorm", **changes: Any) -> ViT:
    torch.manual_seed(2)
    return ViT(norm=make_norm(norm), classes=5, **{**ENCODER, **changes})


def shuffled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def encoder_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FAIR's files without the decoder."""
    return {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}


def saved(path: Path, state: dict[str, Tensor]) -> str:
    """As FAIR's files: a dict with the weights under "model"."""
    torch.save({"model": state}, path)
    return str(path)


def load(model: Any, path: str, *, norm: str = "layernorm", across: bool = False) -> list[str]:
    return init_from(model, path, norm=make_norm(norm).describe(), across_norms=across)


def published_names(depth: int, decoder_depth: int) -> set[str]:
    """The names in FAIR's mae_pretrain_vit_*_full files, written out."""
    names = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_embed.bias",
        "decoder_norm.weight",
        "decoder_norm.bias",
        "decoder_pred.weight",
        "decoder_pred.bias",
    }
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for part, count in (("blocks", depth), ("decoder_blocks", decoder_depth)):
        for i in range(count):
            names |= {f"{part}.{i}.{layer}.{kind}" for layer in layers for kind in KINDS}
    return names


KINDS = ("weight", "bias")


# --- FAIR's layout --------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_published_vit_base() -> None:
    data = info(extra={"image_size": 224, "in_chans": 3})
    with torch.device("meta"):
        model = build_mae(MODELS["mae_vit_base"].options, norm=make_norm("layernorm"), data=data)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert set(shapes) == published_names(12, 8)
    for name, shape in {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.11.mlp.fc1.weight": (3072, 768),
        "decoder_embed.weight": (512, 768),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_blocks.7.mlp.fc2.weight": (512, 2048),
        "decoder_pred.weight": (768, 512),
    }.items():
        assert shapes[name] == shape


def test_a_published_file_with_a_decoder_loads_strictly(tmp_path: Path) -> None:
    source, target = mae(), mae(mlp_ratio=4.0)
    for parameter in target.parameters():
        parameter.data.zero_()
    assert set(source.state_dict()) == published_names(2, 1)
    notes = load(target, saved(tmp_path / "full.pth", source.state_dict()))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    assert "does not say its norm" in notes[-1]


def test_an_encoder_alone_starts_a_masked_autoencoder_with_a_fresh_decoder(tmp_path: Path) -> None:
    source, target = mae(), MaskedAutoencoder(norm=make_norm("layernorm"), **ENCODER, **DECODER)
    first = {k: v.clone() for k, v in target.state_dict().items()}
    path = saved(tmp_path / "encoder.pth", encoder_only(source.state_dict()))
    notes = load(target, path)
    for name, value in target.state_dict().items():
        old = first if name.startswith(("decoder_", "mask_token")) else source.state_dict()
        assert torch.equal(value, old[name]), name
    fresh = "mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm"
    assert f"the file has no decoder; starts fresh: {fresh}, decoder_pred" in notes
    with pytest.raises(ConfigError, match="no decoder, so that there is nothing to evaluate"):
        read_weights(target, Path(path), norm=make_norm("layernorm").describe(), key="evaluate")


def test_a_classifier_is_refused_by_a_masked_autoencoder(tmp_path: Path) -> None:
    for name, model in (("avg", vit()), ("cls", vit(pool="cls"))):
        path = saved(tmp_path / f"{name}.pth", model.state_dict())
        with pytest.raises(ConfigError, match="weights of a classifier, not of a masked") as error:
            load(mae(), path)
        assert "\n" not in str(error.value)


# --- into a classifier ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_decoder", [True, False])
def test_fine_tuning_keeps_the_encoder_and_starts_fc_norm_and_head_fresh(
    tmp_path: Path, with_decoder: bool
) -> None:
    source, target = mae().state_dict(), vit()
    first = {k: v.clone() for k, v in target.state_dict().items()}
    state = source if with_decoder else encoder_only(source)
    notes = load(target, saved(tmp_path / "mae.pth", state))
    for name, value in target.state_dict().items():
        old = first if name.startswith(("fc_norm", "head")) else source
        assert torch.equal(value, old[name]), name
    decoder = "mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm"
    listed = f"{decoder}, decoder_pred, norm" if with_decoder else "norm"
    assert f"left out of the masked autoencoder: {listed}" in notes
    assert "starts fresh: fc_norm, head" in notes


def test_pooling_by_the_class_token_keeps_the_encoders_norm(tmp_path: Path) -> None:
    source, target = mae(), vit(pool="cls")
    notes = load(target, saved(tmp_path / "mae.pth", encoder_only(source.state_dict())))
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert "starts fresh: head" in notes
    assert not [note for note in notes if note.startswith("left out")]


def test_a_fine_tuned_model_starts_from_the_features_of_pre_training(tmp_path: Path) -> None:
    source, target = mae().eval(), vit(pool="cls").eval()
    load(target, saved(tmp_path / "mae.pth", source.state_dict()))
    image = torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        x_BTC = target.embed(image)
        for block in target.blocks:
            x_BTC = block(x_BTC)
        torch.testing.assert_close(target.norm(x_BTC), source.encode(image))


def test_evaluation_of_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    for name, state in (("full", mae().state_dict()), ("half", encoder_only(mae().state_dict()))):
        path = Path(saved(tmp_path / f"{name}.pth", state))
        with pytest.raises(ConfigError, match="an encoder and no head, so that there is nothing"):
            read_weights(vit(), path, norm=make_norm("layernorm").describe(), key="evaluate")


@pytest.mark.parametrize("changes", [{}, {"pool": "cls"}, {"class_token": False}])
def test_files_of_classifiers_pass_untouched(changes: dict[str, Any], tmp_path: Path) -> None:
    state = shuffled(vit(**changes)).state_dict()
    for whole in (False, True):
        found, notes = vit(**changes).adapt(state, whole=whole)
        assert notes == []
        assert found.keys() == state.keys()
        assert all(found[name] is state[name] for name in state)
    path = saved(tmp_path / "vit.pth", shuffled(vit(pool="cls")).state_dict())
    with pytest.raises(ConfigError, match=r"The file is for model\.pool=cls"):
        load(vit(), path)


# --- class token and positions --------------------------------------------------------------------


def test_without_a_class_token_it_is_left_out_with_its_position(tmp_path: Path) -> None:
    source, target = mae(), vit(class_token=False)
    notes = load(target, saved(tmp_path / "mae.pth", source.state_dict()))
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])
    assert "left out, as model.class_token=false: cls_token and its position" in notes


def test_a_class_token_that_the_file_lacks_starts_fresh(tmp_path: Path) -> None:
    source, target = mae(class_token=False), vit()
    first, position = target.cls_token.clone(), target.pos_embed[:, :1].clone()
    notes = load(target, saved(tmp_path / "mae.pth", source.state_dict()))
    assert torch.equal(target.cls_token, first)
    assert torch.equal(target.pos_embed, torch.cat([position, source.pos_embed], 1))
    assert "the file has no class token; starts fresh: cls_token and its position" in notes
    with pytest.raises(ConfigError, match=r"model\.class_token=false"):
        load(mae(), saved(tmp_path / "bare.pth", source.state_dict()))


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_of_another_grid_are_interpolated(tmp_path: Path, class_token: bool) -> None:
    source = mae(class_token=class_token)
    target = vit(class_token=class_token, image_size=20)
    notes = load(target, saved(tmp_path / "mae.pth", source.state_dict()))
    assert "positions were interpolated from 3 x 3 to 5 x 5 patches" in notes
    extra = int(class_token)
    assert torch.equal(target.pos_embed[:, :extra], source.pos_embed[:, :extra])
    middle = target.pos_embed[0, extra + 12]  # of 5 x 5, as of 3 x 3, where bicubic is exact
    torch.testing.assert_close(middle, source.pos_embed[0, extra + 4])


def test_bicubic_interpolation_is_that_of_a_plain_reference() -> None:
    """Keys' kernel with a = -0.75 at the centres of the new patches, edges repeated."""
    torch.manual_seed(0)
    positions, a = torch.randn(1, 1 + 16, 3, dtype=torch.float64), -0.75

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(7, 4, dtype=torch.float64)
    for i in range(7):
        centre = (i + 0.5) * 4 / 7 - 0.5
        for j in range(-3, 8):
            matrix[i, min(max(j, 0), 3)] += kernel(centre - j)
    wanted = torch.einsum("ij,kl,jlc->ikc", matrix, matrix, positions[0, 1:].view(4, 4, 3))
    found = interpolated(positions, side=7, extra=1)
    torch.testing.assert_close(found[0, 1:], wanted.reshape(49, 3), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, :1], positions[:, :1])


def test_positions_that_are_no_square_are_refused(tmp_path: Path) -> None:
    state = dict(mae().state_dict())
    state["pos_embed"] = state["pos_embed"][:, :9]
    with pytest.raises(ConfigError, match="holds 8 positions of patches, which are no square"):
        load(vit(), saved(tmp_path / "cut.pth", state))


# --- norms ----------------------------------------------------------------------------------------


def test_a_published_file_is_refused_by_another_norm_until_it_is_converted(tmp_path: Path) -> None:
    path = saved(tmp_path / "mae.pth", encoder_only(mae().state_dict()))
    with pytest.raises(ConfigError, match=r"missing blocks\.0\.norm1\.alpha.*another norm"):
        load(vit("dyt"), path, norm="dyt")
    target = vit("dyt")
    notes = load(target, path, norm="dyt", across=True)
    assert "blocks.0.norm1.alpha" in notes[-1]
    assert "kept the initial value" in notes[-1]
    assert torch.equal(target.blocks[1].norm2.bias, mae().blocks[1].norm2.bias)


def test_a_dyt_encoder_does_not_slip_into_a_layernorm_model(tmp_path: Path) -> None:
    """Its weight and bias have LayerNorm's names: strict=False would load them without a word."""
    state = {f"model.{name}": value for name, value in mae("dyt").state_dict().items()}
    identity = {"norm": make_norm("dyt").describe(), "config": {"model": {"heads": 2}}}
    torch.save({"state_dict": state, "suite": identity}, tmp_path / "run.ckpt")
    with pytest.raises(ConfigError) as error:
        load(vit(), str(tmp_path / "run.ckpt"))
    assert "dyt" in str(error.value)
    assert "layernorm" in str(error.value)
    notes = load(vit(), str(tmp_path / "run.ckpt"), across=True)
    assert "blocks.0.norm1.alpha" in notes[-1]
    assert "was left out" in notes[-1]
    plain = saved(tmp_path / "plain.pth", mae("dyt").state_dict())
    with pytest.raises(ConfigError, match=r"unknown blocks\.0\.norm1\.alpha"):
        load(vit(), plain)
    identity["config"]["model"]["heads"] = 4
    torch.save({"state_dict": state, "suite": identity}, tmp_path / "heads.ckpt")
    with pytest.raises(ConfigError, match=r"was trained with model\.heads=4"):
        init_from(
            vit("dyt"),
            str(tmp_path / "heads.ckpt"),
            norm=make_norm("dyt").describe(),
            across_norms=False,
            options=ViTOptions(**ENCODER),
        )


# --- what a file is -------------------------------------------------------------------------------


def test_only_an_encoder_is_taken_for_one() -> None:
    state = mae().state_dict()
    assert is_encoder(encoder_only(state))
    for missing in ("pos_embed", "patch_embed.proj.weight"):
        assert not is_encoder({k: v for k, v in encoder_only(state).items() if k != missing})
    assert not is_encoder(vit().state_dict())
    foreign = {"features.0.weight": torch.zeros(3)}
    assert to_vit(foreign, own=vit().state_dict(), keep_norm=False, whole=True) == (foreign, [])
    assert to_mae(foreign, own=state, whole=True) == (foreign, [])


def test_the_heads_first_weights_can_be_small() -> None:
    torch.manual_seed(2)
    small = ViT(norm=make_norm("dyt"), classes=50, head_std=2e-5, **ENCODER)
    torch.manual_seed(2)
    plain = ViT(norm=make_norm("dyt"), classes=50, **ENCODER)
    assert 1.5e-5 < float(small.head.weight.detach().std()) < 2.5e-5
    assert 0.01 < float(plain.head.weight.detach().std()) < 0.03
    rest = plain.state_dict()
    changed = [k for k, v in small.state_dict().items() if not torch.equal(v, rest[k])]
    assert changed == ["head.weight"]
    with pytest.raises(ValueError, match=r"^head_std must be above 0"):
        ViTOptions(head_std=0.0)
