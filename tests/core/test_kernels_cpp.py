"""The C++ kernels against float64 autograd of the formulas; building, caching and failing well."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from suite.norms.functions import FUNCTIONS
from suite.norms.kernels import compiler, cpp

torch.set_num_threads(1)
ALL = (True, True, True, True, True)
NAMES = ("x", "alpha", "shift", "weight", "bias")
SUPREMA = {"dyisru": 8**0.5}
needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot build: {compiler.missing()}"
)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the library of this process, before and after."""
    compiler.library.cache_clear()
    cpp._found.cache_clear()
    yield
    compiler.library.cache_clear()
    cpp._found.cache_clear()


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dim: int, *, each: bool = False, seed: int = 1) -> list[Tensor | None]:
    """alpha, shift, weight and bias; `each`: alpha and shift of every channel."""
    count = dim if each else 1
    alpha, shift = draw(count, seed=seed).abs() + 0.3, draw(count, seed=seed + 1, scale=0.2)
    weight, bias = draw(dim, seed=seed + 2, scale=0.2) + 1, draw(dim, seed=seed + 3, scale=0.1)
    return [alpha, shift, weight, bias]


def reference(
    x: Tensor, given: list[Tensor | None], function: str, *, dim: int, inner: int = 1
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """y, f(u) and the leaves (x and the parameters) in float64."""
    row = FUNCTIONS[function].at(dim)
    f = row.plain or row.forward
    leaves = [None if p is None else p.double().requires_grad_() for p in (x, *given)]
    wide, *rest = leaves
    alpha, shift, weight, bias = (None if p is None else p.view(-1, 1) for p in rest)
    u = wide.view(-1, dim, inner)  # type: ignore[union-attr]
    u = u if alpha is None else alpha * u
    value = f(u if shift is None else u + shift)
    y = value if weight is None else weight * value
    y = y if bias is None else y + bias
    return y.view(x.shape), value, leaves


def forward(
    x: Tensor, given: list[Tensor | None], function: str, dim: int, inner: int = 1
) -> Tensor:
    return cpp.pointwise_forward(x, None, *given, function=function, dim=dim, inner=inner)[0]


def assert_values(
    x: Tensor, given: list[Tensor | None], function: str, *, dim: int, inner: int = 1
) -> None:
    """Values to 2e-7 and 2e-6 of what is added up: weight * f and bias may cancel in y."""
    found = forward(x, given, function, dim, inner)
    wanted, value, _ = reference(x, given, function, dim=dim, inner=inner)
    weight, bias = (0.0 if p is None else p.double().abs().view(-1, 1) for p in given[2:])
    weight = 1.0 if given[2] is None else weight
    size = (weight * value.detach().abs() + bias).view(x.shape)
    assert found.isfinite().all()
    assert ((found.double() - wanted.detach()).abs() <= 2e-7 + 2e-6 * size).all()


def assert_gradients(
    x: Tensor, given: list[Tensor | None], function: str, *, dim: int, inner: int = 1
) -> None:
    """Every gradient of the kernel, relative to the sum of the absolute terms behind it."""
    dy = draw(*x.shape, seed=9).to(x.dtype)
    y, value, leaves = reference(x, given, function, dim=dim, inner=inner)
    y.backward(dy.double())
    found = cpp.pointwise_backward(
        dy, None, x, *given, function=function, dim=dim, inner=inner, needs=ALL
    )
    dx = leaves[0].grad.view(-1, dim, inner)  # type: ignore[union-attr]
    alpha = leaves[1].detach().view(-1, 1) if leaves[1] is not None else 1.0
    du = (dx / alpha).abs()
    wide, above = x.double().view(-1, dim, inner), dy.double().view(-1, dim, inner).abs()
    terms = (None, du * wide.abs(), du, above * value.detach().abs(), above)
    for name, ours, leaf, term in zip(NAMES, found, leaves, terms, strict=True):
        if leaf is None:
            assert ours is None
            continue
        assert ours is not None, name
        assert ours.shape == leaf.shape
        if term is None:
            small = 1e-2 if x.dtype != torch.float32 else 1e-5
            allowed = small * leaf.grad.abs() + 1e-6 * dy.double().abs() + 1e-7
        else:
            assert ours.dtype == torch.float32
            allowed = 2e-6 * (term.sum((0, 2)) if leaf.numel() == dim > 1 else term.sum()) + 1e-12
        assert ((ours.double() - leaf.grad).abs() <= allowed).all(), name


@needs_compiler
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 20.0])
def test_values_and_gradients_are_those_of_the_formula(function: str, scale: float) -> None:
    given = parameters(24, each=scale == 1.0)
    x = draw(130, 24, scale=scale)
    assert_values(x, given, function, dim=24)
    assert_gradients(x, given, function, dim=24)


