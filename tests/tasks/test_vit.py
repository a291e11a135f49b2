"""ViT against timm with the same weights, and what the suite promises of its initialisation."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.norms import make_norm, norm_modules, norm_parameters
from tasks.vision.vit import FMNIST, MODELS, ViT, ViTOptions, build_vit, scale_embedding

pytestmark = pytest.mark.vision

LAYERNORM = make_norm("layernorm")
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def data_info(*, image_size: int = 28, in_chans: int = 1, classes: int | None = 10) -> DataInfo:
    return DataInfo(
        name="pictures",
        license="none",
        source="test",
        sha256="",
        synthetic=True,
        sizes={"train": 1, "val": 1, "test": 1},
        classes=classes,
        extra={"image_size": image_size, "in_chans": in_chans},
    )


def shuffled(model: nn.Module) -> nn.Module:
    """Every parameter random, norms and biases too, so that a mix-up of two shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("size", list(WIDTHS))
def test_timm_weights_load_unchanged_and_give_timms_logits(size, pool, qk_norm):
    theirs = shuffled(
        timm.create_model(
            f"vit_{size}_patch16_224",
            pretrained=False,
            depth=2,
            img_size=48,
            num_classes=7,
            global_pool={"avg": "avg", "cls": "token"}[pool],
            qk_norm=qk_norm,
        )
    )
    dim, heads = WIDTHS[size]
    ours = ViT(
        norm=LAYERNORM,
        classes=7,
        image_size=48,
        dim=dim,
        depth=2,
        heads=heads,
        pool=pool,
        qk_norm=qk_norm,
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_the_published_vit_tiny_at_224_pixels_gives_timms_logits():
    theirs = shuffled(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    options = dataclasses.replace(MODELS["vit_tiny"].options, pool="cls")
    ours = build_vit(
        options, norm=LAYERNORM, data=data_info(image_size=224, in_chans=3, classes=1000)
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base", "vit_large"])
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_names_and_shapes_of_each_size_are_timms(name, pool):
    with torch.device("meta"):
        theirs = timm.create_model(
            f"{name}_patch16_224", global_pool={"avg": "avg", "cls": "token"}[pool]
        )
        ours = build_vit(
            dataclasses.replace(MODELS[name].options, pool=pool),
            norm=LAYERNORM,
            data=data_info(image_size=224, in_chans=3, classes=1000),
        )

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in model.state_dict().items()}

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(("norm", "parameters"), [("layernorm", 86_567_656), ("dyt", 86_567_681)])
def test_vit_base_has_25_norms_and_the_published_number_of_parameters(norm, parameters):
    with torch.device("meta"):
        model = build_vit(
            ViTOptions(),
            norm=make_norm(norm),
            data=data_info(image_size=224, in_chans=3, classes=1000),
        )
    sites = [module.site for _, module in norm_modules(model)]
    assert {site: sites.count(site) for site in sites} == {"attn": 12, "ffn": 12, "final": 1}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_qk_norms_are_made_for_the_site_qk_with_a_heads_width():
    model = small_vit(qk_norm=True)
    made = [module for _, module in norm_modules(model) if module.site == "qk"]
    assert [tuple(module.weight.shape) for module in made] == [(8,)] * 4


def small_vit(*, norm: str = "layernorm", seed: int = 0, **changes) -> ViT:
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 1, "dim": 16, "depth": 2, "heads": 2}
    torch.manual_seed(seed)
    return ViT(norm=make_norm(norm), classes=3, **(settings | changes))


@pytest.mark.parametrize("init", ["timm", "torch"])
def test_a_seed_gives_every_norm_the_same_other_parameters(init):
    models = [small_vit(norm=name, init=init) for name in ("layernorm", "rmsnorm", "dyt")]
    others = [
        {name: p for name, p in model.named_parameters() if name not in set(norm_parameters(model))}
        for model in models
    ]
    for other in others[1:]:
        assert other.keys() == others[0].keys()
        assert all(torch.equal(other[name], others[0][name]) for name in other)


def test_the_timm_initialisation_has_timms_spread():
    def spread(model: nn.Module) -> dict[str, float]:
        return {
            name: p.std().item()
            for name, p in model.named_parameters()
            if p.ndim > 1 and p.numel() > 2000
        }

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    ours = ViT(norm=LAYERNORM, classes=1000, image_size=64, dim=192, depth=1, heads=3, init="timm")
    expected, found = spread(theirs), spread(ours)
    assert expected.keys() == found.keys()
    assert len(found) == 7
    for name, std in found.items():
        assert std == pytest.approx(expected[name], rel=0.05), name
    for name in ("blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias", "head.bias"):
        assert not ours.get_parameter(name).any()
        assert not theirs.get_parameter(name).any()


def test_the_torch_initialisation_leaves_linear_layers_as_torch_draws_them():
    model = small_vit(dim=256, init="torch")
    bound = 256**-0.5
    assert model.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.blocks[0].attn.qkv.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_training_without_dropout_is_deterministic_and_dropout_is_not():
    image = torch.randn(4, 1, 8, 8)
    model = small_vit().train()
    assert torch.equal(model(image), model(image))
    for changes in ({"dropout": 0.5}, {"drop_path": 0.9}):
        noisy = small_vit(**changes).train()
        assert not torch.equal(noisy(image), noisy(image))
        assert torch.equal(noisy.eval()(image), small_vit().eval()(image))


@pytest.mark.parametrize("class_token", [False, True])
def test_scale_embedding_brings_patch_tokens_to_rms_1_for_every_norm(class_token):
    image = 0.7 + torch.randn(64, 1, 1, 1) * torch.randn(64, 1, 8, 8)
    weights = []
    for norm in ("layernorm", "dyt"):
        model = small_vit(norm=norm, class_token=class_token, init="torch")
        before = model.embed(image)[:, int(class_token) :].square().mean().sqrt().item()
        assert scale_embedding(model, image) == pytest.approx(before, rel=1e-5)
        tokens = model.embed(image)[:, int(class_token) :]
        assert tokens.square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-5)
        weights.append(model.patch_embed.proj.weight)
    assert torch.equal(*weights)


