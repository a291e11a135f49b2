"""What may be fused with a norm, measured on a Transformer block (`suite.bench fusion`).

    plain       h = x + branch; y = norm(h), with the backend that is chosen unasked
    kernel      the same with this package's kernel for the norm
    one pass    add and norm in one kernel (suite.norms.residual), against `kernel`
    recompute   y and what the norm saves are made again in the backward (suite.norms.recompute)
    compiled    torch.compile of the whole block

How a block is built and measured stands in fusion_sides, how kernels are counted in
fusion_kernels. What a norm adds to the kernels of a compiled block shows against no norm at
all: nothing, if it vanished into its neighbours.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.bench import MIN_ROUNDS, split_tokens, whole_number
from suite.benches.fusion_kernels import count_kernels
from suite.benches.fusion_sides import (
    DTYPES,
    HEAD_DIM,
    TOKENS,
    Block,
    Found,
    Setting,
    apart,
    note,
    of_norm,
)
from suite.benches.saved import check_folder, header, header_lines, keep
from suite.errors import ConfigError
from suite.norms import NORMS, make_norm
from suite.train import say

NORM_NAMES = ("layernorm", "rmsnorm", "dyt", "derf")
DEFAULTS = {"cpu": {"dim": "192", "rows": "392"}, "cuda": {"dim": "384,768", "rows": "25088"}}
KEYS = ("norm", "dim", "rows", "rounds", "device", "dtype")
SWITCHES = ("--json", "--save", "--compile")
PAYS = 0.02  # share of a block's time


@dataclass(frozen=True)
class Kernels:
    """What Inductor writes for `what`: functions that are launched, and their loops (on a GPU one
    each)."""

    what: str
    norm: str
    forward: int
    backward: int
    loops: int


@dataclass
class Result:
    """What `measure` found."""

    setting: Setting
    found: list[Found]
    kernels: list[Kernels]
    notes: list[str]
    header: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": "fusion",
            **asdict(self.setting),
            "header": self.header,
            "found": [asdict(f) for f in self.found],
            "kernels": [asdict(k) for k in self.kernels],
            "verdicts": self.verdicts(),
            "notes": self.notes,
        }

    def of(self, f: Found, side: str | None) -> Found | None:
        same = (f.block, f.dim, f.norm, side)
        return next((g for g in self.found if (g.block, g.dim, g.norm, g.side) == same), None)

    def verdicts(self) -> list[str]:
        """A line a side that is an option, from the measured ratios."""
        return [self._verdict(f) for f in self.found if f.side in ("one pass", "recompute")]

    def _verdict(self, f: Found) -> str:
        other = self.of(f, f.against)
        name = f"{f.side}, {f.block} {f.dim} {f.norm}"
        if other is None or not f.ratios:
            return f"{name}: no verdict, {f.against} is missing"
        ratio, saved = statistics.median(f.ratios), other.bytes - f.bytes
        faster = ratio < 1 - PAYS and max(f.ratios) < 1
        gains = ["time"] * faster + ["bytes"] * (saved > 0)
        what = f"pays in {' and '.join(gains)}" if gains else "does not pay"
        return (
            f"{name}: {what}; {ratio:.3f} of {f.against}'s time ({spread(f.ratios)}), "
            f"{saved / 2**10:,.0f} KiB fewer ({100 * saved / other.bytes:.0f} %)"
        )

    def to_markdown(self) -> str:
        """Two tables, the verdicts and the notes."""
        s = self.setting
        lines = [
            f"One block, forward and backward, {actual_rows(s)} tokens, {s.dtype}, {s.rounds} "
            "rounds. Times are medians; a ratio is the median of those inside a round, with least "
            "and most. KiB: alive after a forward, with the two outputs.",
            "",
            "| block | dim | norm | side | ms | ratio | to | KiB | bytes a token and channel |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for f in self.found:
            ms = "-" if f.ms is None else f"{f.ms:.2f}"
            ratio = f"{statistics.median(f.ratios):.3f} ({spread(f.ratios)})" if f.ratios else "-"
            each = f.bytes / (actual_rows(s) * f.dim)
            lines.append(
                f"| {f.block} | {f.dim} | {f.norm} | {f.side} | {ms} | {ratio} | "
                f"{f.against or '-'} | {f.bytes / 2**10:,.0f} | {each:.1f} |"
            )
        lines += [
            "",
            "Kernels that torch.compile writes, forward + backward (and their loops):",
            "",
            "| what | norm | forward | backward | loops | more than no norm |",
            "|---|---|---|---|---|---|",
        ]
        bare = {k.what: k for k in self.kernels if k.norm == "identity"}
        for k in self.kernels:
            none = bare.get(k.what)
            more = "-" if none is None else f"{k.forward - none.forward:+d}, "
            more += "" if none is None else f"{k.backward - none.backward:+d}"
            lines.append(
                f"| {k.what} | {k.norm} | {k.forward} | {k.backward} | {k.loops} | {more} |"
            )
        lines += ["", *(f"- {v}" for v in self.verdicts())]
        return "\n".join([*lines, *(f"- note: {note}" for note in self.notes)])


def spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


def actual_rows(setting: Setting) -> int:
    tokens = min(TOKENS, setting.rows)
    return max(1, setting.rows // tokens) * tokens


# -- the command --------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """`python -m suite.bench fusion`. Raises ConfigError for a mistake in the tokens."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    setting = parse(argv)
    if "--save" in argv:
        check_folder(torch.device(setting.device))
    result = measure(setting)
    device, markdown = torch.device(setting.device), result.to_markdown()
    if "--json" in argv:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print("\n".join([*header_lines(result.header), "", markdown]))
    if "--save" in argv:
        command = " ".join(["python -m suite.bench fusion", *argv])
        folder = keep(
            "fusion",
            device=device,
            result=result.to_dict(),
            markdown=markdown,
            command=command,
        )
        say(f"kept in {folder}")
    return 0


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the tokens name. Raises ConfigError."""
    own, rest = split_tokens([a for a in argv if a not in SWITCHES], own=KEYS)
    if rest:
        keys = ", ".join(f"{key}=" for key in KEYS)
        raise ConfigError(f"{rest[0]}: suite.bench fusion takes {keys}, {', '.join(SWITCHES)}")
    device = own.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEFAULTS or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device}: must be cpu, or cuda where there is an NVIDIA GPU")
    given = {**DEFAULTS[device], "norm": ",".join(NORM_NAMES), "dtype": "float32", **own}
    names = tuple(given["norm"].split(","))
    for name in names:
        if name not in NORMS or name == "identity" or names.count(name) > 1:
            raise ConfigError(
                f"norm={given['norm']}: {name!r} must be a norm and stand there once; "
                f"take some of {', '.join(name for name in NORMS if name != 'identity')}"
            )
    if given["dtype"] not in DTYPES:
        raise ConfigError(f"dtype={given['dtype']}: must be one of {', '.join(DTYPES)}")
    dims = tuple(whole_number("dim", text, low=1) for text in given["dim"].split(","))
    if len(set(dims)) < len(dims):
        raise ConfigError(f"dim={given['dim']}: a width is given twice; leave one out")
    if wrong := [dim for dim in dims if dim >= HEAD_DIM and dim % (dim // HEAD_DIM)]:
        raise ConfigError(f"dim={wrong[0]}: must be a multiple of {HEAD_DIM}, the size of a head")
    compiled = "--compile" in argv or device == "cuda"
    if "--compile" in argv and device == "cpu" and not any(map(shutil.which, ("g++", "c++"))):
        raise ConfigError("--compile: needs a C++ compiler on the PATH; leave it out")
    rows = whole_number("rows", given["rows"], low=1)
    rounds = whole_number("rounds", given.get("rounds", str(MIN_ROUNDS)), low=1)
    return Setting(names, dims, rows, rounds, device, given["dtype"], compiled)


def measure(setting: Setting) -> Result:
    """Every block, width and norm by all its sides; then the kernels."""
    notes: list[str] = []
    found: list[Found] = []
    for kind in ("vit", "llama"):
        for dim in setting.dims:
            for norm in setting.norms:
                found += of_norm(setting, kind, dim, norm, notes)
                gc.collect()
    kernels = counted(setting, notes)
    return Result(setting, found, kernels, notes, header(torch.device(setting.device)))


def counted(setting: Setting, notes: list[str]) -> list[Kernels]:
    """What Inductor writes for two chains and for ViT's block, with each norm and without."""
    found: list[Kernels] = []
    dim = setting.dims[0]
    for norm in ("identity", *setting.norms):
        for what, forward, inputs in chains(setting, norm, dim):
            try:
                found.append(Kernels(what, norm, **count_kernels(forward, inputs)))
            except Exception as error:  # Inductor's own errors have no common class
                text = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
                note(notes, f"kernels of {what} with {norm} could not be counted: {text}")
    return found


