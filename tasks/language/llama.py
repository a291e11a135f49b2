"""LLaMA (Touvron et al., arXiv 2302.13971 and 2307.09288) with the norm as an argument.

Token ids in, the logits of each next token out. Every block is attention over what stands before
(rotary positions, a key/value head for several query heads where kv_heads is less than heads) and a
SwiGLU MLP, each behind a norm and around a residual; no linear layer has a bias. Parameters are
named as those of Hugging Face's LlamaForCausalLM, whose files load as they are.

What goes with a norm is an option, off by default: DyT's LLaMA (arXiv 2503.10622, appendix A)
multiplies the embedding by a learned scalar that begins at sqrt(dim). Its norms have no bias, as
here unless norm_bias is set.

First weights are N(0, init_std); what ends a residual branch begins smaller by sqrt(2 depth), the
square root of the number of branches, as GPT-2's. The LLaMA papers do not state theirs.
depth_init=false is Hugging Face's and, but for a cut at 100 standard deviations, that of fms, the
code that DyT's LLaMA was trained with.

Shapes: B sequences, T positions, C channels, H heads, K key/value heads, D channels of a head,
V rows of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.initial import init_weights
from suite.norms import NormFactory
from suite.registry import ModelOptions
from tasks.language.rope import frequencies, rotary, rotate

SITES = ("attn", "ffn", "final")
LAST = ("o_proj.weight", "down_proj.weight")  # what ends a residual branch
ROTARY = "rotary_emb.inv_freq"  # a buffer of older files; here computed


@dataclass(frozen=True)
class LlamaOptions(ModelOptions):
    """Sizes of LLaMA.

    heads, kv_heads: of the queries, and of the keys and values. hidden_dim: of the SwiGLU MLP.
    vocab_size: rows of the embedding; None: as many as the data has ids.
    tie_head: the head is the embedding. rope_theta: base of the rotary frequencies.
    eps: of a norm that has one. norm_bias: whether a norm may have a bias.
    embed_scale: a learned scalar, at first sqrt(dim), multiplies the embedding.
    init_std: of the first weights. depth_init: what ends a residual branch begins smaller, by
        sqrt(2 depth).
    checkpoint: compute blocks again in the backward instead of keeping what is in them.
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden_dim: int = 352
    vocab_size: int | None = None
    tie_head: bool = False
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    norm_bias: bool = False
    embed_scale: bool = False
    init_std: float = 0.02
    depth_init: bool = True
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "kv_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim must be a multiple of 2 x heads ({2 * self.heads}), as rotary positions turn "
                f"pairs of a head's channels, got {self.dim}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), got {self.kv_heads}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be null or at least 1, got {self.vocab_size}")
        for name in ("rope_theta", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be a finite number above 0, got {getattr(self, name)}"
                )
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std must be 0 or a finite number above, got {self.init_std}")


