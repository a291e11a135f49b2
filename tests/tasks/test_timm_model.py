"""model=timm: padding, keep and sites, layer-wise rates, and one clear line for what cannot be."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm_families import CREATE, batch, info, small, timm
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.norms import foreign_norms, make_norm, swap_table
from suite.optim import parameter_groups
from tasks.vision.timm_model import TimmModel, TimmOptions, build_timm

__all__ = ["small"]  # a fixture


def test_the_same_seed_with_another_norm_gives_the_same_other_parameters(
    small: Callable[..., TimmModel],
) -> None:
    one, other = small("test_efficientnet", "dyt"), small("test_efficientnet", "rmsnorm")
    owned = {r.path for r in one.replaced}
    shared = [k for k, _ in one.named_parameters() if k.rpartition(".")[0] not in owned]
    assert len(shared) > 20
    assert all(torch.equal(one.get_parameter(k), other.get_parameter(k)) for k in shared)
    torch.manual_seed(0)
    build_timm(TimmOptions(timm_name="test_resnet"), norm=make_norm("dyt"), data=info(32))
    after = torch.rand(())
    torch.manual_seed(0)
    CREATE("test_resnet", num_classes=3, drop_rate=0.0)
    assert torch.equal(torch.rand(()), after)


def test_drop_path_is_what_was_asked_for_and_not_timms_default(
    small: Callable[..., TimmModel],
) -> None:
    """Swin's class has 0.1 by default."""

    def rates(model: nn.Module) -> list[float]:
        return [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]

    assert not any(rates(small("swin_tiny_patch4_window7_224")))
    assert max(rates(small("swin_tiny_patch4_window7_224", drop_path=0.3))) == pytest.approx(0.3)


def test_other_channels_and_pooling_are_timms() -> None:
    options = TimmOptions(timm_name="test_vit", pool="avg", dropout=0.1)
    model = build_timm(options, norm=make_norm("dyt"), data=info(64, chans=1, classes=5))
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert [r.path for r in model.replaced if r.site == "final"] == ["fc_norm"]
    assert model.head_drop.p == 0.1


# --- padded rows ---


@pytest.mark.parametrize("norm", ["dyt", "batchnorm"])
def test_padded_rows_change_nothing(norm: str, small: Callable[..., TimmModel]) -> None:
    model = small("test_efficientnet", norm).train()
    alone = copy.deepcopy(model)
    image, _ = batch("test_efficientnet", 6)
    mask = torch.tensor([True, False, True, True, False, True])
    padded = torch.where(mask.view(-1, 1, 1, 1), image, torch.nan)
    logits, expected = model(padded, mask), alone(image[mask])
    assert torch.equal(logits[mask], expected)
    assert torch.equal(logits[~mask], torch.zeros(2, 3))
    for (name, one), other in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other), name
    logits[mask].sum().backward()
    expected.sum().backward()
    for (name, p), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name
    assert torch.equal(model(image, torch.ones(6)), model(image))


def test_a_batch_without_a_real_row_still_has_a_graph(small: Callable[..., TimmModel]) -> None:
    """Under DDP a rank whose rows are all padding must take part in the all-reduce."""
    model = small("test_efficientnet", "batchnorm").train()
    image, _ = batch("test_efficientnet", 2, size=64)
    valid = torch.zeros(2)
    loss = (model(image, valid).sum(1) * valid).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


# --- what the optimizer asks ---


def test_layers_are_timms_groups(small: Callable[..., TimmModel]) -> None:
    model = small("vit_tiny_patch16_224")
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {k: layers[k] for k in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
    }
    assert layers["blocks.0.norm1.alpha"] == layers["blocks.0.mlp.fc1.weight"] == 1
    assert layers["blocks.1.norm2.alpha"] == layers["norm.alpha"] == 2
    assert layers["head.weight"] == max(layers.values()) == 3
    rates = {
        id(p): group["lr"]
        for group in parameter_groups(
            model, weight_decay=0.1, decay_norm=False, lr=1.0, layer_decay=0.5
        )
        for p in group["params"]
    }
    assert rates[id(model.head.weight)] == 1.0
    assert rates[id(model.patch_embed.proj.weight)] == pytest.approx(0.5**3)


def test_a_model_without_groups_says_so() -> None:
    model = build_timm(
        TimmOptions(timm_name="poolformerv2_s12"), norm=make_norm("dyt"), data=info(32)
    )
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: timm's MetaFormer does not say"):
        model.layer_of("stem.conv.weight")


def test_what_timm_does_not_decay_is_named(small: Callable[..., TimmModel]) -> None:
    assert {"cls_token", "pos_embed"} <= small("vit_tiny_patch16_224").no_weight_decay()
    swin = small("swin_tiny_patch4_window7_224").no_weight_decay()
    assert {name.rpartition(".")[2] for name in swin} == {"relative_position_bias_table"}
    assert small("regnetx_002").no_weight_decay() == set()


def test_a_model_can_be_copied_and_pickled(small: Callable[..., TimmModel]) -> None:
    model = small("test_efficientnet").eval()
    image, _ = batch("test_efficientnet")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image, torch.ones(4)), model(image))
        assert other.replaced == model.replaced
        assert list(other.state_dict()) == list(model.state_dict())


# --- keep and sites ---


