"""Our GPT-2: equal to transformers' with the same weights, what a position may see, whose files
load, and what the suite needs of it to shard and to compile it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from suite.checkpoint import init_from
from suite.errors import ConfigError
from suite.initial import drawn, init_weights, own_parameters, reset_norms
from suite.norms import make_norm, norm_modules, norm_parameters
from tasks.language.gpt2 import (
    GPT2,
    GPT2_SIZES,
    SITES,
    GPT2Options,
    positions_within,
    visible_within,
)

NORMS = ("layernorm", "rmsnorm", "dyt", "derf")
V = 37
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 4, "hidden_dim": 40, "max_length": 24}
LAYERNORM = {"name": "layernorm"}


def build(norm: str = "layernorm", *, seed: int = 0, vocab_size: int = V, **options: Any) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(GPT2Options(**(SMALL | options)), norm=make_norm(norm), vocab_size=vocab_size)


def shaken(model: GPT2, by: float = 0.3) -> GPT2:
    """Weights far from their first values, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(2))


def published(**changes: Any) -> Any:
    """transformers' GPT-2 of the small size, its weights and biases far from zero."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=4, n_inner=40, **changes
    )
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def nanogpt(model: GPT2, *, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of nanoGPT's checkpoint with the weights of `model`."""
    state = {n: v.clone() for n, v in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    return {prefix + name: value for name, value in state.items()}


def loaded(state: dict[str, Tensor], tmp_path: Path, **options: Any) -> tuple[GPT2, list[str]]:
    file = tmp_path / "nanogpt.pt"
    torch.save({"model": state, "iter_num": 5, "config": {"dtype": "bfloat16"}}, file)
    model = build(seed=9, **options)
    return model, init_from(model, str(file), norm=LAYERNORM, across_norms=False)


def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = published()
    theirs.save_pretrained(tmp_path)
    ours = build().eval()
    file = str(tmp_path / "model.safetensors")
    notes = init_from(ours, file, norm=LAYERNORM, across_norms=False)
    assert any("model.heads, here 4" in note and "model.gelu, here tanh" in note for note in notes)
    ids = tokens()
    wanted, found = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for logits in (wanted, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        wanted = grads.pop(name)
        wanted = wanted.T if p.dim() == 2 and ".h." in name else wanted  # Conv1D
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert not grads


def test_an_untied_head_and_the_exact_gelu_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = published(activation_function="gelu", tie_word_embeddings=False)
    save_file(
        {n: v.contiguous() for n, v in theirs.state_dict().items()}, tmp_path / "w.safetensors"
    )
    ours = build(tie_head=False, gelu="exact").eval()
    init_from(ours, str(tmp_path / "w.safetensors"), norm=LAYERNORM, across_norms=False)
    wanted = theirs(tokens()).logits
    torch.testing.assert_close(ours(tokens()), wanted, rtol=1e-5, atol=1e-5)
    tanh = build(tie_head=False).eval()
    tanh.load_state_dict(ours.state_dict())
    assert (tanh(tokens()) - wanted).abs().max() > 1e-4
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not .* set model\.tie_head=false$"):
        init_from(build(), str(tmp_path / "w.safetensors"), norm=LAYERNORM, across_norms=False)


def test_files_without_the_wrapper_and_with_its_buffers_load(tmp_path: Path) -> None:
    theirs = published()
    state = {n: v.clone() for n, v in theirs.transformer.state_dict().items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    ours = build().eval()
    file = str(tmp_path / "model.safetensors")
    init_from(ours, file, norm=LAYERNORM, across_norms=False)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_loads_as_it_lies(prefix: str, tmp_path: Path) -> None:
    source = shaken(build()).float()
    model, notes = loaded(nanogpt(source, prefix=prefix), tmp_path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert any("exact for one that nanoGPT trained" in note for note in notes)


def test_a_nanogpt_without_biases_says_what_to_set(tmp_path: Path) -> None:
    source = build(bias=False, norm_bias=False)
    assert not any(name.endswith("bias") for name, _ in source.named_parameters())
    state = nanogpt(source)
    with pytest.raises(ConfigError, match=r"model\.bias=false model\.norm_bias=false$"):
        loaded({n: v for n, v in state.items() if n != "transformer.h.0.attn.bias"}, tmp_path)
    model, _ = loaded(state, tmp_path, bias=False, norm_bias=False)
    assert torch.equal(model(tokens()), source(tokens()))


def test_our_own_files_pass_by_untouched() -> None:
    for options in ({}, {"tie_head": False, "embed_scale": True, "bias": False}):
        model = build("dyt", **options)
        state = model.state_dict()
        adapted, notes = model.adapt(state, whole=True)
        assert notes == []
        assert adapted.keys() == state.keys()
        assert all(adapted[name] is state[name] for name in state)


@pytest.mark.parametrize(
    ("built", "wanted"),
    [
        ({"vocab_size": 64}, "(vocab_size=64): set model.vocab_size=37"),
        ({"max_length": 16}, "(max_length=16): set model.max_length=24"),
        ({"depth": 3, "hidden_dim": 64}, "set model.hidden_dim=40 model.depth=2"),
        ({"dim": 32}, "(dim=32): set model.dim=16"),
        ({"embed_scale": True}, "The file is for model.embed_scale=false"),
        ({"tie_head": False}, "The file is for model.tie_head=true"),
        ({"bias": False}, "The file is for model.bias=true"),
    ],
)
def test_a_file_of_other_sizes_says_what_to_set(
    built: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    published().save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        init_from(build(**built), file, norm=LAYERNORM, across_norms=False)
    assert str(caught.value).endswith(wanted)
    assert "\n" not in str(caught.value)


def test_a_file_with_an_embedding_scale_and_one_of_two_layouts_are_refused(tmp_path: Path) -> None:
    state = build(embed_scale=True).state_dict()
    with pytest.raises(ConfigError, match=r"The file is for model\.embed_scale=true$"):
        loaded(dict(state), tmp_path)
    mixed = build().state_dict()
    mixed["transformer.h.1.attn.c_attn.weight"] = mixed["transformer.h.1.attn.c_attn.weight"].T
    with pytest.raises(ConfigError, match="in some of its blocks and not in others"):
        loaded(mixed, tmp_path)


def test_the_published_vocabulary_is_named_to_a_padded_model() -> None:
    with torch.device("meta"):
        model, file = (
            GPT2(GPT2_SIZES["gpt2_124m"], norm=make_norm("layernorm"), vocab_size=rows)
            for rows in (50_304, 50_257)
        )
    with pytest.raises(ValueError, match=r"set model\.vocab_size=50257$"):
        model.adapt(file.state_dict(), whole=False)


def test_gpt2_124m_has_its_parameters() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2_SIZES["gpt2_124m"], norm=make_norm("layernorm"), vocab_size=50_257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert len(list(norm_modules(model))) == 2 * 12 + 1
    assert len(model.shard_units()) == 12


def test_a_model_from_the_meta_device_is_filled_by_names_alone() -> None:
    for norm in ("dyt", "rmsnorm"):
        wanted = build(norm, seed=4, embed_scale=True)
        with torch.device("meta"):
            model = build(norm, embed_scale=True)
        assert not list(model.buffers())
        model = model.to_empty(device="cpu")
        init_weights(model, seed=4)
        reset_norms(model)
        assert torch.equal(model(tokens()), wanted(tokens()))


def test_first_weights_are_as_published() -> None:
    model = build(dim=128, depth=8, hidden_dim=512, embed_scale=True, tie_head=False)
    last = 0.02 / math.sqrt(2 * 8)
    expected = {"c_attn.weight": 0.02, "c_proj.weight": last, "c_fc.weight": 0.02}
    expected |= {"wte.weight": 0.02, "wpe.weight": 0.02, "lm_head.weight": 0.02}
    for end, std in expected.items():
        values = [p.flatten() for n, p in model.named_parameters() if n.endswith(end)]
        assert torch.cat(values).std().item() == pytest.approx(std, rel=0.05), end
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
    assert model.transformer.embed_scale is not None
    assert model.transformer.embed_scale.tolist() == [pytest.approx(math.sqrt(128))]


def test_a_parameter_is_drawn_by_its_name_alone() -> None:
    model = build(seed=5)
    for name, p in own_parameters(model):
        assert torch.equal(drawn(model, name, p, seed=5), p), name
    deeper = dict(build(seed=5, depth=3).named_parameters())
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(dict(model.named_parameters())[name], deeper[name])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("documents", [False, True])
def test_no_position_sees_a_later_one(norm: str, documents: bool) -> None:
    model, length = shaken(build(norm)), 12
    ids = tokens(1, length)
    document = torch.zeros_like(ids) if documents else None
    changed = (ids + torch.eye(length, dtype=torch.long)) % V  # in row s another id at s
    rows = document.expand(length, -1) if document is not None else None
    with torch.no_grad():
        moved_ST = (model(changed, rows) - model(ids, document)).abs().amax(dim=-1)
    assert moved_ST.tril(-1).max() == 0
    assert moved_ST.triu().add(1 - torch.ones_like(moved_ST).triu()).min() > 1e-7
    assert model.causal


def test_documents_of_a_row_are_as_rows_of_their_own() -> None:
    model = shaken(build(embed_scale=True))
    ids = tokens(2, 20)
    bounds = [[0, 1, 9, 20], [0, 13, 20]]
    document = torch.zeros_like(ids)
    for row, starts in enumerate(bounds):
        for number, start in enumerate(starts[:-1]):
            document[row, start:] = number
    together = model(ids, document)
    for row, starts in enumerate(bounds):
        for start, stop in pairwise(starts):
            alone = model(ids[row : row + 1, start:stop])[0]
            torch.testing.assert_close(together[row, start:stop], alone, rtol=0, atol=1e-11)
    assert (together - model(ids)).abs().max() > 1e-3
    one = model(ids, torch.zeros_like(ids))
    torch.testing.assert_close(one, model(ids), rtol=0, atol=1e-11)


def test_positions_count_from_the_start_of_a_document() -> None:
    document = torch.tensor([[0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 4, 3]])
    assert positions_within(document).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 0, 0]]
    seen = visible_within(document)[0, 0].int().tolist()
    assert seen[2:5] == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_checkpointing_changes_no_gradient() -> None:
    document = torch.tensor([[0] * 9 + [1] * 15] * 2)
    for given in (None, document):
        grads = []
        for kept in (False, True):
            model = build(checkpoint=kept, dropout=0.2)
            torch.manual_seed(3)
            model(tokens(), given).square().sum().backward()
            grads.append({n: p.grad for n, p in model.named_parameters()})
        for name, grad in grads[0].items():
            assert grad is not None, name
            torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


def test_checkpointing_keeps_less_for_the_backward() -> None:
    kept = []
    for again in (False, True):
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            build(checkpoint=again, depth=4)(tokens())
        kept.append(count)
    assert kept[1] < 0.5 * kept[0]


def test_the_embedding_scale_multiplies_tokens_and_learns() -> None:
    plain, scaled = build(), build(embed_scale=True)
    with torch.no_grad():
        plain.transformer.wte.weight *= 4.0  # sqrt(16)
    hidden = [m.transformer(tokens(), None) for m in (plain, scaled)]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-5, atol=1e-6)
    scaled(tokens()).square().sum().backward()
    scale = scaled.transformer.embed_scale
    assert scale is not None
    assert scale.shape == (1,)
    assert scale.grad is not None
    assert scale.grad.abs().item() > 0
    assert "transformer.embed_scale" not in plain.state_dict()


@pytest.mark.parametrize("norm", ["rmsnorm", "dyt", "derf", "groupnorm"])
def test_another_norm_leaves_all_other_parameters_as_they_were(norm: str) -> None:
    first, other = build("layernorm"), build(norm)
    norms = set(norm_parameters(first)) | set(norm_parameters(other))
    ours = {n: p for n, p in first.named_parameters() if n not in norms}
    theirs = {n: p for n, p in other.named_parameters() if n not in norms}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_sites_are_named_and_every_norm_is_given_the_model_s_eps_and_bias() -> None:
    seen = []

    def norm(dim: int, *, site: str, eps: float, bias: bool) -> nn.Module:
        seen.append((dim, site, eps, bias))
        return make_norm("dyt")(dim, site=site, eps=eps, bias=bias)  # type: ignore[arg-type]

    options = GPT2Options(**SMALL, eps=1e-6, norm_bias=False)
    GPT2(options, norm=norm, vocab_size=V)  # type: ignore[arg-type]
    block = [(16, "attn", 1e-6, False), (16, "ffn", 1e-6, False)]
    assert seen == [*block * 2, (16, "final", 1e-6, False)]
    assert {site for _, site, _, _ in seen} == set(SITES)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, plain = build(dropout=0.5), build()
    assert not torch.equal(model(tokens()), model(tokens()))
    assert torch.equal(model.eval()(tokens()), plain(tokens()))


@pytest.mark.parametrize("kept", [False, True])
def test_it_compiles_as_one_graph(kept: bool) -> None:
    model = build("dyt", depth=1, checkpoint=kept)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    document = torch.tensor([[0] * 9 + [1] * 15] * 2)
    for given in (None, document):
        torch.testing.assert_close(compiled(tokens(), given), model(tokens(), given))
    compiled(tokens()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_under_autocast_the_residual_stays_in_float32(norm: str) -> None:
    model, seen = build(norm, embed_scale=True), []
    model.transformer.h[1].register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(), torch.zeros_like(tokens()))
    assert (logits.dtype, seen) == (torch.bfloat16, [torch.float32])
    torch.testing.assert_close(logits.float(), model(tokens()), rtol=0.05, atol=0.05)
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_one_precision_runs_in_it(dtype: torch.dtype) -> None:
    assert build("dyt", embed_scale=True).to(dtype)(tokens()).dtype == dtype


def test_a_row_longer_than_the_positions_is_refused() -> None:
    model = build()
    assert model(tokens(length=24)).shape == (2, 24, V)
    assert model.max_length == 24
    with pytest.raises(ValueError, match=r"^row of 25 tokens is longer than max_length=24"):
        model(tokens(length=25))


def test_layers_are_counted_from_the_embeddings_to_the_head() -> None:
    model = build(tie_head=False, embed_scale=True)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["transformer.wte.weight"] == layers["transformer.wpe.weight"] == 0
    assert layers["transformer.embed_scale"] == 0
    assert layers["transformer.h.1.attn.c_attn.weight"] == 2
    assert layers["transformer.ln_f.weight"] == layers["lm_head.weight"] == 3
    assert model.no_weight_decay() == set()


def test_operations_are_counted_as_torch_counts_them() -> None:
    for tied in (False, True):
        model = build(tie_head=tied)
        # written out, as the CPU's fused attention is not counted
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens(2, 24))
        counted = 3 * counter.get_total_flops() / (2 * 24)  # the backward is twice the forward
        assert model.training_flops(24) == pytest.approx(counted)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("depth", 0),
        ("heads", 3),
        ("heads", 0),
        ("hidden_dim", -4),
        ("max_length", 0),
        ("vocab_size", 0),
        ("gelu", "relu"),
        ("eps", 0.0),
        ("eps", math.nan),
        ("init_std", -0.1),
        ("dropout", 1.0),
    ],
)
def test_an_option_out_of_range_is_named_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must .*got ") as caught:
        GPT2Options(**{field: value})
    assert "\n" not in str(caught.value)


def test_weights_of_another_head_count_or_gelu_are_told_apart() -> None:
    own = build().state_dict()
    for field, value in (("heads", 2), ("gelu", "exact")):
        other = build(**{field: value}).state_dict()
        assert {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in other.items()}
        assert field in GPT2.fixed_by_weights
