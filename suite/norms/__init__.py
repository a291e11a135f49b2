"""Normalization layers as one argument: a table, a factory, and the audit that keeps it honest.

    from suite.norms import make_norm
    norm = make_norm("dyt")                     # or "my_package.my_norm:MyNorm"
    layer = norm(768, site="attn", eps=1e-6)    # y = layer(x) or layer(x, mask)

Usable alone: it imports nothing else of `suite`. Norms draw no random numbers, so the same seed
with another norm gives identical other parameters.
"""

from suite.norms.audit import check_compatible, foreign_norms, is_norm, norm_parameters
from suite.norms.calibrate import calibrate
from suite.norms.factory import NormFactory, make_norm, norm_modules, options_of, register
from suite.norms.options import (
    BatchNormOptions,
    GroupNormOptions,
    NormOptions,
    PointwiseOptions,
    RowOptions,
    StatisticsOptions,
)
from suite.norms.pointwise import PointwiseNorm
from suite.norms.sites import SITES, Site
from suite.norms.swap import Kept, Replaced, guess_site, replace_norms, swap_rows, swap_table
from suite.norms.table import NORMS, NormSpec

__all__ = [
    "NORMS",
    "SITES",
    "BatchNormOptions",
    "GroupNormOptions",
    "Kept",
    "NormFactory",
    "NormOptions",
    "NormSpec",
    "PointwiseNorm",
    "PointwiseOptions",
    "Replaced",
    "RowOptions",
    "Site",
    "StatisticsOptions",
    "calibrate",
    "check_compatible",
    "foreign_norms",
    "guess_site",
    "is_norm",
    "make_norm",
    "norm_modules",
    "norm_parameters",
    "options_of",
    "register",
    "replace_norms",
    "swap_rows",
    "swap_table",
]
