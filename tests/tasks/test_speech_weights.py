"""Our wav2vec 2.0 against torchaudio's and Hugging Face's, with their weights, and fairseq's names.

All references are built here with random weights: nothing is fetched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.data import DataInfo
from suite.norms import make_norm
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
from tasks.speech.wav2vec2 import STRIDES

INFO = DataInfo("speech", "", "", "", True, {})
SAMPLES, SHORT, FRAMES, FEW = 4000, 2600, 12, 7
LENGTHS = torch.tensor([SAMPLES, SHORT])
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "input_dropout")
MODES = [
    (extractor, pre_norm)
    for extractor in ("group_norm", "layer_norm")
    for pre_norm in (False, True)
]


def shaken(model: nn.Module) -> Any:
    """Weights far from their first values, so that every parameter counts; in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def audio(*, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[1, SHORT:] = 0
    return x


def sizes(extractor: str, pre_norm: bool) -> dict[str, Any]:
    return {
        "extractor": extractor,
        "conv_bias": extractor == "layer_norm",
        "conv_dim": 16,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "hidden_dim": 32,
        "pos_kernel": 8,
        "pos_groups": 2,
        "pre_norm": pre_norm,
        "mask_padding": False,
        **dict.fromkeys(DROPOUTS, 0.0),
    }


def ctc(extractor: str = "group_norm", pre_norm: bool = False) -> ForCTC:
    options = CTCOptions(**sizes(extractor, pre_norm), freeze_extractor=False)
    return build_ctc(options, norm=make_norm("layernorm"), data=INFO).eval()


def pretrain(extractor: str = "group_norm", pre_norm: bool = False) -> ForPretraining:
    options = PretrainOptions(
        **sizes(extractor, pre_norm), codes=5, code_dim=8, feature_grad_mult=1.0
    )
    return build_pretrain(options, norm=make_norm("layernorm"), data=INFO).eval()


def fitted(model: Any, state: dict[str, Tensor], *, whole: bool = True) -> list[str]:
    """Load a published state dict strictly; the notes."""
    found, notes = model.adapt(state, whole=whole)
    model.load_state_dict(found, strict=True)
    return notes


def torchaudio_model(extractor: str, pre_norm: bool, *, letters: int | None) -> Any:
    models = pytest.importorskip("torchaudio.models")
    torch.manual_seed(0)
    size = sizes(extractor, pre_norm)
    return shaken(
        models.wav2vec2_model(
            extractor_mode=extractor,
            extractor_conv_layer_config=[(16, kernel, stride) for kernel, stride in STRIDES],
            extractor_conv_bias=size["conv_bias"],
            encoder_embed_dim=16,
            encoder_projection_dropout=0.0,
            encoder_pos_conv_kernel=8,
            encoder_pos_conv_groups=2,
            encoder_num_layers=2,
            encoder_num_heads=2,
            encoder_attention_dropout=0.0,
            encoder_ff_interm_features=32,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0,
            encoder_layer_norm_first=pre_norm,
            encoder_layer_drop=0.0,
            aux_num_out=letters,
        )
    )


def hugging_face(kind: str, extractor: str, pre_norm: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = sizes(extractor, pre_norm)
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        conv_bias=size["conv_bias"],
        feat_extract_norm=extractor.partition("_")[0],
        do_stable_layer_norm=pre_norm,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_codevectors_per_group=5,
        codevector_dim=8,
        proj_codevector_dim=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
    )
    return shaken(getattr(transformers, kind)(config))


def attention_mask() -> Tensor:
    return (torch.arange(SAMPLES) < LENGTHS[:, None]).long()


def equal_grads(ours: nn.Module, reference: nn.Module, *, among: str = "") -> None:
    """The gradients of `reference`, under our names, are ours."""
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    expected, _ = ours.adapt(grads, whole=True)  # type: ignore[operator]
    compared = 0
    for name, p in ours.named_parameters():
        if p.grad is None or name not in expected or among not in name:
            continue
        wanted = expected[name]
        torch.testing.assert_close(
            p.grad, wanted, rtol=1e-7, atol=1e-10 + 1e-9 * wanted.abs().max()
        )
        compared += 1
    assert compared > 40


@pytest.mark.parametrize(("extractor", "pre_norm"), MODES)
def test_context_and_logits_equal_torchaudios(extractor: str, pre_norm: bool) -> None:
    reference = torchaudio_model(extractor, pre_norm, letters=29)
    model = ctc(extractor, pre_norm)
    fitted(model, reference.state_dict())
    with torch.no_grad():
        expected, found = reference(audio())[0], model(audio())[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1
        wanted, frames = reference(audio(), LENGTHS)
        padded, counted = model(audio(), LENGTHS)
    assert counted.tolist() == frames.tolist() == [FRAMES, FEW]
    torch.testing.assert_close(padded[0], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[1, :FEW], wanted[1, :FEW], rtol=1e-4, atol=1e-4)


def test_gradients_equal_torchaudios() -> None:
    reference = torchaudio_model("group_norm", False, letters=29).double()
    model = ctc().double()
    fitted(model, reference.state_dict())
    x = audio(dtype=torch.float64)
    weights = torch.randn(2, FRAMES, 29, dtype=torch.float64)
    for network in (reference, model):
        (network(x)[0] * weights).sum().backward()
    equal_grads(model, reference)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("extractor", "pre_norm"), MODES)
def test_context_and_logits_equal_hugging_faces(
    extractor: str, pre_norm: bool, padded: bool
) -> None:
    reference = hugging_face("Wav2Vec2ForCTC", extractor, pre_norm)
    model = ctc(extractor, pre_norm)
    notes = fitted(model, reference.state_dict())
    assert any("29 of its 32 letters" in note for note in notes)
    lengths, mask = (LENGTHS, attention_mask()) if padded else (None, None)
    with torch.no_grad():
        logits = reference(audio(), attention_mask=mask).logits
        context = reference.wav2vec2(audio(), attention_mask=mask).last_hidden_state
        found, frames = model(audio(), lengths)
        ours = model.encode(audio(), lengths)[0]
    rows = [0, *range(4, 32)]
    for i, n in enumerate(frames.tolist()):
        torch.testing.assert_close(found[i, :n], logits[i, :n, rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[i, :n], context[i, :n], rtol=1e-4, atol=1e-4)
    assert frames.tolist() == ([FRAMES, FEW] if padded else [FRAMES, FRAMES])


def masked() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, FRAMES, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 1:5] = True
    return mask, torch.tensor([[2, 3, 4, 5], [1, 2, 3, 4]])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("extractor", "pre_norm"), MODES)
