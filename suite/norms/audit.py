"""Which norms a model really holds: a swap that was asked for is not yet one that happened."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from suite.norms.factory import NormFactory, norm_modules
from suite.norms.known import is_known, type_name

_TORCH_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)
_NAME = re.compile(r"Norm(?![a-z])|RMS$|DynamicTanh|DynamicErf")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, whoever wrote it.

    torch.nn's norms and their subclasses; those of `suite.norms.known`; and classes with Norm as a
    word of their name (RMSNorm, LayerNorm2d, RmsNormFp32, EvoNorm2dS0, DynamicTanh), unless
    something with parameters or another norm sits inside (then it is a container, such as PreNorm
    or ConvNormAct) or it is a weight parametrization of torch.nn.utils.
    """
    if isinstance(module, _TORCH_NORMS) or is_known(module):
        return True
    cls = type(module)
    if cls.__module__.startswith("torch.nn.utils.") or not _NAME.search(cls.__name__):
        return False
    inner = [child for child in module.modules() if child is not module]
    return not any(
        "norm_name" in vars(child) or is_norm(child) or any(True for _ in child.parameters())
        for child in inner
    )


def foreign_norms(
    model: nn.Module,
    factory: NormFactory,
    keep_sites: Collection[str] = (),
    keep: Collection[str] = (),
) -> list[tuple[str, str]]:
    """(path, type) of the norms in `model` that are not what `factory` makes for their site.

    A norm that a factory made is right if its name is the chosen one for its site (by_site counts),
    or its site is in keep_sites. A norm that no factory made has no site and is foreign unless one
    of the path globs in `keep`, as replace_norms takes them, names it. Empty is good.
    """
    ours = dict(norm_modules(model))
    inside = tuple(f"{path}." for path in ours)
    found = []
    for path, module in model.named_modules():
        if path in ours:
            site = str(module.site)
            if site not in keep_sites and module.norm_name != factory.name_at(site):
                found.append((path, str(module.norm_name)))
        elif not path.startswith(inside) and is_norm(module):
            if any(fnmatchcase(path, glob) for glob in keep):
                continue
            found.append((path, type_name(module)))
    return found


def norm_parameters(model: nn.Module) -> list[str]:
    """Names (as in named_parameters) of the parameters of every norm, ours or not.

    Weight decay goes by this role.
    """
    norms = [module for _, module in norm_modules(model)]
    norms += [module for module in model.modules() if is_norm(module)]
    owned = {id(parameter) for module in norms for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in owned]


def check_compatible(saved: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another norm. Both are `NormFactory.describe()`.

    A DyT checkpoint loads into a LayerNorm model under strict=False with nothing missing, so names
    are compared, not tensors. Raises ValueError if the norm or the norm of any site differs.
    """
    if "name" not in saved:
        raise ValueError("the checkpoint does not say which norm it was trained with")
    if saved["name"] != chosen["name"]:
        raise ValueError(
            f"the checkpoint was trained with norm={saved['name']},"
            f" the model has norm={chosen['name']}"
        )
    before, now = _by_site(saved), _by_site(chosen)
    for site in sorted(before.keys() | now.keys()):
        was, will = before.get(site, saved["name"]), now.get(site, chosen["name"])
        if was != will:
            raise ValueError(
                f"the checkpoint was trained with {was} at site {site!r},"
                f" the model has {will} there"
            )


def _by_site(described: Mapping[str, Any]) -> dict[str, str]:
    return dict(described.get("by_site") or {})
