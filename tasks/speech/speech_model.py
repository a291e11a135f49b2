"""What a model around a wav2vec 2.0 tells the suite of itself, whatever its task."""

from __future__ import annotations

from torch import nn

from tasks.speech.published import size_hint
from tasks.speech.wav2vec2 import Wav2Vec2


class SpeechModel(nn.Module):
    """A wav2vec 2.0, a mask embedding, and what a task puts behind them.

    encoder_depth: layers of the Transformer. fixed_by_weights: options that no name or shape of a
    weight shows.
    """

    wav2vec2: Wav2Vec2
    encoder_depth: int
    fixed_by_weights = ("extractor", "heads", "keep_sites", "pos_groups", "pre_norm")

    def layer_of(self, name: str) -> int:
        """The depth of a parameter, for layer-wise learning rates: what reads the context is last.

        So is the quantizer: it stands beside the Transformer, not in front of it.
        """
        if name.startswith("wav2vec2."):
            return self.wav2vec2.layer_of(name)
        return 0 if name == "mask_embedding" else self.encoder_depth + 1

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed besides norms and biases."""
        return {"mask_embedding"}

    def weights_hint(self, names: set[str]) -> str:
        """What to set so that a file with these names fits; empty if that is not the matter."""
        return size_hint(set(self.state_dict()), names)
