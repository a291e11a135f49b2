"""Our HyenaDNA: what a position may see, what padding may not do, its sizes and first weights.

That it is the published function is in test_hyena_weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.norms import make_norm, norm_modules, norm_parameters
from tasks.dna import hyena as source
from tasks.dna.hyena import HYENA_SIZES, SITES, HyenaDNA, HyenaOptions, time_features
from tasks.dna.tokens import PAD, A, T

NORMS = ("layernorm", "rmsnorm", "dyt", "derf")
SMALL: dict[str, Any] = {"dim": 8, "depth": 2, "hidden_dim": 12, "filter_dim": 8, "l_max": 40}


def build(norm: str = "layernorm", *, seed: int = 0, **options: Any) -> HyenaDNA:
    torch.manual_seed(seed)
    return HyenaDNA(HyenaOptions(**(SMALL | options)), norm=make_norm(norm))


def shaken(model: HyenaDNA, by: float = 0.3) -> HyenaDNA:
    """Weights far from their first values, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def bases(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(A, T + 1, (rows, length), generator=torch.Generator().manual_seed(2))


def changed(ids_L: Tensor) -> Tensor:
    """[L, L]: in row s the base at position s is another one."""
    return ids_L + torch.diag(torch.where(ids_L == A, 1, -1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("conv", "leak"), [("fft", 1e-12), ("direct", 0.0)])
def test_no_position_sees_a_later_one(norm: str, conv: str, leak: float) -> None:
    model = shaken(build(norm, conv=conv))
    ids = bases(1)
    change_SLC = (model(changed(ids[0])) - model(ids)).abs()
    moved_SL = change_SLC.amax(dim=-1)
    assert moved_SL.tril(-1).max() <= leak
    assert moved_SL.diagonal().min() > 1e-4
    assert model.causal


@pytest.mark.parametrize("conv", ["fft", "direct"])
def test_a_two_sided_model_sees_every_position_from_every_other(conv: str) -> None:
    model = shaken(build(bidirectional=True, conv=conv))
    ids = bases(1)
    moved_SL = (model(changed(ids[0])) - model(ids)).abs().amax(dim=-1)
    assert moved_SL.min() > 1e-7
    assert not model.causal


def test_both_ways_of_computing_the_convolution_agree() -> None:
    for two_sided in (False, True):
        fft, direct = (
            shaken(build(conv=conv, bidirectional=two_sided)) for conv in ("fft", "direct")
        )
        torch.testing.assert_close(fft(bases()), direct(bases()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "dyt", "batchnorm"])
def test_padding_leaves_the_real_positions_alone(norm: str, two_sided: bool) -> None:
    model = shaken(build(norm, bidirectional=two_sided))
    ids, padded = bases(length=13), torch.full((2, 20), PAD)
    padded[:, :13] = ids
    mask = padded != PAD
    alone = model(ids)
    torch.testing.assert_close(model(padded, mask)[:, :13], alone, rtol=0, atol=1e-10)
    padded[:, 13:] = A  # whatever stands there
    torch.testing.assert_close(model(padded, mask)[:, :13], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids, torch.ones_like(ids).bool()), alone, rtol=0, atol=0)
    if two_sided:  # and without the mask it would not
        assert (model(padded)[:, :13] - alone).abs().max() > 1e-3


def test_batch_statistics_leave_padding_out() -> None:
    ids = bases(length=13)
    padded = nn.functional.pad(ids, (0, 7), value=PAD)
    model = shaken(build("batchnorm", bidirectional=True, embed_dropout=0.0)).train()
    expected = model(ids)
    torch.testing.assert_close(model(padded, padded != PAD)[:, :13], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("hyenadna_tiny_1k", 436_096),
        ("hyenadna_tiny_1k_d256", 1_641_088),
        ("hyenadna_tiny_16k", 436_096),
        ("hyenadna_small_32k", 3_277_568),
        ("hyenadna_medium_160k", 6_550_528),
        ("hyenadna_medium_450k", 6_550_528),
        ("hyenadna_large_1m", 6_550_528),
    ],
)
def test_a_published_size_has_its_parameters_and_norms(size: str, count: int) -> None:
    with torch.device("meta"):
        model = HyenaDNA(HYENA_SIZES[size], norm=make_norm("layernorm"))
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())  # what is published besides is computed from the options
    assert len(list(norm_modules(model))) == 2 * model.depth + 1


