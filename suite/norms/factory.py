"""From a name to norm layers: `make_norm` gives the one argument `norm` that every model takes.

The model calls it with what it was published with (eps, bias, affine) and with the site; options
that are not None win.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from suite.norms.options import RowOptions, StatisticsOptions
from suite.norms.sites import check_site, did_you_mean
from suite.norms.table import NORMS, NormSpec


class NormFactory:
    """`norm(dim, site="attn")` is an nn.Module whose forward is (x, mask=None).

    name, options: as chosen. causal: whether no position sees another, at any site.
    """

    def __init__(self, name: str, *, spec: NormSpec, options: Any) -> None:
        self.name, self.options = name, options
        self._build = spec.build
        by_site = getattr(options, "by_site", {})
        self._by_site = {site: _at_site(other, options) for site, other in by_site.items()}
        self.causal: bool = spec.causal and all(other.causal for other in self._by_site.values())

    def __call__(
        self,
        dim: int,
        *,
        site: str,
        channels_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        affine: bool = True,
    ) -> nn.Module:
        """A norm over `dim` channels: the last dimension, or the second with channels_first.

        eps, bias, affine: what the model was published with. Raises ValueError for an unknown site.
        """
        check_site(site)
        layout = {"channels_first": channels_first, "eps": eps, "bias": bias, "affine": affine}
        if site in self._by_site:
            return self._by_site[site](dim, site=site, **layout)  # type: ignore[arg-type]
        module = self._build(dim, options=self.options, site=site, **layout)
        vars(module).update(norm_name=self.name, site=site)
        return module

    def across_positions(self) -> str:
        """`norm=batchnorm` or `norm.by_site.ffn=batchnorm`: which choice is not causal."""
        sites = [site for site, other in self._by_site.items() if not other.causal]
        if not sites:
            return f"norm={self.name}"
        return f"norm.by_site.{sites[0]}={self._by_site[sites[0]].name}"

    def name_at(self, site: str) -> str:
        """The norm that stands at `site`: by_site's, or this one."""
        return self._by_site[site].name if site in self._by_site else self.name

    def describe(self) -> dict[str, Any]:
        """Plain types, for checkpoints and results: {"name", "by_site", "options"}."""
        options = asdict(self.options) if is_dataclass(self.options) else {}  # type: ignore[arg-type]
        by_site = {site: other.name for site, other in self._by_site.items()}
        return {"name": self.name, "by_site": by_site, "options": options}

    def __repr__(self) -> str:
        return f"NormFactory({self.name!r}, {self.options!r})"


def _at_site(name: str, options: Any) -> NormFactory:
    """A by_site entry's factory: with these options if of the same type, else its defaults."""
    try:
        spec = _spec(name)
        carried = _as_type(options, spec.options) or spec.options
        return NormFactory(name, spec=spec, options=replace(carried, by_site={}))
    except ValueError as error:
        raise ValueError(f"by_site: {error}") from None


def _as_type(options: Any, defaults: Any) -> Any:
    """`options` as the type of `defaults`; None if they are of another kind.

    RowOptions are StatisticsOptions with a backend, and either stands in for the other.
    """
    if type(options) is type(defaults):
        return options
    if {type(options), type(defaults)} != {RowOptions, StatisticsOptions}:
        return None
    common = [f.name for f in fields(StatisticsOptions)]
    return replace(defaults, **{name: getattr(options, name) for name in common})


def make_norm(name: str, options: Any = None) -> NormFactory:
    """The factory of a norm in NORMS, or of your own class as "my_package.my_norm:MyNorm".

    options: an instance of the norm's options dataclass (`options_of(name)`); None is its defaults.
    Your class is called as MyNorm(dim, site=, channels_first=, eps=, bias=, affine=) with as many
    of the keywords as its signature takes. Raises ValueError for an unknown name (with the
    nearest), an import that fails, or options of another norm.
    """
    spec = _spec(name)
    chosen = spec.options if options is None else _as_type(options, spec.options)
    if chosen is None:
        wanted, got = type(spec.options).__name__, type(options).__name__
        raise ValueError(f"norm {name!r} takes options of type {wanted}, got {got}")
    return NormFactory(name, spec=spec, options=chosen)


