"""wav2vec 2.0 with a letter head, for fine-tuning with CTC (arXiv 2006.11477, section 4.3).

The order is fairseq's (`fairseq/models/wav2vec/wav2vec2_asr.py`). For the first updates of a
fine-tuning everything but the head stands still: it runs without a graph, and an autograd function
hands every parameter a gradient of zero, so that DDP needs no `find_unused_parameters`.

Shapes: B batch, S samples, T frames, C channels, V letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tasks.speech.published import adapt_ctc
from tasks.speech.speech_model import SpeechModel
from tasks.speech.wav2vec2 import Wav2Vec2, valid_of


class _WithoutGradient(torch.autograd.Function):
    """x, for which the parameters beside it count as used, with gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(torch.zeros_like(p) for p in ctx.saved_tensors))


class ForCTC(SpeechModel):
    """See `forward`. encoder_depth: layers; layer_drop: the share that an update leaves out.

    dim: channels of the Transformer; letters: labels of the head, the blank among them.
    freeze_extractor: the convolutions never learn: their parameters ask for no gradient.
    """

    def __init__(
        self,
        wav2vec2: Wav2Vec2,
        *,
        dim: int,
        letters: int,
        freeze_extractor: bool = True,
        final_dropout: float = 0.0,
        layer_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.wav2vec2 = wav2vec2
        self.mask_embedding = nn.Parameter(torch.empty(dim).uniform_())
        self.final_dropout = nn.Dropout(final_dropout)
        self.head = nn.Linear(dim, letters)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.encoder_depth, self.layer_drop = len(wav2vec2.encoder.transformer.layers), layer_drop
        wav2vec2.feature_extractor.requires_grad_(not freeze_extractor)

    def forward(
        self,
        audio_BS: Tensor,
        length_B: Tensor | None = None,
        *,
        mask_BT: Tensor | None = None,
        channel_mask_BC: Tensor | None = None,
        layers_kept: Tensor | None = None,
        freeze_encoder: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """audio [B, S], samples of each row (None: all) -> logits [B, T, V] float32, frames [B].

        mask_BT: bool, frames that the mask embedding replaces. channel_mask_BC: bool, channels of
        the projected features that are 0. layers_kept: bool [depth], see `Transformer.forward`.
        freeze_encoder: all but the head get gradients of zero.
        """
        masks = {"mask_BT": mask_BT, "channel_mask_BC": channel_mask_BC, "layers_kept": layers_kept}
        if freeze_encoder:
            with torch.no_grad():
                context_BTC, frames_B = self.encode(audio_BS, length_B, **masks)
            still = [p for p in self.encoder_parameters() if p.requires_grad]
            context_BTC = _WithoutGradient.apply(context_BTC, *still)
        else:
            context_BTC, frames_B = self.encode(audio_BS, length_B, **masks)
        logits_BTV = self.head(self.final_dropout(context_BTC))
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), frames_B

    def encode(
        self,
        audio_BS: Tensor,
        length_B: Tensor | None = None,
        *,
        mask_BT: Tensor | None = None,
        channel_mask_BC: Tensor | None = None,
        layers_kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All but the head: context [B, T, C] and the valid frames of each row [B]."""
        features_BTC, frames_B = self.wav2vec2.extract(audio_BS, length_B)
        batch, size, _ = features_BTC.shape
        valid_BT = None if frames_B is None else valid_of(frames_B, size)
        normed_BTC = self.wav2vec2.normalize(features_BTC, valid_BT)
        x_BTC = self.wav2vec2.encoder.feature_projection(normed_BTC)
        if mask_BT is not None:
            x_BTC = torch.where(mask_BT.unsqueeze(-1), self.mask_embedding.to(x_BTC.dtype), x_BTC)
        elif self.training:  # DDP wants every parameter used, in every update
            x_BTC = x_BTC + 0 * self.mask_embedding.to(x_BTC.dtype)
        if channel_mask_BC is not None:
            x_BTC = torch.where(channel_mask_BC.unsqueeze(1), 0, x_BTC)
        context_BTC = self.wav2vec2.encoder.transformer(x_BTC, valid_BT, layers_kept=layers_kept)
        if frames_B is None:
            frames_B = torch.full((batch,), size, device=audio_BS.device)
        return context_BTC, frames_B

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What freeze_encoder holds: all but the head's."""
        for name, parameter in self.named_parameters():
            if not name.startswith("head."):
                yield parameter

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a file under this model's names, and notes on what was done.

        whole: the file is to be judged as it is; else a file of pre-training will do, whose
        quantizer is left out and for which the head keeps its first values.
        """
        return adapt_ctc(self, state, whole=whole)
