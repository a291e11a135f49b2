"""Put a norm into a model written by others (timm, torchvision, torchaudio, transformers).

The published converters test `isinstance(m, nn.LayerNorm)` and rebuild. So they convert subclasses
whose forward does something else, skip RMSNorms, give float32 CPU layers to bf16 GPU models, add a
bias where there was none, split shared modules, and report success when nothing matched. Here the
types are an explicit list, all checks come before the first change, and what cannot be replaced
faithfully is an error that names the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from suite.norms.activated import Activated, activated
from suite.norms.audit import is_norm
from suite.norms.factory import NormFactory, make_norm
from suite.norms.known import CHANNELS_FIRST, WITH_ACTIVATION, is_known, type_name
from suite.norms.sites import check_site

_UNIT_OFFSET = re.compile(r"Gemma|Qwen3Next")  # these multiply by 1 + weight

_SITE_BY_PATH = tuple(
    (site, re.compile(pattern, re.IGNORECASE))
    for site, pattern in (
        ("qk", r"(^|[._])(q|k|query|key|qk)_?(layer_?)?norm$"),
        ("downsample", r"downsample"),
        ("stem", r"(^|\.)(\w*_)?stem|(^|\.)feature_extractor|^bn1$|^conv1\.\d+$"),
        ("embed", r"(^|\.)(patch_embed|embed|norm_pre|ln_pre|feature_projection)"),
        (
            "ffn",
            r"\.\d+\.(.*\.)?(norm2|ln_?2|post_attention_\w*norm|\w*(mlp|ffn|ff)\w*"
            r"|final_layer_norm|layernorm_after)",
        ),
        (
            "attn",
            r"\.\d+\.(.*\.)?(norm1|ln_?1|input_layernorm|\w*att(n|ention)\w*|layernorm_before)",
        ),
        ("mixer", r"\.\d+(\.|$)|(^|\.)(s|b|\w*(stage|block|layer))_?\d+\."),
        ("final", r""),
    )
)


@dataclass(frozen=True)
class Replaced:
    """One layer that was replaced.

    path: its first name in the model. was: its type. now: the norm's name. site: where it stands.
    """

    path: str
    was: str
    now: str
    site: str


Kept = tuple[str, str]  # path and type of a norm that was not replaced


def swap_rows(replaced: Sequence[Replaced], kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """One row for each (site, was, now): how many there are, and the first path."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    kinds = [((r.site, _short(r.was), r.now), r.path) for r in replaced]
    kinds += [(("kept", _short(was), "as it was"), path) for path, was in kept]
    for (site, was, now), path in kinds:
        row = {"site": site, "was": was, "now": now, "count": 0, "first": path}
        rows.setdefault((site, was, now), row)["count"] += 1
    return list(rows.values())


def swap_table(replaced: Sequence[Replaced], kept: Sequence[Kept]) -> str:
    """What was replaced by what, where and how often, and what was kept, as aligned text."""
    names = ("site", "was", "now", "count", "first")
    rows = [names, *(tuple(str(row[n]) for n in names) for row in swap_rows(replaced, kept))]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{site:<{wide[0]}}  {was:<{wide[1]}} -> {now:<{wide[2]}}  {count:>{wide[3]}}  {path}"
        for site, was, now, count, path in rows
    )


def _short(name: str) -> str:
    """torch.nn.modules.batchnorm.BatchNorm2d -> torch BatchNorm2d."""
    parts = name.split(".")
    return f"{parts[0]} {parts[-1]}"


@dataclass
class _Plan:
    """A norm to replace, under all the names that it has, and what a new one has to be like."""

    old: nn.Module
    paths: list[str]
    site: str
    like: Tensor | None
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)


def guess_site(path: str) -> str:
    """The site of a norm from its path, by the names of timm, transformers and torchaudio.

    Inside a numbered block: attn or ffn where the name says so, else mixer. Outside: final, but for
    stem (also a convolutional network's first `bn1`), embed, downsample and qk names.
    `replace_norms(sites=...)` overrides it.
    """
    return next(site for site, pattern in _SITE_BY_PATH if pattern.search(path))