def test_what_pretraining_compares_equals_hugging_faces(
    extractor: str, pre_norm: bool, padded: bool
) -> None:
    reference = hugging_face("Wav2Vec2ForPreTraining", extractor, pre_norm)
    model = pretrain(extractor, pre_norm)
    fitted(model, reference.state_dict())
    lengths, attention = (LENGTHS, attention_mask()) if padded else (None, None)
    mask, at = masked()
    with torch.no_grad():
        expected = reference(audio(), attention_mask=attention, mask_time_indices=mask)
        found = model(audio(), lengths, mask_BT=mask, at_BM=at)
    for i in range(2):
        context, target = expected.projected_states, expected.projected_quantized_states
        torch.testing.assert_close(found.context_BMC[i], context[i, at[i]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.target_BMC[i], target[i, at[i]], rtol=1e-4, atol=1e-4)
    assert found.frames_B.tolist() == ([FRAMES, FEW] if padded else [FRAMES, FRAMES])
    assert found.codes_BMG.unique().numel() > 1


def test_gradients_equal_hugging_faces() -> None:
    reference = hugging_face("Wav2Vec2ForPreTraining", "layer_norm", True).double()
    model = pretrain("layer_norm", True).double()
    fitted(model, reference.state_dict())
    mask, at = masked()
    x = audio(dtype=torch.float64)
    expected = reference(x, mask_time_indices=mask)
    context = torch.stack([expected.projected_states[i, at[i]] for i in range(2)])
    target = torch.stack([expected.projected_quantized_states[i, at[i]] for i in range(2)])
    found = model(x, mask_BT=mask, at_BM=at)
    for a, b in ((context, target), (found.context_BMC, found.target_BMC)):
        torch.nn.functional.cosine_similarity(a, b, dim=-1).sum().backward()
    equal_grads(model, reference)


def test_both_spellings_of_weight_norm_are_read() -> None:
    reference = torchaudio_model("group_norm", False, letters=29)
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in reference.state_dict().items()
    }
    assert set(older) != set(reference.state_dict())
    models = ctc(), ctc()
    fitted(models[0], older)
    fitted(models[1], reference.state_dict())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b) or a is models[0].mask_embedding


