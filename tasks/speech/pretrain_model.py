"""wav2vec 2.0 with what pre-training adds: mask embedding, quantizer and two projections.

The order is fairseq's (`fairseq/models/wav2vec/wav2vec2.py`): the quantizer reads the unmasked
features behind their norm, the Transformer the masked ones, and the two meet at the masked frames.
Which frames those are, the noise and the dropped layers are given: the task makes them functions of
seed, step and example, so that two norms are judged on the same.

Shapes: B batch, S samples, T frames, M slots for masked frames, C channels, G codebooks, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.speech.published import adapt_pretrain
from tasks.speech.quantizer import Quantizer
from tasks.speech.speech_model import SpeechModel
from tasks.speech.wav2vec2 import Wav2Vec2, valid_of


class PretrainOutput(NamedTuple):
    """What the loss is made of.

    context_BMC: the projected context of each masked slot; target_BMC: its projected quantized
    vector. codes_BMG, probs_BMGV: as `Quantized` has them. features_BTC: the extractor's output,
    for the penalty on its size. frames_B: valid frames of each row.
    """

    context_BMC: Tensor
    target_BMC: Tensor
    codes_BMG: Tensor
    probs_BMGV: Tensor
    features_BTC: Tensor
    frames_B: Tensor


class _ScaleGradient(torch.autograd.Function):
    """The identity, exactly, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor` on the way back."""
    if factor == 1.0:
        return x
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def at_frames(x_BTC: Tensor, at_BM: Tensor) -> Tensor:
    """x at the frames of each slot: [B, M, C]."""
    return x_BTC.gather(1, at_BM.unsqueeze(-1).expand(-1, -1, x_BTC.shape[-1]))


class ForPretraining(SpeechModel):
    """See `forward`. encoder_depth: layers; layer_drop: the share that an update leaves out.

    features: channels of the extractor; dim: of the Transformer; code_dim: of a target.
    """

    def __init__(
        self,
        wav2vec2: Wav2Vec2,
        *,
        features: int,
        dim: int,
        codebooks: int,
        codes: int,
        code_dim: int,
        feature_dropout: float = 0.0,
        feature_grad_mult: float = 1.0,
        layer_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.wav2vec2 = wav2vec2
        self.mask_embedding = nn.Parameter(torch.empty(dim).uniform_())
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.feature_grad_mult = feature_grad_mult
        self.quantizer = Quantizer(features, codebooks=codebooks, codes=codes, code_dim=code_dim)
        self.project_q = nn.Linear(code_dim, code_dim)
        self.final_proj = nn.Linear(dim, code_dim)
        self.encoder_depth, self.layer_drop = len(wav2vec2.encoder.transformer.layers), layer_drop

    def forward(
        self,
        audio_BS: Tensor,
        length_B: Tensor | None = None,
        *,
        mask_BT: Tensor,
        at_BM: Tensor,
        noise_BMGV: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        layers_kept: Tensor | None = None,
    ) -> PretrainOutput:
        """audio [B, S] and the samples of each row (None: all) -> what the loss is made of.

        mask_BT: bool, frames that the mask embedding replaces. at_BM: int64, the frame of each
        masked slot; unused slots may name any frame. noise_BMGV: Gumbel noise; None as in
        evaluation: the most likely codes. layers_kept: bool [depth], see `Transformer.forward`.
        """
        features_BTC, frames_B = self.wav2vec2.extract(audio_BS, length_B)
        features_BTC = scale_gradient(features_BTC, self.feature_grad_mult)
        batch, size, _ = features_BTC.shape
        valid_BT = None if frames_B is None else valid_of(frames_B, size)
        normed_BTC = self.wav2vec2.normalize(features_BTC, valid_BT)

        chosen = self.quantizer(
            self.feature_dropout(at_frames(normed_BTC, at_BM)),
            noise_BMGV=noise_BMGV,
            temperature=temperature,
        )
        x_BTC = self.wav2vec2.encoder.feature_projection(normed_BTC)
        x_BTC = torch.where(mask_BT.unsqueeze(-1), self.mask_embedding.to(x_BTC.dtype), x_BTC)
        context_BTC = self.wav2vec2.encoder.transformer(x_BTC, valid_BT, layers_kept=layers_kept)
        if frames_B is None:
            frames_B = torch.full((batch,), size, device=audio_BS.device)
        return PretrainOutput(
            context_BMC=self.final_proj(at_frames(context_BTC, at_BM)),
            target_BMC=self.project_q(chosen.vectors.to(self.project_q.weight.dtype)),
            codes_BMG=chosen.codes,
            probs_BMGV=chosen.probs,
            features_BTC=features_BTC,
            frames_B=frames_B,
        )

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a file under this model's names, and notes. whole: nothing is filled in here
        either way."""
        return adapt_pretrain(self, state)
