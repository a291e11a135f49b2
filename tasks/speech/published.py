"""Published wav2vec 2.0 weights under this suite's names.

Four spellings of one network are about: torchaudio's (ours, but for the prefix), Hugging Face's,
fairseq's original, and each with the older or the newer spelling of weight norm. What is not known
is passed on as it is, so that the strict check of the names reports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SPECIAL = (1, 2, 3)  # <s>, </s> and <unk> among the 32 letters of fairseq and Hugging Face
PRETRAINING = ("quantizer", "project_q", "final_proj")  # what fine-tuning has no use for
OURS = ("mask_embedding", "head", *PRETRAINING)
WRAPPERS = re.compile(r"^(w2v_encoder\.w2v_model\.|wav2vec2\.)")

_CONV = r"^feature_extractor\.conv_layers\.(\d+)\."
_LAYER = r"^encoder\.layers\.(\d+)\."
_OUR_LAYER = r"encoder.transformer.layers.\1."
RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # fairseq: the convolution is 0 of its layer, the norm 2, in layer_norm mode 1 of that
        (_CONV + r"0\.", r"feature_extractor.conv_layers.\1.conv."),
        (_CONV + r"2\.(1\.)?", r"feature_extractor.conv_layers.\1.layer_norm."),
        (r"^layer_norm\.", "encoder.feature_projection.layer_norm."),
        (r"^post_extract_proj\.", "encoder.feature_projection.projection."),
        (r"^encoder\.pos_conv\.0\.", "encoder.transformer.pos_conv_embed.conv."),
        (_LAYER + r"self_attn\.", _OUR_LAYER + "attention."),
        (_LAYER + r"self_attn_layer_norm\.", _OUR_LAYER + "layer_norm."),
        (_LAYER + r"fc1\.", _OUR_LAYER + "feed_forward.intermediate_dense."),
        (_LAYER + r"fc2\.", _OUR_LAYER + "feed_forward.output_dense."),
        (r"^mask_emb$", "mask_embedding"),
        (r"^quantizer\.vars$", "quantizer.codebook"),
        (r"^w2v_encoder\.proj\.", "head."),
        # Hugging Face
        (r"^feature_projection\.", "encoder.feature_projection."),
        (r"^masked_spec_embed$", "mask_embedding"),
        (r"^quantizer\.codevectors$", "quantizer.codebook"),
        (r"^project_hid\.", "final_proj."),
        (r"^lm_head\.", "head."),
        # torchaudio
        (r"^aux\.", "head."),
        # Hugging Face and fairseq
        (r"^encoder\.(layers|layer_norm|pos_conv_embed)\.", r"encoder.transformer.\1."),
    )
)
WEIGHT_NORM = re.compile(r"(\.pos_conv_embed\.conv\.)weight_([gv])$")


def our_name(name: str) -> str:
    """The name that this suite has for a published tensor; a name that is not known stays."""
    core = WRAPPERS.sub("", name, count=1)
    for pattern, replacement in RULES:
        found, count = pattern.subn(replacement, core)
        if count:
            core = found
            break
    part = {"g": "original0", "v": "original1"}
    core = WEIGHT_NORM.sub(lambda m: f"{m[1]}parametrizations.weight.{part[m[2]]}", core)
    first = core.partition(".")[0]
    if first in ("feature_extractor", "encoder"):
        return f"wav2vec2.{core}"
    return core if first in OURS else name


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors under our names, and how many of them had another. No tensor is lost."""
    ours: dict[str, Tensor] = {}
    renamed = 0
    for name, value in state.items():
        wanted = our_name(name)
        if wanted in ours or (wanted != name and wanted in state):
            wanted = name  # two spellings of one tensor: the strict check shall name it
        ours[wanted] = value
        renamed += wanted != name
    return ours, renamed


def adapt_pretrain(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """A file of pre-training for `model`, a ForPretraining. Nothing is filled in or left out."""
    ours, renamed = translate(state)
    codebook = ours.get("quantizer.codebook")
    own = model.state_dict()["quantizer.codebook"]
    if codebook is not None and codebook.shape == (1, own.shape[0] * own.shape[1], own.shape[2]):
        ours["quantizer.codebook"] = codebook.reshape(own.shape)  # [1, G * V, D / G] as published
    return ours, about_names(model, renamed)


def adapt_ctc(
    model: nn.Module, state: Mapping[str, Tensor], *, whole: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """A file of fine-tuning or, unless `whole`, of pre-training for `model`, a ForCTC.

    The mask embedding is filled in either way: torchaudio's files have none, and evaluation never
    reads it.
    """
    ours, renamed = translate(state)
    notes = about_names(model, renamed)
    own = model.state_dict()
    if not whole and not any(name.startswith("head.") for name in ours):
        left_out = [name for name in ours if name.partition(".")[0] in PRETRAINING]
        ours = {name: value for name, value in ours.items() if name not in left_out}
        ours |= {name: value for name, value in own.items() if name.startswith("head.")}
        parts = [part for part in PRETRAINING if any(n.startswith(part) for n in left_out)]
        gone = f"{', '.join(parts)} of the file was left out" if parts else "nothing was left out"
        notes.append(f"the file has no letters: the head keeps its initial values, and {gone}")
    elif trimmed := without_special(ours, own):
        ours |= trimmed
        notes.append("the head's rows of <s>, </s> and <unk> were left out: 29 of its 32 letters")
    if "mask_embedding" not in ours:
        ours["mask_embedding"] = own["mask_embedding"]
        notes.append("the file has no mask embedding: it keeps its initial value")
    return ours, notes


def without_special(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head of fairseq's and Hugging Face's 32 letters without those that are no letters.

    The others have our order: the blank, then "|", E, T, ... Empty for any other head.
    """
    names = ("head.weight", "head.bias")
    if any(name not in state or state[name].dim() == 0 for name in names):
        return {}
    if any(len(state[name]) != len(own[name]) + len(SPECIAL) for name in names):
        return {}
    rows = [i for i in range(len(state["head.bias"])) if i not in SPECIAL]
    return {name: state[name][torch.tensor(rows)] for name in names}


def about_names(model: nn.Module, renamed: int) -> list[str]:
    """What is to be said of a file that this suite did not write."""
    if not renamed:
        return []
    pre_norm = str(bool(model.wav2vec2.encoder.transformer.pre_norm)).lower()  # type: ignore[union-attr]
    return [
        f"{renamed} tensors had a published name; such a file does not say where the norms stand: "
        f"model.pre_norm={pre_norm} is taken on trust"
    ]


def size_hint(own: set[str], names: set[str]) -> str:
    """What to set so that a file with these names (ours) fits a model with `own`; may be empty."""
    conv = "wav2vec2.feature_extractor.conv_layers.{}"
    norm, bias = f"{conv.format(1)}.layer_norm.weight", f"{conv.format(1)}.conv.bias"
    wanted = {
        "model.extractor=layer_norm": norm in names - own,
        "model.extractor=group_norm": norm in own - names,
        "model.conv_bias=true": bias in names - own,
        "model.conv_bias=false": bias in own - names,
    }
    changes = [change for change, needed in wanted.items() if needed]
    return f"The file is for {' '.join(changes)}" if changes else ""
