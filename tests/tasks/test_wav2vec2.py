"""Our wav2vec 2.0: its padding, its sites, its first weights, and what stands still when told to.

That it equals torchaudio's and Hugging Face's is in test_speech_weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.data import DataInfo
from suite.norms import foreign_norms, make_norm, norm_modules, norm_parameters
from suite.optim import layer_scales
from tasks.speech.models import (
    CTC_MODELS,
    PRETRAIN_MODELS,
    CTCOptions,
    ForCTC,
    ForPretraining,
    PretrainOptions,
    build_ctc,
    build_pretrain,
)
from tasks.speech.wav2vec2 import HOP, RECEPTIVE, STRIDES, Wav2Vec2, frames_of

SMALL: dict[str, Any] = {
    "conv_dim": 16,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "hidden_dim": 32,
    "pos_kernel": 4,
    "pos_groups": 2,
}
INFO = DataInfo("speech", "", "", "", True, {})
LENGTHS = torch.tensor([4000, 2600])


def shaken(model: nn.Module, by: float = 0.2) -> Any:
    """Weights far from their first values, so that every parameter counts; in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
def test_pre_training_runs_in_one_precision(norm: str, dtype: torch.dtype) -> None:
    model = pretrain(norm).to(dtype)
    audio = torch.randn(2, 4000).to(dtype)
    frames = int(frames_of(4000))
    out = model(
        audio,
        mask_BT=torch.ones(2, frames, dtype=torch.bool),
        at_BM=torch.arange(frames).expand(2, -1),
        noise_BMGV=torch.zeros(2, frames, 2, 8),
    )
    assert out.context_BMC.dtype == out.target_BMC.dtype == dtype
    (out.context_BMC * out.target_BMC).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def pretrain(norm: str = "layernorm", **options: Any) -> ForPretraining:
    torch.manual_seed(0)
    chosen = PretrainOptions(**(SMALL | {"codes": 8, "code_dim": 8} | options))
    return build_pretrain(chosen, norm=make_norm(norm), data=INFO)


def ctc(norm: str = "layernorm", **options: Any) -> ForCTC:
    torch.manual_seed(0)
    chosen = CTCOptions(**(SMALL | {"activation_dropout": 0.0} | options))
    return build_ctc(chosen, norm=make_norm(norm), data=INFO)


def audio(samples: int = 4000, *, rows: int = 2) -> Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(2))


def slots() -> dict[str, Tensor]:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 1:5] = True
    return {"mask_BT": mask, "at_BM": torch.tensor([[2, 3, 4, 5], [1, 2, 3, 4]])}


def test_frames_are_what_the_convolutions_give() -> None:
    model = pretrain().wav2vec2
    for samples in (RECEPTIVE - 1, RECEPTIVE, RECEPTIVE + HOP - 1, RECEPTIVE + HOP, 16_000):
        expected = 0 if samples < RECEPTIVE else 1 + (samples - RECEPTIVE) // HOP
        assert frames_of(samples) == expected
        assert frames_of(torch.tensor([samples, 7])).tolist() == [expected, 0]
        if expected:
            features, frames = model.extract(audio(samples), torch.tensor([samples, RECEPTIVE]))
            assert features.shape == (2, expected, 16)
            assert frames is not None
            assert frames.tolist() == [expected, 1]


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "dyt", "derf", "batchnorm", "groupnorm"])
def test_a_padded_clip_has_the_context_that_it_has_alone(extractor: str, norm: str) -> None:
    keep = () if norm != "layernorm" else ("stem", "embed")
    model = shaken(ctc(norm, extractor=extractor, keep_sites=keep), by=0.05)
    x = audio()
    x[1, LENGTHS[1] :] = 0
    alone = model(x[1:, : LENGTHS[1]])[0]
    together, frames = model(x, LENGTHS)
    assert frames.tolist() == [12, 7]
    torch.testing.assert_close(together[1:, :7], alone, rtol=1e-4, atol=1e-5)
    assert alone.std() > 0.01
    x[1, LENGTHS[1] :] = 3  # whatever stands in the padding
    torch.testing.assert_close(model(x, LENGTHS)[0][1, :7], together[1, :7], rtol=1e-4, atol=1e-5)


