"""Weights of a masked autoencoder in a classifier, and of an encoder in a masked autoencoder.

Fine-tuning (arXiv 2111.06377, appendix A.1) keeps the encoder, leaves out the decoder, and where
the ViT averages its tokens also the encoder's last norm: `fc_norm` stands after the pooling, has
seen nothing of the sort, and starts fresh, as the head does. The published script does so with
strict=False, which also loads a DyT encoder into a LayerNorm model without a word; here every name
that is left out or filled in is decided on, said in a note, and the rest is loaded strictly.

FAIR's files come with the decoder and without it. Files that hold a head are nobody's pre-training:
they pass as they are.

Shapes: N patches, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

State = dict[str, Tensor]
DECODER = ("mask_token", "decoder_")
FRESH = ("fc_norm.", "head.")  # what pre-training does not know


def within(names: Iterable[str], *beginnings: str) -> list[str]:
    """The names that begin with one of `beginnings`."""
    return [name for name in names if name.startswith(beginnings)]


def has_decoder(names: Iterable[str]) -> bool:
    """Whether a file with these names holds a masked autoencoder's decoder."""
    return bool(within(names, *DECODER))


def is_encoder(names: Iterable[str]) -> bool:
    """Whether a file with these names is a ViT's tokens, blocks and last norm, without a head."""
    names = list(names)
    return (
        not within(names, *FRESH)
        and bool(within(names, "blocks."))
        and {"patch_embed.proj.weight", "pos_embed"} <= set(names)
    )


def to_vit(
    state: Mapping[str, Tensor], *, own: Mapping[str, Tensor], keep_norm: bool, whole: bool
) -> tuple[State, list[str]]:
    """A masked autoencoder's tensors for a ViT, and notes; any other file's as they are.

    own: the ViT's state, from which comes what the file does not know. keep_norm: the ViT has the
    encoder's last norm (pool=cls); otherwise fc_norm stands in its place.
    Raises ValueError if `whole`: without a head there is nothing to evaluate.
    """
    if not (has_decoder(state) or is_encoder(state)):
        return dict(state), []
    if whole:
        raise ValueError(
            "holds an encoder and no head, so that there is nothing to evaluate; fine-tune it with "
            "model.init_from=FILE, and evaluate that run"
        )
    out = within(state, *DECODER) + ([] if keep_norm else within(state, "norm."))
    found = {name: value for name, value in state.items() if name not in out}
    notes = [f"left out of the masked autoencoder: {parts_of(out)}"] * bool(out)
    fresh = {name: own[name] for name in within(own, *FRESH) if name not in found}
    if fresh:
        notes.append(f"starts fresh: {parts_of(fresh)}")
    check_sizes(found, own)
    fit_class_token(found, own, notes)
    fit_positions(found, own, notes)
    return found | fresh, notes


def to_mae(
    state: Mapping[str, Tensor], *, own: Mapping[str, Tensor], whole: bool
) -> tuple[State, list[str]]:
    """An encoder's tensors, completed by `own`'s decoder, and notes; any other file's as they are.

    Raises ValueError for a classifier, and if `whole` for an encoder alone.
    """
    if within(state, *FRESH) and not has_decoder(state):
        raise ValueError(
            "these are weights of a classifier, not of a masked autoencoder: its encoder was "
            "trained for its labels; take task=vision/classify for this file"
        )
    if has_decoder(state) or is_encoder(state):
        check_sizes(state, own)
    if has_decoder(state) or not is_encoder(state):
        return dict(state), []
    if whole:
        raise ValueError(
            "holds an encoder and no decoder, so that there is nothing to evaluate; pre-train on "
            "with model.init_from=FILE, or fine-tune it with task=vision/classify"
        )
    fresh = {name: own[name] for name in within(own, *DECODER)}
    return dict(state) | fresh, [f"the file has no decoder; starts fresh: {parts_of(fresh)}"]


def check_sizes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the options which differ from those of a pre-training's file."""
    here = sizes_of(own)
    wrong = {n: size for n, size in sizes_of(state).items() if size != here.get(n, size)}
    if wrong:
        known = ", ".join(f"{name}={here[name]}" for name in wrong)
        settings = " ".join(f"model.{name}={size}" for name, size in wrong.items())
        raise ValueError(f"its sizes are other than this model's ({known}): set {settings}")


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The options that shapes and names show, as far as there are such tensors."""
    sizes = {}
    patch, decoder = (state.get(f"{n}.weight") for n in ("patch_embed.proj", "decoder_embed"))
    if patch is not None and patch.dim() == 4:
        sizes["dim"], sizes["in_chans"], sizes["patch_size"], _ = patch.shape
    if decoder is not None:
        sizes["decoder_dim"] = len(decoder)
    for option, blocks in (("depth", "blocks."), ("decoder_depth", "decoder_blocks.")):
        if numbers := {name.split(".")[1] for name in within(state, blocks)}:
            sizes[option] = len(numbers)
    return sizes


def fit_class_token(found: State, own: Mapping[str, Tensor], notes: list[str]) -> None:
    """Give `found` a class token and its position, or take them away, as `own` has them."""
    has, wants = "cls_token" in found, "cls_token" in own
    positions = found.get("pos_embed")
    if has == wants or positions is None or positions.dim() != 3:
        return
    if has:
        del found["cls_token"]
        found["pos_embed"] = positions[:, 1:]
        notes.append("left out, as model.class_token=false: cls_token and its position")
    else:
        found["cls_token"] = own["cls_token"]
        found["pos_embed"] = torch.cat([own["pos_embed"][:, :1].to(positions), positions], dim=1)
        notes.append("the file has no class token; starts fresh: cls_token and its position")


def fit_positions(found: State, own: Mapping[str, Tensor], notes: list[str]) -> None:
    """Interpolate the positions of `found` to the grid of `own`, where it is another one."""
    positions, wanted = found.get("pos_embed"), own["pos_embed"]
    if positions is None or positions.dim() != 3 or positions.shape[1] == wanted.shape[1]:
        return
    extra = int("cls_token" in own)
    old, new = (math.isqrt(p.shape[1] - extra) for p in (positions, wanted))
    if old**2 != positions.shape[1] - extra or old < 1:
        raise ValueError(
            f"pos_embed holds {positions.shape[1] - extra} positions of patches, which are no "
            "square grid that could be interpolated"
        )
    found["pos_embed"] = interpolated(positions, side=new, extra=extra)
    notes.append(f"positions were interpolated from {old} x {old} to {new} x {new} patches")


def interpolated(positions: Tensor, *, side: int, extra: int) -> Tensor:
    """positions [1, extra + N, C] -> [1, extra + side * side, C], bicubic, as published."""
    old = math.isqrt(positions.shape[1] - extra)
    grid = rearrange(positions[:, extra:].float(), "one (h w) c -> one c h w", h=old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    rows = rearrange(grid, "one c h w -> one (h w) c").to(positions.dtype)
    return torch.cat([positions[:, :extra], rows], dim=1)


def parts_of(names: Iterable[str]) -> str:
    """`decoder_blocks, norm`: the first words of the names, each once, in order."""
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in names)) or "nothing"
