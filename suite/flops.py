"""How much of a device's arithmetic a training uses: model FLOPs utilisation (MFU).

MFU is the arithmetic that the model needs, forward and backward and no more, over what the device
could do in the same time (PaLM, arXiv 2204.02311, appendix B): recomputed activations count for
nothing. Peaks are the makers' figures for dense products of 16-bit numbers added up in 32 bits.
"""

from __future__ import annotations

import re

import torch

# Words of torch's name for a device -> tera-operations a second; the first that fits.
PEAK_16_BIT = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
}
TF32_SHARE = {"B200": 0.5, "GH200": 0.5, "H200": 0.5, "H100": 0.5, "A100": 0.5, "L40S": 0.5}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that `device` is sold with; None where that is not known.

    precision: Lightning's name. Of float32 only the products that run as TF32 have a figure.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """`peak_flops` of a device by torch's name for it."""
    found = next((part for part in PEAK_16_BIT if re.search(rf"\b{part}\b", name)), None)
    if found is None or "MIG" in name.split():  # a slice of one, whose share no name says
        return None
    peak = PEAK_16_BIT[found] * 1e12
    if precision.startswith(("bf16", "16")):
        return peak
    if precision == "32-true" and torch.get_float32_matmul_precision() != "highest":
        share = TF32_SHARE.get(found.split()[0])
        return None if share is None else peak * share
    return None
