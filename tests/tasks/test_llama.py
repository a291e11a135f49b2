"""Our LLaMA: what a position may see, its precision, its sizes and first weights.

That it is the published function is in test_llama_weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.initial import drawn, init_weights, own_parameters, reset_norms
from suite.norms import make_norm, norm_modules
from tasks.language.llama import LLAMA_SIZES, SITES, Llama, LlamaOptions
from tasks.language.rope import rotary, rotate

ROWS = 31
SMALL: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 6, "kv_heads": 2, "hidden_dim": 40}
State = dict[str, Tensor]


def build(norm: str = "rmsnorm", *, seed: int = 0, rows: int = ROWS, **options: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaOptions(**(SMALL | options)), norm=make_norm(norm), vocab_size=rows)


@torch.no_grad()
def shaken(model: Llama, by: float = 0.3) -> Llama:
    """Weights far from their first values, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(by * torch.randn(p.shape, generator=generator))
    return model.eval()


def tokens(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(0, ROWS, (rows, length), generator=torch.Generator().manual_seed(2))


def grads(model: nn.Module, logits_BTV: Tensor) -> State:
    weigh = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (logits_BTV.float() * weigh).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- what a position sees ---


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "dyt", "derf"])
def test_a_later_token_changes_nothing_before_it(norm: str) -> None:
    model, ids = shaken(build(norm)), tokens(1)
    other = ids.repeat(13, 1)
    other[range(13), range(13)] = (ids[0] + 1) % ROWS  # row s has another token at position s
    moved_ST = (model(other) - model(ids.repeat(13, 1))).abs().amax(dim=-1)
    assert moved_ST.tril(-1).max() == 0
    assert moved_ST.diagonal().min() > 1e-3
    assert moved_ST[0].min() > 1e-7  # and what is later sees it
    assert model.causal


def test_documents_in_a_row_are_as_alone() -> None:
    model, ids = shaken(build()), tokens()
    document = torch.zeros(2, 13, dtype=torch.int64)
    document[0, 5:], document[0, 12:] = 1, 2
    document[1, 1:] = 1
    found = model(ids, document)
    for row, start, end in ((0, 0, 5), (0, 5, 12), (0, 12, 13), (1, 0, 1), (1, 1, 13)):
        alone = model(ids[row : row + 1, start:end])[0]
        torch.testing.assert_close(found[row, start:end], alone, rtol=1e-4, atol=1e-5)
    assert (found - model(ids)).abs().max() > 0.1  # without it, they see each other


def test_one_document_is_as_none() -> None:
    model, ids = shaken(build()), tokens()
    found = model(ids, torch.full_like(ids, 7))
    torch.testing.assert_close(found, model(ids), rtol=1e-5, atol=1e-5)


def test_a_score_depends_on_the_distance_alone() -> None:
    g = torch.Generator().manual_seed(4)
    q_D, k_D = torch.randn(2, 16, generator=g, dtype=torch.float64)
    cos_TD, sin_TD = rotary(40, head_dim=16, theta=100.0, like=q_D)
    q_TD, k_TD = (rotate(x.expand(40, 16), cos_TD=cos_TD, sin_TD=sin_TD) for x in (q_D, k_D))
    score_TT = q_TD @ k_TD.T
    for distance in (0, 1, 17):
        along = score_TT.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert score_TT[0, 0] == pytest.approx((q_D @ k_D).item())  # position 0 is not turned
    assert score_TT[0].std() > 0.1
    torch.testing.assert_close(q_TD.norm(dim=-1), q_D.norm().expand(40))


# --- precision, checkpoints, compilation, the meta device ---