def replace_norms(
    model: nn.Module,
    norm: NormFactory | str,
    *,
    sites: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    carry_affine: bool = True,
) -> list[Replaced]:
    """Replace every norm of a known type in `model` by `norm`, in place; returns what was replaced.

    norm: a factory, or a name for its defaults. sites: path glob -> site, first match wins
    (default: `guess_site`; a norm with an activation inside is no attn or ffn norm, but mixer).
    keep: path globs of the norms that stay. Globs cross dots; one that matches no norm is an error.
    carry_affine: copy weight and bias into the new norm where it has one of the same shape (a
    ResNet's zero-init stays).
    Kept as they were: device, dtype, training mode, requires_grad, sharing of modules and of
    parameters, eps, absent weights and biases. BatchNorm is replaced like the rest; running
    statistics go with it, and a new batchnorm starts with fresh ones. What timm puts behind a norm
    in one module, act(drop(norm(x))), stays behind the new one. Activations that overwrite their
    input no longer do: it may be what the new norm needs for its gradient (DyT without a weight),
    or its own input (identity).
    Raises ValueError, with nothing changed, if: nothing was replaced; a norm is of a type that is
    not known (such as a subclass with its own forward, EvoNorm, or a frozen batch norm), unless it
    is kept; a layer has hooks; a norm normalizes more than one dimension; it is inside
    nn.TransformerEncoder(Layer) or a block with fused_add_norm, whose fast paths would go on
    computing a LayerNorm. Norms that a factory made are left alone.
    """
    factory = make_norm(norm) if isinstance(norm, str) else norm
    plans = list(_plans(model, sites or {}, keep))
    _refuse_fused(model, plans)
    if not plans:
        raise ValueError(
            "replace_norms: nothing to replace: the model has no norm of a known type outside keep"
        )
    built = [(plan, _build(plan, factory)) for plan in plans]
    tied: dict[int, nn.Parameter] = {}
    for plan, new in built:
        _carry(plan.old, new, tied, values=carry_affine)
        for parent, name in plan.parents:
            setattr(parent, name, new)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return [
        Replaced(plan.paths[0], type_name(plan.old), str(new.norm_name), plan.site)
        for plan, new in built
    ]


def _plans(model: nn.Module, sites: Mapping[str, str], keep: Sequence[str]) -> Iterator[_Plan]:
    """One plan for each distinct norm; raises before any change if one cannot be replaced."""
    for site in sites.values():
        check_site(site, where="sites")
    modules = dict(model.named_modules(remove_duplicate=False))
    paths_of: dict[nn.Module, list[str]] = {}
    for path, module in modules.items():
        if is_norm(module) and not _made_by_factory(path, modules):
            paths_of.setdefault(module, []).append(path)
    every = [path for paths in paths_of.values() for path in paths]
    for pattern in (*keep, *sites):
        if not any(fnmatchcase(path, pattern) for path in every):
            raise ValueError(
                f"replace_norms: {pattern!r} matches no norm; norms are at: {', '.join(every)}"
            )
    going = {
        module: paths
        for module, paths in paths_of.items()
        if not any(fnmatchcase(path, pattern) for path in paths for pattern in keep)
    }
    problems: dict[str, list[str]] = {}
    for module, paths in going.items():
        if why := _problem(module, paths):
            problems.setdefault(why, []).append(paths[0])
    if problems:
        listed = "; ".join(
            f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} ({why})"
            for why, paths in problems.items()
        )
        raise ValueError(
            f"replace_norms: cannot replace {listed}. Name them in keep= to leave them as they are"
        )
    for module, paths in going.items():
        plan = _Plan(
            module, paths, _site(paths[0], module, sites), _like(module, paths[0], modules)
        )
        for path in paths:
            parent, _, name = path.rpartition(".")
            plan.parents.append((modules[parent], name))
        yield plan


def _made_by_factory(path: str, modules: Mapping[str, nn.Module]) -> bool:
    parts = path.split(".")
    above = (".".join(parts[:n]) for n in range(len(parts) + 1))
    return any("norm_name" in vars(modules[name]) for name in above)


