"""Our ConvNeXt against timm's, and the rules of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.layers import DropPath
from suite.norms import foreign_norms, make_norm, norm_modules
from tasks.vision.convnext import MODELS, ConvNeXt, ConvNeXtOptions, build_convnext

SMALL: dict[str, Any] = {"depths": (1, 2, 3, 1), "dims": (8, 16, 32, 64)}


def info(size: int = 224, chans: int = 3, classes: int | None = 1000) -> DataInfo:
    extra = {"image_size": size, "in_chans": chans}
    return DataInfo("photos", "", "", "", True, {}, classes=classes, extra=extra)


def ours(**options: Any) -> ConvNeXt:
    chosen: dict[str, Any] = {"dim": 8, "depths": SMALL["depths"], "classes": 10, **options}
    return ConvNeXt(norm=make_norm("layernorm"), **chosen)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their first values: a layer scale of 1e-6 would hide every block."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("layer_scale", [1e-6, None])
def test_logits_equal_timms_with_the_same_weights(size: int, layer_scale: float | None) -> None:
    plain = timm.models.ConvNeXt(num_classes=10, ls_init_value=layer_scale, **SMALL)
    reference = shaken(plain)
    model = ours(layer_scale=layer_scale).eval()
    model.load_state_dict(reference.state_dict())
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = reference(image), model(image)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_timms() -> None:
    reference = shaken(timm.create_model("convnext_tiny", num_classes=10, **SMALL))
    model = ours().eval()
    model.load_state_dict(reference.state_dict())
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for network in (reference, model):
        network(image).square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("convnext_tiny", 28_589_128),
        ("convnext_small", 50_223_688),
        ("convnext_base", 88_591_464),
        ("convnext_large", 197_767_336),
    ],
)
def test_published_sizes_have_timms_names_and_shapes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        options = MODELS[name].options
        model = build_convnext(options, norm=make_norm("layernorm"), data=info())
        reference = timm.create_model(name)
    found = {k: v.shape for k, v in model.state_dict().items()}
    assert found == {k: v.shape for k, v in reference.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "more"), [("convnext_base", 41), ("convnext_large", 41)])
def test_dyt_adds_one_alpha_a_norm_at_the_published_places(name: str, more: int) -> None:
    with torch.device("meta"):
        models = [
            build_convnext(MODELS[name].options, norm=make_norm(norm), data=info())
            for norm in ("layernorm", "dyt")
        ]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[1] - counts[0] == more
    sites = Counter(norm.site for _, norm in norm_modules(models[1]))
    assert sites == {"stem": 1, "downsample": 3, "mixer": 36, "final": 1}
    assert foreign_norms(models[1], make_norm("dyt")) == []


def test_a_channels_first_norm_and_a_channels_last_one_agree() -> None:
    factory = make_norm("derf")
    first = factory(8, site="stem", channels_first=True)
    last = factory(8, site="mixer")
    with torch.no_grad():
        first.weight.copy_(torch.linspace(0.5, 2, 8))
    last.load_state_dict(first.state_dict())
    x_BCHW = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    moved = last(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(first(x_BCHW), moved)


def test_drop_path_rises_over_all_blocks_as_timms() -> None:
    model = ours(drop_path=0.6)
    reference = timm.create_model("convnext_tiny", drop_path_rate=0.6, **SMALL)
    found = [m.p for m in model.modules() if isinstance(m, DropPath)]
    wanted = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in reference.stages
        for block in stage.blocks
    ]
    assert found == pytest.approx(wanted)


def test_initial_weights_are_timms_in_distribution() -> None:
    model = ours(dim=64, head_init_scale=0.5, classes=1000)
    spread = {
        "mlp": model.stages[2].blocks[0].mlp.fc1.weight.std().item(),
        "head": model.head.fc.weight.std().item(),
    }
    assert spread == pytest.approx({"mlp": 0.02, "head": 0.01}, rel=0.05)
    assert not model.stem[0].bias.any()
    assert torch.equal(model.stages[0].blocks[0].gamma, torch.full((64,), 1e-6))


def test_layers_for_layer_wise_rates_are_timms() -> None:
    from timm.models import group_parameters

    reference = timm.create_model("convnext_tiny", **SMALL)
    expected = {}
    groups = group_parameters(reference, reference.group_matcher(coarse=False))
    for layer, names in groups.items():
        expected.update(dict.fromkeys(names, layer))
    model = ours()
    found = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    depths = sorted(set(found.values()))
    assert depths == list(range(len(depths)))
    for name, layer in found.items():
        for other, its in found.items():
            if "downsample" not in name + other and "head" not in name + other:
                assert (layer < its) == (expected[name] < expected[other]), (name, other)


def test_padded_rows_do_not_enter_a_batch_norm() -> None:
    model = ConvNeXt(norm=make_norm("batchnorm"), classes=10, dim=8, depths=(1, 1), init="torch")
    image = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, True, True, False, False])
    found = model.train()(image, mask)[:4]
    other = torch.cat([image[:4], 100 * image[4:]])
    torch.testing.assert_close(model(other, mask)[:4], found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (info(size=28, chans=1), "model.in_chans=1 model.patch_size=3"),
        (info(size=4), "model.patch_size=1 model.depth4=0"),
        (info(classes=None), "no labelled images"),
    ],
)
def test_images_that_do_not_fit_say_what_to_set(data: DataInfo, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_convnext(ConvNeXtOptions(), norm=make_norm("dyt"), data=data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("depth1", 0),
        ("depth4", -1),
        ("depth3", 0),
        ("kernel_size", 4),
        ("drop_path", 1.0),
        ("layer_scale", 0.0),
        ("head_init_scale", float("inf")),
        ("mlp_ratio", 0.0),
        ("init", "xavier"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="^(depth4|" + field + ")"):
        ConvNeXtOptions(**{field: value})
