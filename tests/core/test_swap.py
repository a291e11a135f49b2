"""replace_norms: every known failure of the published converters is a test here."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from suite.norms import (
    PointwiseOptions,
    StatisticsOptions,
    foreign_norms,
    guess_site,
    make_norm,
    norm_modules,
    replace_norms,
)

torch.set_num_threads(1)
DIM = 8


class Transposing(nn.LayerNorm):
    """As torchaudio's and ConvNeXt's: a LayerNorm subclass whose forward is not LayerNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class SharedTwice(nn.Module):
    """One norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.norm2 = self.norm1

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.norm1(x))


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]


def test_a_shared_module_stays_one_module() -> None:
    model = SharedTwice()
    replaced = replace_norms(model, "dyt")
    assert model.norm1 is model.norm2
    assert [(r.path, r.was, r.now) for r in replaced] == [
        ("norm1", "torch.nn.modules.normalization.LayerNorm", "dyt")
    ]
    assert len(list(model.parameters())) == 3


def test_a_parameter_shared_by_two_norms_stays_shared() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), nn.LayerNorm(DIM))
    model[1].weight = model[0].weight
    replace_norms(model, "dyt")
    assert model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias


def test_the_dtype_is_kept() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)).to(torch.bfloat16)
    replace_norms(model, "derf")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = nn.Sequential(nn.LayerNorm(DIM)).double()
    replace_norms(model, "batchnorm")
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert dtypes["0.running_mean"] == torch.float64
    assert dtypes["0.num_batches_tracked"] == torch.int64


def test_the_device_is_kept() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), nn.LayerNorm(DIM).to("meta"))
    replace_norms(model, "dyt")
    assert {p.device.type for p in model[0].parameters()} == {"cpu"}
    assert {p.device.type for p in model[1].parameters()} == {"meta"}


def test_a_norm_without_parameters_takes_device_and_dtype_from_around_it() -> None:
    """DiT's LayerNorms have no affine; DyT then has an alpha, which must be where the block is."""
    block = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM, elementwise_affine=False))
    model = nn.Sequential(nn.Linear(DIM, DIM), block.to("meta", torch.float64))
    replace_norms(model, "dyt")
    assert [(n, p.device.type, p.dtype) for n, p in block[1].named_parameters()] == [
        ("alpha", "meta", torch.float64)
    ]
    assert block[1].alpha.requires_grad


def test_bias_false_stays_without_bias() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM, bias=False), nn.RMSNorm(DIM))
    replace_norms(model, "dyt")
    for module in model:
        assert [name for name, _ in module.named_parameters()] == ["alpha", "weight"]


def test_elementwise_affine_false_stays_without_affine() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM, elementwise_affine=False), nn.InstanceNorm1d(DIM))
    replace_norms(model, "rmsnorm")
    assert list(model.parameters()) == []


def test_eps_is_kept() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM, eps=1e-3), nn.RMSNorm(DIM), nn.BatchNorm1d(DIM))
    replace_norms(model, "layernorm")
    assert [m.eps for m in model] == [1e-3, torch.finfo(torch.float32).eps, 1e-5]
    model = nn.Sequential(nn.LayerNorm(DIM, eps=1e-3))
    replace_norms(model, make_norm("rmsnorm", StatisticsOptions(eps=1e-2)))
    assert model[0].eps == 1e-2


def test_training_mode_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM).eval().requires_grad_(False), nn.LayerNorm(DIM))
    model[1].bias.requires_grad_(False)
    replace_norms(model, "dyt")
    assert [m.training for m in model] == [False, True]
    assert not any(p.requires_grad for p in model[0].parameters())
    trains = {name: p.requires_grad for name, p in model[1].named_parameters()}
    assert trains == {"alpha": True, "weight": True, "bias": False}


