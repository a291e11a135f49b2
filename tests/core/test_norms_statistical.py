"""Statistics norms: equal to torch's, in every layout, with padding, dtypes and over ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from suite.norms import (
    NORMS,
    BatchNormOptions,
    GroupNormOptions,
    PointwiseOptions,
    StatisticsOptions,
    make_norm,
)
from suite.norms.statistical import _moments, default_groups

torch.set_num_threads(1)

STATISTICS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", "scalenorm", "identity")
DIM = 16


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers with a mean and a scale that a norm has to remove."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * x + 1.5


def disturbed(module: nn.Module) -> nn.Module:
    """The module in float64 with parameters that are not 0 or 1."""
    module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()) + index)
    return module


def with_same_affine(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    theirs.double().load_state_dict(dict(ours.named_parameters()), strict=False)
    return theirs


def first(module: nn.Module, x: Tensor) -> Tensor:
    """A channels-first module applied to a channels-last input."""
    return module(x.movedim(-1, 1)).movedim(1, -1)


def test_the_table_has_these_and_the_pointwise_ones() -> None:
    pointwise = {name for name, spec in NORMS.items() if spec.options == PointwiseOptions()}
    assert set(NORMS) - pointwise == set(STATISTICS)


@pytest.mark.parametrize("shape", [(3, DIM), (2, 5, DIM), (2, 3, 4, DIM)])
def test_layernorm_and_rmsnorm_equal_torchs(shape: tuple[int, ...]) -> None:
    x = rand(*shape)
    for name, theirs in (("layernorm", nn.LayerNorm), ("rmsnorm", nn.RMSNorm)):
        ours = disturbed(make_norm(name)(DIM, site="attn", eps=1e-3))
        torch.testing.assert_close(ours(x), with_same_affine(theirs(DIM, eps=1e-3), ours)(x))


def test_scalenorm_is_the_unit_vector_times_root_dim_and_one_learned_scale() -> None:
    x = rand(2, 5, DIM)
    module = make_norm("scalenorm")(DIM, site="attn", eps=1e-12).double()
    module.weight.data.fill_(0.7)
    assert [tuple(p.shape) for p in module.parameters()] == [(1,)]
    expected = 0.7 * DIM**0.5 * x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("shape", "theirs"),
    [
        ((6, DIM), nn.BatchNorm1d),
        ((3, 5, DIM), nn.BatchNorm1d),
        ((2, 3, 4, DIM), nn.BatchNorm2d),
    ],
)
def test_batchnorm_equals_torchs_in_training_and_evaluation(
    shape: tuple[int, ...], theirs: type[nn.Module]
) -> None:
    for channels_first in (True, False):
        ours = disturbed(make_norm("batchnorm")(DIM, site="stem", channels_first=channels_first))
        reference = with_same_affine(theirs(DIM), ours)
        for seed in range(3):
            x = rand(*shape, seed=seed)
            got = first(ours, x) if channels_first else ours(x)
            torch.testing.assert_close(got, first(reference, x))
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
        ours.eval(), reference.eval()
        got = first(ours, x) if channels_first else ours(x)
        torch.testing.assert_close(got, first(reference, x))


def test_groupnorm_equals_torchs_over_positions_and_stays_within_a_token() -> None:
    factory = make_norm("groupnorm", GroupNormOptions(groups=4))
    for shape in ((2, 5, DIM), (2, 3, 4, DIM)):
        x = rand(*shape)
        over = disturbed(factory(DIM, site="stem", channels_first=True))
        theirs = with_same_affine(nn.GroupNorm(4, DIM), over)
        torch.testing.assert_close(first(over, x), first(theirs, x))
    image = disturbed(factory(DIM, site="stem"))
    torch.testing.assert_close(image(x), first(theirs, x))
    tokens = rand(2, 5, DIM)
    within = disturbed(factory(DIM, site="attn"))
    expected = torch.stack([theirs(tokens[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(within(tokens), expected)


def test_groupnorm_of_one_group_is_layernorm_on_tokens() -> None:
    x = rand(2, 5, DIM)
    grouped = make_norm("groupnorm", GroupNormOptions(groups=1))(DIM, site="attn").double()
    torch.testing.assert_close(grouped(x), make_norm("layernorm")(DIM, site="attn").double()(x))


def test_default_groups_divide_and_keep_eight_channels_each() -> None:
    chosen = {dim: default_groups(dim) for dim in (1, 6, 12, 16, 64, 96, 768, 1024)}
    assert chosen == {1: 1, 6: 1, 12: 1, 16: 2, 64: 8, 96: 12, 768: 32, 1024: 32}
    with pytest.raises(ValueError, match="groups must divide the 16 channels, got 5"):
        make_norm("groupnorm", GroupNormOptions(groups=5))(DIM, site="attn")


@pytest.mark.parametrize("name", STATISTICS)
def test_channels_first_equals_channels_last(name: str) -> None:
    """GroupNorm is apart: on [B, T, C] it stays in the token, on [B, C, T] it is torch's."""
    shapes = [(3, DIM), (2, 3, 4, DIM)] + ([] if name == "groupnorm" else [(2, 5, DIM)])
    for shape in shapes:
        x = rand(*shape)
        last = disturbed(make_norm(name)(DIM, site="stem"))
        other = disturbed(make_norm(name)(DIM, site="stem", channels_first=True))
        torch.testing.assert_close(first(other, x), last(x))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, masked: bool) -> None:
    module = disturbed(make_norm(name)(8, site="stem", channels_first=True))
    mask = torch.tensor([[True, True, False], [True, False, False]]) if masked else None

    def apply(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x, mask))

    inputs = (rand(2, 8, 3), *(p.detach() for p in module.parameters()))
    assert torch.autograd.gradcheck(apply, tuple(t.clone().requires_grad_() for t in inputs))


