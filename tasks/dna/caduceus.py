"""Caduceus (Schiff et al., arXiv 2403.03234): Mamba in both directions, on one strand or on both.

Each block adds, normalizes and mixes; the sum of all mixers stays in the residual. Ph reads the
strand that it is given. PS ("reverse-complement parameter sharing", RCPS) reads both strands with
the same weights; its output for the other strand of the input is the same numbers, turned round.
Read in its own direction, the other strand is one more sequence: the two meet nowhere but in
`rcps_strand_swap`. So here either strand is a run of the plain network, in its own direction and
with channels in their own order, and only the output is put into the published order: [..., :C] the
strand given, [..., C:] the other one turned back over positions and channels.

The strands run as two calls of equal shape, not as one batch: the last elements of a tensor go
through other instructions than the rest, so that a row's numbers may depend, in the last bit, on
where in the batch it stands, and equivariance here is exact. A norm that takes statistics over the
batch sees both strands in one call.

The official code computes two functions under one flag (`RCPSMambaBlock`, commit 0060a6d): with
`fused_add_norm`, as its checkpoints were trained, every block takes the strands crosswise; without,
it does not; the final norm never does. Both are equivariant.

Shapes: B sequences, L positions, C channels, D = expand C channels of a mixer, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.norms import NormFactory
from suite.registry import ModelOptions
from tasks.dna.mamba import Mamba
from tasks.dna.scan import BACKENDS, Backend, resolve
from tasks.dna.tokens import ROWS, complement

EPS = 1e-5  # what Caduceus was published with; a norm option overrides it

Strands = list[Tensor]  # [B, L, C] each, in its own reading direction: the one given, the other


@dataclass(frozen=True)
class CaduceusOptions(ModelOptions):
    """Sizes and kind of a Caduceus.

    dim, depth: channels and blocks. state: numbers a channel remembers. conv_kernel: taps of the
    mixers' convolution. expand: channels of the mixer for each of the model.
    rcps: both strands inside (PS); without, one strand (Ph).
    bidirectional: each mixer reads both ways; without, the model is a plain causal Mamba.
    rcps_strand_swap: every block takes the strands crosswise. True for checkpoints of PS that were
        trained with fused_add_norm (the published default), False for those without; the names of
        a published file show which (tasks/dna/published_caduceus.py).
    tie_head: the language head shares the embedding's weights.
    embed_std: spread of the embedding's first values. init_std: of a head's own weights; the
        mixers' are Mamba's.
    residual_in_fp32: the residual stays float32 in a model of 16 bits.
    scan: how the selective scan is computed (tasks/dna/scan.py).
    checkpoint: recompute the blocks in the backward pass, for long sequences.
    """

    dim: int = 118
    depth: int = 4
    state: int = 16
    conv_kernel: int = 4
    expand: int = 2
    rcps: bool = True
    bidirectional: bool = True
    rcps_strand_swap: bool = False
    tie_head: bool = True
    embed_std: float = 0.02
    init_std: float = 0.02
    residual_in_fp32: bool = True
    scan: Backend = "auto"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "state", "conv_kernel", "expand"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("embed_std", "init_std"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.rcps and not self.bidirectional:
            raise ValueError(
                "bidirectional must be true with rcps=true: a strand read from one end only is not "
                "read as the other is; set rcps=false for a plain Mamba"
            )
        if self.rcps_strand_swap and not self.rcps:
            raise ValueError("rcps_strand_swap needs two strands: it must be false with rcps=false")
        if self.scan not in BACKENDS:
            raise ValueError(f"scan must be one of {', '.join(BACKENDS)}, got {self.scan!r}")


PS_1K = CaduceusOptions()
PS_1K_256 = CaduceusOptions(dim=256)
PS_32K = CaduceusOptions(dim=256, depth=8)
PS_131K = CaduceusOptions(dim=256, depth=16)
PS_TINY = CaduceusOptions(dim=64, depth=2, tie_head=False, embed_std=1.0)  # for short trainings
CADUCEUS_SIZES: dict[str, CaduceusOptions] = {
    "caduceus_ps_1k": PS_1K,
    "caduceus_ph_1k": replace(PS_1K, rcps=False),
    "caduceus_ps_1k_256": PS_1K_256,
    "caduceus_ph_1k_256": replace(PS_1K_256, rcps=False),
    "caduceus_ps_32k": PS_32K,
    "caduceus_ph_32k": replace(PS_32K, rcps=False),
    "caduceus_ps_131k": PS_131K,
    "caduceus_ph_131k": replace(PS_131K, rcps=False),
    "caduceus_ps_tiny": PS_TINY,
    "caduceus_ph_tiny": replace(PS_TINY, rcps=False),
}


class Block(nn.Module):
    """Add, norm, mix: (what the block before found, residual) -> (what this one finds, residual).

    together: the norm sees both strands in one call. swap: the strands are taken crosswise.
    wide: the residual is float32 at least.
    """

    def __init__(
        self,
        norm: nn.Module,
        mixer: Mamba,
        *,
        together: bool,
        swap: bool,
        wide: bool,
        checkpointed: bool,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.together, self.swap, self.wide = together, swap, wide
        self.checkpointed = checkpointed

    def forward(
        self, found: Strands, residual: Strands | None, masks: Sequence[Tensor | None]
    ) -> tuple[Strands, Strands]:
        residual = added(found, residual, wide=self.wide)
        if self.swap:
            residual = [turned(strand_BLC) for strand_BLC in reversed(residual)]
        normed = norm_strands(self.norm, residual, masks, together=self.together)
        dtype = self.mixer.in_proj.weight.dtype
        mixed = (self.mix(h.to(dtype), mask) for h, mask in zip(normed, masks, strict=True))
        return list(mixed), residual

    def mix(self, h_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The mixer; the norm is not recomputed, for its running statistics move once a step."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(  # type: ignore[no-any-return]
                self.mixer, h_BLC, mask_BL, use_reentrant=False, preserve_rng_state=False
            )
        return self.mixer(h_BLC, mask_BL)  # type: ignore[no-any-return]


def added(found: Strands, residual: Strands | None, *, wide: bool) -> Strands:
    """The residual with what a block found, of each strand."""
    if residual is not None:
        found = [r + f for r, f in zip(residual, found, strict=True)]
    return [f.to(torch.promote_types(f.dtype, torch.float32)) for f in found] if wide else found


def turned(strand_BLC: Tensor) -> Tensor:
    """A strand's numbers as the other strand's: over positions and channels."""
    return strand_BLC.flip(1, 2)


def norm_strands(
    norm: nn.Module, strands: Strands, masks: Sequence[Tensor | None], *, together: bool
) -> Strands:
    """One norm on every strand, in its own channel order.

    together: in one call, so that statistics over the batch are those of all strands.
    """
    if not together or len(strands) == 1:
        return [norm(x_BLC, mask) for x_BLC, mask in zip(strands, masks, strict=True)]
    known = [mask for mask in masks if mask is not None]
    normed: Tensor = norm(torch.cat(strands), torch.cat(known) if known else None)
    return list(normed.chunk(len(strands)))


class Caduceus(nn.Module):
    """ids [B, L] -> hidden [B, L, C], or with both strands [B, L, 2C]. See `forward`.

    dim: C. strands: 1, or 2 with rcps. causal: no position sees what follows it.
    """

    fixed_by_weights = ("rcps", "rcps_strand_swap")  # our own files do not show them

    def __init__(self, options: CaduceusOptions, *, norm: NormFactory) -> None:
        super().__init__()
        o = options
        self.dim, self.depth = o.dim, o.depth
        self.strands, self.swap = 2 if o.rcps else 1, o.rcps_strand_swap
        self.causal = not o.bidirectional
        self.wide, self.scan = o.residual_in_fp32, o.scan
        self.together = not norm.causal  # positions that see each other: the strands' do too
        self.embedding = nn.Embedding(ROWS, o.dim)
        nn.init.normal_(self.embedding.weight, std=o.embed_std)
        self.layers = nn.ModuleList(
            Block(
                norm(o.dim, site="mixer", eps=EPS),
                Mamba(
                    o.dim,
                    state=o.state,
                    kernel=o.conv_kernel,
                    expand=o.expand,
                    bidirectional=o.bidirectional,
                    depth=o.depth,
                    scan=o.scan,
                ),
                together=self.together,
                swap=o.rcps_strand_swap,
                wide=o.residual_in_fp32,
                checkpointed=o.checkpoint,
            )
            for _ in range(o.depth)
        )
        self.norm_f = norm(o.dim, site="final", eps=EPS)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """ids [B, L] -> hidden [B, L, C]; with both strands [B, L, 2C]: the strand given, then the
        other one turned back over positions and channels.

        mask: True where a position is real; None: everywhere. The others touch no real one, on
        either strand, and what stands there is of no use.
        """
        ids, masks = [ids_BL], [mask_BL]
        if self.strands == 2:
            ids.append(complement(ids_BL).flip(1))
            masks.append(None if mask_BL is None else mask_BL.flip(1))
        found: Strands = [self.embedding(strand_BL) for strand_BL in ids]
        residual: Strands | None = None
        for block in self.layers:
            found, residual = block(found, residual, masks)
        residual = added(found, residual, wide=self.wide)
        last = norm_strands(self.norm_f, residual, masks, together=self.together)
        last = [h_BLC.to(self.embedding.weight.dtype) for h_BLC in last]
        return torch.cat([last[0], turned(last[1])], dim=-1) if self.strands == 2 else last[0]

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError where the chosen scan cannot run on `device`."""
        resolve(self.scan, device)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: the embedding 0, then the blocks, 1 more for the last norm."""
        first, _, rest = name.partition(".")
        if first == "layers":
            return int(rest.partition(".")[0]) + 1
        return 0 if first == "embedding" else self.depth + 1

    def no_weight_decay(self) -> set[str]:
        """The embedding, A_log and D, as the published parameter groups have it."""
        names = ("embedding.weight", "A_log", "D")
        return {
            n for n, _ in self.named_parameters() if n in names or n.rpartition(".")[2] in names
        }
