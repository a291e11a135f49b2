"""Gumbel product quantizer of wav2vec 2.0 (arXiv 2006.11477, section 2; arXiv 1611.01144).

Each of G codebooks has V vectors; a frame chooses one of each, and what it chose, side by side, is
the target of pre-training. All of it runs in float32 whatever the autocast: the choice is an
argmax, and the diversity loss lives on small differences of probabilities. The sum over the
codebook is a matrix product: fairseq's and Hugging Face's products [.., G * V, D / G] take 128
times the memory of the logits.

Shapes: B batch, M slots for masked frames, C channels, G codebooks, V codes of each, D channels of
a quantized vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a frame became.

    vectors: [B, M, D]. codes: int64 [B, M, G], the vectors that were taken, so equal codes are
    equal vectors. probs: float32 [B, M, G, V], the softmax of the logits without noise or
    temperature; its argmax is the choice without noise, from which fairseq's code perplexity comes.
    """

    vectors: Tensor
    codes: Tensor
    probs: Tensor


class Quantizer(nn.Module):
    """Frames [B, M, C] -> Quantized. dim: C; code_dim: D, a multiple of `codebooks`."""

    def __init__(self, dim: int, *, codebooks: int, codes: int, code_dim: int) -> None:
        super().__init__()
        self.codebooks, self.codes = codebooks, codes
        self.weight_proj = nn.Linear(dim, codebooks * codes)
        nn.init.normal_(self.weight_proj.weight)  # fairseq's: logits of a spread that can choose
        nn.init.zeros_(self.weight_proj.bias)
        self.codebook = nn.Parameter(torch.empty(codebooks, codes, code_dim // codebooks))
        nn.init.uniform_(self.codebook)

    def forward(
        self,
        x_BMC: Tensor,
        *,
        noise_BMGV: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Quantized:
        """Choose a vector of each codebook.

        noise_BMGV: Gumbel noise; the choice is then drawn, and its gradient is that of a softmax at
        `temperature` (straight through). None: the most likely, whose logits get no gradient.
        """
        with torch.autocast(x_BMC.device.type, enabled=False):
            dtype = torch.promote_types(x_BMC.dtype, torch.float32)
            weight, bias = self.weight_proj.weight.to(dtype), self.weight_proj.bias.to(dtype)
            logits_BMGV = F.linear(x_BMC.to(dtype), weight, bias).unflatten(
                -1, (self.codebooks, self.codes)
            )
            probs_BMGV = logits_BMGV.softmax(-1)
            if noise_BMGV is None:
                codes_BMG = logits_BMGV.argmax(-1)
                return Quantized(self._taken(codes_BMG).to(dtype), codes_BMG, probs_BMGV)
            noisy_BMGV = logits_BMGV + noise_BMGV
            codes_BMG = noisy_BMGV.argmax(-1)
            soft_BMGV = (noisy_BMGV / temperature).softmax(-1)
            hard_BMGV = torch.zeros_like(soft_BMGV).scatter(-1, codes_BMG.unsqueeze(-1), 1.0)
            # the bracket is exactly 0: the value is the hard choice, the gradient the soft one's
            choice_BMGV = hard_BMGV + (soft_BMGV - soft_BMGV.detach())
            vectors = torch.einsum("btgv,gvd->btgd", choice_BMGV, self.codebook.to(dtype))
            return Quantized(vectors.flatten(-2), codes_BMG, probs_BMGV)

    def _taken(self, codes_BMG: Tensor) -> Tensor:
        first_G = torch.arange(self.codebooks, device=codes_BMG.device) * self.codes
        return F.embedding(codes_BMG + first_G, self.codebook.flatten(0, 1)).flatten(-2)
