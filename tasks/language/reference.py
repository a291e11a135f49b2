"""transformers' LlamaForCausalLM and GPT2LMHeadModel as the references for a step of language/lm.

Sizes, weights, batch and loss are equal. What theirs have not is off on our side: the learned
factor of the embedding (DyT, arXiv 2503.10622, appendix A), attention within documents, and blocks
that are computed again in the backward. Dropouts are 0 on both sides, since two implementations do
not drop the same. Norms are those that the models were published with: RMSNorm and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from suite.benches.peers import check_norm, check_rows
from suite.config import Config
from suite.data import DataInfo, DataOptions, Splits, SuiteDataModule
from suite.errors import ConfigError
from suite.module import Batch
from tasks.language.gpt2 import GPT2Options
from tasks.language.llama import LlamaOptions

GELUS = {"tanh": "gelu_new", "exact": "gelu"}  # their names; gelu_new is OpenAI's formula


class LanguageReference:
    """See suite.benches.peers.Reference. What it is called is known once a config is settled."""

    audio = False
    notes: Sequence[str] = (
        "our step counts its hits for the log as well; theirs computes the loss alone",
        "dropouts, the embedding's factor, checkpoints and attention within documents are off",
    )

    def __init__(self) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError(
                "task=language/lm: suite.bench compares it with transformers, which is not "
                "installed; pip install transformers"
            ) from None
        transformers.logging.set_verbosity_error()
        self.library: Any = transformers
        self.name = f"transformers {transformers.__version__}"
        self.info: DataInfo | None = None

    def published_norm(self, config: Config) -> str:
        """RMSNorm of a LLaMA, LayerNorm of a GPT-2."""
        return "layernorm" if isinstance(config.model, GPT2Options) else "rmsnorm"

    def settle(self, config: Config) -> Config:
        """Without what theirs lack; see the module's docstring."""
        model: Any = config.model
        gpt2 = isinstance(model, GPT2Options)
        kind = "GPT2LMHeadModel" if gpt2 else "LlamaForCausalLM"
        self.name = f"transformers {self.library.__version__} {kind}"
        check_norm(config, name=self.name, published=self.published_norm(config))
        off: dict[str, Any] = {"embed_scale": False, "checkpoint": False}
        if gpt2:
            off["dropout"] = 0.0
            for field in ("bias", "norm_bias"):
                if not getattr(model, field):
                    raise ConfigError(
                        f"model.{field}=false: {self.name} has biases; leave model.{field} out"
                    )
        data: Any = config.data
        if data.documents == "mask":
            data = replace(data, documents="join")
        return replace(config, model=replace(model, **off), data=data)

    def batch(self, splits: Splits, *, rows: int, seconds: float | None) -> Batch:
        """The first training rows."""
        check_rows(rows, len(splits.train))
        self.info = splits.info
        return SuiteDataModule(splits, options=DataOptions(), seed=0).fixed_batch(rows)

    def build(self, config: Config) -> nn.Module:
        """The model of the same sizes, in training mode, for the data of `batch`."""
        assert self.info is not None
        m: Any = config.model
        rows, length = m.vocab_size or self.info.extra["vocab_size"], self.info.extra["length"]
        made: nn.Module = (
            self._gpt2(m, rows) if isinstance(m, GPT2Options) else self._llama(m, rows, length)
        )
        return made.train()

    def _llama(self, m: LlamaOptions, rows: int, length: int) -> nn.Module:
        made: nn.Module = self.library.LlamaForCausalLM(
            self.library.LlamaConfig(
                vocab_size=rows,
                hidden_size=m.dim,
                intermediate_size=m.hidden_dim,
                num_hidden_layers=m.depth,
                num_attention_heads=m.heads,
                num_key_value_heads=m.kv_heads,
                max_position_embeddings=length,
                rms_norm_eps=m.eps,
                rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
                tie_word_embeddings=m.tie_head,
                use_cache=False,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        return made

    def _gpt2(self, m: GPT2Options, rows: int) -> nn.Module:
        made: nn.Module = self.library.GPT2LMHeadModel(
            self.library.GPT2Config(
                vocab_size=rows,
                n_positions=m.max_length,
                n_embd=m.dim,
                n_layer=m.depth,
                n_head=m.heads,
                n_inner=m.hidden_dim,
                activation_function=GELUS[m.gelu],
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                layer_norm_epsilon=m.eps,
                tie_word_embeddings=m.tie_head,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        return made

    def share(self, model: nn.Module, module: Any) -> None:
        """The reference's weights under our names and in our layout."""
        state, _ = module.model.adapt(model.state_dict(), whole=True)
        module.model.load_state_dict(state, strict=True)

    def loss(self, model: Any, module: Any, batch: Batch) -> Callable[[], Tensor]:
        """Its own mean loss; targets are given shifted, as our data has them."""
        ids_BT, target_BT = batch["ids"], batch["target"]

        def mean() -> Tensor:
            found: Tensor = model(input_ids=ids_BT, labels=target_BT, shift_labels=target_BT).loss
            return found

        return mean

    def same_noise(self, module: Any, batch: Batch) -> AbstractContextManager[None]:
        """Neither side draws any."""
        return nullcontext()
