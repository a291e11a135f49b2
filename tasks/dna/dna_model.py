"""A backbone and its head: what pre-training and classification share, and how weights get in.

Files that may be loaded: runs of the suite, of either task, and the published checkpoints of
HyenaDNA and Caduceus (tasks/dna/published_hyena.py, published_caduceus.py).

Shapes: B sequences, L positions, V rows of the vocabulary, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dna.heads import ClassHead, LanguageHead, Pool
from tasks.dna.published_caduceus import from_caduceus
from tasks.dna.published_caduceus import trained_as as caduceus_options
from tasks.dna.published_hyena import from_hyena
from tasks.dna.published_hyena import trained_as as hyena_options
from tasks.dna.tokens import ROWS

State = dict[str, Tensor]
METRIC = re.compile(r"^(train|val|test)_torchmetrics\.")  # in the authors' own checkpoints
EMBEDDING, LM_HEAD = "backbone.embedding.weight", "lm_head.weight"


class Backbone(Protocol):
    """What HyenaDNA and Caduceus have in common. See `forward` of either."""

    dim: int
    depth: int
    strands: int
    causal: bool
    embedding: nn.Embedding
    fixed_by_weights: tuple[str, ...]

    def layer_of(self, name: str) -> int: ...

    def no_weight_decay(self) -> set[str]: ...


class DNAModel(nn.Module):
    """A backbone, and what its weights and parameters are called."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def body(self) -> Backbone:
        """The backbone as what it has to be."""
        return cast(Backbone, self.backbone)

    @property
    def fixed_by_weights(self) -> tuple[str, ...]:
        """Options that no name or shape of a weight shows."""
        return self.body.fixed_by_weights

    def layer_of(self, name: str) -> int:
        """The depth of a parameter, for layer-wise learning rates; the head is last."""
        part, _, rest = name.partition(".")
        body = self.body
        return body.layer_of(rest) if part == "backbone" else body.depth + 2

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed besides norms and biases."""
        return {f"backbone.{name}" for name in self.body.no_weight_decay()}

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError where the model cannot run on `device`."""
        check = getattr(self.backbone, "check_device", None)
        if check is not None:
            check(device)

    def adapt(self, state: Mapping[str, Tensor], *, whole: bool) -> tuple[State, list[str]]:
        """Tensors of a file under this model's names, and notes on what was done."""
        check_traces(state, self.body)
        found, notes = published(state)
        return self.adapt_head(pad_rows(found, notes), notes, whole=whole)

    def adapt_head(self, state: State, notes: list[str], *, whole: bool) -> tuple[State, list[str]]:
        """The same for what is not the backbone's."""
        raise NotImplementedError


def check_traces(state: Mapping[str, Tensor], body: Backbone) -> None:
    """Raise ValueError where a published file shows an option that this model has otherwise.

    Of HyenaDNA the length that its filter's time runs over, of Caduceus the strands and their way
    through the blocks.
    """
    length = getattr(body, "l_max", None)
    own = {"l_max": length, "rcps": body.strands == 2, "rcps_strand_swap": swaps(body)}
    hyena, caduceus = hyena_options(state), caduceus_options(state)
    if hyena is not None and length is None:
        raise ValueError("these are HyenaDNA's weights; take a model=hyenadna_...")
    if caduceus is not None and length is not None:
        raise ValueError("these are Caduceus' weights; take a model=caduceus_...")
    wanted: dict[str, Any] = {**(hyena or {}), **(caduceus or {})}
    if any(own[key] != value for key, value in wanted.items()):
        keys = " ".join(f"model.{key}={str(value).lower()}" for key, value in wanted.items())
        raise ValueError(
            f"was trained with {keys}: the weights would load and mean nothing; set {keys}"
        )


def swaps(body: Backbone) -> bool:
    """Whether the strands go crosswise through the blocks."""
    return bool(getattr(body, "swap", False))


def published(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A published file's tensors under the suite's names; any other file's as they are."""
    weights = {name: value for name, value in state.items() if not METRIC.match(name)}
    for convert in (from_hyena, from_caduceus):
        found = convert(weights)
        if found is not None:
            left_out = len(state) - len(weights)
            notes = [f"{left_out} counts of its training metrics were left out"] * bool(left_out)
            return dict(found[0]), [*found[1], *notes]
    return dict(state), []


def pad_rows(state: State, notes: list[str]) -> State:
    """Embedding and head filled up to 16 rows with zeros, as the published vocabulary is."""
    for name in (EMBEDDING, LM_HEAD):
        rows = len(state[name]) if name in state and state[name].ndim == 2 else ROWS
        if rows < ROWS:
            state[name] = F.pad(state[name], (0, 0, 0, ROWS - rows))
            notes.append(f"{name} has {rows} rows; {ROWS - rows} of zeros were added")
    return state


class ForPretraining(DNAModel):
    """Logits of every position's base. See `forward`.

    causal: no position sees what follows it. tie_head: the head shares the embedding's weights.
    """

    def __init__(self, backbone: nn.Module, *, tie_head: bool, head_std: float) -> None:
        super().__init__(backbone)
        body = self.body
        self.causal, self.tied = body.causal, tie_head
        self.lm_head = LanguageHead(
            body.dim,
            strands=body.strands,
            embedding=body.embedding if tie_head else None,
            std=head_std,
        )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """ids [B, L], mask bool [B, L] (True: real; None: all) -> logits [B, L, V], in at least
        float32.
        """
        logits_BLV = self.lm_head(self.backbone(ids_BL, mask_BL))
        return logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))

    def adapt_head(self, state: State, notes: list[str], *, whole: bool) -> tuple[State, list[str]]:
        """A file without a head of its own shares the embedding's weights."""
        if EMBEDDING not in state:
            return state, notes
        head = state.setdefault(LM_HEAD, state[EMBEDDING])
        if self.tied and not torch.equal(head, state[EMBEDDING]):
            raise ValueError(
                "its head and embedding differ, here they are one tensor; set model.tie_head=false"
            )
        return state, notes


class ForClassification(DNAModel):
    """Logits of a sequence's class. See `forward`.

    conjoins: whether the model was published to be asked about both strands and averaged.
    """

    def __init__(
        self, backbone: nn.Module, *, classes: int, head_std: float, conjoins: bool
    ) -> None:
        super().__init__(backbone)
        body = self.body
        self.conjoins = conjoins
        self.head = ClassHead(body.dim, strands=body.strands, classes=classes, std=head_std)

    def forward(
        self, ids_BL: Tensor, mask_BL: Tensor | None = None, *, pool: Pool = "mean"
    ) -> Tensor:
        """ids [B, L], mask bool [B, L] (True: real; None: all) -> logits [B, K] in at least
        float32. pool: see ClassHead.
        """
        logits_BK = self.head(self.backbone(ids_BL, mask_BL), mask_BL, pool=pool)
        return logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))

    def adapt_head(self, state: State, notes: list[str], *, whole: bool) -> tuple[State, list[str]]:
        """From a file of pre-training: its head is left out, the classifier keeps its first
        values.
        """
        if whole or EMBEDDING not in state or "head.weight" in state:
            return state, notes
        if state.pop(LM_HEAD, None) is not None:
            notes.append("the head of pre-training was left out")
        own = self.state_dict()
        state.update({name: own[name] for name in ("head.weight", "head.bias")})
        notes.append("the classifier keeps its first values")
        return state, notes
