"""What `suite.bench llama` found, as a table beside the paper's, and its help."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tasks.language.llama_bench import Result

# (part, pass, norm) -> seconds of 100 passes of LLaMA-7B on an H100, eager and compiled: tables 14
# and 15 of arXiv 2503.10622. What the paper calls "layer" is called "rest" here.
PUBLISHED = {
    ("rest", "inference", "rmsnorm"): (2.1, 0.3),
    ("rest", "inference", "dyt"): (1.0, 0.3),
    ("rest", "training", "rmsnorm"): (8.3, 3.9),
    ("rest", "training", "dyt"): (4.8, 3.9),
    ("model", "inference", "rmsnorm"): (14.1, 12.3),
    ("model", "inference", "dyt"): (13.0, 12.3),
    ("model", "training", "rmsnorm"): (42.6, 38.9),
    ("model", "training", "dyt"): (39.1, 38.9),
}
WHAT = {
    "layer": "the norms of a whole model alone, one after the other on one activation",
    "model": "a whole model with cross-entropy, in training with its backward, no optimizer",
    "rest": "the model less the one with identities: what the paper's tables call a layer",
}
PAPER = ("paper", "paper compiled")


@dataclass
class Found:
    """Of one side: seconds of 100 passes, a round each; ratios: to rmsnorm in the same form.

    part: "layer", "model" or "rest". passes: that a round timed.
    """

    part: str
    mode: str
    norm: str
    form: str
    seconds: list[float]
    ratios: list[float]
    passes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def reduction(self) -> float | None:
        """Percent less than rmsnorm takes, as the paper has it; None where there is no rmsnorm."""
        return reduction(statistics.median(self.ratios)) if self.ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return {**asdict(self), **found, "reduction_percent": self.reduction}

    def text(self, *, reference: str) -> str:
        """A cell: seconds, and by how much that is less than the reference's."""
        if self.norm == reference or self.reduction is None:
            return plain(self.median)
        return f"{plain(self.median)} ({change(self.reduction)})"


def reduction(ratio: float) -> float:
    """Percent that a time which is `ratio` of another is less than it."""
    return 100.0 * (1.0 - ratio)


def change(percent_less: float) -> str:
    """As the paper's arrows: -52.4% is less time."""
    return "0.0%" if abs(percent_less) < 0.05 else f"{-percent_less:+.1f}%"


def plain(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:.1f}" if abs(seconds) >= 10 else f"{seconds:.3g}"


def rows(result: Result) -> list[list[str]]:
    """The table, its head first: a row a part, pass and norm; a column a form; the paper's last."""
    forms = [form for form in result.setting.forms if any(f.form == form for f in result.found)]
    cells = {(f.part, f.mode, f.norm, f.form): f for f in result.found}
    table = [["part", "pass", "norm", *forms, *PAPER]]
    for part, mode, norm in dict.fromkeys(key[:3] for key in cells):
        own = [cells.get((part, mode, norm, form)) for form in forms]
        shown = ["-" if f is None else f.text(reference="rmsnorm") for f in own]
        table.append([part, mode, norm, *shown, *published(part, mode, norm)])
    return table


def published(part: str, mode: str, norm: str) -> list[str]:
    """The paper's two cells."""
    own = PUBLISHED.get((part, mode, norm))
    if own is None:
        return ["-", "-"]
    if norm == "rmsnorm":
        return [f"{x:.1f}" for x in own]
    against = PUBLISHED[part, mode, "rmsnorm"]
    pairs = zip(own, against, strict=True)
    return [f"{x:.1f} ({change(reduction(x / rms))})" for x, rms in pairs]