def test_sites_are_named_and_every_norm_is_the_chosen_one() -> None:
    seen = []

    def norm(dim: int, *, site: str, eps: float) -> nn.Module:
        seen.append((dim, site, eps))
        return make_norm("dyt")(dim, site=site, eps=eps)  # type: ignore[arg-type]

    HyenaDNA(HyenaOptions(**SMALL), norm=norm)  # type: ignore[arg-type]
    assert seen == [(8, "mixer", 1e-5), (8, "ffn", 1e-5)] * 2 + [(8, "final", 1e-5)]
    assert {site for _, site, _ in seen} == set(SITES)


@pytest.mark.parametrize("norm", ["rmsnorm", "dyt", "derf", "batchnorm"])
def test_another_norm_leaves_all_other_parameters_as_they_were(norm: str) -> None:
    first, other = build("layernorm", bidirectional=True), build(norm, bidirectional=True)
    norms = set(norm_parameters(first)) | set(norm_parameters(other))
    ours = {n: p for n, p in first.named_parameters() if n not in norms}
    theirs = {n: p for n, p in other.named_parameters() if n not in norms}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_first_weights_are_as_published() -> None:
    model = build(dim=128, depth=4, hidden_dim=512, filter_dim=64, embed_std=0.7)
    last = 0.02 / math.sqrt(2 * 4)
    expected = {
        "in_proj.weight": 0.02,
        "out_proj.weight": last,
        "fc1.weight": 0.02,
        "fc2.weight": last,
        "filter.out.weight": 0.02,
        "filter.layers.1.weight": 0.02,
        "embedding.weight": 0.7,
        "mixer.skip": 1.0,
    }
    for end, std in expected.items():
        values = [p for n, p in model.named_parameters() if n.endswith(end)]
        spread = torch.cat([p.flatten() for p in values]).std()
        assert spread.item() == pytest.approx(std, rel=0.1), end
    for name, p in model.named_parameters():
        if name.endswith("filter.freq"):
            assert (p == 10).all()
        elif name.endswith("bias") and "short_filter" not in name:
            assert (p == 0).all(), name


def test_the_filter_depends_on_l_max_and_on_the_shift() -> None:
    ids = bases()
    outputs = [
        shaken(build(**options))(ids)
        for options in ({}, {"l_max": 41}, {"modulation_shift": 0.0}, {"filter_freq": 9.0})
    ]
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() > 1e-3
    assert HyenaDNA.fixed_by_weights == ("l_max", "modulation_shift")
    own, other = (set(build(**o).state_dict()) for o in ({}, {"bidirectional": True}))
    assert own < other  # which is why a two-sided model needs no such mention


def test_the_decay_runs_from_one_to_the_shift() -> None:
    module: Any = build(dim=5, modulation_shift=0.25).blocks[0]
    decay = module.mixer.filter.decay(torch.tensor([[0.0], [0.3], [1.5], [1e9]]).double())
    assert decay[0].tolist() == [1.25] * 5
    assert decay[1, -1] == pytest.approx(0.25 + 1e-2)
    assert decay[2, 0] == pytest.approx(0.25 + 1e-2)
    assert decay[3].tolist() == [0.25] * 5
    assert (decay[1].diff() < 0).all()


def test_a_shorter_input_has_the_beginning_of_the_longer_one_s_filter() -> None:
    options = {"l_max": 40, "features": 5, "like": torch.zeros(1).double()}
    short, long = (time_features(n, **options) for n in (7, 40))  # type: ignore[arg-type]
    assert torch.equal(short, long[:7])
    assert long[0].tolist() == [0, 1, 1, 0, 0]
    assert long[-1, 0] == 1


