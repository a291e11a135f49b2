"""The Triton kernel of the scan, in Triton's interpreter: values and gradients, block by block.

The interpreter is chosen when Triton is first imported, so the checks run in a process of their
own: this file, as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KINDS = {
    "everything": {},
    "reversed and masked": {"reverse": True, "masked": True},
    "bare": {"bare": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def check() -> None:
    """Run inside the interpreter: every kind at lengths below, at and beyond a block's."""
    from test_scan import drawn, graded

    from tasks.dna import scan_triton

    torch.set_num_threads(1)
    assert scan_triton.interpreted()
    scan_triton.BLOCK_L, scan_triton.BLOCK_D = 4, 4  # 5 channels: two blocks, one of them cut
    for kind, options in KINDS.items():
        for length in (1, 6) if kind == "everything" else (6,):
            dtype = options.get("dtype", torch.float32)
            x = {n: v[:2] if v.dim() == 3 else v for n, v in drawn(length, dtype=dtype).items()}
            rest = {"reverse": options.get("reverse", False)}
            if options.get("masked"):
                draw = torch.Generator().manual_seed(1)
                rest["mask_BL"] = torch.rand(2, length, generator=draw) > 0.3
            if options.get("bare"):
                x = {n: v for n, v in x.items() if n not in ("D_D", "z_BDL", "delta_bias_D")}
                x["delta_BDL"], rest["softplus"] = x["delta_BDL"].abs(), False
            wanted = graded(x, backend="reference", **rest)
            found = graded(x, backend="triton", **rest)
            bound = 2e-5 if dtype == torch.float32 else 2**-7
            for name, value in wanted.items():
                assert found[name].dtype == value.dtype, (kind, length, name)
                error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
                assert error < bound, (kind, length, name, float(error))
            print(kind, length)
    x = {n: v[:1] if v.dim() == 3 else v for n, v in drawn(5, dtype=torch.float32).items()}
    first, again = (graded(x, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    softplus(torch.tensor([-30.0, -9.0, -1.0, 0.0, 3.0, 21.0, 50.0]))


def softplus(x: torch.Tensor) -> None:
    """The kernel's softplus keeps the digits of small steps: with one position y = delta."""
    from tasks.dna.scan import selective_scan

    u, A, one = torch.ones(1, len(x), 1), -torch.ones(len(x), 1), torch.ones(1, 1, 1)
    y = selective_scan(u, x[None, :, None], A, one, one, backend="triton")
    exact = torch.nn.functional.softplus(x.double())
    assert ((y[0, :, 0] - exact).abs() <= 2e-6 * exact).all(), y


def test_the_kernel_gives_the_values_and_gradients_of_the_loop_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(kind in done.stdout for kind in KINDS)


def test_outside_of_the_interpreter_the_kernel_asks_for_a_gpu() -> None:
    pytest.importorskip("triton")
    from tasks.dna.scan import resolve

    with pytest.raises(ValueError, match="scan=triton runs on NVIDIA GPUs only; take scan=chunked"):
        resolve("triton", "cpu")


def test_the_kernel_refuses_float64_in_any_input() -> None:
    pytest.importorskip("triton")
    from tasks.dna.scan import Scan
    from tasks.dna.scan_triton import triton_scan

    x = torch.zeros(1, 2, 3)
    A, B = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="scan=triton computes in float32"):
        triton_scan(Scan(x, x, A, B, B, None, None, None, None, True, False))


if __name__ == "__main__":
    check()
