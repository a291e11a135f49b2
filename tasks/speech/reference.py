"""transformers' Wav2Vec2ForPreTraining as the reference for a step of speech/pretrain.

It takes masks and negatives from a collator, which makes them with NumPy on the CPU: here they are
given to it ready-made, and are those that our step draws for itself. It has no feature penalty and
no factor on the extractor's gradient, so our side runs without both, and dropouts are 0 on both
sides, since two implementations do not drop the same. Its Gumbel noise is its own but for the check
of the losses.

Shapes: B examples, S samples, T frames, M slots for masked frames, K negatives, G codebooks, V
codes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.config import Config
from suite.data import Splits
from suite.errors import ConfigError
from suite.module import Batch
from suite.randomness import sample_seeds
from tasks.speech import masks
from tasks.speech.wav2vec2 import RATE, RECEPTIVE, frames_of

if TYPE_CHECKING:
    from tasks.speech.pretrain import Pretrain

OFF = {
    **dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "feature_dropout"),
        0.0,
    ),
    "layer_drop": 0.0,
    "feature_grad_mult": 1.0,
}


class PretrainReference:
    """See suite.reference.Reference."""

    notes: Sequence[str] = (
        "our step draws its masks and negatives and computes its metrics; theirs is given masks "
        "and negatives ready-made, which its collator makes on the CPU, and computes no metric",
        "dropouts, LayerDrop and the feature penalty, which theirs has not, are off",
    )

    def __init__(self) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError(
                "task=speech/pretrain: suite.bench reference compares it with transformers, which "
                "is not installed; pip install transformers"
            ) from None
        transformers.logging.set_verbosity_error()
        self.library: Any = transformers
        self.name = f"transformers {transformers.__version__} Wav2Vec2ForPreTraining"

    def settle(self, config: Config) -> Config:
        """Without what transformers' lacks; see the module's docstring."""
        if config.norm_name != "layernorm":
            raise ConfigError(
                f"norm={config.norm_name}: {self.name} has LayerNorm alone; leave norm= out, and "
                "compare norms with suite.bench step"
            )
        model: Any = config.model
        if model.extractor == "group_norm" and "stem" not in model.keep_sites:
            raise ConfigError(
                f"model.keep_sites={list(model.keep_sites)}: {self.name} has the published norm at "
                "the site stem; leave keep_sites out"
            )
        return replace(
            config,
            model=replace(model, **OFF),
            task=replace(config.task, penalty_weight=0.0),
            data=replace(config.data, pad=False),
        )

    def batch(self, splits: Splits, *, rows: int, seconds: float) -> Batch:
        """Rows of equal length: training clips, one behind the other, cut into `rows` pieces."""
        split, samples = splits.train, int(seconds * RATE)
        if samples < RECEPTIVE:
            raise ConfigError(f"seconds={seconds:g}: one frame of the model is {RECEPTIVE / RATE}")
        pieces, held = [], 0
        for index in range(len(split)):
            if held >= rows * samples:
                break
            clip = split.fetch([index], epoch=0, train=False)
            pieces.append(clip["audio"][0, : int(clip["length"][0])])
            held += len(pieces[-1])
        if held < rows * samples:
            raise ConfigError(
                f"rows={rows} seconds={seconds:g}: the training split has {held / RATE:.0f} s of "
                "audio; take fewer rows or seconds"
            )
        return {
            "audio": torch.cat(pieces)[: rows * samples].view(rows, samples),
            "length": torch.full((rows,), samples),
            "sample_id": torch.arange(rows),
            "epoch": torch.zeros(rows, dtype=torch.int64),
            "valid": torch.ones(rows, dtype=torch.bool),
        }

    def build(self, config: Config) -> nn.Module:
        """Wav2Vec2ForPreTraining of the same sizes, in training mode."""
        m, task = config.model, config.task
        made: nn.Module = self.library.Wav2Vec2ForPreTraining(
            self.library.Wav2Vec2Config(
                hidden_size=m.dim,
                num_hidden_layers=m.depth,
                num_attention_heads=m.heads,
                intermediate_size=m.hidden_dim,
                conv_dim=(m.conv_dim,) * 7,
                conv_bias=m.conv_bias,
                feat_extract_norm=m.extractor.partition("_")[0],
                do_stable_layer_norm=m.pre_norm,
                num_conv_pos_embeddings=m.pos_kernel,
                num_conv_pos_embedding_groups=m.pos_groups,
                num_codevector_groups=m.codebooks,
                num_codevectors_per_group=m.codes,
                codevector_dim=m.code_dim,
                proj_codevector_dim=m.code_dim,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0,
                feat_quantizer_dropout=0.0,
                layerdrop=0.0,
                num_negatives=task.negatives,
                contrastive_logits_temperature=task.logit_temperature,
                diversity_loss_weight=task.diversity_weight,
            )
        )
        return made.train()

    def share(self, model: nn.Module, module: Any) -> None:
        """The reference's weights under our names."""
        state, _ = module.model.adapt(model.state_dict(), whole=True)
        module.model.load_state_dict(state, strict=True)

    def loss(self, model: Any, module: Any, batch: Batch) -> Callable[[], Tensor]:
        """Its loss a masked frame, of the masks and negatives that `module` draws."""
        model.set_gumbel_temperature(module.temperature)
        mask_BT, negatives_BTK = ready_made(module, batch)
        audio_BS, count = batch["audio"], mask_BT.sum()

        def mean() -> Tensor:
            found: Tensor = model(
                audio_BS, mask_time_indices=mask_BT, sampled_negative_indices=negatives_BTK
            ).loss
            return found / count

        return mean

    @contextmanager
    def same_noise(self, module: Any, batch: Batch) -> Iterator[None]:
        """Our Gumbel noise in the place of torch's.

        And without torch's rounding (its hard choice is 1 - soft + soft), which makes equal
        codewords differ, so that negatives that are the target are no longer found.
        """
        noise_BTGV = noise_of_frames(module, batch)

        def given_noise(logits: Tensor, *, tau: float, hard: bool) -> Tensor:
            soft = ((logits + noise_BTGV.view_as(logits)) / tau).softmax(-1)
            return F.one_hot(soft.argmax(-1), soft.shape[-1]) + (soft - soft.detach())

        with patch.object(F, "gumbel_softmax", given_noise):
            yield