def test_weight_and_bias_are_carried_over_unless_asked_not_to() -> None:
    source = nn.Sequential(nn.LayerNorm(DIM))
    nn.init.uniform_(source[0].weight)
    nn.init.uniform_(source[0].bias)
    carried, fresh = copy.deepcopy(source), copy.deepcopy(source)
    replace_norms(carried, "dyt")
    replace_norms(fresh, "dyt", carry_affine=False)
    assert torch.equal(carried[0].weight, source[0].weight)
    assert torch.equal(carried[0].bias, source[0].bias)
    assert torch.equal(fresh[0].weight, torch.ones(DIM))
    assert torch.equal(fresh[0].bias, torch.zeros(DIM))


@pytest.mark.parametrize("shape", [(2, 3, DIM), (2, 3, 4, DIM)])
def test_the_same_norm_gives_the_same_outputs(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Tanh(), nn.RMSNorm(DIM))
    nn.init.uniform_(model[1].weight)
    pairs = [(model, "layernorm", "3"), (copy.deepcopy(model), "rmsnorm", "1")]
    x = torch.randn(shape)
    expected = model(x)
    for swapped, name, keep in pairs:
        replace_norms(swapped, name, keep=[keep])
        torch.testing.assert_close(swapped(x), expected)


def test_a_batchnorm_goes_with_its_running_statistics_and_channels_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), nn.BatchNorm2d(DIM))
    nn.init.zeros_(model[1].weight)  # ResNet's zero-init, which must survive
    x = torch.randn(2, 3, 5, 4)
    model(x)
    replaced = replace_norms(model, "layernorm")
    assert list(dict(model.named_buffers())) == []
    assert replaced[0].was == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert torch.equal(model[1].weight, torch.zeros(DIM))
    nn.init.ones_(model[1].weight)
    y = model(x)
    assert y.shape == (2, DIM, 5, 4)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5, 4), atol=1e-5, rtol=0)


def test_to_batchnorm_starts_with_fresh_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(DIM))
    model(torch.randn(16, DIM) + 3)
    replace_norms(model, "batchnorm")
    assert torch.equal(model[0].running_mean, torch.zeros(DIM))
    assert model[0].num_batches_tracked == 0


def test_zero_swaps_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_norms(nn.Sequential(nn.Linear(DIM, DIM)), "dyt")
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_norms(nn.Sequential(nn.LayerNorm(DIM)), "dyt", keep=["*"])
    done = nn.Sequential(nn.LayerNorm(DIM))
    replace_norms(done, "dyt")
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_norms(done, "derf")


def test_a_subclass_of_layernorm_is_an_error_and_nothing_is_changed() -> None:
    """isinstance(m, nn.LayerNorm) converts it and drops its forward."""
    model = nn.ModuleDict({"a": nn.LayerNorm(DIM), "b": Transposing(DIM)})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot replace b \(.*Transposing, not a type that is"):
        replace_norms(model, "dyt")
    assert snapshot(model) == before
    replace_norms(model, "dyt", keep=["b"])
    assert isinstance(model["b"], Transposing)
    assert foreign_norms(model, make_norm("dyt")) == [("b", f"{__name__}.Transposing")]


def test_a_home_made_norm_that_is_no_subclass_is_an_error() -> None:
    """FAIR's ConvNeXt: a class called LayerNorm that isinstance(m, nn.LayerNorm) never sees."""

    class LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(DIM))

    with pytest.raises(ValueError, match=r"cannot replace 1 \("):
        replace_norms(nn.Sequential(nn.LayerNorm(DIM), LayerNorm()), "dyt")


def test_norms_that_cannot_be_replaced_faithfully_say_why() -> None:
    hooked = nn.Sequential(nn.LayerNorm(DIM))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="with hooks"):
        replace_norms(hooked, "dyt")
    with pytest.raises(ValueError, match="over more than the channels"):
        replace_norms(nn.Sequential(nn.LayerNorm((4, DIM))), "dyt")
    with pytest.raises(ValueError, match="the model itself is a norm"):
        replace_norms(nn.LayerNorm(DIM), "dyt")


