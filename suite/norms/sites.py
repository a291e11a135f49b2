"""Where in a model a norm stands: a closed set, so that alpha and the norm may differ by site.

Published runs need it: LLaMA 7B with DyT uses alpha 0.8 before attention and 0.2 elsewhere (arXiv
2503.10622, table 10), and wav2vec 2.0 keeps the data norm of its feature extractor.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal, get_args

Site = Literal["attn", "ffn", "mixer", "embed", "qk", "stem", "downsample", "final"]
SITES: tuple[str, ...] = get_args(Site)


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest of `allowed`, if any is near, and the whole list."""
    names = list(allowed)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choose from: {', '.join(names)}"


def check_site(site: object, *, where: str = "site") -> None:
    """Raise a ValueError that starts with `where` unless `site` is one of SITES."""
    if site not in SITES:
        raise ValueError(f"{where} has no {site!r}; {did_you_mean(site, SITES)}")
