"""Write docs/performance.md from the saved results of suite.bench, and from nothing else.

    python scripts/performance_page.py            # benchmarks/*/ -> docs/performance.md
    python scripts/performance_page.py --check    # exit code 1 if the page is not that

So no figure of the page is typed by hand, and none outlives the run that it came from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/performance.md")
RATIOS = ("ratio_to_baseline", "ratio_to_peer")
Json = dict[str, Any]
LAYER_COLUMNS = (
    *(("dyt", "ours"), ("derf", "ours"), ("layernorm", "ours"), ("rmsnorm", "ours")),
    *(("dyt", "compile"), ("rmsnorm", "compile"), ("dyt", "published"), ("derf", "published")),
)

HEAD = """\
# What a norm costs

This page is written by `python scripts/performance_page.py` from the results under
`benchmarks/`, which `suite.bench ... --save` puts there; each table stands under its command. A
ratio is the median of the ratios inside the rounds of one run, with the least and the most in
brackets.

## In short

- A point-wise norm has **no bandwidth to gain over LayerNorm**: forward both read x and write y,
  backward both read dy and x and write dx, 10 bytes an element in bf16. Published gains of DyT
  are against norms that are not fused, and the paper's own compiled table has none (arXiv
  2503.10622, table 15). What it saves is the statistics, and what it adds is tanh or erf.
- **Written out in PyTorch DyT and Derf are slow and keep two to three times their input**; as
  one kernel, or under torch.compile, they keep the input alone, as LayerNorm does. "Less memory"
  is true against the formula, not against LayerNorm.
- What only an element-wise norm allows is to **recompute its output**: `norm.recompute=true`
  trades time for bytes (below).
- In whole training steps on a CPU, DyT and Derf written out cost more than LayerNorm, most in the
  smallest model; the C++ kernels, or torch.compile of the whole model, take half of that away or
  more. Differences of a few percent are this machine's noise.
- On a CPU a kernel of ours is called through Python, which on small tensors is most of its time
  (the first row of the first table).
- **Nothing here was measured on a GPU yet.** `python scripts/measure_gpu.py` runs every check
  and benchmark there and saves them.
"""

GPU = """\
## On a GPU

Not yet measured on a GPU. The Triton kernels pass all tests in Triton's interpreter, compile for
sm_80, sm_90 and sm_100 and load and store bf16 16 bytes at a time
(`tests/core/test_kernels_triton.py`,
`tests/core/test_kernels_rows.py`); `norm.backend=auto` compares them with the formula on the GPU
before it takes them. What is asked of them (H100, bf16, more than the L2): 80 % of the copy's
bandwidth forward from 4096 channels on, 65 % backward with all gradients of parameters, never
slower than torch's LayerNorm, Derf within 1.15 of DyT.

```bash
python scripts/measure_gpu.py --minutes 25
```
"""


def read(folder: Path, name: str) -> Json | None:
    """A saved result, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def spread(figure: Json) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(result: Json) -> str:
    return f"```bash\n{result['command']}\n```"


def layers(result: Json) -> list[str]:
    """Forward and backward of one layer, as ratios to torch's LayerNorm; the goals; bytes."""
    rows, kept, errors = [], {}, {}
    for t in result["tables"]:
        if t["work"] != "norm":
            continue
        by = {(f["norm"], f["kind"]): f for f in t["found"]}
        cells = [
            spread(by[side]["figures"]["train"]["to_layernorm"]) if side in by else "-"
            for side in LAYER_COLUMNS
        ]
        rows.append([f"{t['rows']} x {t['dim']} {t['dtype']}", *cells])
        for side, found in by.items():
            kept.setdefault(side, {})[t["dtype"]] = found["saved"]
            worst = max(e for name, e in found["errors"].items() if name != "y")
            of = errors.setdefault(side, {})
            of[t["dtype"]] = max(worst, of.get(t["dtype"], 0.0))
    goals = [
        [
            g["what"],
            f"{'at most' if g['at_most'] else 'at least'} {g['asked']:g}",
            f"{g['found']:.2f}",
            "yes" if g["met"] else "**no**",
        ]
        for g in result["goals"]
        if "saved bytes" not in g["what"]
    ]
    met = sum(g["met"] for g in result["goals"])
    dtypes = sorted({d for v in kept.values() for d in v}, reverse=True)
    saved = [
        [f"{norm}, {kind}", *(f"{v[d]:.2f}" if d in v else "-" for d in dtypes)]
        + [f"{errors[norm, kind][d]:.1e}" if d in v else "-" for d in dtypes]
        for (norm, kind), v in kept.items()
    ]
    return [
        "## One layer",
        "Forward and backward with all gradients of parameters, as time over that of torch's "
        "LayerNorm; below 1 is faster. *Ours* is this package's kernel, *compile* torch.compile "
        "of the layer, *published* the papers' own module.",
        command(result),
        table(["x", *(f"{norm}, {kind}" for norm, kind in LAYER_COLUMNS)], rows),
        "8192 x 1024 in float32 is exactly 32 MiB, which the C library maps anew for every "
        "output: there page faults are most of every side's time.",
        f"What was asked of the kernels, {met} of {len(result['goals'])} reached (all of the "
        "bytes kept are):",
        table(["what", "asked", "found", "reached"], goals),
        "Bytes an element that a forward keeps for its backward, x included; and the largest error "
        "of a gradient (of x or of a parameter) against float64, relative to its largest value. "
        "(torch's own LayerNorm sums the gradients of its parameters in bfloat16 on a CPU.)",
        table(["norm", *(f"kept, {d}" for d in dtypes), *(f"error, {d}" for d in dtypes)], saved),
        "Errors against float64, microseconds, the rates of the copy and every round: "
        "`norms.md` and `norms.json` beside the picture.",
    ]