def test_transformer_encoder_layers_are_refused() -> None:
    """Their fast path reads norm.eps in eval and computes LayerNorm with the new norm's weights."""
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)
    for model in (layer, nn.TransformerEncoder(layer, 2), nn.Sequential(nn.LayerNorm(DIM), layer)):
        before = snapshot(model)
        with pytest.raises(ValueError, match="computes a LayerNorm without calling the new norm"):
            replace_norms(model, "dyt")
        assert snapshot(model) == before
    model = nn.Sequential(nn.LayerNorm(DIM), layer)
    assert len(replace_norms(model, "dyt", keep=["1.*"])) == 1


def test_the_trap_is_real_and_a_norm_without_eps_does_not_fall_into_it() -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, dropout=0.0).eval()
    layer.norm1, layer.norm2 = (make_norm("dyt")(DIM, site="attn") for _ in range(2))
    with torch.inference_mode(), pytest.raises(AttributeError, match="eps"):
        layer(torch.randn(2, 3, DIM))


def test_blocks_that_fuse_add_and_norm_are_refused() -> None:
    """Caduceus: the Triton kernel would run LayerNorm or RMSNorm with Derf's weights."""
    block = nn.ModuleDict({"norm": nn.LayerNorm(DIM)})
    block.fused_add_norm = True
    model = nn.ModuleDict({"block": block})
    with pytest.raises(ValueError, match="fused_add_norm=False"):
        replace_norms(model, "derf")
    block.fused_add_norm = False
    assert replace_norms(model, "derf")[0].path == "block.norm"


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model = nn.Sequential(OrderedDict(norm1=nn.LayerNorm(DIM)))
    with pytest.raises(ValueError, match="'nrom1' matches no norm; norms are at: norm1"):
        replace_norms(model, "dyt", keep=["nrom1"])
    with pytest.raises(ValueError, match="'x' matches no norm"):
        replace_norms(model, "dyt", sites={"x": "attn"})
    with pytest.raises(ValueError, match="sites has no 'atn'; did you mean 'attn'"):
        replace_norms(model, "dyt", sites={"norm1": "atn"})


def test_sites_choose_alpha_and_norm() -> None:
    model = nn.Sequential(OrderedDict(a=nn.LayerNorm(DIM), b=nn.LayerNorm(DIM)))
    options = PointwiseOptions(alpha_init_by_site={"attn": 0.8}, by_site={"final": "rmsnorm"})
    replaced = replace_norms(model, make_norm("dyt", options), sites={"a": "attn", "*": "final"})
    assert [(r.path, r.site, r.now) for r in replaced] == [
        ("a", "attn", "dyt"),
        ("b", "final", "rmsnorm"),
    ]
    assert model.a.alpha.item() == pytest.approx(0.8)


def test_sites_are_guessed_from_the_usual_names() -> None:
    guesses = {
        "blocks.0.norm1": "attn",
        "blocks.11.norm2": "ffn",
        "blocks.0.attn.q_norm": "qk",
        "norm": "final",
        "fc_norm": "final",
        "head.norm": "final",
        "stem.1": "stem",
        "stages.1.downsample.0": "downsample",
        "stages.1.blocks.0.norm": "mixer",
        "patch_embed.norm": "embed",
        "model.layers.3.input_layernorm": "attn",
        "model.layers.3.post_attention_layernorm": "ffn",
        "model.norm": "final",
        "transformer.h.0.ln_1": "attn",
        "transformer.h.0.ln_2": "ffn",
        "transformer.ln_f": "final",
        "encoder.layers.0.final_layer_norm": "ffn",
        "encoder.layers.0.self_attn_layer_norm": "attn",
        "feature_extractor.conv_layers.0.layer_norm": "stem",
        "bn1": "stem",
        "conv1.4": "stem",
        "conv_stem.bn": "stem",
        "bn2": "final",
        "layer1.0.bn1": "mixer",
        "layer2.0.downsample.1": "downsample",
        "s1.b1.conv1.bn": "mixer",
        "blocks.0.0.bn2": "mixer",
        "features.denseblock1.denselayer1.norm1": "mixer",
        "layers.1.downsample.norm": "downsample",
        "wav2vec2.encoder.layer_norm": "final",
    }
    assert {path: guess_site(path) for path in guesses} == guesses