def _site(path: str, module: nn.Module, sites: Mapping[str, str]) -> str:
    guess = guess_site(path)
    if guess in ("attn", "ffn") and type_name(module) in WITH_ACTIVATION:
        guess = "mixer"  # norm1 and norm2 of a block of convolutions
    return next((site for glob, site in sites.items() if fnmatchcase(path, glob)), guess)


def _problem(module: nn.Module, paths: list[str]) -> str:
    """Why a norm cannot be replaced faithfully; empty if it can."""
    name = type_name(module)
    if paths[0] == "":
        return "the model itself is a norm: call the factory instead"
    if not is_known(module):
        return f"{name}, not a type that is known"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return f"{name} with hooks or a forward of its own, which would be lost"
    if len(getattr(module, "normalized_shape", (0,))) != 1:
        return f"{name} over more than the channels"
    return ""


def _like(module: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> Tensor | None:
    """The tensor whose device and dtype the new norm takes: the old norm's, or the nearest."""
    while True:
        tensors = (
            [*modules[path].parameters(), *modules[path].buffers()]
            if path
            else [*modules[""].parameters()]
        )
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
        if not path:
            return None
        path = path.rpartition(".")[0]


def _refuse_fused(model: nn.Module, plans: Sequence[_Plan]) -> None:
    for path, module in model.named_modules():
        encoder = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if not encoder and getattr(module, "fused_add_norm", False) is not True:
            continue
        inside = [p for plan in plans for p in plan.paths if not path or p.startswith(f"{path}.")]
        if inside:
            why = (
                "reads norm.eps in eval mode and computes"
                if encoder
                else "has fused_add_norm=True and computes"
            )
            what = f"{type(module).__name__} {why} a LayerNorm without calling the new norm"
            advice = (
                "use a block written out, such as suite.layers'"
                if encoder
                else "build it with fused_add_norm=False"
            )
            raise ValueError(
                f"replace_norms: cannot replace {inside[0]}: {what}; {advice}, or keep those norms"
            )


def _build(plan: _Plan, factory: NormFactory) -> nn.Module:
    old = plan.old
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    eps = getattr(old, "eps", getattr(old, "variance_epsilon", None))
    if eps is None:  # torch's RMSNorm: the smallest step of the dtype
        eps = torch.finfo(torch.float32 if plan.like is None else plan.like.dtype).eps
    new = factory(
        _dim(old),
        site=plan.site,
        channels_first=type_name(old) in CHANNELS_FIRST,
        eps=float(eps),
        bias=bias is not None,
        affine=weight is not None,
    )
    if plan.like is not None:
        new.to(device=plan.like.device, dtype=plan.like.dtype)
    new.train(old.training)
    if type_name(old) not in WITH_ACTIVATION:
        return new
    drop, act = old.get_submodule("drop"), old.get_submodule("act")
    does_nothing = type(drop) is nn.Identity and type(act) is nn.Identity
    return new if does_nothing else activated(new, drop=drop, act=act)


def _dim(norm: Any) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return int(getattr(norm, name))
    shape = getattr(norm, "normalized_shape", None)
    return int(shape[0]) if shape is not None else int(norm.weight.shape[0])


@torch.no_grad()
def _carry(old: nn.Module, new: nn.Module, tied: dict[int, nn.Parameter], *, values: bool) -> None:
    """requires_grad, and with `values` weight and bias, to new; tied parameters stay tied."""
    before = dict(old.named_parameters(recurse=False))
    trains = any(p.requires_grad for p in before.values()) or not before
    for name, parameter in list(new.named_parameters()):
        if isinstance(new, Activated) and name.startswith(("act.", "drop.")):
            continue  # the old ones, as they were
        source = before.get(name)
        if source is None or source.shape != parameter.shape:
            parameter.requires_grad_(trains)
            continue
        if id(source) in tied:
            setattr(new, name, tied[id(source)])
            continue
        tied[id(source)] = parameter
        parameter.requires_grad_(source.requires_grad)
        if values:
            offset = 1.0 if _UNIT_OFFSET.search(type(old).__name__) and name == "weight" else 0.0
            parameter.copy_(source + offset)