def test_a_sequence_longer_than_l_max_is_refused() -> None:
    model = build(l_max=24)
    assert model(bases(length=24)).shape == (2, 24, 8)
    with pytest.raises(ValueError, match="sequence of 25 positions is longer than l_max=24"):
        model(bases(length=25))


@pytest.mark.parametrize("two_sided", [False, True])
def test_checkpointing_changes_no_gradient(two_sided: bool) -> None:
    grads = []
    for kept in (False, True):
        model = build(checkpoint=kept, bidirectional=two_sided, dropout=0.2)
        torch.manual_seed(3)
        model(bases()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)


def test_under_autocast_filter_and_transforms_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = build(), []
    rfft, sin = torch.fft.rfft, torch.sin

    def watched_rfft(x: Tensor, **size: int) -> Tensor:
        seen.append(x.dtype)
        return rfft(x, **size)

    def watched_sin(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return sin(x)

    monkeypatch.setattr(torch.fft, "rfft", watched_rfft)
    monkeypatch.setattr(source.torch, "sin", watched_sin)
    projected: list[torch.dtype] = []
    block: Any = model.blocks[0]
    block.mixer.in_proj.register_forward_hook(lambda m, i, y: projected.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(bases())
    hidden.float().square().sum().backward()
    assert projected == [torch.bfloat16]
    assert len(seen) >= 2 * (3 + 2 + 3)  # sines, transforms forward, transforms backward
    assert set(seen) == {torch.float32}
    assert hidden.dtype == torch.float32  # the residual and the norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_one_precision_runs_in_it(dtype: torch.dtype) -> None:
    model = build(bidirectional=True).to(dtype)
    hidden = model(bases())
    assert hidden.dtype == dtype
    hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiling_changes_nothing() -> None:
    model = build(bidirectional=True, depth=1).eval()
    ids = nn.functional.pad(bases(length=13), (0, 3), value=PAD)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids != PAD), model(ids, ids != PAD))


def test_layers_are_counted_from_the_embedding_to_the_final_norm() -> None:
    model = build()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["embedding.weight"] == 0
    assert layers["blocks.1.mixer.skip"] == 2
    assert layers["final_norm.weight"] == 3
    assert set(layers.values()) == {0, 1, 2, 3}


def test_embedding_and_filters_are_not_decayed_and_projections_are() -> None:
    model = build(bidirectional=True)
    exempt, names = model.no_weight_decay(), {n for n, _ in model.named_parameters()}
    assert exempt <= names
    block = "blocks.0.mixer."
    for part in ("filter.freq", "filter.layers.0.weight", "reverse_filter.out.weight"):
        assert block + part in exempt
    assert "embedding.weight" in exempt
    for part in ("short_filter.weight", "in_proj.weight", "out_proj.weight"):
        assert block + part not in exempt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("depth", 0),
        ("l_max", 1),
        ("filter_embed", 4),
        ("filter_embed", 1),
        ("filter_layers", -1),
        ("filter_freq", 0.0),
        ("modulation_shift", math.nan),
        ("short_kernel", 0),
        ("embed_dropout", 1.0),
        ("dropout", -0.1),
        ("init_std", -1.0),
        ("conv", "winograd"),
    ],
)
def test_an_option_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        HyenaOptions(**{field: value})


def test_batch_statistics_move_once_a_step_with_checkpoints_too() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        options = HyenaOptions(dim=8, depth=1, hidden_dim=16, filter_dim=8, checkpoint=again)
        model = HyenaDNA(options, norm=make_norm("batchnorm")).train()
        model(
            torch.randint(7, 11, (2, 12), generator=torch.Generator().manual_seed(1))
        ).sum().backward()
        found.append({k: v for k, v in model.state_dict().items() if "running" in k})
    assert found[0]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
