"""Randomness that is addressed, not drawn: a function of (seed, epoch or step, sample), never of
rank or worker.

A resumed run, another number of workers or another number of ranks then sees the very same masks,
flips and orders, and two norms are compared on the same task. The mixing function is splitmix64
(Steele et al., 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def derive(seed: int, stream: str, *keys: int) -> int:
    """A 63-bit seed for one use: equal arguments give an equal seed on every machine.

    stream: the name of the use ("order", "flip", "dropout"), so that two uses do not share numbers.
    """
    z = zlib.crc32(stream.encode())
    for key in (seed, *keys):
        z = _mix((z + _GAMMA + (key & _MASK)) & _MASK)
    return z >> 1


def generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, stream, *keys))


def uniform(seed: int, stream: str, *keys: int, ids: Tensor, draws: int = 1) -> Tensor:
    """Uniform numbers in [0, 1), one row for each sample id.

    ids: [B] integer sample ids. Returns float64 [B, draws]; row i depends on ids[i] alone, so that
    how samples are grouped into batches changes nothing.
    """
    base = np.uint64(derive(seed, stream, *keys))
    with np.errstate(over="ignore"):
        z = base + (ids.cpu().numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
        z = _mix_array(z)[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        z = _mix_array(z)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def _mix_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def sample_seeds(seed: int, stream: str, *keys: int, ids: Tensor, epoch: Tensor) -> Tensor:
    """A seed for each example of an epoch, on the device of `ids`, without waiting for it.

    ids, epoch: [B] integers. Returns int64 [B]; row i depends on (seed, stream, keys, epoch[i],
    ids[i]) alone.
    """
    base = _signed(derive(seed, stream, *keys))
    z = _mix_tensor(base + (epoch.long() + 1) * _signed(_GAMMA))
    return _mix_tensor(z + (ids.long() + 1) * _signed(_GAMMA))


def uniform_grid(seeds: Tensor, *sizes: int) -> Tensor:
    """Uniform numbers inside (0, 1), a grid for each seed, counted and not drawn.

    seeds: int64 [B]. Returns float32 [B, *sizes] of 23 bits, neither 0 nor 1, so that their
    logarithm is finite; the same on every device.
    """
    count = math.prod(sizes)
    counter = torch.arange(1, count + 1, device=seeds.device)
    z = _mix_tensor(seeds[:, None] + counter * _signed(_GAMMA))
    top = (z >> 41) & ((1 << 23) - 1)
    return ((top.float() + 0.5) * 2.0**-23).view(len(seeds), *sizes)


def _signed(z: int) -> int:
    """A 64-bit number as the int64 that has its bits."""
    z &= _MASK
    return z - (1 << 64) if z >> 63 else z


def _mix_tensor(z: Tensor) -> Tensor:
    """splitmix64's function of int64, whose products wrap and whose shifts keep the sign."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
