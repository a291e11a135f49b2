"""Time, memory and error of one norm layer, however it is computed, against the speed of a copy.

A norm does little for each byte that it reads, so the measure is the memory's bandwidth: how much
of a copy's rate, measured in the same rounds, does a side reach? How it is timed stands in
norm_rounds, what is compared in norm_sides, what is derived in norm_figures.
"""

from __future__ import annotations

import gc
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch

from suite.bench import split_tokens, whole_number
from suite.benches import saved
from suite.benches.norm_figures import PASSES, SIZES, Goal, Table, goals, page
from suite.benches.norm_rounds import Bench, Setting, first_line
from suite.benches.norm_sides import KINDS, MEASURED, own_backend
from suite.benches.roofline import draw
from suite.errors import ConfigError, DataError
from suite.metrics import plain
from suite.registry import check_choice
from suite.train import say

KEYS = ("shape", "dtype", "norm", "pass", "side", "rounds", "device")
SWITCHES = ("--add", "--graph", "--json", "--save")
SHAPES = {
    "cpu": ("6304x768", "8192x1024", "16384x256", "2048x4096"),
    "cuda": ("50432x768", "4375x768", "262144x128", "1000000x256", "8192x4096", "4096x4096"),
}
DEFAULT_PASSES = {"cpu": "forward,train", "cuda": "forward,backward,train"}
WHAT = {
    "us": "one call: median over the rounds; a round times `calls` of them together; with --graph "
    "on the device alone",
    "to_floor": "time by that of the bytes that must move, at the rate of the pass's reference",
    "of_copy": "rate by that of y.copy_(x)",
    "saved": "bytes an element that autograd keeps, x among them, parameters not",
    "peak": "bytes that a call adds at its peak; on a GPU only",
    "errors": "against float64: output |error| / (1 + |y|), gradients |error| / largest, the worst",
    "parameters": "in the dtype of x on all sides",
}