def test_without_mask_padding_a_group_norm_sees_the_padding() -> None:
    models = [shaken(ctc(mask_padding=mask)) for mask in (True, False)]
    x = audio()
    x[1, LENGTHS[1] :] = 0
    masked, published = (model(x, LENGTHS)[0] for model in models)
    torch.testing.assert_close(masked[0], published[0], rtol=1e-4, atol=1e-5)
    assert (masked[1, :7] - published[1, :7]).abs().max() > 1e-3


def test_lengths_that_fill_the_batch_change_nothing() -> None:
    model = shaken(pretrain())
    plain = model(audio(), **slots())
    full = model(audio(), torch.tensor([4000, 4000]), **slots())
    for a, b in zip(plain, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_shapes_are_the_contracts() -> None:
    found = pretrain()(audio(), LENGTHS, **slots(), noise_BMGV=torch.zeros(2, 4, 2, 8))
    assert found.context_BMC.shape == found.target_BMC.shape == (2, 4, 8)
    assert found.codes_BMG.shape == (2, 4, 2)
    assert found.probs_BMGV.shape == (2, 4, 2, 8)
    assert found.features_BTC.shape == (2, 12, 16)
    assert found.frames_B.tolist() == [12, 7]
    logits, frames = ctc()(audio(), LENGTHS)
    assert logits.shape == (2, 12, 29)
    assert frames.tolist() == [12, 7]


@pytest.mark.parametrize("layers", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_dropped_layer_is_left_out_and_has_gradients_of_zero(
    layers: tuple[bool, bool], pre_norm: bool
) -> None:
    model = shaken(ctc(pre_norm=pre_norm, freeze_extractor=False))
    found = model(audio(), LENGTHS, layers_kept=torch.tensor(layers))[0]
    found.square().sum().backward()
    transformer = model.wav2vec2.encoder.transformer
    for kept, layer in zip(layers, transformer.layers, strict=True):
        for name, p in layer.named_parameters():
            assert p.grad is not None
            # the softmax does not see what is added to every key
            assert bool(p.grad.any()) == kept or name == "attention.k_proj.bias"
    transformer.layers = nn.ModuleList(
        layer for kept, layer in zip(layers, transformer.layers, strict=True) if kept
    )
    torch.testing.assert_close(model(audio(), LENGTHS)[0], found)


def test_a_frozen_encoder_gives_the_same_logits_and_gradients_of_zero() -> None:
    model = shaken(ctc(freeze_extractor=False))
    masks = {"mask_BT": slots()["mask_BT"], "channel_mask_BC": torch.arange(32).view(2, 16) % 5 < 1}
    free = model(audio(), LENGTHS, **masks)[0]
    held = model(audio(), LENGTHS, **masks, freeze_encoder=True)[0]
    assert torch.equal(free, held)
    held.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.any()) == name.startswith("head.")
    head = model.head.weight.grad.clone()
    still = {id(p) for p in model.encoder_parameters()}
    assert still == {id(p) for n, p in model.named_parameters() if not n.startswith("head.")}
    model.zero_grad()
    free.square().sum().backward()
    torch.testing.assert_close(model.head.weight.grad, head)


def test_a_frozen_extractor_asks_for_no_gradient_and_the_rest_learns() -> None:
    model = ctc()
    model(audio(), LENGTHS)[0].square().sum().backward()
    for name, p in model.named_parameters():
        frozen = "feature_extractor" in name
        assert p.requires_grad != frozen
        assert (p.grad is None) == frozen, name


def test_every_parameter_of_pretraining_learns_in_training() -> None:
    model = pretrain(feature_grad_mult=0.1).train()
    found = model(audio(), LENGTHS, **slots(), noise_BMGV=torch.randn(2, 4, 2, 8))
    (found.context_BMC * found.target_BMC).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() or name.endswith("k_proj.bias"), name


def test_masks_of_fine_tuning_replace_frames_and_silence_channels() -> None:
    model = shaken(ctc())
    seen: list[Tensor] = []
    transformer = model.wav2vec2.encoder.transformer
    transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = slots()["mask_BT"]
    channels = torch.zeros(2, 16, dtype=torch.bool)
    channels[0, 3:5] = True
    model(audio(), LENGTHS)
    model(audio(), LENGTHS, mask_BT=mask, channel_mask_BC=channels)
    plain, masked = seen
    assert not masked[0, :, 3:5].any()
    assert torch.equal(masked[1][mask[1]], model.mask_embedding.expand(4, -1))
    assert torch.equal(masked[1][~mask[1]], plain[1][~mask[1]])


def test_the_extractors_gradient_is_scaled_and_the_features_are_not() -> None:
    outputs, grads = [], []
    for factor in (1.0, 0.1):
        model = shaken(pretrain(feature_grad_mult=factor))
        found = model(audio(), LENGTHS, **slots())
        found.features_BTC.square().mean().backward()
        outputs.append(found.features_BTC)
        grads.append(model.wav2vec2.feature_extractor.conv_layers[0].conv.weight.grad)
    assert torch.equal(*outputs)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], 0.1 * grads[0])


