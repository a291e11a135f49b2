"""The DNA models that `model=` names: HyenaDNA and Caduceus of every published size, as a language
model or as a classifier.

Sizes: tasks/dna/hyena.py and tasks/dna/caduceus.py.
"""

from __future__ import annotations

from typing import Any

from suite.data import DataInfo
from suite.norms import NormFactory
from suite.registry import Choice
from tasks.dna.caduceus import CADUCEUS_SIZES, Caduceus, CaduceusOptions
from tasks.dna.dna_model import ForClassification, ForPretraining
from tasks.dna.hyena import HYENA_SIZES, HyenaDNA, HyenaOptions


def build_backbone(
    options: HyenaOptions | CaduceusOptions, *, norm: NormFactory, data: DataInfo
) -> HyenaDNA | Caduceus:
    """The backbone. Raises ValueError where the data's longest sequence is longer than l_max."""
    if not isinstance(options, HyenaOptions):
        return Caduceus(options, norm=norm)
    longest = data.extra.get("length", 0)
    if longest > options.l_max:
        raise ValueError(
            f"data={data.name} has sequences of {longest:,} positions, model.l_max is "
            f"{options.l_max:,}; set model.l_max={longest}, or cut them with the data's length"
        )
    return HyenaDNA(options, norm=norm)


def build_pretraining(options: Any, *, norm: NormFactory, data: DataInfo) -> ForPretraining:
    """`Choice.build` of a language model."""
    backbone = build_backbone(options, norm=norm, data=data)
    return ForPretraining(backbone, tie_head=options.tie_head, head_std=options.init_std)


def build_classification(options: Any, *, norm: NormFactory, data: DataInfo) -> ForClassification:
    """`Choice.build` of a classifier."""
    conjoins = isinstance(options, CaduceusOptions) and options.bidirectional and not options.rcps
    return ForClassification(
        build_backbone(options, norm=norm, data=data),
        classes=data.classes or 0,
        head_std=options.init_std,
        conjoins=conjoins,
    )


def help_of(name: str, options: HyenaOptions | CaduceusOptions) -> str:
    """A line for `--list`."""
    size = f"{options.depth} layers, {options.dim} channels"
    if isinstance(options, HyenaOptions):
        return f"HyenaDNA (arXiv 2306.15794): {size}, up to {options.l_max - 2:,} bases"
    kind = "both strands inside (PS)" if options.rcps else "both strands by augmentation (Ph)"
    return f"Caduceus (arXiv 2403.03234), {kind}: {size}"


def choices(build: Any, *, causal: bool) -> dict[str, Choice]:
    """An entry for each size. causal: HyenaDNA is to predict the next base."""
    sizes: dict[str, Any] = {**HYENA_SIZES, **CADUCEUS_SIZES}
    return {
        name: Choice(
            options,
            build,
            help=help_of(name, options),
            causal=causal and isinstance(options, HyenaOptions),
        )
        for name, options in sizes.items()
    }


PRETRAIN_MODELS = choices(build_pretraining, causal=True)
CLASSIFY_MODELS = choices(build_classification, causal=False)