def test_norms_on_the_keep_list_stay_and_are_listed() -> None:
    build = partial(build_timm, norm=make_norm("dyt"), data=info(32))
    with pytest.raises(
        ConfigError, match=r"GlobalResponseNorm, not a type that is known\)"
    ) as said:
        build(TimmOptions(timm_name="convnextv2_atto"))
    assert str(said.value).endswith("To leave them as they are: \"model.keep=['*.grn']\"")
    model = build(TimmOptions(timm_name="convnextv2_atto", keep=["*.grn"]))
    assert len(model.kept) == 12
    assert {kind for _, kind in model.kept} == {"timm.layers.grn.GlobalResponseNorm"}
    assert all(path.endswith(".grn") for path, _ in model.kept)
    assert foreign_norms(model, make_norm("dyt"), keep=["*.grn"]) == []


def test_sites_may_be_chosen(small: Callable[..., TimmModel]) -> None:
    sites = {"norm": "embed", "blocks.*": "mixer"}
    model = small("vit_tiny_patch16_224", sites=sites)
    assert Counter(r.site for r in model.replaced) == {"embed": 1, "mixer": 4}


def test_the_table_says_what_was_replaced_and_kept() -> None:
    options = TimmOptions(timm_name="test_resnet", keep=["layer4.*"])
    model = build_timm(options, norm=make_norm("dyt"), data=info(32))
    assert swap_table(model.replaced, model.kept).splitlines() == [
        "site        was               -> now        count  first",
        "stem        torch BatchNorm2d -> dyt            3  conv1.1",
        "mixer       torch BatchNorm2d -> dyt            7  layer1.0.bn1",
        "downsample  torch BatchNorm2d -> dyt            2  layer2.0.downsample.2",
        "kept        torch BatchNorm2d -> as it was      3  layer4.0.bn1",
    ]


# --- one clear line ---


@pytest.mark.parametrize(
    ("size", "options", "line"),
    [
        (32, {}, r"model\.timm_name is not set; .* model\.timm_name=resnet50"),
        (32, {"timm_name": "resnet5"}, r"timm .* has no such model; nearest: resnet50, "),
        (32, {"timm_name": "zzzz"}, r"has no such model; timm\.list_models\(\) lists them"),
        (32, {"timm_name": "hf-hub:timm/resnet18"}, r"weights as model\.init_from=FILE: nothing"),
        (32, {"timm_name": "resnet18.no_such"}, r"timm cannot build it .*no_such"),
        (32, {"timm_name": "test_nfnet"}, r"has no norm that norm=dyt could be"),
        (32, {"timm_name": "test_resnet", "keep": ["*"]}, r"no norm .* outside model\.keep"),
        (32, {"timm_name": "test_resnet", "keep": ["x"]}, r"'x' matches no norm; norms are at: "),
        (32, {"timm_name": "test_resnet", "image_size": 64}, r"model\.image_size=64: data=photos"),
        (28, {"timm_name": "test_vit"}, r"patches of 16 x 16, .* set data\.image_size=160"),
        (50, {"timm_name": "coat_tiny"}, r"does not take images of 3 x 50 x 50: .*image_size=224"),
        (32, {"timm_name": "vgg11_bn", "drop_path": 0.1}, r"no such argument as model\.drop_path"),
        (32, {"timm_name": "test_resnet", "pool": "nope"}, r"global_pool=nope"),
    ],
)
def test_what_cannot_be_built_ends_in_one_line(
    size: int, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as said:
        build_timm(TimmOptions(**options), norm=make_norm("dyt"), data=info(size))
    assert "\n" not in str(said.value)
    assert str(said.value).startswith("model")


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'pip install "dyt-suite\[timm\]"'):
        build_timm(TimmOptions(timm_name="resnet18"), norm=make_norm("dyt"), data=info(32))


def test_options_out_of_range_name_their_field() -> None:
    for field, value in (
        ("image_size", 0),
        ("dropout", 1.0),
        ("drop_path", -0.1),
        ("sites", {"a": "b"}),
    ):
        with pytest.raises(ValueError, match=rf"^{field} must be "):
            TimmOptions(**{field: value})  # type: ignore[arg-type]


class Fused(nn.Module):
    """A model whose evaluation goes around its norm, as fused kernels do."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image.mean((2, 3)))
        if self.training:
            return self.norm(x)
        return F.layer_norm(x, (3,), self.norm.weight, self.norm.bias)


class Pair(Fused):
    """A model that gives two outputs in training."""

    def forward(self, image: Tensor) -> Any:
        x = self.norm(self.stem(image.mean((2, 3))))
        return (x, x) if self.training else x


@pytest.fixture
def built_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], TimmModel]:
    def build(cls: type[nn.Module]) -> TimmModel:
        monkeypatch.setattr(timm, "create_model", lambda *args, **options: cls())
        options = TimmOptions(timm_name="resnet18")
        return build_timm(options, norm=make_norm("dyt"), data=info(32))

    return build


def test_a_norm_that_a_fused_path_goes_around_is_refused(
    built_as: Callable[[type[nn.Module]], TimmModel],
) -> None:
    line = r"1 of the replaced norms do not run in evaluation: .*\"model\.keep=\['norm'\]\""
    with pytest.raises(ConfigError, match=line):
        built_as(Fused)


def test_a_model_that_gives_no_logits_is_refused(
    built_as: Callable[[type[nn.Module]], TimmModel],
) -> None:
    with pytest.raises(ConfigError, match=r"gives tuple in training, not logits"):
        built_as(Pair)


def test_building_on_the_meta_device_allocates_nothing() -> None:
    """The dry run of a model that is too large for the machine builds it so."""
    with torch.device("meta"):
        model = build_timm(TimmOptions(timm_name="resnet50"), norm=make_norm("dyt"), data=info(64))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(model.replaced) == 53