@pytest.mark.parametrize("channels_first", [False, True])
def test_masked_batchnorm_is_batchnorm_over_the_valid_positions_alone(
    channels_first: bool,
) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    ours = disturbed(make_norm("batchnorm")(DIM, site="stem", channels_first=channels_first))
    theirs = with_same_affine(nn.BatchNorm1d(DIM), ours)
    for seed in range(2):
        x = rand(3, 5, DIM, seed=seed)
        x[~mask] = 1e3  # what stands in the padding must not matter
        x_in = (x.movedim(-1, 1) if channels_first else x).clone().requires_grad_()
        x_valid = x[mask].clone().requires_grad_()
        got, expected = ours(x_in, mask), theirs(x_valid)
        got = got.movedim(1, -1) if channels_first else got
        torch.testing.assert_close(got[mask], expected)
        (got[mask] ** 3).sum().backward()
        (expected**3).sum().backward()
        assert x_in.grad is not None
        grad = x_in.grad.movedim(1, -1) if channels_first else x_in.grad
        torch.testing.assert_close(grad[mask], x_valid.grad)
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


def test_a_mask_of_examples_covers_all_their_positions() -> None:
    module = make_norm("batchnorm")(DIM, site="stem", channels_first=True).double()
    x = rand(3, DIM, 2, 2)
    expected = copy.deepcopy(module)(x[:2])
    got = module(x, torch.tensor([True, True, False]))
    torch.testing.assert_close(got[:2], expected)


def test_a_batch_without_valid_positions_leaves_the_running_statistics() -> None:
    module = make_norm("batchnorm")(DIM, site="attn").double()
    y = module(rand(2, 3, DIM), torch.zeros(2, 3, dtype=torch.bool))
    assert y.isfinite().all()
    assert module.running_mean.abs().sum() == 0
    assert torch.equal(module.running_var, torch.ones(DIM).double())
    assert module.num_batches_tracked == 0


