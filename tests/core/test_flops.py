"""The arithmetic that a device is sold with, by the name that torch has for it."""

from __future__ import annotations

import pytest
import torch

from suite.flops import peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_device_has_its_own_peak(name: str, tera: float) -> None:
    assert peak_of(name, "bf16-mixed") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA RTX A1000", "NVIDIA GB200", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a CPU"]
)
def test_another_device_or_a_slice_of_one_has_none(name: str) -> None:
    assert peak_of(name, "bf16-mixed") is None


def test_float32_has_one_only_where_products_run_as_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_of("NVIDIA H100 PCIe", "32-true") is None
        torch.set_float32_matmul_precision("high")
        assert peak_of("NVIDIA H100 PCIe", "32-true") == pytest.approx(378e12)
        assert peak_of("NVIDIA GeForce RTX 4090", "32-true") is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None