def test_under_autocast_angles_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build(), []
    attend = nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype, rest["enable_gqa"]))
        return attend(q, k, v, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        cos_TD, sin_TD = rotary(1000, head_dim=4, theta=1e4, like=torch.zeros(1).bfloat16())
        found = grads(model, model(tokens()))
    assert cos_TD.dtype == sin_TD.dtype == torch.float32
    assert cos_TD[999, 0].item() == pytest.approx(math.cos(999), abs=1e-5)
    assert seen == [(torch.bfloat16,) * 3 + (True,)] * 2  # the kernel that has groups
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float64, 1e-4)])
def test_a_model_of_one_precision_runs_in_it(
    dtype: torch.dtype, limit: float, documents: bool
) -> None:
    ids = tokens()
    document = (torch.arange(13) // 5).expand(2, 13) if documents else None
    expected = shaken(build(), by=0.1)(ids, document)
    found = shaken(build(), by=0.1).to(dtype)(ids, document)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("documents", [False, True])
def test_checkpoints_change_no_gradient(documents: bool) -> None:
    document = (torch.arange(13) // 5).expand(2, 13) if documents else None
    plain, again = (shaken(build(checkpoint=kept)).train() for kept in (False, True))
    calls: list[int] = []
    first: Any = again.model.layers[0]
    first.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = (grads(m, m(tokens(), document)) for m in (plain, again))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=0, msg=name)
    assert len(calls) == 2  # once forward, once in the backward


def test_it_compiles_into_one_graph() -> None:
    model = build(checkpoint=True, embed_scale=True)
    document = (torch.arange(13) // 5).expand(2, 13)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for given in (None, document):
        torch.testing.assert_close(compiled(tokens(), given), model(tokens(), given))


@pytest.mark.parametrize("options", [{}, {"tie_head": True, "embed_scale": True}])
def test_a_model_of_the_meta_device_is_filled_parameter_by_parameter(
    options: dict[str, Any],
) -> None:
    expected = build("dyt", seed=9, **options)
    with torch.device("meta"):
        model = build("dyt", seed=1, **options)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for name, parameter in own_parameters(model):
            parameter.copy_(drawn(model, name, parameter, seed=9))
    reset_norms(model)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model(tokens()), expected(tokens()))


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("llama_tiny", 804_225),
        ("llama_124m", 134_105_856),
        ("llama_1b", 1_100_048_384),
        ("llama_7b", 6_738_415_616),
        ("llama_13b", 13_015_864_320),
        ("llama_34b", 33_743_970_304),
        ("llama_70b", 68_976_648_192),
    ],
)
def test_a_size_has_its_published_parameters_and_norms(size: str, count: int) -> None:
    with torch.device("meta"):
        model = Llama(LLAMA_SIZES[size], norm=make_norm("rmsnorm"), vocab_size=257)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(list(norm_modules(model))) == 2 * model.depth + 1
    assert model.shard_units() == list(model.model.layers)
    assert len(model.shard_units()) == model.depth


def test_sizes_cover_what_is_listed() -> None:
    for size in LLAMA_SIZES.values():
        assert size.vocab_size in (None, 32_000)
        assert not size.norm_bias
        assert size.embed_scale == (size.vocab_size is None)  # tiny alone


def test_a_token_costs_six_operations_a_weight_and_attention() -> None:
    blocks = 2 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40)
    expected = 6 * (blocks + ROWS * 24) + 12 * 2 * 24 * 100
    assert build().training_flops(100) == expected
    assert build(tie_head=True, embed_scale=True).training_flops(100) == expected
    with torch.device("meta"):
        large = Llama(LLAMA_SIZES["llama_7b"], norm=make_norm("dyt"), vocab_size=32_000)
    assert large.training_flops(4096) == pytest.approx(6 * 6.607e9 + 12 * 32 * 4096**2, rel=1e-3)


