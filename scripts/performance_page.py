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
NAMES = ("norms", "kernels", "fusion", "llama")
RATIOS = ("ratio_to_baseline", "ratio_to_peer")
Json = dict[str, Any]
LAYER_COLUMNS = (
    *(("dyt", "ours"), ("derf", "ours"), ("layernorm", "ours"), ("rmsnorm", "ours")),
    *(("dyt", "compile"), ("rmsnorm", "compile"), ("dyt", "published"), ("derf", "published")),
    ("dyt", "liger"),
)
MAPPED = (8192, 1024)  # in float32 exactly 32 MiB
CACHED = 128 * 2**20  # bytes of two tensors below which an L2 helps a copy

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
- A kernel of ours is called through Python, which on small tensors is most of its time on a CPU
  (the first row of the first table) and at most sizes on a GPU: there, see *the device alone*.
"""

GPU = """\
## What a GPU has not shown yet

Not yet measured on a GPU: the paper's table, what may be fused, steps of the language, speech and
DNA models, and the selective scan. `python scripts/measure_gpu.py` runs every check and benchmark
there, the most valuable first, and saves them; what is done is not run again:

```bash
python scripts/measure_gpu.py --minutes 25
```

The Triton kernels pass all tests in Triton's interpreter and on an H100
(`tests/gpu/test_gpu_kernels.py`), compile for sm_80, sm_90 and sm_100 and load and store bf16 16
bytes at a time (`tests/core/test_kernels_triton.py`, `tests/core/test_kernels_rows.py`);
`norm.backend=auto` compares them with the formula on the GPU before it takes them.
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


def on_gpu(result: Json) -> bool:
    return bool(result["header"]["cuda"])


def layer_row(t: Json, columns: list[tuple[str, str]]) -> list[str]:
    """One shape and dtype."""
    by = {(f["norm"], f["kind"]): f for f in t["found"]}
    cells = [
        spread(by[side]["figures"]["train"]["to_layernorm"]) if side in by else "-"
        for side in columns
    ]
    return [f"{t['rows']} x {t['dim']} {t['dtype']}", *cells]


def layer_remarks(result: Json, tables: list[Json]) -> list[str]:
    """What its figures need to be read rightly."""
    if on_gpu(result):
        return [
            "**These are calls from Python, and at most of these sizes the host is the slower "
            "one**: a backward crosses to autograd's thread and runs Python there, as it does for "
            "every kernel that is written in Python (Liger's) and for a layer that is compiled by "
            "itself, while torch's own norms are called from C++. Only 1000000 x 256 keeps the "
            "device busy. A CUDA graph does not pay this, and in a large model the device is the "
            "slower one anyway (ViT-B below). The device's own time is the next table."
        ]
    if any((t["rows"], t["dim"]) == MAPPED for t in tables):
        return [
            "8192 x 1024 in float32 is exactly 32 MiB, which the C library maps anew for every "
            "output: there page faults are most of every side's time."
        ]
    return []


def kernels(result: Json) -> list[str]:
    """What the device takes, without the host."""
    rows = []
    sides = [f"{norm}, {kind}" for norm in ("dyt", "derf") for kind in ("ours",)]
    sides += [f"{norm}, {kind}" for kind in ("ours", "torch") for norm in ("layernorm", "rmsnorm")]
    for t in result["tables"]:
        size = t["rows"] * t["dim"] * (2 if t["dtype"] == "bfloat16" else 4)
        for which, bytes_to_copy in (("forward", 1.0), ("backward", 1.5)):
            us = {side: found[f"{which}_us"] for side, found in t["sides"].items()}
            of_copy = bytes_to_copy * t["copy_us"] / us["dyt, ours"]
            cells = [f"{us[side]:.1f}" if side in us else "-" for side in sides]
            cells.append(f"{of_copy:.0%}" if 2 * size >= CACHED else "-")
            cells.append(f"{us['dyt, ours'] / us['layernorm, torch']:.2f}")
            rows.append([f"{t['rows']} x {t['dim']} {t['dtype']}", which, *cells])
    head = ["x", "pass", *sides, "dyt, of the copy's rate", "dyt to torch's layernorm"]
    return [
        "## One layer, the device alone",
        f"Microseconds, backward with all gradients of parameters. {result['method']}",
        command(result),
        table(head, rows),
        "What was asked of the kernels in bf16 is reached on the device, all of it but what was "
        "asked against Liger's DyT, which was timed in calls alone (the goals above): 80 % of the "
        "copy's bandwidth forward and 65 % backward from 4096 channels on, never slower than "
        "torch's LayerNorm, Derf within 1.15 of DyT.",
        "The command above has since run for 50432 x 768 alone, with the same result: "
        "`norms-graph.md` beside the picture.",
    ]