def facts(result: Result) -> list[tuple[str, str]]:
    """What a reader must know of the figures: a name and a line each."""
    s, o = result.setting, result.setting.options
    threads = torch.get_num_threads()
    where = f"cpu, {threads} thread{'s' * (threads != 1)}" if s.device == "cpu" else s.device
    sizes = f"{o.dim} channels, {o.heads} heads, MLP of {o.hidden_dim}, {o.depth} blocks"
    lines = [
        ("llama", f"{s.model} ({sizes}), 1 x {s.tokens} tokens, all in {s.dtype}, {where}"),
        ("times", f"seconds of 100 passes, scaled from {s.passes} or more: medians of {s.rounds}"),
        ("", "rounds; (..) is the change against rmsnorm in the same column, less is faster"),
        *((part, text) for part, text in WHAT.items()),
        ("script", "as the modules of the paper's script: bfloat16 through and through, eager"),
        ("eager", "the suite's norms in plain torch: float32 inside (rmsnorm: torch's function)"),
        ("compiled", "torch.compile of each norm (layer), of each block and the last norm (model)"),
        ("kernel", f"norm.backend={result.kernel}"),
        ("paper", "published, not measured here: LLaMA-7B on an H100, arXiv 2503.10622, tables"),
        ("", "14 (eager) and 15 (compiled)"),
    ]
    lines += [("small", result.small)] if result.small else []
    lines += [("cut", result.cut)] if result.cut else []
    lines.append(("norms", f"{result.norm_layers} in layer, {2 * result.depth + 1} in model"))
    return lines + [("note", note) for note in result.notes]


def text(result: Result) -> str:
    """For a terminal."""
    table = rows(result)
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = [f"{name:<9}{line}" for name, line in facts(result)]
    for k, row in enumerate(table):
        if row[:2] != table[k - 1][:2]:
            lines.append("")
        lines.append("  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip())
    return "\n".join([*lines, "", *spread(result.found)])


def markdown(result: Result) -> str:
    """For the page that is kept."""
    listed = [f"- {name}: {line}" if name else f"  {line}" for name, line in facts(result)]
    table = rows(result)
    rule = ["---"] * 3 + ["---:"] * (len(table[0]) - 3)
    drawn = [f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])]
    return "\n".join([*listed, "", *drawn, "", *spread(result.found)])


def spread(found: Sequence[Found]) -> list[str]:
    """How far rounds were apart."""
    wide = [max(f.seconds) / min(f.seconds) for f in found if f.part != "rest"]
    if not wide:
        return []
    return [
        f"Slowest by fastest round of a side: {statistics.median(wide):.2f} in the median, "
        f"{max(wide):.2f} at most."
    ]


HELP = """\
The efficiency table of the DyT paper: seconds of 100 passes of a LLaMA with each norm.

usage: python -m suite.bench llama [model=llama_7b|small|...] [depth=N] [tokens=N] [passes=N]
                                   [rounds=5] [norms=rmsnorm,dyt,derf,identity]
                                   [forms=script,eager,compiled,kernel] [dtype=bfloat16|float32]
                                   [device=cpu|cuda] [--json] [--save]

model     widths: llama_7b on a GPU; elsewhere small (512 channels, 4 blocks), which takes minutes
depth=N   blocks; left out: the model's own, or what fits into the device's free memory
tokens=N  of the one sequence: 4096 on a GPU, else 256
passes=N  of each side, over all rounds: 100 on a GPU, else 10; figures are scaled to 100
rounds=N  turns that each side takes; figures are medians over them
norms     any that no position of a causal model forbids; rmsnorm must be there
forms     script: the modules of the paper's script. eager: the suite's in plain torch.
          compiled: torch.compile. kernel: ours (triton on a GPU, cpp elsewhere)
--json    everything that was measured, as one JSON object
--save    keep it as llama.json and llama.md in benchmarks/<device>/

parts     layer: the norms of a model alone; model: all of it; rest: the model less the one with
          identities, which is how the paper's "layer" comes about
Weights and activations are of one dtype; one set of weights serves all sides, so a model needs room
for one, and in training for its gradients, which add up as in the paper's script.

examples
  python -m suite.bench llama
  python -m suite.bench llama depth=8 passes=20 --save
  python -m suite.bench llama model=llama_13b forms=compiled,kernel"""