class Attention(nn.Module):
    """Causal attention; each key/value head serves heads / kv_heads query heads."""

    def __init__(self, options: LlamaOptions) -> None:
        super().__init__()
        dim, heads, kv_heads = options.dim, options.heads, options.kv_heads
        self.head_dim, self.theta = dim // heads, options.rope_theta
        self.shared = heads // kv_heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """mask: True where a query sees a key; None: all that stand before it, and itself."""
        q_BHTD, k_BKTD, v_BKTD = (
            rearrange(layer(x_BTC), "b t (h d) -> b h t d", d=self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos_TD, sin_TD = rotary(
            x_BTC.shape[1], head_dim=self.head_dim, theta=self.theta, like=q_BHTD
        )
        q_BHTD = rotate(q_BHTD, cos_TD=cos_TD, sin_TD=sin_TD)
        k_BKTD = rotate(k_BKTD, cos_TD=cos_TD, sin_TD=sin_TD)
        y_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, mask_B1TT, shared=self.shared)
        return self.o_proj(rearrange(y_BHTD, "b h t d -> b t (h d)"))


def attend(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask_B1TT: Tensor | None, *, shared: int
) -> Tensor:
    """Scaled dot-product attention; each key/value head serves `shared` query heads in a row."""
    # On a GPU only flash attention has groups: elsewhere enable_gqa would be torch's kernel that
    # keeps all T * T scores.
    flash = mask_B1TT is None and q_BHTD.dtype in (torch.bfloat16, torch.float16)
    if shared > 1 and not flash:
        k_BKTD, v_BKTD = (h.repeat_interleave(shared, dim=1) for h in (k_BKTD, v_BKTD))
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKTD,
        v_BKTD,
        attn_mask=mask_B1TT,
        is_causal=mask_B1TT is None,
        enable_gqa=shared > 1 and flash,
    )


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    """Two residual branches, each behind its norm."""

    def __init__(self, options: LlamaOptions, *, norm: NormFactory) -> None:
        super().__init__()
        dim, eps, bias = options.dim, options.eps, options.norm_bias
        self.input_layernorm = norm(dim, site="attn", eps=eps, bias=bias)
        self.self_attn = Attention(options)
        self.post_attention_layernorm = norm(dim, site="ffn", eps=eps, bias=bias)
        self.mlp = Mlp(dim, hidden_dim=options.hidden_dim)
        self.checkpoint = options.checkpoint

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """The checkpoint is inside, so that FSDP gathers a block's weights around both passes."""
        if self.checkpoint and self.training:
            again_BTC: Tensor = checkpoint(
                self.branches, x_BTC, mask_B1TT, use_reentrant=False, preserve_rng_state=False
            )
            return again_BTC
        return self.branches(x_BTC, mask_B1TT)

    def branches(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), mask_B1TT)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Trunk(nn.Module):
    """Ids [B, T] -> hidden [B, T, C]: all but the head."""

    def __init__(self, options: LlamaOptions, *, norm: NormFactory, vocab_size: int) -> None:
        super().__init__()
        dim = options.dim
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        scale = nn.Parameter(torch.empty(1)) if options.embed_scale else None
        self.register_parameter("embed_scale", scale)
        self.layers = nn.ModuleList(Block(options, norm=norm) for _ in range(options.depth))
        self.norm = norm(dim, site="final", eps=options.eps, bias=options.norm_bias)

    def forward(self, ids_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        x_BTC = self.embed_tokens(ids_BT)
        if self.embed_scale is not None:
            x_BTC = x_BTC * self.embed_scale
        mask_B1TT = None if document_BT is None else within_documents(document_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, mask_B1TT)
        hidden_BTC: Tensor = self.norm(x_BTC)
        return hidden_BTC


def within_documents(document_BT: Tensor) -> Tensor:
    """[B, 1, T, T], True where the key is of the query's document and not behind the query."""
    same_BTT = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
    return same_BTT.tril().unsqueeze(1)


class Llama(nn.Module):
    """Ids [B, T] -> logits [B, T, V].

    vocab_size: ids of the data; options.vocab_size, if it is given, is the number of rows.
    fixed_by_weights: options that no name or shape of a weight shows.
    Raises ValueError where the rows are fewer than the ids.
    """

    causal = True
    max_length: int | None = None  # rotary positions have no last one
    fixed_by_weights = ("heads", "rope_theta")

    def __init__(self, options: LlamaOptions, *, norm: NormFactory, vocab_size: int) -> None:
        super().__init__()
        rows = options.vocab_size or vocab_size
        if rows < vocab_size:
            raise ValueError(f"vocab_size must be at least the data's {vocab_size}, got {rows}")
        self.options, self.vocab_size, self.depth = options, rows, options.depth
        self.model = Trunk(options, norm=norm, vocab_size=rows)
        # Tied, it is no module: to_empty() would make two parameters of one weight in two places.
        self.lm_head = None if options.tie_head else nn.Linear(options.dim, rows, bias=False)
        init_weights(self)

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Fill a parameter that no norm owns with its first value."""
        if name == "model.embed_scale":
            full.fill_(math.sqrt(self.options.dim))
            return
        smaller = self.options.depth_init and name.endswith(LAST)
        std = self.options.init_std / (math.sqrt(2 * self.depth) if smaller else 1.0)
        full.normal_(0.0, std, generator=generator)

    def forward(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """document_BT: number of each position's document, which no attention leaves; None: one."""
        hidden_BTC = self.model(ids_BT, document_BT)
        if self.lm_head is None:
            return F.linear(hidden_BTC, self.model.embed_tokens.weight)
        logits_BTV: Tensor = self.lm_head(hidden_BTC)
        return logits_BTV

    def shard_units(self) -> list[nn.Module]:
        """The blocks, in order: what FSDP shards one by one."""
        return list(self.model.layers)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 the embedding, then the blocks, 1 more norm and head."""
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith("model.embed_") else self.depth + 1

    def no_weight_decay(self) -> set[str]:
        """None by name: LLaMA decays all."""
        return set()

    def training_flops(self, length: int) -> float:
        """Floating point operations of forward and backward for one token in rows of `length`.

        As PaLM counts them (arXiv 2204.02311, appendix B): 6 for each weight that multiplies (the
        head's, not those that are looked up) and 12 C T for each block's attention, as if every
        position saw the whole row. What checkpoints compute again does not count.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        if self.lm_head is None:
            weights += self.model.embed_tokens.weight.numel()
        return 6.0 * weights + 12.0 * self.depth * self.options.dim * length

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors without what is no weight here, and notes; see suite.checkpoint.

        Raises ValueError where a file's sizes, its rotary frequencies or its second copy of a tied
        head say that it is of another model.
        """
        ours, notes = dict(state), []
        self.check_sizes(state)
        rotaries = [name for name in state if name.endswith(ROTARY)]
        for name in rotaries:
            self.check_rotary(name, ours.pop(name))
        if rotaries:
            notes.append("its rotary frequencies are those of model.rope_theta and model.heads")
        if self.lm_head is None and "lm_head.weight" in ours:
            head = ours.pop("lm_head.weight")
            if not torch.equal(ours.setdefault("model.embed_tokens.weight", head), head):
                raise ValueError("its head is not its embedding: set model.tie_head=false")
        return ours, notes

    def check_sizes(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError that names the options which differ from those of a whole file."""
        own = vars(self.options) | {"vocab_size": self.vocab_size}
        wrong = {name: size for name, size in sizes_of(state).items() if size != own[name]}
        if wrong:
            here = ", ".join(f"{name}={own[name]}" for name in wrong)
            settings = " ".join(f"model.{name}={size}" for name, size in wrong.items())
            where = ", if its ids mean what the data's do" if "vocab_size" in wrong else ""
            raise ValueError(
                f"its sizes are other than this model's ({here}): set {settings}{where}"
            )

    def check_rotary(self, name: str, found: Tensor) -> None:
        """Raise ValueError unless a file's frequencies are those of this model, to rounding."""
        options = self.options
        head_dim = options.dim // options.heads
        expected = frequencies(head_dim, theta=options.rope_theta, like=found.double())
        if found.shape != expected.shape:
            raise ValueError(
                f"{name} is of heads of {2 * found.numel()} channels, here they have {head_dim}: "
                "set model.heads"
            )
        if not torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-6):  # of 16 bits, too
            raise ValueError(f"{name} is not of model.rope_theta={options.rope_theta:g}")

    def said_by(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options by a config.json of Hugging Face. Raises ValueError for what has no option."""
        if config.get("model_type", "llama") != "llama":
            raise ValueError(f"model_type={config['model_type']}, expected llama")
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_type={kind}; rotary positions here are the plain ones")
        found = {
            "heads": config.get("num_attention_heads"),
            "kv_heads": config.get("num_key_value_heads"),
            "rope_theta": config.get("rope_theta", rope.get("rope_theta")),
            "eps": config.get("rms_norm_eps"),
        }
        return {key: value for key, value in found.items() if value is not None}

    def weights_hint(self, names: set[str]) -> str:
        """What may be wrong with a file that has other names."""
        if any(name.endswith(".attention.wq.weight") for name in names):
            return "It is in Meta's own layout: convert it to Hugging Face's with transformers"
        if any(name.endswith("_proj.bias") for name in names):
            return "Its linear layers have biases: it is no LLaMA"
        ends = ("model.embed_tokens.", "model.norm.")
        if names and not all(any(name.startswith(end) for name in names) for end in ends):
            return (
                "It is one piece of a model that was saved in several: give their folder, which "
                "has a model.safetensors.index.json, or that file"
            )
        if self.lm_head is not None and "lm_head.weight" not in names:
            return (
                "It has no head of its own: if its head is the embedding, set model.tie_head=true"
            )
        scaled = self.options.embed_scale
        if scaled != ("model.embed_scale" in names):
            return f"Set model.embed_scale={str(not scaled).lower()}"
        return ""


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The options that a file's shapes show; {} of one that is not a whole LLaMA."""
    embed, gate = (
        state.get(f"model.{name}.weight") for name in ("embed_tokens", "layers.0.mlp.gate_proj")
    )
    if embed is None or gate is None or "model.norm.weight" not in state:
        return {}
    if embed.dim() != 2:
        return {}
    blocks = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    (rows, dim), hidden = embed.shape, len(gate)
    return {"vocab_size": rows, "dim": dim, "hidden_dim": hidden, "depth": len(blocks)}


_PUBLISHED = LlamaOptions(vocab_size=32_000)
# 7B, 13B and 70B are LLaMA's, 1B is TinyLlama's (arXiv 2401.02385). 34B has the shapes of Code
# Llama's (2308.12950), whose files are of rope_theta=1e6; in fms-fsdp, DyT's code, it is 1e4. 124M
# has GPT-2's width and depth, and its MLP as many weights. Tiny begins with weights of
# 1 / sqrt(dim) and an embedding of RMS 1, whatever the norm: with 0.02 a norm without statistics
# sees inputs far below its range, and learns nothing for long.
LLAMA_SIZES = {
    "llama_tiny": LlamaOptions(embed_scale=True, init_std=0.088),
    "llama_124m": replace(_PUBLISHED, dim=768, depth=12, heads=12, kv_heads=12, hidden_dim=2048),
    "llama_1b": replace(_PUBLISHED, dim=2048, depth=22, heads=32, kv_heads=4, hidden_dim=5632),
    "llama_7b": replace(_PUBLISHED, dim=4096, depth=32, heads=32, kv_heads=32, hidden_dim=11_008),
    "llama_13b": replace(_PUBLISHED, dim=5120, depth=40, heads=40, kv_heads=40, hidden_dim=13_824),
    "llama_34b": replace(_PUBLISHED, dim=8192, depth=48, heads=64, kv_heads=8, hidden_dim=22_016),
    "llama_70b": replace(_PUBLISHED, dim=8192, depth=80, heads=64, kv_heads=8, hidden_dim=28_672),
}