def layers(result: Json) -> list[str]:
    """Forward and backward of one layer, as ratios to torch's LayerNorm; the goals; bytes."""
    kept, errors = {}, {}
    normed = [t for t in result["tables"] if t["work"] == "norm"]
    there = {(f["norm"], f["kind"]) for t in normed for f in t["found"]}
    columns = [side for side in LAYER_COLUMNS if side in there]
    rows = [layer_row(t, columns) for t in normed]
    for t in normed:
        for f in t["found"]:
            side = f["norm"], f["kind"]
            kept.setdefault(side, {})[t["dtype"]] = f["saved"]
            worst = max(e for name, e in f["errors"].items() if name != "y")
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
        table(["x", *(f"{norm}, {kind}" for norm, kind in columns)], rows),
        *layer_remarks(result, normed),
        f"What was asked of the kernels, {met} of {len(result['goals'])} reached (all of the "
        "bytes kept are):",
        table(["what", "asked", "found", "reached"], goals),
        "Bytes an element that a forward keeps for its backward, x included; and the largest error "
        "of a gradient (of x or of a parameter) against float64, relative to its largest value."
        + (" (torch's own LayerNorm sums the gradients of its parameters in bfloat16 on a CPU.)")
        * (not on_gpu(result)),
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
        used = any(c["mfu"] for c in result["cells"])
        rows = [
            [
                c["peer"] or c["norm"],
                c["ran"] or "",
                "" if c["compile"] == "false" else c["compile"],
                c["precision"],
                f"{c['ms']['median']:.1f}",
                *([f"{c['examples_per_s']:,.0f}", f"{c['mfu']:.1%}"] if used else []),
                *("" if c[key] is None else spread(c[key]) for key in RATIOS),
            ]
            for c in result["cells"]
        ]
        named = [
            *("norm", "backend", "run.compile", "precision"),
            *("ms a step", *(("examples a second", "MFU") if used else ())),
            *("of layernorm", "of the peer"),
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


def on_devices(folder: Path) -> str:
    """What GPUs add to the short list."""
    lines = []
    for device in sorted(p for p in folder.glob("*") if p.is_dir()):
        alone = read(device, "kernels")
        for t in alone["tables"] if alone else []:
            if (t["rows"], t["dim"], t["dtype"]) == (50432, 768, "bfloat16"):
                us = {k: v["forward_us"] + v["backward_us"] for k, v in t["sides"].items()}
                ratio = us["dyt, ours"] / us["layernorm, torch"]
                lines.append(
                    f"- On {alone['header']['device']} the device takes {us['dyt, ours']:.0f} us "
                    f"for DyT's forward and backward at ViT-B's size in bf16, **{ratio:.2f} of "
                    f"torch's LayerNorm**; but our LayerNorm takes {us['layernorm, ours']:.0f}: "
                    "the gain is the kernel's, not the norm's."
                )
        step = read(device, "step-vision-classify-vit_base")
        if step is not None:
            lines.append(step_line(step) + compiled_line(read(device, "norms")))
    return "\n".join([*lines, ""]) if lines else ""


def step_line(result: Json) -> str:
    """Whole steps, uncompiled and compiled, in a sentence."""
    of: dict[tuple[str, str], float] = {
        (c["norm"], c["compile"]): c["ratio_to_baseline"]["median"]
        for c in result["cells"]
        if not c["peer"]
    }
    return (
        f"- A step of {result['model']} there takes {of['dyt', 'false']:.2f} (DyT) and "
        f"{of['derf', 'false']:.2f} (Derf) of that with LayerNorm where nothing is compiled, and "
        f"{of['dyt', 'default']:.2f} and {of['derf', 'default']:.2f} under torch.compile."
    )


def compiled_line(result: Json | None) -> str:
    """A likely reason: the gradients of parameters as Inductor computes them."""
    for t in result["tables"] if result else []:
        if (t["rows"], t["dim"], t["dtype"]) == (1_000_000, 256, "bfloat16"):
            us = {
                f["norm"]: f["figures"]["backward"]["us"]["median"]
                for f in t["found"]
                if f["kind"] == "compile"
            }
            ratio = us["dyt"] / us["layernorm"]
            return (
                f" (There its backward of DyT takes {ratio:.1f} of LayerNorm's, at 1000000 x 256.)"
            )
    return ""


def page(folder: Path) -> str:
    """All of it, from the results in `folder`."""
    parts = [HEAD + on_devices(folder)]
    for device in sorted(p for p in folder.glob("*") if p.is_dir()):
        results = {name: read(device, name) for name in NAMES}
        files = sorted(device.glob("step-*.json"))
        of_steps = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        known = [r for r in (*results.values(), *of_steps) if r is not None]
        if not known:
            continue
        head = known[0]["header"]
        said = ", ".join(f"{k} {v}" for k, v in head.items() if isinstance(v, str))
        picture = f"![achieved bandwidth](../benchmarks/{device.name}/norms-roofline.png)"
        parts.append(f"# {device.name}\n\n{said}.\n\n{picture}\n")
        writers = (layers, kernels, fusions, llama)
        for name, write in zip(NAMES, writers, strict=True):
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