def chains(setting: Setting, norm: str, dim: int) -> list[tuple[str, Callable[..., Any], Any]]:
    """Name, function and inputs. Norms are plain torch, which Inductor sees through."""
    torch.manual_seed(0)
    options = NORMS[norm].options
    if hasattr(options, "backend"):
        options = type(options)(backend="auto")  # type: ignore[call-arg]
    factory = make_norm(norm, options)
    layer = factory(dim, site="attn").to(setting.device)
    linear = nn.Linear(dim, dim).to(setting.device)
    block = Block("vit", dim, norm=factory, together=False).to(setting.device)
    x, branch = setting.inputs(dim)

    def behind_add(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        y, h = apart(layer, branch, x)
        return linear(y), h

    return [
        ("add, norm, linear", behind_add, (x, branch)),
        ("gelu, norm", lambda x: (layer(F.gelu(x)),), (x,)),
        ("vit block", block, (x, branch)),
    ]


HELP = f"""\
What a norm may be fused with, on one block of a ViT and one of a LLaMA, forward and backward:
residual add and norm in one pass, its output recomputed instead of kept, and torch.compile.

usage: python -m suite.bench fusion [norm={",".join(NORM_NAMES)}] [dim=..] [rows=N]
                                    [rounds={MIN_ROUNDS}] [device=cpu|cuda] [dtype=float32|bfloat16]
                                    [--compile] [--json] [--save]

norm=..    norms, comma-separated
dim=..     widths, comma-separated; left out: 192 on a CPU, 384 and 768 on a GPU
rows=N     tokens of a batch, in sequences of {TOKENS}; left out: 392 on a CPU, 25088 on a GPU
rounds=N   turns that each side takes; figures are medians over them
dtype      bfloat16 is autocast over float32 weights
--compile  also time compiled blocks, as is done on a GPU in any case (minutes on a CPU)
--json     everything that was measured, as one JSON object
--save     keep it in benchmarks/<device>/fusion.json and .md

An option pays if it saves more than {PAYS:.0%} of a block's time, with every round below 1, or if
fewer bytes are kept for the backward. Kernels are counted in the code that torch.compile writes.

examples
  python -m suite.bench fusion
  python -m suite.bench fusion norm=layernorm,dyt dim=384 dtype=bfloat16 rounds=9"""
