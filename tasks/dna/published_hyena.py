"""Published HyenaDNA weights under this suite's names.

The layouts are those of the authors' checkpoints (hyena-dna d553021: Lightning's names begin with
`model.`, and where activations were checkpointed the mixer and the MLP stand in a `layer`), of
their standalone file (`backbone...`), and of the Hugging Face port (`hyena.backbone...`). The
frequencies of a filter's sines are one tensor under a name for each of them, or, as safetensors,
under the first.

What the files have besides weights is computed here from the options: the features of time and the
decays. They are compared with what they were published as, and tell the l_max of a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tasks.dna.hyena import decay_rates, time_features

WRAPPERS = re.compile(r"^(model\.|hyena\.|hyenadna\.)*(?=backbone\.|lm_head\.)")
FILTER = re.compile(r"^backbone\.layers\.\d+\.mixer\.(layer\.)?filter_fn\.")
_MIXER = r"^backbone\.layers\.(\d+)\.mixer\.(?:layer\.)?"
_OURS = r"backbone.blocks.\1."
RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.embeddings\.word_embeddings\.", "backbone.embedding."),
        (_MIXER + r"filter_fn\.bias$", _OURS + "mixer.skip"),
        (_MIXER + r"filter_fn\.implicit_filter\.\d+\.freq$", _OURS + "mixer.filter.freq"),
        (_MIXER + r"(in_proj|out_proj|short_filter)\.", _OURS + r"mixer.\2."),
        (r"^backbone\.layers\.(\d+)\.mlp\.(?:layer\.)?", _OURS + "mlp."),
        (r"^backbone\.layers\.(\d+)\.(norm[12])\.", _OURS + r"\2."),
        (r"^backbone\.ln_f\.", "backbone.final_norm."),
    )
)
LINEAR = re.compile(_MIXER + r"filter_fn\.implicit_filter\.(\d+)\.(weight|bias)$")
BUFFER = re.compile(_MIXER + r"filter_fn\.(pos_emb\.[zt]|modulation\.deltas)$")
TOLERANCE = 1e-3  # of what is computed here in another order, and perhaps in another precision


def core_of(name: str) -> str:
    """A published name without what is wrapped around the network."""
    return WRAPPERS.sub("", name, count=1)


def our_name(core: str, *, last: int) -> str:
    """The name that this suite has for a tensor; a name that is not known stays.

    last: number of the filter's last linear layer in its published list, sines in between counted.
    """
    if found := LINEAR.match(core):
        block, number, part = int(found[1]), int(found[2]), found[3]
        layer = "out" if number == last else f"layers.{number // 2}"
        return f"backbone.blocks.{block}.mixer.filter.{layer}.{part}"
    for pattern, replacement in RULES:
        renamed, count = pattern.subn(replacement, core)
        if count:
            return renamed
    return core


def trained_as(state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """The option `l_max` that a published file was trained with; empty if the file does not say.

    None if the file is not in a published layout. Raises ValueError if layers differ.
    """
    cores = {core_of(name): value for name, value in state.items()}
    if not any(map(FILTER.match, cores)):
        return None
    lengths = {
        value.shape[1]
        for core, value in cores.items()
        if core.endswith((".pos_emb.z", ".pos_emb.t")) and value.dim() == 3
    }
    if len(lengths) > 1:
        raise ValueError(f"its layers were made for several l_max: {sorted(lengths)}")
    return {"l_max": lengths.pop()} if lengths else {}


def from_hyena(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """A published file's tensors under our names, and notes; None for a file of another layout.

    Raises ValueError where two names of one tensor hold different numbers, and where the features
    of time or the decays were trained. A name that is not known is passed on, so that the strict
    check reports it.
    """
    options = trained_as(state)
    if options is None:
        return None
    cores = {name: core_of(name) for name in state}
    linear = [found for core in cores.values() if (found := LINEAR.match(core))]
    last = max((int(found[2]) for found in linear), default=0)
    ours: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    for name, value in state.items():
        if BUFFER.match(cores[name]):
            check_published(name, value)
            continue
        wanted = our_name(cores[name], last=last)
        if wanted in ours and not torch.equal(ours[wanted], value):
            raise ValueError(f"{given[wanted]} and {name} differ, here they are one tensor")
        ours[wanted], given[wanted] = value, name
    length = f"model.l_max={options['l_max']}" if options else "a model.l_max that it does not say"
    shift = "the file does not say its model.modulation_shift, 0.05 or 0: it is taken on trust"
    return ours, [f"HyenaDNA's published names: the file was trained with {length}", shift]


def check_published(name: str, value: Tensor) -> None:
    """Raise ValueError unless a buffer [1, L, E] or [1, 1, D] is what it was first set to."""
    if value.dim() != 3 or value.shape[0] != 1 or not is_published(name, value):
        raise ValueError(
            f"{name} is not what HyenaDNA computes it as: it was trained, or the file is damaged"
        )


def is_published(name: str, value: Tensor) -> bool:
    """Whether a buffer [1, L, E] or [1, 1, D] holds what it was first set to, to rounding."""
    found = value[0].double()
    if name.endswith("deltas"):
        expected = decay_rates(found.shape[-1], like=found).expand_as(found)
        found = found.abs()
    else:
        length, features = found.shape
        if length < 2 or features % 2 == 0:
            return False
        expected = time_features(length, l_max=length, features=features, like=found)
    tolerance = TOLERANCE if value.dtype in (torch.float32, torch.float64) else 10 * TOLERANCE
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