@needs_compiler
def test_the_sources_and_the_table_have_the_same_functions() -> None:
    assert set(cpp.FUNCTIONS) == set(FUNCTIONS)
    assert len(cpp.FUNCTIONS) == 18


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_infinity_saturates_and_nan_stays(function: str, dtype: torch.dtype) -> None:
    infinity = float("inf")
    x = torch.tensor([[infinity, -infinity, float("nan"), 0.0, 3e38, -3e38, 1e-40, -0.0]] * 5)
    y = forward(x.to(dtype), [None] * 4, function, 8)
    supremum = SUPREMA.get(function, 1.0)
    lowest = 0.0 if function == "sigmoid" else -supremum
    at_zero = 0.5 if function == "sigmoid" else 0.0
    torch.testing.assert_close(y[:, 0].float(), torch.full((5,), supremum), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(y[:, 1].float(), torch.full((5,), lowest), rtol=1e-2, atol=1e-6)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5, 6, 7]].isfinite().all()
    assert (y[:, [3, 7]] == at_zero).all()
    # a saturated float32 is within a percent of the supremum (the slowest, saturlog, at 0.989)
    assert (y[:, 4].float() >= 0.98 * supremum).all()


@needs_compiler
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_the_slope_at_zero_is_the_table_s(function: str) -> None:
    x = torch.zeros(2, 8)
    dx, *_ = cpp.pointwise_backward(
        torch.ones(2, 8), None, x, None, None, None, None,
        function=function, dim=8, inner=1, needs=ALL,
    )  # fmt: skip
    assert dx is not None
    torch.testing.assert_close(dx, torch.full((2, 8), FUNCTIONS[function].slope))


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    dim=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2100, 20000])),
    outer=st.integers(1, 3),
    inner=st.sampled_from([1, 2, 7, 65]),
    function=st.sampled_from(["dyt", "derf", "softsign"]),
    absent=st.sets(st.sampled_from(range(4)), max_size=3),
    each=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_any_set_of_parameters(
    dim: int,
    outer: int,
    inner: int,
    function: str,
    absent: set[int],
    each: bool,
    dtype: torch.dtype,
) -> None:
    inner = inner if dim < 100 else 1
    given = [None if i in absent else p for i, p in enumerate(parameters(dim, each=each))]
    x = draw(outer, dim, inner, scale=2).to(dtype)
    wanted, *_ = reference(x, given, function, dim=dim, inner=inner)
    found = forward(x, given, function, dim, inner)
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert_values(x, given, function, dim=dim, inner=inner)
    else:
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-2, atol=1e-3)
    assert_gradients(x, given, function, dim=dim, inner=inner)


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 3, 2500), (70, 5, 40), (3, 1, 1025)])
def test_channels_first_takes_long_and_many_positions(shape: tuple[int, ...]) -> None:
    given = parameters(shape[1], each=True)
    x = draw(*shape)
    assert_values(x, given, "derf", dim=shape[1], inner=shape[2])
    assert_gradients(x, given, "derf", dim=shape[1], inner=shape[2])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ["dyt", "isru"])
def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(function: str, dtype: torch.dtype) -> None:
    x, residual, dy, dh = (draw(6, 40, seed=seed).to(dtype) for seed in range(4))
    given = parameters(40)
    y, h = cpp.pointwise_forward(x, residual, *given, function=function, dim=40, inner=1)
    assert h is not None
    assert torch.equal(h, x + residual)
    assert torch.equal(y, forward(h, given, function, 40))
    form = {"function": function, "dim": 40, "inner": 1, "needs": ALL}
    both = cpp.pointwise_backward(dy, dh, h, *given, **form)
    alone = cpp.pointwise_backward(dy.float(), None, h.float(), *given, **form)
    torch.testing.assert_close(both[0], (alone[0] + dh.float()).to(dtype))  # type: ignore[operator]
    for ours, other in zip(both[1:], alone[1:], strict=True):
        torch.testing.assert_close(ours, other)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
    zero = torch.zeros_like(every)
    _, same = cpp.pointwise_forward(
        every, zero, *[None] * 4, function="hardtanh", dim=1024, inner=1
    )
    assert same is not None
    torch.testing.assert_close(same, every, rtol=0, atol=0, equal_nan=True)
    other = every.flip(0) * 0.37
    _, sums = cpp.pointwise_forward(
        every, other, *[None] * 4, function="hardtanh", dim=1024, inner=1
    )
    assert sums is not None
    torch.testing.assert_close(sums, every + other, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (130, 33), (2, 20000)])