# --- models of other libraries ---


def test_timms_vit_is_swapped_completely() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    factory = make_norm("dyt")
    replaced = replace_norms(model, factory)
    assert [(r.path, r.site) for r in replaced] == [
        ("blocks.0.norm1", "attn"),
        ("blocks.0.norm2", "ffn"),
        ("blocks.1.norm1", "attn"),
        ("blocks.1.norm2", "ffn"),
        ("norm", "final"),
    ]
    assert foreign_norms(model, factory) == []
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_atto_rms"])
def test_timms_convnext_is_swapped_in_both_layouts(name: str) -> None:
    """The published converter leaves convnext_atto_rms on RmsNorm2d."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    x = torch.randn(2, 3, 64, 64)
    same = copy.deepcopy(model)
    replace_norms(same, "rmsnorm" if "rms" in name else "layernorm")
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    replace_norms(model, "dyt")
    assert foreign_norms(model, make_norm("dyt")) == []
    assert model(x).isfinite().all()
    assert {m.site for _, m in norm_modules(model)} == {"stem", "downsample", "mixer", "final"}


def test_many_norms_with_one_reason_are_one_line() -> None:
    model = nn.Sequential(*(Transposing(DIM) for _ in range(30)))
    with pytest.raises(ValueError, match=r"cannot replace 0 and 29 more \(.*Transposing, not"):
        replace_norms(model, "dyt")


def test_the_audit_leaves_out_what_the_user_keeps() -> None:
    model = nn.Sequential(OrderedDict(a=nn.LayerNorm(DIM), b=nn.LayerNorm(DIM)))
    replace_norms(model, "dyt", keep=["b*"])
    layernorm = "torch.nn.modules.normalization.LayerNorm"
    assert foreign_norms(model, make_norm("dyt")) == [("b", layernorm)]
    assert foreign_norms(model, make_norm("dyt"), keep=["b*"]) == []
    assert foreign_norms(model, make_norm("derf"), keep=["*"]) == [("a", "dyt")]


def test_torchvisions_convnext_and_resnet_are_swapped() -> None:
    models = pytest.importorskip("torchvision.models")
    convnext = models.convnext_tiny(num_classes=3)
    x = torch.randn(1, 3, 32, 32)
    expected = convnext.eval()(x)
    replaced = replace_norms(convnext, "layernorm")
    assert len(replaced) == 23
    torch.testing.assert_close(convnext(x), expected, rtol=1e-4, atol=1e-5)
    resnet = models.resnet18(num_classes=3)
    assert len(replace_norms(resnet, "dyt")) == 20
    assert resnet(x).isfinite().all()


@pytest.mark.parametrize(("name", "offset"), [("LlamaRMSNorm", 0.0), ("Gemma2RMSNorm", 1.0)])
def test_transformers_rmsnorms_are_known_by_name_and_weight(name: str, offset: float) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * (self.weight + offset)

    module = f"transformers.models.{name.lower()}.modeling"
    cls = type(name, (nn.Module,), {"forward": forward, "__module__": module})
    gated = type(f"{name}Gated", (nn.Module,), {"__module__": module})
    norm = cls()
    norm.weight, norm.variance_epsilon = nn.Parameter(torch.full((DIM,), 0.25)), 1e-6
    model = nn.ModuleDict({"norm": norm})
    replaced = replace_norms(model, "rmsnorm")
    assert replaced[0].was == f"{module}.{name}"
    assert model["norm"].eps == 1e-6
    assert torch.equal(model["norm"].weight, torch.full((DIM,), 0.25 + offset))
    with pytest.raises(ValueError, match="Gated, not a type that is known"):
        replace_norms(nn.Sequential(gated()), "rmsnorm")
