"""GPT-2 (Radford et al. 2019) with the norm as an argument.

Ids in, logits of the next token out. Learned positions, pre-norm blocks of causal attention and an
MLP, a norm behind the last block, and a head that is the embedding. Parameter names are those of
Hugging Face's GPT2LMHeadModel; its linear layers are Conv1D, whose weights lie transposed, and
nanoGPT's are Linear as here: `adapt` takes either.

What a file does not show: the published GPT-2, and so every file of Hugging Face's `gpt2`, computes
GELU by tanh (`gelu_new`); nanoGPT trains with the exact one. `gelu` says which.

With documents the attention stays within a document, and its positions count from its start, so
that a document has the logits that it would have in a row of its own.

Shapes: B sequences, T positions, C channels, H heads, D channels of a head, V rows of the
vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.initial import init_weights
from suite.norms import NormFactory
from suite.registry import ModelOptions

SITES = ("attn", "ffn", "final")
PUBLISHED_GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
GELUS: dict[str, Literal["tanh", "none"]] = {"tanh": "tanh", "exact": "none"}  # torch's names

BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # the causal mask of published files
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
C_ATTN = re.compile(r"^transformer\.h\.\d+\.attn\.c_attn\.weight$")
BARE = re.compile(r"^(wte|wpe|ln_f|h\.\d+)\.")  # names of GPT2Model, without its wrapper


@dataclass(frozen=True)
class GPT2Options(ModelOptions):
    """Sizes of GPT-2.

    hidden_dim: of the MLP. max_length: learned positions, the longest row.
    vocab_size: rows of the embedding; None: the data's. More than the data's is fine.
    bias: biases of the linear layers. norm_bias: biases of norms that have one.
    gelu: tanh (OpenAI, Hugging Face) or exact (nanoGPT); no file of weights shows it.
    tie_head: the head is the embedding. embed_scale: a learnable factor of the token embedding,
        sqrt(dim) at first, which Derf's GPT-2 has with point-wise norms (arXiv 2512.10938).
    init_std: of the first weights; what ends a residual branch has it less by sqrt(2 depth).
    dropout: of the embedding, the attention and both residual branches.
    checkpoint: compute blocks again in the backward instead of keeping what is in them.
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    hidden_dim: int = 512
    max_length: int = 1024
    vocab_size: int | None = None
    bias: bool = True
    norm_bias: bool = True
    gelu: Literal["tanh", "exact"] = "tanh"
    eps: float = 1e-5
    tie_head: bool = True
    embed_scale: bool = False
    init_std: float = 0.02
    dropout: float = 0.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "hidden_dim", "max_length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim={self.dim}, got {self.heads}")
        if self.gelu not in GELUS:
            raise ValueError(f"gelu must be tanh or exact, got {self.gelu!r}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be a finite number above 0, got {self.eps}")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std must be 0 or a finite number above, got {self.init_std}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class Attention(nn.Module):
    """Causal self-attention with q, k and v in one linear layer."""

    def __init__(self, options: GPT2Options) -> None:
        super().__init__()
        self.heads, self.dropout = options.heads, options.dropout
        self.c_attn = nn.Linear(options.dim, 3 * options.dim, bias=options.bias)
        self.c_proj = nn.Linear(options.dim, options.dim, bias=options.bias)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """mask_B1TT: True where a query (third) may look at a key; None: at none that is later."""
        qkv = rearrange(self.c_attn(x_BTC), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.unbind(0)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHTD,
            v_BHTD,
            attn_mask=mask_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1TT is None,
        )
        return self.c_proj(rearrange(y_BHTD, "b h t d -> b t (h d)"))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, options: GPT2Options) -> None:
        super().__init__()
        self.c_fc = nn.Linear(options.dim, options.hidden_dim, bias=options.bias)
        self.c_proj = nn.Linear(options.hidden_dim, options.dim, bias=options.bias)
        self.gelu = nn.GELU(approximate=GELUS[options.gelu])

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x_BTC)))


class Block(nn.Module):
    """Two residual branches, each behind its norm."""

    def __init__(self, options: GPT2Options, *, norm: NormFactory) -> None:
        super().__init__()
        dim, eps, bias = options.dim, options.eps, options.norm_bias
        self.ln_1 = norm(dim, site="attn", eps=eps, bias=bias)
        self.attn = Attention(options)
        self.ln_2 = norm(dim, site="ffn", eps=eps, bias=bias)
        self.mlp = Mlp(options)
        self.dropout = nn.Dropout(options.dropout)
        self.checkpoint = options.checkpoint

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """Kept or computed again in here, so that a sharded block is gathered around either."""
        if self.checkpoint and self.training:
            again: Tensor = checkpoint(self.branches, x_BTC, mask_B1TT, use_reentrant=False)
            return again
        return self.branches(x_BTC, mask_B1TT)

    def branches(self, x_BTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attn(self.ln_1(x_BTC), mask_B1TT))
        return x_BTC + self.dropout(self.mlp(self.ln_2(x_BTC)))