def test_row_norms_are_torch_s_in_float64(
    kind: str, dtype: torch.dtype, rows: int, dim: int
) -> None:
    _, _, weight, bias = parameters(dim)
    x, residual, dy, dh = (draw(rows, dim, seed=seed).to(dtype) for seed in range(4))
    y, h, stats = cpp.rows_forward(x, residual, weight, bias, kind=kind, eps=1e-5)
    assert h is not None
    assert torch.equal(h, x + residual)
    assert stats.shape == (2 if kind == "layer" else 1, rows)
    wide, scale, offset = (p.double().requires_grad_() for p in (h, weight, bias))  # type: ignore[union-attr]
    if kind == "layer":
        wanted = torch.nn.functional.layer_norm(wide, (dim,), scale, offset, 1e-5)
    else:
        wanted = torch.nn.functional.rms_norm(wide, (dim,), scale, 1e-5) + offset
    close = {"rtol": 1e-2, "atol": 5e-3} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(y.double(), wanted, **close)
    wanted.backward(dy.double())
    found = cpp.rows_backward(dy, dh, h, stats, weight, bias, kind=kind, needs=(True,) * 3)
    torch.testing.assert_close(found[0].double(), wide.grad + dh.double(), **close)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found[1].double(), scale.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(found[2].double(), offset.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@needs_compiler
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    given = parameters(96)
    x, dy = draw(700, 96), draw(700, 96, seed=3)

    def everything() -> list[Tensor]:
        y, _, stats = cpp.rows_forward(x, None, *given[2:], kind="layer", eps=1e-5)
        rows = cpp.rows_backward(dy, None, x, stats, *given[2:], kind="layer", needs=(True,) * 3)
        grads = cpp.pointwise_backward(
            dy, None, x, *given, function="derf", dim=96, inner=1, needs=ALL
        )
        return [y, forward(x, given, "derf", 96), *rows, *grads]  # type: ignore[list-item]

    one = everything()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_compiler
def test_nothing_in_is_nothing_out() -> None:
    given = parameters(4)
    x = torch.empty(0, 3, 4)
    assert forward(x, given, "dyt", 4).shape == x.shape
    grads = cpp.pointwise_backward(x, None, x, *given, function="dyt", dim=4, inner=1, needs=ALL)
    assert [g.abs().sum().item() for g in grads if g is not None] == [0.0] * 5
    y, h, stats = cpp.rows_forward(x, None, given[2], None, kind="rms", eps=1e-6)
    assert (y.shape, h, stats.shape) == (x.shape, None, (1, 0))
    dx, dweight, _ = cpp.rows_backward(
        x, None, x, stats, given[2], None, kind="rms", needs=(True,) * 3
    )
    assert dx is not None
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros(4))  # type: ignore[arg-type]


@needs_compiler
def test_only_what_is_needed_is_returned() -> None:
    x = draw(3, 4)
    found = cpp.pointwise_backward(
        x, None, x, *parameters(4), function="dyt", dim=4, inner=1,
        needs=(False, True, False, False, True),
    )  # fmt: skip
    assert [g is not None for g in found] == [False, True, False, False, True]


@needs_compiler
def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16- and 32-bit CPU tensors, got torch\.float64"):
        forward(draw(2, 4).double(), [None] * 4, "dyt", 4)
    with pytest.raises(ValueError, match="a parameter of 3 numbers where 4 are due"):
        forward(draw(2, 4), [None, None, torch.ones(3), None], "dyt", 4)
    assert cpp.available("cuda") == "it needs tensors on the CPU"


def test_without_a_compiler_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    assert cpp.available("cpu") == "CXX=/nonexistent is not a program"
    monkeypatch.delenv("CXX")
    assert cpp.available("cpu") == "no C++ compiler (c++, g++, clang++)"
    with pytest.raises(ValueError, match=r"^no C\+\+ compiler"):
        forward(draw(2, 4), [None] * 4, "dyt", 4)