def steps(results: list[Json]) -> list[str]:
    """Whole training steps."""
    if not results:
        return []
    parts = [
        "## Whole training steps",
        "A step (forward, loss, backward, update) over that of the same model with layernorm, in "
        "the same process by turns, and over a peer's model of the same shape with the norm that "
        "it was published with.",
    ]
    for result in results:
        rows = [
            [
                c["peer"] or c["norm"],
                c["ran"] or "",
                "" if c["compile"] == "false" else c["compile"],
                c["precision"],
                f"{c['ms']['median']:.1f}",
                *("" if c[key] is None else spread(c[key]) for key in RATIOS),
            ]
            for c in result["cells"]
        ]
        named = [
            *("norm", "backend", "run.compile", "precision"),
            *("ms a step", "of layernorm", "of the peer"),
        ]
        parts += [f"{result['task']}, {result['model']}:", command(result), table(named, rows)]
    return parts


def fusions(result: Json) -> list[str]:
    """What may be fused."""
    found = {(f["block"], f["dim"], f["norm"], f["side"]): f for f in result["found"]}
    rows = []
    for (block, dim, norm, side), f in found.items():
        if side not in ("one pass", "recompute"):
            continue
        base = found[block, dim, norm, f["against"]]
        ratios = sorted(f["ratios"])
        middle = {"median": ratios[len(ratios) // 2], "min": ratios[0], "max": ratios[-1]}
        less = 1 - f["bytes"] / base["bytes"]
        rows.append([f"{block} {dim}", norm, side, f["against"], spread(middle), f"{less:.0%}"])
    kernels = [
        [k["what"], k["norm"], str(k["forward"]), str(k["backward"]), str(k["loops"])]
        for k in result["kernels"]
    ]
    return [
        "## What may be fused with a norm",
        "One Transformer block, forward and backward. *One pass*: residual sum and norm in one "
        "kernel, against two. *Recompute*: `norm.recompute=true` against the formula as it is. "
        "Less kept: bytes that the block keeps for its backward.",
        command(result),
        table(["block", "norm", "what", "against", "time", "less kept"], rows),
        "The one pass saves 6 of 22 bytes an element and is lost in a block's noise on a CPU, so "
        "no model uses it: it is `suite.norms.residual.add_norm` for those who write one. "
        "Recomputing pays in bytes, not in time; it is an option, off by default.",
        "Under torch.compile: kernels that are written for the forward and the backward, and the "
        "loops in them. A point-wise norm adds a loop or two for the gradients of its parameters; "
        "LayerNorm and RMSNorm add loops for statistics too. On a CPU all of them stand in the "
        "kernel of their neighbours.",
        table(["what", "norm", "forward", "backward", "loops"], kernels),
    ]


def llama(result: Json) -> list[str]:
    """The DyT paper's table."""
    found: dict[tuple[str, str, str], Json] = {}
    for f in result["found"]:
        found.setdefault((f["part"], f["mode"], f["norm"]), {})[f["form"]] = f
    forms = ["script", "eager", "compiled", "kernel"]

    def cell(f: Json | None) -> str:
        if f is None:
            return "-"
        change = f["reduction_percent"]
        return f"{f['median']:.3g} s" + ("" if not change else f" ({-change:+.1f} %)")

    rows = [
        [part, mode, norm, *(cell(by.get(form)) for form in forms)]
        for (part, mode, norm), by in found.items()
        if part != "rest"
    ]
    size = "A small version of it" if result["small"] else "It"
    return [
        "## The DyT paper's table of efficiency",
        "arXiv 2503.10622 times 100 passes of LLaMA-7B on an H100: DyT's norms take 52.4 % less "
        "than RMSNorm's in inference and 42.2 % less in training, the model 7.8 % and 8.2 % "
        "(table 14, RMSNorm written out and not fused); compiled there is no difference (table "
        f"15). {size} was run here. *Layer*: the model's norms alone; *model*: all of it; "
        "*script*: the paper's modules; the change is against rmsnorm in the same column.",
        command(result),
        table(["part", "pass", "norm", *forms], rows),
    ]


def page(folder: Path) -> str:
    """All of it, from the results in `folder`."""
    parts = [HEAD]
    for device in sorted(p for p in folder.glob("*") if p.is_dir()):
        results = {name: read(device, name) for name in ("norms", "fusion", "llama")}
        files = sorted(device.glob("step-*.json"))
        of_steps = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        known = [r for r in (*results.values(), *of_steps) if r is not None]
        if not known:
            continue
        head = known[0]["header"]
        said = ", ".join(f"{k} {v}" for k, v in head.items() if isinstance(v, str))
        picture = f"![achieved bandwidth](../benchmarks/{device.name}/norms-roofline.png)"
        parts.append(f"# {device.name}\n\n{said}.\n\n{picture}\n")
        writers = {"norms": layers, "fusion": fusions, "llama": llama}
        for name, write in writers.items():
            result = results[name]
            if name == "fusion":
                parts += ["\n\n".join(steps(of_steps)) + "\n"]
            if result is not None:
                parts.append("\n\n".join(write(result)) + "\n")
    return "\n".join([*parts, GPU])


def main(argv: list[str]) -> int:
    """Exit code: 0 written or up to date, 1 out of date, 2 wrong arguments."""
    if argv not in ([], ["--check"]):
        print(f"error: {' '.join(argv)}: takes --check or nothing", file=sys.stderr)
        return 2
    text, path = page(ROOT / "benchmarks"), ROOT / PAGE
    if not argv:
        path.write_text(text, encoding="utf-8")
        return 0
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    if not same:
        print(f"error: {PAGE} is old: run python scripts/performance_page.py", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