class Transformer(nn.Module):
    """Ids -> hidden states; what Hugging Face calls GPT2Model."""

    def __init__(self, options: GPT2Options, *, norm: NormFactory, vocab_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, options.dim)
        self.wpe = nn.Embedding(options.max_length, options.dim)
        self.embed_scale = nn.Parameter(torch.empty(1)) if options.embed_scale else None
        self.drop = nn.Dropout(options.dropout)
        self.h = nn.ModuleList(Block(options, norm=norm) for _ in range(options.depth))
        self.ln_f = norm(options.dim, site="final", eps=options.eps, bias=options.norm_bias)

    def forward(self, ids_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        position_BT, mask_B1TT = torch.arange(ids_BT.shape[1], device=ids_BT.device), None
        if document_BT is not None:
            position_BT = positions_within(document_BT)
            mask_B1TT = visible_within(document_BT)
        x_BTC = self.wte(ids_BT)
        if self.embed_scale is not None:
            x_BTC = x_BTC * self.embed_scale
        x_BTC = self.drop(x_BTC + self.wpe(position_BT))
        for block in self.h:
            x_BTC = block(x_BTC, mask_B1TT)
        hidden_BTC: Tensor = self.ln_f(x_BTC)
        return hidden_BTC


def positions_within(document_BT: Tensor) -> Tensor:
    """[B, T]: how far every position is from the first of its document."""
    index_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    begins_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
    return index_T - torch.where(begins_BT, index_T, 0).cummax(dim=1).values


def visible_within(document_BT: Tensor) -> Tensor:
    """[B, 1, T, T]: True where a query may look at a key: of its document and not later."""
    length = document_BT.shape[1]
    same_BTT = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=document_BT.device).tril()
    return (same_BTT & causal_TT).unsqueeze(1)