def test_a_compiler_that_fails_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'note: this' >&2\necho 'fatal error: that' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_version", lambda command: "1")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"build the C\+\+ kernels: fatal error: that$"):
            forward(draw(2, 4), [None] * 4, "dyt", 4)
    assert list(tmp_path.iterdir()) == [broken]


def kept() -> Path:
    """Where the library lies in the cache."""
    command, folder = compiler.compiler(), compiler.folder()
    assert command is not None
    assert folder is not None
    return folder / f"kernels-{compiler._key(command)}.so"


@pytest.fixture(scope="module")
def built() -> bytes:
    """The library, as it lies in the cache after a build."""
    compiler.library.cache_clear()
    compiler.library()
    return kept().read_bytes()


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_built_again(
    damage: str, built: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kept()
    path.parent.mkdir(parents=True, mode=0o700)
    wrong = {"cut": built[:9000], "changed": built[:500] + b"?" + built[501:], "empty": b""}
    path.write_bytes(wrong[damage])
    calls = []

    def pretend(command: list[str], out: Path) -> None:
        calls.append(command)
        out.write_bytes(built[: -compiler._DIGEST])

    monkeypatch.setattr(compiler, "_compile", pretend)
    assert torch.equal(forward(torch.zeros(2, 4), [None] * 4, "dyt", 4), torch.zeros(2, 4))
    assert len(calls) == 1
    assert path.read_bytes() == built
    assert list(path.parent.iterdir()) == [path]


@needs_compiler
@pytest.mark.parametrize("place", ["a file", "relative", "no home", "of all", "full"])
def test_a_folder_that_cannot_be_used_is_no_obstacle(
    place: str, built: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None
) -> None:
    monkeypatch.chdir(tmp_path)
    where = tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache" if place == "relative" else str(where))
    if place == "a file":
        where.write_text("not a folder")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", no_home)
    if place == "of all":  # somebody else's code is not loaded, whatever its digest
        kept().parent.mkdir(parents=True)
        kept().parent.chmod(0o777)
        code = b"not a library"
        kept().write_bytes(code + hashlib.sha256(code).digest())
    if place == "full":
        monkeypatch.setattr(shutil, "copyfile", disk_full)
    monkeypatch.setattr(
        compiler, "_compile", lambda command, out: out.write_bytes(built[: -compiler._DIGEST])
    )
    assert torch.equal(forward(torch.zeros(2, 4), [None] * 4, "dyt", 4), torch.zeros(2, 4))
    if place == "relative":
        assert not where.exists()
    if place == "of all":
        assert kept().read_bytes().startswith(code)
    if place == "full":
        assert list(kept().parent.iterdir()) == []


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def disk_full(*paths: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_quote_in_cxx_that_is_not_closed_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    assert compiler.missing() == "CXX='g++ is not a program"


def test_another_processor_gets_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_version", lambda command: "1")
    keys = {compiler._key(["c++"]), compiler._key(["g++"])}
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    assert len(keys | {compiler._key(["c++"])}) == 3


@needs_compiler
def test_two_processes_may_build_at_once(built: bytes, tmp_path: Path) -> None:
    library, slow = tmp_path / "library", tmp_path / "slow-compiler"
    library.write_bytes(built[: -compiler._DIGEST])
    slow.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo 1\nfor out in $@; do :; done\n"
        f"touch {tmp_path}/started.$$\n"
        f"while [ $(ls {tmp_path} | grep -c started) -lt 2 ]; do sleep 0.1; done\n"
        f"exec cp {library} $out\n"
    )
    slow.chmod(0o755)
    code = (  # by file path: nothing of torch is needed to build and load
        "import importlib.util as util\n"
        f"spec = util.spec_from_file_location('compiler', {compiler.__file__!r})\n"
        "module = util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.library().pointwise_room(1, 4, 1))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(slow)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1)
        for _ in range(2)
    ]
    for process in started:
        out, error = process.communicate(timeout=200)
        assert out == b"16\n", error.decode()
    (only,) = (tmp_path / "cache" / "dyt-suite" / "kernels").iterdir()
    assert only.read_bytes() == built


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system lists no maps")
def test_torch_s_threads_are_used_and_no_second_pool() -> None:
    cpp._library()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    pools = {path for path in mapped if "/libgomp" in path}
    assert len(pools) <= 1, pools