def test_masked_groupnorm_is_groupnorm_of_the_cut_example() -> None:
    module = disturbed(make_norm("groupnorm")(DIM, site="stem", channels_first=True))
    x = rand(2, DIM, 6)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    y = module(x, mask)
    torch.testing.assert_close(y[:1, :, :4], module(x[:1, :, :4]))
    torch.testing.assert_close(y[1:], module(x[1:]))


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "scalenorm", "identity", "groupnorm"])
def test_norms_within_a_token_ignore_the_mask_and_other_tokens(name: str) -> None:
    module = disturbed(make_norm(name)(DIM, site="attn"))
    x = rand(2, 5, DIM)
    changed = x.clone()
    changed[:, 3:] = 7.0
    y = module(x, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(y, module(x))
    assert torch.equal(module(changed)[:, :3], y[:, :3])
    assert NORMS[name].causal


def test_batchnorm_says_that_it_is_not_causal() -> None:
    assert not make_norm("batchnorm").causal
    assert not make_norm("dyt", PointwiseOptions(by_site={"stem": "batchnorm"})).causal
    assert make_norm("dyt").causal


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_statistics_in_float32_and_the_output_in_the_inputs_dtype(
    name: str, layout: str, parameters: torch.dtype
) -> None:
    """Rounded once; where torch's own bf16 kernel is used (same dtypes), it may round twice."""
    shape = (2, 40, DIM) if layout == "tokens" else (2, DIM, 5, 8)
    build = make_norm(name)(DIM, site="attn", channels_first=layout == "images")
    for parameter in build.parameters():  # numbers that bf16 cannot hold
        parameter.data.copy_(torch.linspace(0.51, 1.5, parameter.numel()))
    reference = copy.deepcopy(build.to(parameters)).float()
    x = (rand(*shape).float() + 20).bfloat16()  # a large mean ruins bf16 statistics
    expected = reference(x.float()).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = build(x)
        assert y.dtype == torch.bfloat16
        if parameters == torch.float32:
            assert torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("name", STATISTICS)
def test_float64_stays_float64_and_mixed_parameters_work(name: str) -> None:
    module = make_norm(name)(DIM, site="attn")
    x = rand(2, 5, DIM)
    y = module(x)
    assert y.dtype == torch.float64
    exact = copy.deepcopy(module).double()
    torch.testing.assert_close(y, exact(x))
    assert module.double()(x.float()).dtype == torch.float32


def test_what_the_model_passes_holds_unless_the_options_say_otherwise() -> None:
    def names(norm: str, options: StatisticsOptions | None = None, **passed: bool) -> list[str]:
        module = make_norm(norm, options)(DIM, site="attn", **passed)
        return [name for name, _ in module.named_parameters()]

    assert names("layernorm") == ["weight", "bias"]
    assert names("layernorm", bias=False) == ["weight"]
    assert names("layernorm", affine=False) == []
    assert names("rmsnorm") == names("scalenorm") == ["weight"]  # published without a bias
    assert names("rmsnorm", StatisticsOptions(bias=True)) == ["weight", "bias"]
    assert names("layernorm", StatisticsOptions(bias=False)) == ["weight"]
    assert names("layernorm", StatisticsOptions(weight=False)) == ["bias"]
    assert names("layernorm", StatisticsOptions(weight=True), affine=False) == ["weight"]
    assert names("identity") == []
    assert make_norm("layernorm")(DIM, site="attn", eps=1e-6).eps == 1e-6
    assert (
        make_norm("layernorm", StatisticsOptions(eps=1e-3))(DIM, site="attn", eps=1e-6).eps == 1e-3
    )


@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_norm_can_be_made_on_the_meta_device_and_started_later(name: str) -> None:
    with torch.device("meta"):
        late = make_norm(name)(DIM, site="attn")
    late.to_empty(device="cpu")
    if name != "identity":
        late.reset_parameters()
    for key, value in make_norm(name)(DIM, site="attn").state_dict().items():
        assert torch.equal(late.state_dict()[key], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: StatisticsOptions(eps=0.0), "^eps must be a positive number, got 0.0"),
        (lambda: BatchNormOptions(momentum=1.5), "^momentum must be above 0 and at most 1"),
        (lambda: GroupNormOptions(groups=0), "^groups must be a whole number"),
    ],
)
def test_wrong_options_are_refused_by_name(options: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x = rand(7, 4, DIM)
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4, 2])[:, None]
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    part = x[mine].clone().requires_grad_()
    valid = mask[mine].unsqueeze(-1)
    mean, var, count = _moments(part, valid, over_ranks=True)
    z = (part - mean) * torch.rsqrt(var + 1e-5)
    (torch.where(valid, z, 0) ** 3).sum().backward()
    refused = ""
    try:
        make_norm("batchnorm")(DIM, site="attn").double()(part)
    except ValueError as error:
        refused = str(error)
    alone = make_norm("batchnorm", BatchNormOptions(sync=False))(DIM, site="attn").double()
    result = {"mean": mean.detach(), "var": var.detach(), "count": count, "grad": part.grad}
    torch.save(result | {"refused": refused, "alone": alone(part).detach()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_batchnorm_over_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synced moments and gradients are one process's; on CPU ranks it is refused."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = rand(7, 4, DIM).requires_grad_()
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4, 2])[:, None]
    valid = x[mask]
    z = (valid - valid.mean(0)) * torch.rsqrt(valid.var(0, unbiased=False) + 1e-5)
    (z**3).sum().backward()
    for result in ranks:
        torch.testing.assert_close(result["mean"], valid.mean(0).detach())
        torch.testing.assert_close(result["var"], valid.var(0, unbiased=False).detach())
        assert result["count"] == mask.sum()
        assert "norm.sync=false" in result["refused"]
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([ranks[0]["grad"], ranks[1]["grad"]]), x.grad)
    one = make_norm("batchnorm")(DIM, site="attn").double()
    torch.testing.assert_close(ranks[0]["alone"], one(x[:3]).detach())


@pytest.mark.parametrize("masked", [False, True])
def test_batchnorm_of_one_value_leaves_the_running_variance(masked: bool) -> None:
    """torch refuses it in the middle of a run: one real row of a last batch, at 1 x 1."""
    norm = make_norm("batchnorm")(3, site="mixer", channels_first=True)
    x = torch.tensor([2.0, -1.0, 5.0]).view(1, 3, 1, 1)
    mask = torch.ones(1, dtype=torch.bool) if masked else None
    assert torch.equal(norm.train()(x, mask), torch.zeros(1, 3, 1, 1))
    assert torch.equal(norm.running_var, torch.ones(3))
    torch.testing.assert_close(norm.running_mean, 0.1 * x.flatten())


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "groupnorm"])
def test_gradients_of_sixteen_bit_parameters_are_summed_in_float32(name: str) -> None:
    layer = make_norm(name)(16, site="attn")
    x, dy = (torch.randn(4000, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    layer(x.bfloat16()).backward(dy.bfloat16())
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer.bfloat16()(x.bfloat16()).backward(dy.bfloat16())
    found = [p.grad.float() for p in layer.parameters() if p.grad is not None]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 0.01 * b.abs().max()