@pytest.mark.parametrize("norm_bias", [False, True])
def test_norms_stand_at_their_sites_with_what_was_published(norm_bias: bool) -> None:
    seen = []

    def norm(dim: int, *, site: str, **published: Any) -> nn.Module:
        seen.append((dim, site, published))
        return make_norm("dyt")(dim, site=site, **published)

    options = LlamaOptions(**SMALL, eps=1e-4, norm_bias=norm_bias)
    model = Llama(options, norm=norm, vocab_size=ROWS)  # type: ignore[arg-type]
    told = {"eps": 1e-4, "bias": norm_bias}
    assert seen == [(24, site, told) for site in ("attn", "ffn", "attn", "ffn", "final")]
    assert {site for _, site, _ in seen} == set(SITES)
    parts = {name for _, made in norm_modules(model) for name, _ in made.named_parameters()}
    assert parts == {"alpha", "weight"} | ({"bias"} if norm_bias else set())


# --- first weights ---


@pytest.mark.parametrize("norm", ["dyt", "derf", "layernorm"])
def test_another_norm_leaves_all_other_parameters_as_they_were(norm: str) -> None:
    ours, theirs = (dict(own_parameters(build(n, embed_scale=True))) for n in ("rmsnorm", norm))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 7 + 3
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


@pytest.mark.parametrize("depth_init", [True, False])
def test_first_weights_are_normal_and_smaller_at_the_end_of_a_branch(depth_init: bool) -> None:
    model = build(dim=96, depth=3, hidden_dim=192, rows=300, init_std=0.05, depth_init=depth_init)
    last = 0.05 / math.sqrt(2 * 3) if depth_init else 0.05
    for name, p in own_parameters(model):
        std = last if "o_proj" in name or "down_proj" in name else 0.05
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name


def test_first_weights_follow_from_the_seed_alone() -> None:
    first, again, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)  # type: ignore[union-attr]
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)  # type: ignore[union-attr]
    init_weights(other, seed=3)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


def test_the_embedding_scale_begins_at_the_root_of_the_width_and_is_learned() -> None:
    model, plain = build("dyt", embed_scale=True), build("dyt")
    scale = model.get_parameter("model.embed_scale")
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(math.sqrt(24))
    with torch.no_grad():
        plain.get_parameter("model.embed_tokens.weight").mul_(math.sqrt(24))
    torch.testing.assert_close(model(tokens()), plain(tokens()))
    assert grads(model, model(tokens()))["model.embed_scale"].abs() > 0


# --- roles, rows, options ---


def test_layers_are_counted_from_the_embedding_to_the_head_and_all_decay() -> None:
    model = build(embed_scale=True)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["model.embed_tokens.weight"] == layers["model.embed_scale"] == 0
    assert layers["model.layers.1.mlp.up_proj.weight"] == 2
    assert layers["model.norm.weight"] == layers["lm_head.weight"] == 3
    assert set(layers.values()) == {0, 1, 2, 3}
    assert model.no_weight_decay() == set()


def test_rows_are_the_data_s_unless_they_are_given() -> None:
    assert build()(tokens()).shape == (2, 13, ROWS)
    assert build(vocab_size=40)(tokens()).shape == (2, 13, 40)
    with pytest.raises(ValueError, match=r"^vocab_size must be at least the data's 31, got 30$"):
        build(vocab_size=30)
    assert Llama.max_length is None


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("dim", {"dim": 0}),
        ("dim", {"dim": 130}),  # no multiple of the heads
        ("dim", {"dim": 12}),  # heads of 3 channels
        ("depth", {"depth": 0}),
        ("heads", {"heads": -4}),
        ("kv_heads", {"kv_heads": 3}),
        ("kv_heads", {"kv_heads": 8}),
        ("kv_heads", {"kv_heads": 0}),
        ("hidden_dim", {"hidden_dim": 0}),
        ("vocab_size", {"vocab_size": 0}),
        ("rope_theta", {"rope_theta": 0.0}),
        ("rope_theta", {"rope_theta": math.inf}),
        ("eps", {"eps": math.nan}),
        ("init_std", {"init_std": -0.1}),
    ],
)
def test_an_option_out_of_range_is_named_in_one_line(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field} must .*got .*{wrong[field]}") as caught:
        LlamaOptions(**wrong)
    assert "\n" not in str(caught.value)