def test_scale_embedding_refuses_what_no_scale_can_bring_to_rms_1():
    model = small_vit()
    nn.init.zeros_(model.patch_embed.proj.bias)
    with pytest.raises(ValueError, match="blank"):
        scale_embedding(model, torch.zeros(2, 1, 8, 8))
    nn.init.constant_(model.pos_embed, 2.0)
    with pytest.raises(ValueError, match="pos_embed"):
        scale_embedding(model, torch.randn(2, 1, 8, 8))


def test_positions_and_class_token_are_not_decayed():
    assert small_vit().no_weight_decay() == {"pos_embed", "cls_token"}
    assert small_vit(class_token=False).no_weight_decay() == {"pos_embed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, r"^image_size must be a multiple of patch_size \(7\), got 30$"),
        ({"dim": 66}, r"^dim must be a multiple of heads \(4\), got 66$"),
        ({"depth": 0}, r"^depth must be at least 1, got 0$"),
        ({"mlp_ratio": float("nan")}, r"^mlp_ratio must be finite .*, got nan$"),
        ({"mlp_ratio": 0.001}, r"^mlp_ratio .* a width of at least 1, got 0.001$"),
        ({"dropout": 1.0}, r"^dropout must be at least 0 and below 1, got 1.0$"),
        ({"drop_path": -0.1}, r"^drop_path must be at least 0 and below 1, got -0.1$"),
        ({"pool": "max"}, r"^pool must be one of avg, cls, got 'max'$"),
        ({"init": "jax"}, r"^init must be one of timm, torch, got 'jax'$"),
        ({"pool": "cls"}, r"^pool=cls reads the class token: set class_token=true or pool=avg$"),
    ],
)
def test_impossible_options_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FMNIST, **changes)


def test_a_model_for_other_images_is_refused_with_what_to_set():
    with pytest.raises(ConfigError) as caught:
        build_vit(ViTOptions(), norm=LAYERNORM, data=data_info())
    message = str(caught.value)
    assert "Set model.image_size=28 model.in_chans=1 model.patch_size=7" in message
    assert "data=pictures has 1 x 28 x 28" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match="has no labelled images"):
        build_vit(FMNIST, norm=LAYERNORM, data=data_info(classes=None))


def test_the_embedded_model_takes_the_embedded_images():
    model = build_vit(FMNIST, norm=LAYERNORM, data=data_info())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert model.embed_rms
    assert model.pos_embed.shape == (1, 16, 64)


def test_padded_rows_do_not_enter_batchnorms_statistics() -> None:
    from suite.norms import make_norm

    model = ViT(
        norm=make_norm("batchnorm"),
        classes=10,
        image_size=28,
        patch_size=7,
        in_chans=1,
        dim=48,
        depth=2,
        heads=3,
    ).train()
    images = torch.randn(8, 1, 28, 28)
    mask = torch.arange(8) < 5
    alone = model(images[:5])
    torch.testing.assert_close(model(images, mask)[:5], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(images)[:5], alone, rtol=1e-3, atol=1e-3)
