"""What `suite.bench llama` runs: the norms of a LLaMA in several forms, and whole models with them.

A side is a norm and a form of it. "script" is the module that the script of the DyT paper timed
(github.com/jiachenzhu/DyT, other_tasks/Efficiency), written here from its formula: Hugging Face's
LlamaRMSNorm in plain operations, and DyT with neither a bias nor a float32 inside. "eager",
"compiled" and "kernel" are the suite's own layers.

All models of a measurement have the same weights and gradients, not equal ones: a copy of a model
has its own norms and nothing else of its own. Else two LLaMA-7B would not fit on one GPU.

Shapes: T tokens of one sequence, C channels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from suite.initial import init_weights
from suite.norms import NORMS, make_norm
from suite.norms.kernels.chosen import Chosen
from tasks.language.llama import Llama, LlamaOptions

FORMS = ("script", "eager", "compiled", "kernel")
ALPHA = {"alpha_init": 0.2, "alpha_init_by_site": {"attn": 0.8}}  # table 10 of the paper, at 4096
SCRIPT_ALPHA = 0.5
NORM_BYTES = 12  # an element: what the greediest eager norm, Derf in float32, keeps
RESERVE = 0.1  # of free memory: for the allocator's gaps and kernels' own space


class ScriptRMSNorm(nn.Module):
    """weight * x / sqrt(mean x^2 + eps): squares and mean in float32, the weight in x's dtype."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        square = wide.pow(2).mean(dim=-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(square + self.eps)).to(x.dtype)


class ScriptDyT(nn.Module):
    """weight * tanh(alpha x), all in x's dtype."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), SCRIPT_ALPHA))
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x)


class ScriptDerf(ScriptDyT):
    """weight * erf(alpha x + shift): as the script would have it, which knows no Derf."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.erf(self.alpha * x + self.shift)


SCRIPT: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": ScriptRMSNorm,
    "dyt": ScriptDyT,
    "derf": ScriptDerf,
}


@dataclass(frozen=True)
class Side:
    """A norm in one of FORMS."""

    norm: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.norm} {self.form}"


@dataclass(frozen=True)
class Place:
    """Where models stand: their options (depth as it is measured), rows of the vocabulary, device
    and dtype of weights and activations."""

    options: LlamaOptions
    vocab: int
    device: torch.device
    dtype: torch.dtype


def sides(norms: tuple[str, ...], forms: tuple[str, ...]) -> list[Side]:
    """Those that are something: an identity has no script and no kernel of its own, only the eager
    and the compiled model around it; a norm that the script's table cannot be asked for has none.
    """
    found = [Side(norm, form) for form in forms for norm in norms]
    return [
        side
        for side in found
        if not (side.form == "script" and side.norm not in SCRIPT)
        and not (side.form == "kernel" and not has_backends(side.norm))
    ]


def has_backends(norm: str) -> bool:
    """Whether norm.backend is an option of it."""
    return "backend" in {field.name for field in fields(NORMS[norm].options)}


def kernel_backend(device: torch.device) -> str:
    """Our kernels there."""
    return "triton" if device.type == "cuda" else "cpp"


def build_norm(side: Side, place: Place, *, site: str) -> nn.Module:
    """One norm layer. Raises RuntimeError where a kernel is asked for and another thing came."""
    dim, eps = place.options.dim, place.options.eps
    with place.device:
        if side.form == "script":
            return SCRIPT[side.norm](dim, eps=eps).to(place.dtype)
        forms = {"kernel": kernel_backend(place.device), "compiled": "auto"}
        wanted = forms.get(side.form, "eager")
        options: Any = NORMS[side.norm].options
        own = {field.name for field in fields(options)}
        changes = {"backend": wanted, **ALPHA}
        options = replace(options, **{k: v for k, v in changes.items() if k in own})
        layer = make_norm(side.norm, options)(dim, site=site, eps=eps, bias=False)
    if side.form == "kernel" and isinstance(layer, Chosen):
        choice = layer.choice(place.device.type)
        if choice.name != wanted:
            raise RuntimeError(f"backend={wanted} is not to be had here: {choice.why}")
    return layer.to(place.dtype)


def norms_of(side: Side, place: Place) -> list[nn.Module]:
    """The norms of a whole model, in their order: two a block, and the last."""
    sites = [*("attn", "ffn") * place.options.depth, "final"]
    return [build_norm(side, place, site=site) for site in sites]


def compiled_alone(norms: list[nn.Module]) -> list[nn.Module]:
    """Each under torch.compile by itself; equal ones share their code."""
    for norm in norms:
        norm.compile(dynamic=False)
    return norms


def base_model(place: Place) -> Llama:
    """A LLaMA without norms, drawn where it stands: nothing of it is ever elsewhere or wider."""
    with torch.device("meta"):
        model = Llama(place.options, norm=make_norm("identity"), vocab_size=place.vocab)
    model = model.to(place.dtype).to_empty(device=place.device)
    init_weights(model, seed=0)
    return model.train()


def model_of(side: Side, place: Place, base: Llama) -> Llama:
    """`base` with the side's norms; its weights and their gradients are those of `base`."""
    shared: dict[int, Any] = {id(p): p for p in base.parameters()}
    model = copy.deepcopy(base, shared)
    norms = iter(norms_of(side, place))
    blocks: list[Any] = model.shard_units()
    for block in blocks:
        block.input_layernorm = next(norms)
        block.post_attention_layernorm = next(norms)
    model.model.norm = next(norms)
    if side.form == "compiled":
        for unit in [*blocks, model.model.norm]:
            unit.compile(dynamic=False)
    return model


# --- how deep a model may be ---


@dataclass(frozen=True)
class Need:
    """Bytes of training: `fixed` whatever the depth, and of each block; free: to be had."""

    fixed: int
    block: int
    free: int

    @property
    def depth(self) -> int:
        """Blocks that fit, 0 where not even one does."""
        return max(0, int(self.free * (1 - RESERVE) - self.fixed) // self.block)

    def total(self, depth: int) -> int:
        return self.fixed + depth * self.block


def need(place: Place, *, tokens: int, free: int) -> Need:
    """What a forward and a backward of all the weights take, without an optimizer.

    A block: weights and gradients, and what its backward needs: both norms' own and their output,
    queries, keys, values, attention's output as it is and as o_proj reads it, logsumexp and four
    tensors of the MLP. Attention keeps no scores (flash attention). Fixed: embedding and head with
    gradients, logits four times (logits, their logarithms, two gradients), and the largest gradient
    before it is added to the one that is kept.
    """
    o, size = place.options, place.dtype.itemsize
    kv = o.dim // o.heads * o.kv_heads
    weights = 2 * o.dim * o.dim + 2 * o.dim * kv + 3 * o.dim * o.hidden_dim
    numbers = 2 * o.dim + (o.dim + 2 * kv) + 2 * o.dim + 4 * o.hidden_dim
    saved = size * numbers + 2 * NORM_BYTES * o.dim + 4 * o.heads
    outside = (1 if o.tie_head else 2) * place.vocab * o.dim
    largest = o.dim * max(place.vocab, o.hidden_dim)
    return Need(
        fixed=size * (2 * outside + largest + 4 * place.vocab * tokens),
        block=2 * size * weights + saved * tokens,
        free=free,
    )


def free_memory(device: torch.device) -> int:
    """Bytes: what a GPU has free; half of a machine's memory, as others work on it too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