@dataclass
class Result:
    """What `measure` found."""

    setting: Setting
    header: dict[str, Any]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)

    @property
    def goals(self) -> list[Goal]:
        return goals(self.tables, device=self.setting.device, threads=self.header["threads"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": "norms",
            "header": self.header,
            "setting": asdict(self.setting),
            "what": WHAT,
            "tables": [table.to_dict() for table in self.tables],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """The page, for a terminal and for the file."""
        return page(self.tables, self.goals, self.notes)


def run(argv: Sequence[str]) -> int:
    """`python -m suite.bench norms`. Raises ConfigError for a mistake in the tokens."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    setting = parse(argv)
    if "--save" in argv:
        saved.check_folder(torch.device(setting.device))
    result = measure(setting)
    if "--json" in argv:
        print(json.dumps(plain(result.to_dict()), indent=2))
    else:
        print("\n".join([*saved.header_lines(result.header), "", result.to_text()]))
    if "--save" in argv:
        name = "norms-graph" if setting.graph else "norms"
        folder = saved.keep(
            name,
            device=torch.device(result.setting.device),
            result=result.to_dict(),
            markdown=result.to_text(),
            pictures={f"{name}-roofline": partial(draw, result.tables)},
            command=shlex.join(["python", "-m", "suite.bench", "norms", *argv]),
        )
        say(f"kept in {folder}")
    return 0


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the tokens name. Raises ConfigError."""
    own, rest = split_tokens([a for a in argv if a not in SWITCHES], own=KEYS)
    if rest:
        keys = ", ".join(f"{key}=" for key in KEYS)
        raise ConfigError(f"{rest[0]}: suite.bench norms takes {keys}, {' and '.join(SWITCHES)}")
    device = own.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device}: must be cpu, or cuda where there is an NVIDIA GPU")
    if "--graph" in argv and device != "cuda":
        raise ConfigError("--graph: a CUDA graph needs device=cuda; leave it out on a CPU")
    shapes = listed("shape", own.get("shape", ",".join(SHAPES[device])))
    passes = listed("pass", own.get("pass", DEFAULT_PASSES[device]), PASSES)
    kinds = listed("side", own.get("side", ",".join(KINDS)), KINDS)
    if "side" in own and "one-pass" in kinds and "--add" not in argv:
        raise ConfigError(f"side={own['side']}: one-pass is of --add; add it or leave one-pass out")
    return Setting(
        shapes=tuple(shape(text) for text in shapes),
        dtypes=listed("dtype", own.get("dtype", "float32,bfloat16"), SIZES),
        norms=listed("norm", own.get("norm", "dyt,derf,layernorm,rmsnorm"), MEASURED),
        passes=passes,  # type: ignore[arg-type]
        kinds=kinds,
        works=("norm", "add") if "--add" in argv else ("norm",),
        rounds=whole_number("rounds", own.get("rounds", "5"), low=1),
        device=device,
        graph="--graph" in argv,
    )


def listed(key: str, text: str, allowed: Sequence[str] | dict[Any, Any] = ()) -> tuple[str, ...]:
    """Comma-separated values. Raises ConfigError for one that is twice there or not allowed."""
    found = tuple(text.split(","))
    for value in found:
        if allowed:
            check_choice(key, value, allowed)
        if found.count(value) > 1:
            raise ConfigError(f"{key}={text}: {value} is given twice; leave one out")
    return found


def shape(text: str) -> tuple[int, int]:
    """Rows and channels of "6304x768". Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise ConfigError(f"shape={text}: must be ROWSxCHANNELS, both 1 or more, as 6304x768")
    return int(match[1]), int(match[2])


def measure(setting: Setting) -> Result:
    """Time and weigh every side at every shape and dtype."""
    result = Result(setting, saved.header(torch.device(setting.device)), [])
    grid = list(product(setting.shapes, setting.dtypes, setting.works))
    config: Any = torch._dynamo.config
    functorch: Any = torch._functorch.config
    # Each shape is compiled for itself: a limit that is reached would be eager without a word.
    # Donated buffers rule out the second backward of a graph, which pass=backward does.
    limits = {"automatic_dynamic_shapes": False, "recompile_limit": 1024}
    with config.patch(**limits), functorch.patch(donated_buffer=False):
        for number, ((rows, dim), dtype, work) in enumerate(grid):
            torch._dynamo.reset()
            gc.collect()
            try:
                table = Bench(setting, rows, dim, dtype, work, result.notes).table()
            except (RuntimeError, MemoryError) as error:  # the others are to be measured
                result.notes.append(f"{rows} x {dim} {dtype}, {work} failed: {first_line(error)}")
                if len(grid) > 1:
                    say(f"note: {result.notes[-1]}")
                continue
            result.tables.append(table)
            say(f"{number + 1}/{len(grid)}: {table.title}, {work}")
    if not result.tables:
        raise DataError(f"nothing could be measured: {result.notes[-1]}")
    result.notes.append(f"ours is backend={own_backend(torch.device(setting.device))}")
    if setting.device == "cpu":
        result.notes.append("Liger, apex and QuACK need a GPU: left out")
    result.notes[:] = dict.fromkeys(result.notes)
    return result


HELP = f"""\
Time, memory and error of a norm layer however it is computed, against the speed of a copy.

usage: python -m suite.bench norms [shape=ROWSxCHANNELS,..] [dtype=float32,bfloat16] [norm=..]
                                   [pass=..] [side=..] [rounds=5] [device=cpu|cuda] [--add]
                                   [--graph] [--json] [--save]

shape=..   inputs; left out: on a CPU {", ".join(SHAPES["cpu"])};
           on CUDA {", ".join(SHAPES["cuda"])}
dtype=..   {", ".join(SIZES)}; of parameters too
norm=..    dyt,derf,layernorm,rmsnorm if left out; any point-wise norm
pass=..    {", ".join(PASSES)}; left out: {DEFAULT_PASSES["cpu"]} on a CPU, all on CUDA
side=..    which sides; torch's LayerNorm is always measured. A first run spends most of its time
           in compile, which is cached; without it, side=torch,published,eager,ours
rounds=N   turns of each side; figures are medians over them
device     cuda where there is an NVIDIA GPU, else cpu
--add      also a residual add with the norm, in one pass and in two
--graph    on CUDA, time replays of a CUDA graph: what the device takes, without what Python takes
           to start it, which at small shapes is more
--json     everything that was measured, as one JSON object
--save     keep JSON, Markdown and a picture in benchmarks/<device>/ of the current folder, named
           norms, or with --graph norms-graph

sides
{chr(10).join(f"  {kind:<10} {text}" for kind, text in KINDS.items())}

shapes: ViT-B with 32 images (6304x768) or 256 (50432x768); what wav2vec 2.0 base gives one GPU of
its 64, 1.4 million samples (4375x768); HyenaDNA, 256 sequences of 1024 at width 128 (262144x128)
and one of a million at width 256; LLaMA-7B's width, batches of 8192 and 4096 tokens. A float32
8192x1024 is exactly 32 MiB: the C library maps each new output and its pages fault, on all sides,
so its ratios say less; it is there because goals name it.

columns: time of one call; ratio to torch's LayerNorm; ratio to the floor, which is what the bytes
that must move take at the rate of y.copy_(x) (forward), torch.add(x, g, out=dx) (backward) or both;
rate as a share of y.copy_(x)'s; bytes an element that autograd keeps, x among them; on a GPU, the
peak that a call adds; error against float64. On a CPU use OMP_NUM_THREADS=1: one thread is timed in
process time, which neighbours disturb less.

examples
  OMP_NUM_THREADS=1 python -m suite.bench norms device=cpu
  python -m suite.bench norms shape=8192x4096 dtype=bfloat16 norm=dyt,rmsnorm rounds=15
  python -m suite.bench norms side=torch,ours,one-pass --add --save"""