def test_the_first_features_have_a_size_that_norms_can_see() -> None:
    # PyTorch's own initialisation gives 1.8e-7 here, below the norm's eps: training stays at chance
    torch.manual_seed(0)
    model = build_pretrain(
        PretrainOptions(**(SMALL | {"conv_dim": 128})), norm=make_norm("layernorm"), data=INFO
    )
    features, _ = model.wav2vec2.extract(audio(16_000))
    assert 0.01 < features.square().mean().item() < 1
    assert model.wav2vec2.normalize(features).std().item() == pytest.approx(1, rel=0.01)


def test_first_weights_are_fairseqs_in_distribution() -> None:
    options = replace(PretrainOptions(), depth=1, conv_dim=32)
    model = build_pretrain(options, norm=make_norm("layernorm"), data=INFO)
    layer = model.wav2vec2.encoder.transformer.layers[0]
    for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not linear.bias.any()
    positions = model.wav2vec2.encoder.transformer.pos_conv_embed.conv
    assert positions.weight.std().item() == pytest.approx((4 / (128 * 768)) ** 0.5, rel=0.02)
    assert not positions.bias.any()
    assert model.mask_embedding.min() >= 0
    assert model.mask_embedding.mean().item() == pytest.approx(0.5, rel=0.1)
    letters = build_ctc(CTCOptions(**SMALL), norm=make_norm("dyt"), data=INFO).head
    assert not letters.bias.any()
    assert letters.weight.abs().max().item() == pytest.approx((6 / (16 + 29)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("build", [pretrain, ctc])
@pytest.mark.parametrize("norm", ["dyt", "derf", "rmsnorm", "batchnorm"])
def test_another_norm_leaves_the_other_weights_as_they_are(build: Any, norm: str) -> None:
    plain, other = build(), build(norm)
    first = dict(plain.named_parameters())
    norms = set(norm_parameters(other)) | set(norm_parameters(plain))
    compared = [name for name, _ in other.named_parameters() if name not in norms]
    assert len(compared) > 30
    for name, p in other.named_parameters():
        assert name in norms or torch.equal(p, first[name])


def names_at(model: nn.Module) -> dict[str, set[str]]:
    sites: dict[str, set[str]] = {}
    for _, norm in norm_modules(model):
        sites.setdefault(str(norm.site), set()).add(str(norm.norm_name))
    return sites


def test_data_norms_are_kept_by_default_and_none_is_without_keep_sites() -> None:
    kept = names_at(pretrain("dyt"))
    layers = {"attn": {"dyt"}, "ffn": {"dyt"}, "final": {"dyt"}}
    assert kept == {"stem": {"groupnorm"}, "embed": {"layernorm"}, **layers}
    everywhere = pretrain("dyt", keep_sites=(), extractor="layer_norm")
    assert names_at(everywhere) == {"stem": {"dyt"}, "embed": {"dyt"}, **layers}
    assert foreign_norms(everywhere, make_norm("dyt")) == []
    part = names_at(pretrain("dyt", keep_sites=("embed", "final")))
    assert part["final"] == part["embed"] == {"layernorm"}
    assert part["stem"] == part["attn"] == {"dyt"}


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_there_are_two_norms_a_layer_and_one_behind(extractor: str) -> None:
    sites = Counter(m.site for _, m in norm_modules(pretrain(extractor=extractor)))
    stems = {"group_norm": 1, "layer_norm": 7}[extractor]
    assert sites == {"stem": stems, "embed": 1, "attn": 2, "ffn": 2, "final": 1}


@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
@pytest.mark.parametrize("table", [PRETRAIN_MODELS, CTC_MODELS])
def test_every_size_can_be_built(table: dict[str, Any], norm: str) -> None:
    for choice in table.values():
        with torch.device("meta"):
            model = choice.build(choice.options, norm=make_norm(norm), data=INFO)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert float(choice.help.split(" M ")[0]) == pytest.approx(millions, abs=0.6)
        assert foreign_norms(model, make_norm(norm), keep_sites=choice.options.keep_sites) == []
        assert model.encoder_depth == choice.options.depth
        assert model.layer_drop == choice.options.layer_drop
        assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("pre_norm", [True, False])
def test_layers_of_parameters_rise_from_the_extractor_to_the_head(pre_norm: bool) -> None:
    model = ctc(pre_norm=pre_norm)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3}
    assert layers["head.weight"] == 3
    assert layers["wav2vec2.encoder.transformer.layer_norm.weight"] == (3 if pre_norm else 0)
    assert layers["wav2vec2.encoder.transformer.pos_conv_embed.conv.bias"] == 0
    assert layers["wav2vec2.encoder.transformer.layers.1.layer_norm.weight"] == 2
    assert min(layer_scales(model, 0.5).values()) == 0.125
    assert pretrain().layer_of("quantizer.codebook") == 3


@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
def test_under_autocast_the_output_stays_near_float32s(norm: str) -> None:
    model = shaken(pretrain(norm), by=0.05)
    exact = model(audio(), LENGTHS, **slots())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(audio(), LENGTHS, **slots())
        logits, _ = shaken(ctc(norm))(audio(), LENGTHS)
    assert logits.dtype == torch.float32
    assert found.probs_BMGV.dtype == torch.float32
    assert found.context_BMC.dtype == torch.bfloat16
    difference = (found.context_BMC - exact.context_BMC).abs().max()
    assert 0 < difference < 0.05 * exact.context_BMC.abs().max()


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_the_whole_forward_is_one_graph_whatever_the_lengths(extractor: str) -> None:
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(pretrain(extractor=extractor), backend=counting, fullgraph=True)
    for lengths, kept in (([4000, 2600], [True, False]), ([3000, 4000], [False, True])):
        compiled(audio(), torch.tensor(lengths), **slots(), layers_kept=torch.tensor(kept))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conv_dim", 0),
        ("depth", 0),
        ("heads", 5),
        ("pos_groups", 7),
        ("dropout", 1.0),
        ("input_dropout", -0.1),
        ("layer_drop", 1.0),
        ("feature_dropout", 2.0),
        ("init_std", 0.0),
        ("init_std", float("nan")),
        ("extractor", "batch_norm"),
        ("keep_sites", ("stem", "head")),
        ("keep_sites", "stem"),
        ("codebooks", 0),
        ("codes", 1),
        ("code_dim", 255),
        ("feature_grad_mult", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="^" + field):
        PretrainOptions(**{field: value})
    if field == "dropout":
        with pytest.raises(ValueError, match=r"^final_dropout"):
            CTCOptions(final_dropout=value)


def test_the_encoder_alone_gives_the_context() -> None:
    torch.manual_seed(0)
    convs = [(16, kernel, stride) for kernel, stride in STRIDES]
    size = {name: value for name, value in SMALL.items() if name != "conv_dim"}
    model = Wav2Vec2(norm=make_norm("layernorm"), convs=convs, **size)
    assert model(audio(), LENGTHS).shape == (2, 12, 16)