def where(batch: Batch) -> dict[str, Tensor]:
    """What addresses a batch's random numbers."""
    return {"ids": batch["sample_id"], "epoch": batch["epoch"]}


def ready_made(module: Pretrain, batch: Batch) -> tuple[Tensor, Tensor]:
    """Masked frames [B, T], and the negatives of each frame as numbers of frames in the batch,
    [B, T, K], as transformers' collator has them.
    """
    seeds_B = sample_seeds(module.seed, "mask", **where(batch))
    mask_BT, at_BM, used_BM = module._masked(batch, seeds_B)
    seeds_B = sample_seeds(module.seed, "negatives", **where(batch))
    drawn_BMK = masks.negatives(used_BM, count=module.negatives, seeds_B=seeds_B)
    frame_BMK = at_BM.gather(1, drawn_BMK.flatten(1)).view_as(drawn_BMK)
    rows, size = mask_BT.shape
    first_B11 = torch.arange(rows, device=mask_BT.device)[:, None, None] * size
    return mask_BT, over_frames(frame_BMK, at_BM, size=size) + first_B11


def noise_of_frames(module: Pretrain, batch: Batch) -> Tensor:
    """The noise that our step draws, at its frames: [B, T, G, V], 0 at unmasked ones."""
    seeds_B = sample_seeds(module.seed, "mask", **where(batch))
    at_BM = module._masked(batch, seeds_B)[1]
    seeds_B = sample_seeds(module.seed, "gumbel", **where(batch))
    noise_BMGV = masks.gumbel(seeds_B, at_BM.shape[1], *module.shape)
    size = int(frames_of(batch["audio"].shape[1]))
    noise_BTX = over_frames(noise_BMGV.flatten(2), at_BM, size=size)
    return noise_BTX.unflatten(2, module.shape)


def over_frames(x_BMX: Tensor, at_BM: Tensor, *, size: int) -> Tensor:
    """x of the slots at the frames of the slots: [B, T, X], 0 elsewhere. size: T."""
    rows, _, width = x_BMX.shape
    zeros_BTX = x_BMX.new_zeros(rows, size, width)
    return zeros_BTX.scatter(1, at_BM[..., None].expand_as(x_BMX), x_BMX)