def test_a_torchaudio_file_for_evaluation_lacks_but_the_mask_embedding() -> None:
    model = ctc()
    notes = fitted(model, torchaudio_model("group_norm", False, letters=29).state_dict())
    assert [note for note in notes if "mask embedding" in note]
    assert [note for note in notes if "model.pre_norm=false is taken on trust" in note]


@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "Wav2Vec2ForPreTraining"])
def test_fine_tuning_starts_from_a_pretrained_encoder(kind: str) -> None:
    reference = hugging_face(kind, "group_norm", False)
    model = ctc()
    head = model.head.weight.clone()
    notes = fitted(model, reference.state_dict(), whole=False)
    assert torch.equal(model.head.weight, head)
    encoder = getattr(reference, "wav2vec2", reference)
    with torch.no_grad():
        expected = encoder(audio()).last_hidden_state
        found = model.encode(audio())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (note,) = [note for note in notes if "the head keeps its initial values" in note]
    assert ("quantizer, project_q, final_proj of the file was left out" in note) == (
        kind == "Wav2Vec2ForPreTraining"
    )


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
def test_a_run_of_pretraining_starts_a_fine_tuning_but_is_not_one(extractor: str) -> None:
    run = shaken(pretrain(extractor)).state_dict()
    model = ctc(extractor)
    notes = fitted(model, run, whole=False)
    assert len(notes) == 1
    assert torch.equal(model.mask_embedding, run["mask_embedding"])
    with pytest.raises(RuntimeError, match=r"Missing.*head\.weight"):
        fitted(ctc(extractor), run, whole=True)


@pytest.mark.parametrize("build", [pretrain, ctc])
@pytest.mark.parametrize("whole", [False, True])
def test_own_names_pass_unchanged(build: Any, whole: bool) -> None:
    state = shaken(build()).state_dict()
    found, notes = build().adapt(state, whole=whole)
    assert notes == []
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def fairseq_names(model: ForPretraining | ForCTC, *, layer_norm: bool) -> dict[str, Tensor]:
    """Our state dict as fairseq's checkpoints spell it."""
    inside = "0.2.1." if layer_norm else "0.2."
    changes = [
        ("wav2vec2.feature_extractor", "feature_extractor"),
        ("wav2vec2.encoder.feature_projection.layer_norm", "layer_norm"),
        ("wav2vec2.encoder.feature_projection.projection", "post_extract_proj"),
        ("wav2vec2.encoder.transformer.", "encoder."),
        ("pos_conv_embed.conv.bias", "pos_conv.0.bias"),
        ("pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.0.weight_g"),
        ("pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.0.weight_v"),
        *((f"r.layers.{i}.layer_norm", f"r.layers.{i}.self_attn_layer_norm") for i in range(2)),
        (".attention.", ".self_attn."),
        ("feed_forward.intermediate_dense", "fc1"),
        ("feed_forward.output_dense", "fc2"),
        *((f"conv_layers.{i}.conv", f"conv_layers.{i}.0") for i in range(7)),
        *((f"conv_layers.{i}.layer_norm", f"conv_layers.{i}.{inside[2:-1]}") for i in range(7)),
        ("mask_embedding", "mask_emb"),
        ("quantizer.codebook", "quantizer.vars"),
    ]
    renamed = {}
    for name, value in model.state_dict().items():
        spelt = name
        for ours, theirs in changes:
            spelt = spelt.replace(ours, theirs)
        if isinstance(model, ForCTC):
            head = spelt.startswith("head.")
            spelt = spelt.replace("head.", "w2v_encoder.proj.")
            spelt = spelt if head else f"w2v_encoder.w2v_model.{spelt}"
        renamed[spelt] = value.flatten(0, 1)[None] if spelt == "quantizer.vars" else value
    return renamed


