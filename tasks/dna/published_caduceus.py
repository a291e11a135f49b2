"""Published Caduceus weights under this suite's names.

The layouts are those of the authors' repository (kuleshov-group/caduceus 0060a6d: Lightning
checkpoints, whose names begin with `model.`) and of its Hugging Face port (`caduceus.backbone...`,
or `backbone...` of the bare model). Both hold the projections that the two directions share under
two names, or, as safetensors, under either one.

The names say what the weights cannot: PS wraps its mixers (`mixer.submodule`), and without
fused_add_norm its norms too (`norm.submodule`), so that a file shows which of the two functions of
tasks/dna/caduceus.py it was trained as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tasks.dna.tokens import COMPLEMENT, ROWS, VOCAB

WRAPPERS = re.compile(r"^(model\.)*(caduceus\.)?(?=backbone\.|lm_head\.)")
MIXER = re.compile(r"^backbone\.layers\.\d+\.mixer\.(submodule\.)?mamba_(fwd|rev)\.")
_BLOCK = r"^backbone\.layers\.(\d+)\."
_OURS = r"backbone.layers.\1."
RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"^backbone\.embeddings\.word_embeddings\.(embedding\.)?weight$",
            "backbone.embedding.weight",
        ),
        (_BLOCK + r"norm\.(?:submodule\.)?", _OURS + "norm."),
        (
            _BLOCK + r"mixer\.(?:submodule\.)?mamba_(?:fwd|rev)\.(in_proj|out_proj)\.",
            _OURS + r"mixer.\2.",
        ),
        (_BLOCK + r"mixer\.(?:submodule\.)?mamba_fwd\.", _OURS + "mixer.directions.0."),
        (_BLOCK + r"mixer\.(?:submodule\.)?mamba_rev\.", _OURS + "mixer.directions.1."),
        (r"^backbone\.norm_f\.submodule\.", "backbone.norm_f."),
        (r"^lm_head\.lm_head\.", "lm_head."),
    )
)
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def core_of(name: str) -> str:
    """A published name without what is wrapped around the network."""
    return WRAPPERS.sub("", name, count=1)


def our_name(name: str) -> str:
    """The name that this suite has for a published tensor; a name that is not known stays."""
    core = core_of(name)
    for pattern, replacement in RULES:
        found, count = pattern.subn(replacement, core)
        if count:
            return re.sub(r"(\.directions\.\d\.)dt_proj\.bias$", r"\1dt_bias", found)
    return core


def trained_as(state: Mapping[str, Tensor]) -> dict[str, bool] | None:
    """The options `rcps` and `rcps_strand_swap` that a published file was trained with.

    None if the file is not in a published layout.
    """
    names = [core_of(name) for name in state]
    if not any(MIXER.match(name) for name in names):
        return None
    rcps = any(".mixer.submodule." in name for name in names)
    crosswise = rcps and not any(".norm.submodule." in name for name in names)
    return {"rcps": rcps, "rcps_strand_swap": crosswise}


def from_caduceus(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """A published file's tensors under our names, and notes; None for a file of another layout.

    Raises ValueError where two names of one tensor hold different numbers, and for token ids that
    are not ours. A name that is not known is passed on, so that the strict check reports it.
    """
    options = trained_as(state)
    if options is None:
        return None
    ours: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for name, value in state.items():
        if name.endswith(".complement_map"):
            check_complement(name, value)
            continue
        wanted = our_name(name)
        if wanted in ours:
            check_tied(renamed[wanted], ours[wanted], name, value)
        ours[wanted], renamed[wanted] = value, name
    notes = ["Caduceus' published names: the file was trained with " + settings(options)]
    if EMBEDDING not in ours and HEAD in ours:
        ours[EMBEDDING] = ours[HEAD]
        notes.append("the file has no embedding: it is tied to the head, whose weights were taken")
    for name in (EMBEDDING, HEAD):
        if name in ours and not VOCAB <= len(ours[name]) <= ROWS:
            raise ValueError(
                f"{renamed.get(name, name)} has {len(ours[name])} rows: its token ids are not the "
                f"{VOCAB} (padded to {ROWS}) of this suite"
            )
    return ours, notes


def settings(options: Mapping[str, bool]) -> str:
    """Options as on the command line."""
    return " ".join(f"model.{name}={str(value).lower()}" for name, value in options.items())


def check_tied(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise ValueError unless two names of one tensor hold the same numbers."""
    if a.shape != b.shape or not torch.equal(a, b):
        raise ValueError(
            f"{first} and {second} differ, here they are one tensor: the file's directions do not "
            "share their projections (bidirectional_weight_tie=false), or it is damaged"
        )


def check_complement(name: str, found: Tensor) -> None:
    """Raise ValueError unless a file's complements are those of this suite's token ids."""
    if found.tolist() != COMPLEMENT[: len(found)].tolist() or len(found) < VOCAB:
        raise ValueError(
            f"{name} is {found.tolist()}: the file's token ids are not this suite's, whose "
            f"complements are {COMPLEMENT.tolist()}"
        )
