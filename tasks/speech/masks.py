"""Which frames are masked, which negatives are drawn, which layers are left out.

All of it is a function of (seed, epoch or step, sample) and runs on the device without waiting for
it: two norms are judged on the same task, two processes draw what one does, and a resumed run goes
on as if nothing had happened. (fairseq's masks cannot be repeated even with a seed.) The rules are
those of fairseq's compute_mask_indices and sample_negatives (arXiv 2006.11477, section 3.2 and
appendix A), read at 3d262bb25690.

Shapes: B examples, T frames, M slots for masked frames, K negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suite.randomness import derive, uniform, uniform_grid


def span_mask(
    length_B: Tensor,
    *,
    size: int,
    prob: float,
    span: int,
    min_spans: int = 0,
    seeds_B: Tensor,
) -> Tensor:
    """Masked positions: spans that may overlap, each inside its row's length. bool [B, size].

    length_B: [B] positions that a row has. prob: chance of a position to be masked if spans did not
    overlap. span: positions of one. min_spans: fewest of a row. seeds_B: from
    suite.randomness.sample_seeds.
    """
    grid_B = uniform_grid(seeds_B, size + 1)
    rounding_B, draw_BT = grid_B[:, 0], grid_B[:, 1:]
    count_B = (prob * length_B / span + rounding_B).floor().long().clamp(min=min_spans)
    # fairseq's rule for rows too short for so many whole spans: the spans are cut at the end
    whole_B = length_B - span
    starts_B = torch.where(whole_B <= count_B, count_B + 1, whole_B)
    starts_B = torch.minimum(starts_B, length_B).clamp(min=0)
    places_T = torch.arange(size, device=length_B.device)
    draw_BT = draw_BT.masked_fill(places_T >= starts_B[:, None], 2.0)
    count_B = torch.minimum(count_B, starts_B)
    start_BT = smallest(draw_BT, count_B)
    begun_BT = start_BT.long().cumsum(dim=1)
    over_BT = torch.zeros_like(begun_BT)
    over_BT[:, span:] = begun_BT[:, :-span]
    return (begun_BT > over_BT) & (places_T < length_B[:, None])


def smallest(values_BT: Tensor, count_B: Tensor) -> Tensor:
    """True at the count_B smallest values of each row (and at ties of the last). bool [B, T]."""
    ordered_BT = values_BT.sort(dim=1).values
    last_B1 = ordered_BT.gather(1, (count_B - 1).clamp(min=0)[:, None])
    return (values_BT <= last_B1) & (count_B[:, None] > 0)


def thinned(mask_BT: Tensor, *, real_B: Tensor, seeds_B: Tensor) -> Tensor:
    """Every row cut at random to the smallest count of the batch, as fairseq does. bool [B, T].

    real_B: bool [B], rows that are not padding.
    """
    counts_B = mask_BT.sum(dim=1)
    least = torch.where(real_B, counts_B, mask_BT.shape[1]).min()
    draw_BT = uniform_grid(seeds_B, mask_BT.shape[1]).masked_fill(~mask_BT, 2.0)
    return smallest(draw_BT, least.expand_as(counts_B)) & mask_BT


def most_masked(size: int, *, prob: float, span: int, min_spans: int) -> int:
    """The most positions that `span_mask` can mask in a row of `size`."""
    return min(size, max(min_spans, int(prob * size / span + 1)) * span)


def slots(mask_BT: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Masked positions in order: their frames [B, M] int64, and which slots are used [B, M] bool.

    An unused slot names some unmasked frame. A fixed number of slots keeps every shape known
    without waiting for the device.
    """
    at_BM = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    used_BM = torch.arange(at_BM.shape[1], device=mask_BT.device) < mask_BT.sum(dim=1)[:, None]
    return at_BM, used_BM


def negatives(used_BM: Tensor, *, count: int, seeds_B: Tensor) -> Tensor:
    """For each slot, `count` other slots of the same row, drawn with replacement. [B, M, K] int64.

    Rows with fewer than two used slots have none; what stands there is slot 0.
    """
    slots_M = used_BM.shape[1]
    others_B11 = (used_BM.sum(dim=1) - 1)[:, None, None]
    drawn_BMK = (uniform_grid(seeds_B, slots_M, count) * others_B11).long()
    own_M1 = torch.arange(slots_M, device=used_BM.device)[:, None]
    drawn_BMK = drawn_BMK + (drawn_BMK >= own_M1)
    return torch.minimum(drawn_BMK, others_B11.clamp(min=0))


def gumbel(seeds_B: Tensor, *sizes: int) -> Tensor:
    """Gumbel noise, float32 [B, *sizes]."""
    return -(-uniform_grid(seeds_B, *sizes).log()).log()


def layers_kept(
    seed: int, step: int, depth: int, *, prob: float, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Which layers count in an optimizer step: bool [depth] on `device`; None keeps all.

    The same on every process and in every accumulation step, unlike fairseq's, so that the number
    of processes changes nothing.
    """
    if not prob:
        return None
    draws = uniform(derive(seed, "layerdrop"), "step", step, ids=torch.arange(depth))
    return (draws[:, 0] >= prob).to(device, non_blocking=True)
