"""wav2vec 2.0's loss: pick the true quantized frame among others of the same utterance.

InfoNCE over cosine similarities (arXiv 2006.11477, equation 3), as fairseq computes it at
3d262bb25690, with one matrix of similarities per utterance instead of a [K + 1, B, M, C] tensor of
gathered negatives. And the perplexity of the codes, whose entropy the diversity term raises
(equation 4, in the perplexity form of fairseq's code).

Shapes: B examples, M slots for masked frames, C channels, K negatives, G codebooks, V codes of
each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class Contrast(NamedTuple):
    """Of every slot. loss_BM: InfoNCE in nats; hit_BM: the true frame is the most similar;
    same_BM: share of the negatives whose codes are those of the true frame."""

    loss_BM: Tensor
    hit_BM: Tensor
    same_BM: Tensor


def info_nce(
    context_BMC: Tensor,
    target_BMC: Tensor,
    *,
    codes_BMG: Tensor,
    negatives_BMK: Tensor,
    temperature: float,
) -> Contrast:
    """-log softmax(cos(context, [target, negatives]) / temperature) of the target, in float32.

    A negative with the codes of the target is the target: it is left out of the sum, as in fairseq.
    A slot of which every negative is left out has loss 0, and is no hit.
    """
    context_BMC = F.normalize(context_BMC.float(), dim=-1, eps=1e-8)
    target_BMC = F.normalize(target_BMC.float(), dim=-1, eps=1e-8)
    with torch.autocast(context_BMC.device.type, enabled=False):
        similar_BMM = context_BMC @ target_BMC.transpose(1, 2) / temperature
    true_BM = similar_BMM.diagonal(dim1=1, dim2=2)
    other_BMK = similar_BMM.gather(2, negatives_BMK)
    same_BMK = same_codes(codes_BMG, negatives_BMK)
    other_BMK = other_BMK.masked_fill(same_BMK, -torch.inf)
    logits_BMK = torch.cat([true_BM[..., None], other_BMK], dim=2)
    loss_BM = logits_BMK.logsumexp(dim=2) - true_BM
    distinct_BM = ~same_BMK.all(dim=2)
    hit_BM = (true_BM > other_BMK.amax(dim=2)) & distinct_BM
    return Contrast(loss_BM, hit_BM, same_BMK.float().mean(dim=2))


def same_codes(codes_BMG: Tensor, negatives_BMK: Tensor) -> Tensor:
    """Whether a negative's codes are those of the slot itself. bool [B, M, K]."""
    same_BMK = torch.ones_like(negatives_BMK, dtype=torch.bool)
    for codes_BM in codes_BMG.unbind(dim=2):
        their_BMK = codes_BM.unsqueeze(1).expand(-1, codes_BM.shape[1], -1).gather(2, negatives_BMK)
        same_BMK = same_BMK & (their_BMK == codes_BM[..., None])
    return same_BMK


def perplexity(mean_GV: Tensor) -> Tensor:
    """Sum over the codebooks of exp(entropy) of the mean probabilities: from G to G * V. 0-dim."""
    entropy_G = -torch.special.xlogy(mean_GV, mean_GV.clamp(min=1e-30)).sum(dim=-1)
    return entropy_G.exp().sum()


class CodePerplexity(Metric):
    """Perplexity of codes over a whole set and all processes, from summed counts.

    (fairseq averages the perplexities of batches and processes, which is another number.) sums:
    "code" for hard choices, "prob" for mean probabilities.
    """

    full_state_update = False
    total_GV: Tensor

    def __init__(self, groups: int, codes: int, *, sums: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sums = sums
        self.add_state("total_GV", default=torch.zeros(groups, codes), dist_reduce_fx="sum")

    def update(self, code_GV: Tensor, prob_GV: Tensor) -> None:
        """Add a batch's counts of codes and sums of probabilities, both [G, V]."""
        added = code_GV if self.sums == "code" else prob_GV
        self.total_GV = self.total_GV + added.to(self.total_GV)

    def compute(self) -> Tensor:
        """0-dim; nan before anything was counted."""
        return of_sums(self.total_GV)


def of_sums(total_GV: Tensor) -> Tensor:
    """The perplexity of counts or summed probabilities [G, V]; nan where there are none."""
    return perplexity(total_GV / total_GV.sum(dim=-1, keepdim=True))


def chance_bits(negatives: int) -> float:
    """InfoNCE in bits of one who does not listen."""
    return math.log2(negatives + 1)
