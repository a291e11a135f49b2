"""Caduceus: what is exactly true of it, whatever the norm.

That it is the published network is in test_caduceus_weights.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from suite.norms import NORMS, foreign_norms, make_norm, norm_modules, norm_parameters
from suite.optim import layer_scales, parameter_groups
from tasks.dna.caduceus import CADUCEUS_SIZES, Caduceus, CaduceusOptions, turned
from tasks.dna.heads import ClassHead, LanguageHead
from tasks.dna.mamba import DepthwiseConv, Mamba
from tasks.dna.scan import selective_scan
from tasks.dna.tokens import COMPLEMENT, PAD, ROWS, A, N, other_strand

PUBLISHED_NORM = "rmsnorm"
PER_TOKEN = [name for name, spec in NORMS.items() if spec.causal]
KINDS = {
    "ps": {"rcps": True},
    "ps crosswise": {"rcps": True, "rcps_strand_swap": True},
    "ph": {"rcps": False},
    "mamba": {"rcps": False, "bidirectional": False},
}
DIM, LENGTH = 9, 21


def backbone(norm: str = PUBLISHED_NORM, **options: Any) -> Caduceus:
    """A small model in float64, with weights far from their first values, in evaluation mode."""
    torch.manual_seed(0)
    chosen = CaduceusOptions(**({"dim": DIM, "depth": 2, "state": 3} | options))
    model = Caduceus(chosen, norm=make_norm(norm)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((1.0 if "embedding" in name else 0.2) * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def bases(rows: int = 3, length: int = LENGTH, *, seed: int = 1) -> Tensor:
    """Ids of A, C, G, T and some N."""
    return torch.randint(A, N + 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids_BL: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    at_L = torch.arange(ids_BL.shape[1])
    mask_BL = at_L < torch.tensor(lengths)[:, None]
    return ids_BL.where(mask_BL, PAD), mask_BL


@pytest.mark.parametrize("shape", [(3, LENGTH), (1, 1), (2, 33)])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("norm", PER_TOKEN)
def test_the_other_strand_gives_the_same_numbers_turned_round(
    norm: str, swap: bool, shape: tuple[int, int]
) -> None:
    model = backbone(norm, rcps_strand_swap=swap)
    ids = bases(*shape)
    found = model(ids)
    assert found.shape == (*shape, 2 * DIM)
    assert torch.equal(turned(model(other_strand(ids))), found)
    assert found.std() > 0.01
    assert (found[..., :DIM] - found[..., DIM:]).abs().max() > 0.01


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_over_the_batch_sees_both_strands(training: bool) -> None:
    model = backbone("batchnorm").train(training)
    ids = bases()
    found, other = model(ids), model(other_strand(ids))
    torch.testing.assert_close(turned(other), found, rtol=0, atol=1e-12)
    first = model.layers[0].norm
    assert int(first.num_batches_tracked) == (2 if training else 0)


def test_batch_statistics_are_those_of_both_strands() -> None:
    model = backbone("batchnorm").train()
    ids = bases()
    model(ids)
    embedded = model.embedding(torch.cat([ids, other_strand(ids)]))
    norm: Any = model.layers[0].norm
    fresh: Any = make_norm("batchnorm")(DIM, site="mixer").double()
    fresh.running_mean.copy_(backbone("batchnorm").layers[0].norm.running_mean)  # type: ignore[union-attr,arg-type]
    fresh.train()(embedded)
    torch.testing.assert_close(norm.running_mean, fresh.running_mean)
    torch.testing.assert_close(norm.running_var, fresh.running_var)


@pytest.mark.parametrize("swap", [False, True])
def test_the_language_head_is_equivariant_and_the_class_head_invariant(swap: bool) -> None:
    model = backbone(rcps_strand_swap=swap)
    ids = bases()
    hidden, other = model(ids), model(other_strand(ids))
    language = LanguageHead(DIM, strands=2, embedding=model.embedding, std=0.0)
    logits, turned_back = language(hidden), language(other).flip(1)[..., COMPLEMENT.tolist()]
    torch.testing.assert_close(turned_back, logits, rtol=0, atol=1e-12)
    assert logits.shape[-1] == ROWS
    head = ClassHead(DIM, strands=2, classes=3, std=1.0).double()
    torch.testing.assert_close(head(other), head(hidden), rtol=0, atol=1e-12)
    assert logits.std() > 0.1
    assert head(hidden).std() > 0.01


def test_a_norm_over_both_strands_channels_breaks_equivariance() -> None:
    model = backbone()
    both = model(bases())
    weight = torch.linspace(0.5, 2, 2 * DIM).double()

    def concatenated(both_BLE: Tensor) -> Tensor:
        return F.layer_norm(both_BLE, (2 * DIM,), weight)

    assert (turned(concatenated(turned(both))) - concatenated(both)).abs().max() > 0.1
    halves = [model.norm_f(both[..., :DIM]), turned(model.norm_f(turned(both[..., DIM:])))]
    swapped = turned(both)
    again = [model.norm_f(swapped[..., :DIM]), turned(model.norm_f(turned(swapped[..., DIM:])))]
    assert torch.equal(turned(torch.cat(again, dim=-1)), torch.cat(halves, dim=-1))


@pytest.mark.parametrize(
    ("norm", "kind"),
    [*((n, "ps") for n in NORMS), *((PUBLISHED_NORM, k) for k in KINDS if k != "ps")],
)
def test_a_padded_row_has_the_states_that_it_has_alone(norm: str, kind: str) -> None:
    model = backbone(norm, **KINDS[kind])
    ids, mask = padded(bases(), [LENGTH, 13, 1])
    together = model(ids, mask)
    assert torch.equal(model(ids[:1], mask[:1]), model(ids[:1]))
    for row, length in enumerate([LENGTH, 13, 1]):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=0, atol=1e-12)
    elsewhere = ids.where(mask, A)  # whatever stands in the padding
    torch.testing.assert_close(model(elsewhere, mask)[mask], together[mask], rtol=0, atol=1e-12)
    if kind != "mamba":
        assert (model(elsewhere)[mask] - together[mask]).abs().max() > 1e-6


@pytest.mark.parametrize("norm", [PUBLISHED_NORM, "dyt", "batchnorm"])
def test_padding_changes_neither_the_gradients_nor_the_strands(norm: str) -> None:
    model = backbone(norm).train()
    ids, mask = padded(bases(2, seed=3), [LENGTH, 13])
    found = model(ids, mask)
    other = model(other_strand(ids), mask)
    ends = [found[1, :13], turned(other[1:, :13])[0]]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
    gradients = []
    for filler in (PAD, A):
        model.zero_grad()
        filled = ids.where(mask, filler)
        (model(filled, mask)[mask] ** 2).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


def influence(model: Caduceus, length: int = 12) -> Tensor:
    """[L, L]: how much the state at each position (row) changes with each letter (column)."""
    ids = bases(1, length).expand(length, -1).clone()
    changed = ids.clone()
    at = torch.arange(length)
    changed[at, at] = torch.where(ids[at, at] == A, A + 1, A)
    return (model(changed) - model(ids)).abs().amax(-1).t()


@pytest.mark.parametrize("norm", PER_TOKEN)
def test_mamba_sees_nothing_of_what_follows(norm: str) -> None:
    model = backbone(norm, **KINDS["mamba"])
    assert model.causal
    seen = influence(model)
    assert (seen.triu(1) == 0).all()
    assert (seen.tril() > 0)[torch.ones(12, 12).tril().bool()].all()


@pytest.mark.parametrize("kind", ["ps", "ps crosswise", "ph"])
def test_a_bidirectional_model_sees_everything_from_everywhere(kind: str) -> None:
    model = backbone(depth=1, **KINDS[kind])
    assert not model.causal
    assert (influence(model) > 0).all()


def test_the_second_direction_is_the_first_on_the_reversed_sequence() -> None:
    torch.manual_seed(0)
    mixer = Mamba(6, state=3, kernel=4, expand=2, bidirectional=True, depth=1, scan="auto").double()
    first, second = mixer.directions
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(second(x.flip(1)).flip(1), first(x), rtol=0, atol=1e-12)
    one_way = deepcopy(mixer)
    one_way.directions = one_way.directions[:1]
    h = torch.randn(2, 11, 6, dtype=torch.float64)
    both = one_way(h) + one_way(h.flip(1)).flip(1)
    torch.testing.assert_close(mixer(h), both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_the_convolution_is_torchs(kernel: int) -> None:
    torch.manual_seed(0)
    mixer = Mamba(4, state=2, kernel=kernel, expand=2, bidirectional=True, depth=1, scan="auto")
    x = torch.randn(2, 3, 8)
    for direction in mixer.directions:
        conv: Any = direction.conv1d
        turn = (1,) if direction.reverse else ()
        x_BDL = F.pad(x.flip(turn).transpose(1, 2), (kernel - 1, 0))
        torch.testing.assert_close(
            direction.convolve(x),  # type: ignore[operator]
            conv(x_BDL).transpose(1, 2).flip(turn),
        )


def test_both_directions_share_the_projections_whatever_is_done_to_the_model() -> None:
    model = backbone()
    wanted = {n for n in model.state_dict() if "_proj.weight" in n and ".directions." not in n}
    assert len(wanted) == 2 * 2
    fresh = Caduceus(
        CaduceusOptions(dim=DIM, depth=2, state=3), norm=make_norm(PUBLISHED_NORM)
    ).double()
    fresh.load_state_dict(model.state_dict())
    ids = bases()
    expected = model(ids)
    for copy in (deepcopy(model), fresh):
        assert torch.equal(copy.eval()(ids), expected)
        assert len(list(copy.parameters())) == len(copy.state_dict())
        mixer: Any = copy.layers[0].mixer
        mixer.in_proj.weight.data.zero_()
        assert torch.equal(mixer(torch.ones(1, 5, DIM).double()), torch.zeros(1, 5, DIM).double())
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("kind", ["ps", "ph"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [("1k", 470_702), ("1k_256", 1_934_592), ("32k", 3_864_832), ("131k", 7_725_312)],
)
def test_the_sizes_have_the_published_parameter_counts(size: str, expected: int, kind: str) -> None:
    options = CADUCEUS_SIZES[f"caduceus_{kind}_{size}"]
    assert options.rcps == (kind == "ps")
    model = Caduceus(options, norm=make_norm(PUBLISHED_NORM))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_there_are_depth_plus_one_norms_and_no_others(norm: str) -> None:
    model = backbone(norm, depth=3)
    assert [vars(module)["site"] for _, module in norm_modules(model)] == ["mixer"] * 3 + ["final"]
    assert foreign_norms(model, make_norm(norm)) == []


def test_norms_leave_every_other_parameter_alone() -> None:
    others = []
    for norm in NORMS:
        torch.manual_seed(0)
        model = Caduceus(CaduceusOptions(dim=DIM, depth=2), norm=make_norm(norm))
        own = set(norm_parameters(model))
        others.append({n: p for n, p in model.named_parameters() if n not in own})
    assert len(others[0]) == 1 + 2 * (2 + 2 * 7)
    for found in others[1:]:
        assert found.keys() == others[0].keys()
        assert all(torch.equal(found[n], others[0][n]) for n in found)


@pytest.mark.parametrize("norm", [PUBLISHED_NORM, "derf", "batchnorm"])
def test_recomputing_the_blocks_gives_the_same_gradients(norm: str) -> None:
    plain, again = (backbone(norm, checkpoint=c).train() for c in (False, True))
    ids, mask = padded(bases(), [LENGTH, 13, 2])
    for model in (plain, again):
        (model(ids, mask)[mask] ** 2).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_first_step_sizes_are_mambas() -> None:
    torch.manual_seed(0)
    mixer = Mamba(128, state=16, kernel=4, expand=2, bidirectional=True, depth=4, scan="auto")
    for direction in mixer.directions:
        steps = F.softplus(direction.dt_bias.detach().double())  # type: ignore[operator]
        assert 0.999e-3 < float(steps.min()) < 2e-3
        assert 0.05 < float(steps.max()) < 0.1001
        assert torch.equal(direction.A_log.exp().round()[7], torch.arange(1.0, 17))  # type: ignore[operator]
    bound = (1 / 256) ** 0.5 / 4**0.5  # Kaiming's, over the root of the depth
    assert 0.95 * bound < float(mixer.out_proj.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 3, 2), (2, 6, 2)])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_convolutions_gradients_are_those_of_its_formula(
    reverse: bool, shape: tuple[int, int, int]
) -> None:
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in (shape, (4, shape[-1]), shape[-1:])
    )
    assert torch.autograd.gradcheck(DepthwiseConv.apply, (x, weight, bias, reverse))


def test_bf16_keeps_the_state_of_the_scan_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any, Tensor]] = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        found = selective_scan(*args, **options)
        calls.append((args, options, found.detach()))
        return found

    monkeypatch.setattr("tasks.dna.mamba.selective_scan", recorded)
    model = backbone(depth=1).float()
    ids = bases(2, 200)
    exact = model(ids).detach()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids).detach()
    assert rounded.dtype == torch.float32  # the residual's
    assert float((rounded - exact).norm() / exact.norm()) < 0.03
    assert len(calls) == 4
    for args, options, found in calls:
        assert args[0].dtype == found.dtype == torch.bfloat16
        own = (args[2], options["D_D"], options["delta_bias_D"])
        assert {p.dtype for p in own} == {torch.float32}
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        truth = selective_scan(*(x.double() for x in args), **wide).detach()
        # half a unit in the last of bf16's 8 bits: only the result was rounded
        torch.testing.assert_close(found.double(), truth, rtol=1.02 * 2**-8, atol=1e-5)


def test_a_model_in_bf16_keeps_the_scans_own_parameters_in_float32() -> None:
    model = backbone().float().requires_grad_(False)
    before = model.layers[0].mixer.directions[0].A_log.clone()  # type: ignore[union-attr,index,operator]
    exact = model(bases())
    model.to(torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"layers.{i}.mixer.directions.{j}.{name}"
        for i in range(2)
        for j in range(2)
        for name in ("A_log", "D", "dt_bias")
    }
    assert torch.equal(model.layers[0].mixer.directions[0].A_log, before)  # type: ignore[union-attr,index]
    found = model(bases())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - exact).norm() / exact.norm()) < 0.1
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_is_float32_in_a_model_of_16_bits_if_told_so(wide: bool) -> None:
    model = backbone(residual_in_fp32=wide).to(torch.bfloat16)
    seen: list[torch.dtype] = []
    for _, norm in norm_modules(model):
        norm.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].dtype))
    (model(bases()) ** 2).sum().backward()
    assert seen == [torch.float32 if wide else torch.bfloat16] * 6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_the_published_groups_exempt_is_not_decayed() -> None:
    model = backbone()
    exempt = model.no_weight_decay()
    assert {name.rpartition(".")[2] for name in exempt} == {"weight", "A_log", "D"}
    assert "embedding.weight" in exempt
    assert exempt <= {name for name, _ in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, decay_norm=False, lr=1.0)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n.rpartition("mixer.")[2] for n, p in model.named_parameters() if id(p) in decayed}
    tails = {name.removeprefix("directions.0.").removeprefix("directions.1.") for name in names}
    matrices = ("in_proj", "out_proj", "conv1d", "x_proj", "dt_proj")
    assert tails == {f"{matrix}.weight" for matrix in matrices}


def test_layers_are_numbered_from_the_embedding_to_the_last_norm() -> None:
    model = backbone()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["layers.1.norm.weight"] == 2
    assert layers["norm_f.weight"] == 3
    assert layer_scales(model, 0.5)["embedding.weight"] == 0.125


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"state": -1}, "state must be at least 1"),
        ({"embed_std": -0.1}, "embed_std must be 0 or more"),
        ({"bidirectional": False}, "bidirectional must be true with rcps=true"),
        ({"rcps": False, "rcps_strand_swap": True}, "rcps_strand_swap needs two strands"),
        ({"scan": "fast"}, "scan must be one of auto, "),
    ],
)
def test_options_that_make_no_model_are_refused(options: dict[str, Any], start: str) -> None:
    with pytest.raises(ValueError, match=f"^{start}"):
        CaduceusOptions(**options)