def options_of(name: str) -> Any:
    """The default options (a frozen dataclass instance) of a name in NORMS or of a dotted path.

    Raises ValueError as make_norm does.
    """
    return _spec(name).options


def register(
    name: str,
    build: Callable[..., nn.Module],
    options: Any = None,
    *,
    help: str = "",
    causal: bool = True,
) -> None:
    """Add a norm to NORMS from Python.

    build: a class or function, called as build(dim, options=, site=, channels_first=, eps=, bias=,
    affine=) with as many of the keywords as its signature takes. options: an instance of a frozen
    dataclass with its defaults.
    Raises ValueError if the name is taken or holds a colon, which marks a dotted path.
    """
    if name in NORMS:
        raise ValueError(f"register: there is already a norm called {name!r}")
    if ":" in name or not name:
        raise ValueError(f"register: a norm's name is a plain word, got {name!r}")
    defaults = StatisticsOptions() if options is None else options
    if not is_dataclass(defaults) or isinstance(defaults, type):
        raise ValueError(f"register: options must be an instance of a dataclass, got {defaults!r}")
    NORMS[name] = NormSpec(partial(_build_foreign, name, build), defaults, help, causal)


def norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every norm that a factory made; a shared one once, by its first path."""
    for path, module in model.named_modules():
        if "norm_name" in vars(module):
            yield path, module


def _spec(name: str) -> NormSpec:
    if not isinstance(name, str) or (name not in NORMS and ":" not in name):
        raise ValueError(
            f"norm has no {name!r}; {did_you_mean(name, NORMS)},"
            " or a class of your own as my_package.my_norm:MyNorm"
        )
    if name in NORMS:
        return NORMS[name]
    cls = _import(name)
    return NormSpec(partial(_build_foreign, name, cls), StatisticsOptions(), f"the class {name}")


def _import(path: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"norm {path!r}: cannot import {module_name!r}: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name in vars(module) if isinstance(vars(module)[name], type)]
        hint = did_you_mean(attribute, public)
        raise ValueError(f"norm {path!r}: {module_name!r} has no {attribute!r}; {hint}")
    return found


def _build_foreign(
    name: str,
    build: Callable[..., nn.Module],
    dim: int,
    *,
    options: Any,
    channels_first: bool,
    **published: Any,
) -> nn.Module:
    """Call a norm that is not ours with the keywords that it knows; see make_norm."""
    if isinstance(options, StatisticsOptions):
        chosen = {"eps": options.eps, "bias": options.bias, "affine": options.weight}
        published |= {key: value for key, value in chosen.items() if value is not None}
    keywords = published | {"channels_first": channels_first, "options": options}
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm {name!r}: its signature cannot be read: {error}") from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if channels_first and "channels_first" not in parameters and not takes_all:
        site = published["site"]
        raise ValueError(
            f"norm {name!r}: site {site!r} has its channels in dimension 1, and the norm takes no"
            f" channels_first; add it, or give the site another norm with norm.by_site.{site}"
        )
    known = {key: value for key, value in keywords.items() if takes_all or key in parameters}
    try:
        # Norms draw no random numbers: the rest of the model is the same with every norm.
        with torch.random.fork_rng(devices=[]):
            module = build(dim, **known)
    except Exception as error:
        raise ValueError(f"norm {name!r}: cannot be built for {dim} channels: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"norm {name!r}: gave a {type(module).__name__}, not a torch.nn.Module")
    if not _takes_mask(module):
        module.register_forward_pre_hook(_drop_mask, with_kwargs=True)
    return module


def _takes_mask(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == "mask" or p.kind in (p.VAR_POSITIONAL,) for p in parameters)


def _drop_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For a norm whose forward is (x): the suite's models may pass a mask."""
    return args[:1], {key: value for key, value in kwargs.items() if key != "mask"}
