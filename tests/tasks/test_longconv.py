"""The long convolution: by FFT what it is tap by tap, its gradients, its dtypes; and its bench."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.errors import ConfigError, DivergedError
from tasks.dna import longconv, longconv_bench
from tasks.dna.longconv import direct_conv, fft_conv, fft_size

LENGTHS = (1, 2, 7, 20)
WHICH = [(skip, two_sided) for skip in (False, True) for two_sided in (False, True)]


def inputs(length: int, *, dtype: torch.dtype = torch.float64, rows: int = 2) -> tuple[Tensor, ...]:
    """u [B, D, L], k [D, L], D [D], k_reverse [D, L]."""
    g = torch.Generator().manual_seed(length)
    shapes = ((rows, 3, length), (3, length), (3,), (3, length))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)


def chosen(conv: Any, parts: tuple[Tensor, ...], *, skip: bool, two_sided: bool) -> Tensor:
    u, k, D, reverse = parts
    result: Tensor = conv(
        u, k, D_D=D if skip else None, k_reverse_DL=reverse if two_sided else None
    )
    return result


def by_loops(parts: tuple[Tensor, ...], *, skip: bool, two_sided: bool) -> Tensor:
    u, k, D, reverse = parts
    y = u * D[:, None] if skip else torch.zeros_like(u)
    for t in range(u.shape[-1]):
        for s in range(u.shape[-1]):
            if s <= t:
                y[..., t] += k[:, t - s] * u[..., s]
            elif two_sided:
                y[..., t] += reverse[:, s - t] * u[..., s]
    return y


@pytest.mark.parametrize(("skip", "two_sided"), WHICH)
@pytest.mark.parametrize("length", LENGTHS)
def test_both_ways_compute_the_sum_that_defines_them(
    length: int, skip: bool, two_sided: bool
) -> None:
    parts = inputs(length)
    expected = by_loops(parts, skip=skip, two_sided=two_sided)
    for conv in (fft_conv, direct_conv):
        found = chosen(conv, parts, skip=skip, two_sided=two_sided)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("skip", "two_sided"), WHICH)
@pytest.mark.parametrize("conv", [fft_conv, direct_conv])
def test_gradients_are_those_of_the_function(conv: Any, skip: bool, two_sided: bool) -> None:
    for length in (1, 6):
        parts = tuple(x.requires_grad_() for x in inputs(length))
        used = parts[: 3 + two_sided]

        def function(*given: Tensor, own: tuple[Tensor, ...] = parts) -> Tensor:
            return chosen(conv, given + own[len(given) :], skip=skip, two_sided=two_sided)

        assert torch.autograd.gradcheck(function, used)


def test_the_first_tap_of_the_reverse_filter_is_not_used() -> None:
    u, k, _, reverse = inputs(9)
    other = reverse.clone()
    other[:, 0] += 5
    for conv in (fft_conv, direct_conv):
        reverse.requires_grad_()
        y = conv(u, k, k_reverse_DL=reverse)
        assert torch.equal(y.detach(), conv(u, k, k_reverse_DL=other))
        (grad,) = torch.autograd.grad(y.square().sum(), reverse)
        assert (grad[:, 0] == 0).all()
        assert (grad[:, 1:] != 0).all()


def test_tap_by_tap_no_output_changes_with_a_later_input_and_by_fft_by_rounding() -> None:
    u, k, D, _ = inputs(64)
    later = u.clone()
    later[..., 40:] += 100
    for conv, leak in ((direct_conv, 0.0), (fft_conv, 1e-12)):
        gap = (conv(later, k, D_D=D) - conv(u, k, D_D=D)).abs()
        assert gap[..., :40].max() <= leak
        assert gap[..., 40:].min() > 1e-3


def test_it_is_not_circular() -> None:
    u, k = inputs(16)[:2]
    wrapped = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(k), n=16)
    assert (fft_conv(u, k) - wrapped).abs().max() > 0.1


def test_channels_may_go_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for budget in (2**22, 1, 2 * 2 * 17 * 16 * 2):  # all channels, one, two and then one
        monkeypatch.setitem(longconv.SLICE_BYTES, "cpu", budget)
        parts = tuple(x.requires_grad_() for x in inputs(16))
        y = chosen(fft_conv, parts, skip=True, two_sided=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), parts)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    sizes = [s.stop - s.start for s in longconv.slices_of(inputs(16)[0], spectra=2)]
    assert sizes == [2, 1]


def test_inputs_need_not_be_contiguous() -> None:
    _, k, D, _ = inputs(8)
    strided = torch.randn(2, 8, 6, dtype=torch.float64).transpose(1, 2)[:, ::2].requires_grad_()
    y = fft_conv(strided, k.T.contiguous().T, D_D=D)
    torch.testing.assert_close(y, fft_conv(strided.contiguous(), k, D_D=D))
    (grad,) = torch.autograd.grad(y.sum(), strided)
    again = strided.detach().contiguous().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(fft_conv(again, k, D_D=D).sum(), again)[0])


def test_only_what_needs_a_gradient_gets_one() -> None:
    u, k, D, _ = inputs(8)
    k.requires_grad_()
    fft_conv(u, k, D_D=D).sum().backward()
    assert k.grad is not None
    assert u.grad is None
    assert D.grad is None


@pytest.mark.parametrize("length", [1, 5, 512, 1023, 1024, 1026, 4097, 160_002, 1_000_002])
def test_the_transform_is_long_enough_and_of_a_fast_length(length: int) -> None:
    size = fft_size(length)
    assert 2 * length - 1 <= size <= max(16, 1.15 * 2 * length)
    assert size % 16 == 0
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    assert size == 1


def test_a_power_of_two_stays_one() -> None:
    assert [fft_size(n) for n in (256, 1024, 2**20)] == [512, 2048, 2**21]


@pytest.mark.parametrize("conv", [fft_conv, direct_conv])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_in_float32_and_returns_the_input_s_dtype(
    conv: Any, dtype: torch.dtype
) -> None:
    rounded = inputs(30, dtype=dtype)
    expected = by_loops(tuple(x.double() for x in rounded), skip=True, two_sided=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = chosen(conv, rounded, skip=True, two_sided=True)
    assert found.dtype == dtype
    best = expected.to(dtype).double()  # no better can be had in that dtype
    gap, unavoidable = (found.double() - expected).abs(), (best - expected).abs()
    assert (gap <= unavoidable + 1e-5).all()


def test_float64_stays_under_autocast() -> None:
    parts = inputs(12)
    with torch.autocast("cpu", torch.bfloat16):
        found = chosen(fft_conv, parts, skip=True, two_sided=False)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_loops(parts, skip=True, two_sided=False))


def test_a_half_precision_input_and_a_float32_filter_have_gradients_of_their_own_dtypes() -> None:
    u, k, D, reverse = inputs(9, dtype=torch.float32)
    u = u.bfloat16().requires_grad_()
    k.requires_grad_()
    du, dk = torch.autograd.grad(fft_conv(u, k, D_D=D, k_reverse_DL=reverse).sum(), (u, k))
    assert (du.dtype, dk.dtype) == (torch.bfloat16, torch.float32)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    """Its schema, its shapes under the compiler, and its gradient's registration."""
    u, k, D, reverse = (x.requires_grad_() for x in inputs(6))
    for arguments in ((u, k, D, reverse), (u, k, None, None)):
        torch.library.opcheck(torch.ops.suite_dna.fft_conv.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3, 8)}, r"^u_BDL must be \[B, D, L\]"),
        ({"u": torch.zeros(2, 3, 0)}, r"^u_BDL must be \[B, D, L\] and not empty"),
        ({"k": torch.zeros(3, 9)}, r"^k_DL must be \[3, 8\]"),
        ({"k": torch.zeros(1, 8)}, r"^k_DL must be \[3, 8\]"),
        ({"D": torch.zeros(1)}, r"^D_D must be \[3\]"),
        ({"reverse": torch.zeros(3, 7)}, r"^k_reverse_DL must be \[3, 8\]"),
    ],
)
@pytest.mark.parametrize("conv", [fft_conv, direct_conv])
def test_a_shape_that_does_not_fit_is_named(
    conv: Any, change: dict[str, Tensor], message: str
) -> None:
    given = dict(zip(("u", "k", "D", "reverse"), inputs(8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        conv(given["u"], given["k"], D_D=given["D"], k_reverse_DL=given["reverse"])


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one step, memory without processes, and no long import of torchaudio."""
    monkeypatch.setattr(longconv_bench, "find_spec", lambda name: None)
    monkeypatch.setattr(longconv_bench, "TURN_SECONDS", 1e-9)
    monkeypatch.setattr(longconv_bench, "alone", lambda *_, **__: 2**20)


@pytest.mark.usefixtures("_quick")
def test_the_bench_measures_every_method_at_every_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert longconv_bench.run(["length=32,8,16", "dim=2", "batch=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["length"], row["method"]): row for row in found["rows"]}
    wanted = {(n, m) for n in (8, 16, 32) for m in ("ours", "published", "conv1d")}
    assert wanted <= rows.keys()
    assert rows[8, "ours"]["ours_to_its_time"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert all(row["ms"] > 0 for row in rows.values())
    assert found["growth_exponent"].keys() == {method for _, method in rows}
    assert found["device"] in ("cpu", "cuda")


@pytest.mark.usefixtures("_quick")
def test_the_bench_prints_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert longconv_bench.run(["length=8", "dim=2", "batch=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[:2] for line in lines if line.split()[0] == "8"]
    assert named == [["8", method] for method in longconv_bench.methods_for(8)]
    assert "batch 1, dim 2" in lines[0]
    assert not any(line.startswith("growth") for line in lines)  # one length shows none


def test_beyond_its_limit_the_direct_convolution_is_left_out() -> None:
    assert "conv1d" in longconv_bench.methods_for(longconv_bench.DIRECT_LIMIT)
    assert "conv1d" not in longconv_bench.methods_for(longconv_bench.DIRECT_LIMIT + 1)


def test_memory_is_what_a_step_adds() -> None:
    # in a process of its own: this one may have room from other tests, which then adds nothing
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        added = pool.submit(longconv_bench.added_by, "ours", 8192, 1, 4, "cpu", 1).result()
    assert 2**17 <= added < 2**26  # at least the output, 4 * 8192 numbers


@pytest.mark.usefixtures("_quick")
def test_the_bench_times_nothing_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = {**longconv_bench.METHODS, "conv1d": lambda u, k, D: u * 1.0 + 0 * D[:, None] + 0 * k}
    monkeypatch.setattr(longconv_bench, "METHODS", wrong)
    with pytest.raises(DivergedError, match="length=8: conv1d and published differ"):
        longconv_bench.run(["length=8", "dim=2", "batch=1"])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("length=7", "length=7: must be a whole number, 8 or more"),
        ("length=64,,128", "length=: must be a whole number"),
        ("length=64,x", "length=x: must be a whole number"),
        ("length=64,128,64", "length=64,128,64: 64 is given twice"),
        ("length=99999999999", "length=99999999999: must be 16,777,216 or less"),
        ("rounds=4", "rounds=4: must be a whole number, 5 or more"),
        ("batch=0", "batch=0: must be a whole number, 1 or more"),
        ("dim=1.5", "dim=1.5: must be a whole number, 1 or more"),
        ("lengths=64", "lengths=64: suite.bench longconv takes length="),
        ("norm=dyt", "norm=dyt: suite.bench longconv takes length="),
    ],
)
def test_a_wrong_token_is_one_clear_line(token: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        longconv_bench.run([token])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_token_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="length is given twice"):
        longconv_bench.run(["length=64", "length=128"])


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert longconv_bench.run(["--help"]) == 0
    assert "published" in capsys.readouterr().out