class GPT2(nn.Module):
    """Ids [B, T] -> logits [B, T, V].

    vocab_size: rows of the embedding (options.vocab_size or the data's).
    fixed_by_weights: options that no name or shape of a weight shows.
    """

    causal = True
    fixed_by_weights = ("heads", "gelu")

    def __init__(self, options: GPT2Options, *, norm: NormFactory, vocab_size: int) -> None:
        super().__init__()
        self.options, self.vocab_size = options, vocab_size
        self.dim, self.depth = options.dim, options.depth
        self.max_length: int | None = options.max_length
        self.transformer = Transformer(options, norm=norm, vocab_size=vocab_size)
        self.lm_head = None if options.tie_head else nn.Linear(self.dim, vocab_size, bias=False)
        init_weights(self)

    def forward(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """document_BT: number of every position's document; None: a row is one document.

        Raises ValueError for a row that is longer than the positions.
        """
        if ids_BT.shape[1] > self.options.max_length:
            raise ValueError(
                f"row of {ids_BT.shape[1]} tokens is longer than max_length="
                f"{self.options.max_length}: set data.length to at most that"
            )
        hidden_BTC = self.transformer(ids_BT, document_BT)
        if self.lm_head is not None:
            logits_BTV: Tensor = self.lm_head(hidden_BTC)
            return logits_BTV
        return F.linear(hidden_BTC, self.transformer.wte.weight)

    @torch.no_grad()
    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """N(0, std), what ends a residual branch less by their number; biases 0. As published."""
        std = self.options.init_std
        if name.endswith("embed_scale"):
            full.fill_(math.sqrt(self.dim))
        elif name.endswith(".bias"):
            full.zero_()
        elif name.endswith("c_proj.weight"):
            full.normal_(std=std / math.sqrt(2 * self.depth), generator=generator)
        else:
            full.normal_(std=std, generator=generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks, in order."""
        return list(self.transformer.h)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 the embeddings, then the blocks, 1 more what is behind."""
        if name.startswith("transformer.h."):
            return int(name.split(".")[2]) + 1
        return self.depth + 1 if name.startswith(("transformer.ln_f.", "lm_head.")) else 0

    def no_weight_decay(self) -> set[str]:
        """None: nanoGPT decays whatever has two dimensions, the embeddings too."""
        return set()

    def training_flops(self, length: int) -> float:
        """Operations of forward and backward for one token in rows of `length`.

        6 for every weight that multiplies, the head among them and no embedding, and 12 dim length
        a block for the attention, without a discount for what it masks: PaLM, arXiv 2204.02311,
        appendix B.
        """
        weights = self.depth * (4 * self.dim**2 + 2 * self.dim * self.options.hidden_dim)
        weights += self.vocab_size * self.dim
        return float(6 * weights + 12 * self.depth * self.dim * length)

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Hugging Face's and nanoGPT's files under our names and layout, and notes; ours as it is.

        Raises ValueError for a file of other sizes and for a head that is not the embedding.
        """
        del whole  # a published file has all that there is
        ours = from_published(state, tie_head=self.options.tie_head)
        self.check_sizes(ours)
        if ours.keys() == state.keys() and all(ours[name] is state[name] for name in ours):
            return ours, []
        wanted = "tanh for OpenAI's and Hugging Face's GPT-2, exact for one that nanoGPT trained"
        return ours, [
            f"published names of GPT-2; no file says its model.heads, here {self.options.heads}, "
            f"nor its model.gelu, here {self.options.gelu}: {wanted}"
        ]

    def check_sizes(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError that names the options which differ from those of a file."""
        own = {"vocab_size": self.vocab_size}
        found = sizes_of(state)
        wrong = {
            name: value
            for name, value in found.items()
            if value != own.get(name, getattr(self.options, name))
        }
        if wrong:
            here = ", ".join(f"{n}={own.get(n, getattr(self.options, n))}" for n in wrong)
            settings = " ".join(f"model.{name}={value}" for name, value in wrong.items())
            raise ValueError(f"its sizes are other than this model's ({here}): set {settings}")

    def said_by(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options by a config.json of Hugging Face. Raises ValueError for what has no option."""
        if config.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type={config['model_type']}, expected gpt2")
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if config.get(name):
                raise ValueError(f"{name}=true, which this GPT-2 does not have")
        act = config.get("activation_function")
        if act not in (None, *PUBLISHED_GELUS):
            allowed = ", ".join(PUBLISHED_GELUS)
            raise ValueError(f"activation_function={act}; allowed: {allowed}")
        found = {
            "heads": config.get("n_head"),
            "gelu": None if act is None else PUBLISHED_GELUS[act],
            "eps": config.get("layer_norm_epsilon"),
        }
        return {key: value for key, value in found.items() if value is not None}

    def weights_hint(self, names: set[str]) -> str:
        """What to set so that a file with these names fits; empty if that is not the matter."""
        own = set(self.state_dict())
        bare = not any(name.endswith(".bias") for name in names)  # nanoGPT's bias=False
        bias = "transformer.h.0.attn.c_attn.bias"
        wanted = {
            "model.bias=false": bias in own - names,
            "model.bias=true": bias in names - own,
            "model.norm_bias=false": bare and "transformer.ln_f.bias" in own,
            "model.embed_scale=true": "transformer.embed_scale" in names - own,
            "model.embed_scale=false": "transformer.embed_scale" in own - names,
            "model.tie_head=true": "lm_head.weight" in own - names,
        }
        changes = [change for change, needed in wanted.items() if needed]
        return f"The file is for {' '.join(changes)}" if changes else ""


def from_published(state: Mapping[str, Tensor], *, tie_head: bool) -> dict[str, Tensor]:
    """Tensors under our names and in our layout; a name that is not known is passed on.

    Raises ValueError where lm_head differs from the embedding and both are to be one.
    """
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("_orig_mod.")  # torch.compile's, which nanoGPT saves
        name = f"transformer.{name}" if BARE.match(name) else name
        if not BUFFER.search(name):
            ours[name] = value
    if is_conv1d(ours):
        ours = {n: v.T if CONV1D.search(n) and v.dim() == 2 else v for n, v in ours.items()}
    if tie_head and "lm_head.weight" in ours:
        head = ours.pop("lm_head.weight")
        if not torch.equal(ours.setdefault("transformer.wte.weight", head), head):
            raise ValueError(
                "lm_head.weight is not transformer.wte.weight, here they are one: set "
                "model.tie_head=false"
            )
    return ours


def is_conv1d(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are [in, out]. Only c_attn tells: the one of c_proj is a square.

    Raises ValueError if some blocks are so and some are not.
    """
    shapes = [value.shape for name, value in state.items() if C_ATTN.match(name)]
    wide = [len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes]
    if any(wide) and not all(wide):
        raise ValueError("c_attn.weight is [in, out] in some of its blocks and not in others")
    return any(wide)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The options that a file's shapes show, as far as it has the tensors."""
    sizes = {}
    for name, row, column in (
        ("wte.weight", "vocab_size", "dim"),
        ("wpe.weight", "max_length", "dim"),
        ("h.0.mlp.c_fc.weight", "hidden_dim", "dim"),
    ):
        value = state.get(f"transformer.{name}")
        if value is not None and value.dim() == 2:
            sizes[row], sizes[column] = value.shape
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    return sizes | ({"depth": len(blocks)} if blocks else {})


GPT2_SIZES = {
    # weights of 1 / sqrt(dim) and an embedding of RMS 1: see LLAMA_SIZES in tasks/language/llama.py
    "gpt2_tiny": GPT2Options(max_length=256, embed_scale=True, init_std=0.088),
    # nanoGPT's rows, a multiple of 64; the published files have 50257
    "gpt2_124m": GPT2Options(dim=768, depth=12, heads=12, hidden_dim=3072, vocab_size=50_304),
}