@pytest.mark.parametrize("extractor", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("build", [pretrain, ctc])
def test_fairseqs_names_are_known(build: Any, extractor: str) -> None:
    source, model = shaken(build(extractor)), build(extractor)
    state = fairseq_names(source, layer_norm=extractor == "layer_norm")
    assert len(state) == len(source.state_dict())
    fitted(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_fairseqs_names_are_those_of_its_released_checkpoints() -> None:
    listed = {
        "mask_emb": "mask_embedding",
        "feature_extractor.conv_layers.0.0.weight": "feature_extractor.conv_layers.0.conv.weight",
        "feature_extractor.conv_layers.0.2.bias": "feature_extractor.conv_layers.0.layer_norm.bias",
        "encoder.pos_conv.0.weight_g": (
            "encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original0"
        ),
        "encoder.layers.1.self_attn.k_proj.bias": (
            "encoder.transformer.layers.1.attention.k_proj.bias"
        ),
        "encoder.layers.1.fc2.weight": (
            "encoder.transformer.layers.1.feed_forward.output_dense.weight"
        ),
        "encoder.layer_norm.weight": "encoder.transformer.layer_norm.weight",
        "layer_norm.weight": "encoder.feature_projection.layer_norm.weight",
    }
    names = set(pretrain().state_dict())
    for theirs, ours in listed.items():
        found, _ = pretrain().adapt({theirs: torch.zeros(1)}, whole=True)
        wanted = ours if ours == "mask_embedding" else f"wav2vec2.{ours}"
        assert list(found) == [wanted]
        assert wanted in names


def test_names_that_are_not_known_are_passed_on_to_the_strict_check() -> None:
    reference = torchaudio_model("group_norm", False, letters=29).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*adapter\.layer\.weight"):
        fitted(ctc(), {**reference, "adapter.layer.weight": torch.zeros(2)})
    pos = "encoder.transformer.pos_conv_embed.conv."
    twice = {**reference, f"{pos}weight_g": torch.zeros(1, 1, 8)}
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight_g"):
        fitted(ctc(), twice)


def test_a_file_of_another_extractor_says_what_to_set() -> None:
    model = ctc("group_norm")
    state = torchaudio_model("layer_norm", True, letters=29).state_dict()
    found, _ = model.adapt(state, whole=True)
    assert model.weights_hint(set(found)) == (
        "The file is for model.extractor=layer_norm model.conv_bias=true"
    )
    own = set(model.state_dict())
    assert ctc("layer_norm").weights_hint(own) == (
        "The file is for model.extractor=group_norm model.conv_bias=false"
    )
    assert model.weights_hint(own) == ""


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wav2vec2_base", 94.37),
        ("wav2vec2_large", 315.43),
        ("wav2vec2_large_lv60k", 315.44),
    ],
)
def test_published_sizes_have_torchaudios_names_and_shapes(name: str, millions: float) -> None:
    models = pytest.importorskip("torchaudio.models")
    for table in (PRETRAIN_MODELS, CTC_MODELS):
        choice = table[name]
        with torch.device("meta"):
            model = choice.build(choice.options, norm=make_norm("layernorm"), data=INFO)
            reference = getattr(models, name)()
        found = {k: v.shape for k, v in model.wav2vec2.state_dict().items()}
        assert found == {k: v.shape for k, v in reference.state_dict().items()}
        count = sum(p.numel() for p in model.wav2vec2.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.005)
