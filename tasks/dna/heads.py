"""What stands behind a backbone: a head that names bases, or one that names a sequence's class.

A backbone that keeps both strands (RCPS, arXiv 2403.03234) gives the reverse-complemented hidden
state of the second strand in its last C channels. The language head then reads base v of one strand
and the complement of v of the other, and the classifier reads both through the same weights and
averages: the first is equivariant, the second invariant under reverse complement.

Shapes: B sequences, L positions, C channels of a strand, E channels of the backbone's output (C, or
2C with both strands), V rows of the vocabulary, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dna.tokens import COMPLEMENT, ROWS


def strands_of(hidden_BLE: Tensor, strands: int) -> list[Tensor]:
    """The hidden state of each strand [B, L, C], both in the order of the first one's positions,
    and with the channels in the order that the weights know.
    """
    if strands == 1:
        return [hidden_BLE]
    first_BLC, second_BLC = hidden_BLE.chunk(2, dim=-1)
    return [first_BLC, second_BLC.flip(-1)]


Pool = Literal["mean", "last"]


class LanguageHead(nn.Module):
    """Logits of the base at each position. embedding: whose weights it shares; None: its own.

    strands: 1, or 2 for both of an RCPS backbone. std: spread of its own first weights.
    """

    complement: Tensor

    def __init__(
        self, dim: int, *, strands: int, embedding: nn.Embedding | None, std: float
    ) -> None:
        super().__init__()
        self.strands = strands
        self.weight = (
            nn.Parameter(torch.empty(ROWS, dim)) if embedding is None else embedding.weight
        )
        if embedding is None:
            nn.init.normal_(self.weight, std=std) if std else nn.init.zeros_(self.weight)
        complement = torch.from_numpy(COMPLEMENT).long()
        self.register_buffer("complement", complement, persistent=False)

    def forward(self, hidden_BLE: Tensor) -> Tensor:
        """hidden [B, L, E] -> logits [B, L, V]."""
        first_BLC, *second = strands_of(hidden_BLE, self.strands)
        logits_BLV = F.linear(first_BLC, self.weight)
        for strand_BLC in second:
            logits_BLV = logits_BLV + F.linear(strand_BLC, self.weight[self.complement])
        return logits_BLV


class ClassHead(nn.Module):
    """Logits of a sequence's class from the mean over its real positions.

    strands: 1, or 2 for both of an RCPS backbone, whose logits are averaged.
    """

    def __init__(self, dim: int, *, strands: int, classes: int, std: float) -> None:
        super().__init__()
        self.strands = strands
        self.weight = nn.Parameter(torch.empty(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.normal_(self.weight, std=std)

    def forward(
        self, hidden_BLE: Tensor, mask_BL: Tensor | None = None, *, pool: Pool = "mean"
    ) -> Tensor:
        """hidden [B, L, E], mask bool [B, L] (True: real; None: all) -> logits [B, K].

        pool: over the real positions, or the last one that a strand reads.
        """
        strands = strands_of(hidden_BLE, self.strands)
        if pool == "mean":
            pooled = [mean_over(h_BLC, mask_BL) for h_BLC in strands]
        else:  # the second strand ends where the first one begins
            pooled = [last_of(strands[0], mask_BL), *(h_BLC[:, 0] for h_BLC in strands[1:])]
        logits = [F.linear(pooled_BC, self.weight, self.bias) for pooled_BC in pooled]
        return sum(logits[1:], logits[0]) / len(logits)


def last_of(hidden_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The last real position of each row, padded at the end, [B, C]."""
    if mask_BL is None:
        return hidden_BLC[:, -1]
    at_B = (mask_BL.sum(dim=1) - 1).clamp(min=0)
    return hidden_BLC[torch.arange(len(at_B), device=at_B.device), at_B]


def mean_over(hidden_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over the real positions, [B, C], in at least float32; 0 where a row has none."""
    hidden_BLC = hidden_BLC.to(torch.promote_types(hidden_BLC.dtype, torch.float32))
    if mask_BL is None:
        return hidden_BLC.mean(dim=1)
    # not by a product: what a padded position holds may be no number
    total_BC = hidden_BLC.where(mask_BL.unsqueeze(-1), 0.0).sum(dim=1)
    return total_BC / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
