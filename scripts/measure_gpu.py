"""Measure everything that wants a GPU, the most valuable first, within a budget of time.

    python scripts/measure_gpu.py                         # 25 minutes, of one NVIDIA GPU
    python scripts/measure_gpu.py --minutes 10 --only tests,norms
    python scripts/measure_gpu.py --dry-run               # the commands, and how long each may take
    python scripts/measure_gpu.py --small                 # the same on small sizes, on a CPU too

Each job is a process of its own with a limit of time; one that fails or hangs ends alone. Results
are kept by the jobs themselves in benchmarks/<device>/ of the current folder; beside them jobs.json
says what became of each job and logs/<job>.log what it printed. A job that is done is not run
again, so the same command goes on where it was stopped; --again starts over. --small keeps its own
jobs.json apart, and what it measures replaces figures of the same device: run it in another folder.
--out copies benchmarks/<device>/ there after every job. The exit code is 0 if no job failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "measure-gpu-images"  # a generated tree, for models of 224 x 224 pixels
GRID = ("norm=layernorm,rmsnorm,dyt,derf", "run.compile=false,default")
ON_GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
SMALL_GRID = ("norm=layernorm,dyt", "steps=1", "trainer.accelerator=cpu", "--save")
LEAST_SECONDS = 5  # with less left, nothing is begun


@dataclass(frozen=True)
class Job:
    """One command. words, small: of Python, on a GPU and with --small. takes: seconds that it is
    expected to need, without which left it is skipped; limit: after which it is ended. makes: a
    folder that it wants to make itself; what an earlier try left of it is removed."""

    name: str
    words: tuple[str, ...]
    small: tuple[str, ...]
    takes: int
    limit: int
    makes: str = ""


def bench(*words: str) -> tuple[str, ...]:
    """A command of suite.bench."""
    return ("-m", "suite.bench", *words)


def steps(name: str, *, full: str, small: str, takes: int = 120) -> Job:
    """Training steps of one model. full, small: its tokens, as one text."""
    own = (*full.split(), *GRID, *ON_GPU, "--save")
    cut = (*small.split(), *SMALL_GRID)
    return Job(name, bench("step", *own), bench("step", *cut), takes, 3 * takes)


def gpu_tests() -> tuple[str, ...]:
    """Without a cache folder: the checkout need not be writable. In processes, as most of it builds
    kernels (two minutes on 16 cores, with four builds beside it)."""
    several = str(min(8, os.cpu_count() or 1))
    return ("-m", "pytest", str(ROOT / "tests" / "gpu"), "-p", "no:cacheprovider", "-n", several)


def image_tree(count: int) -> tuple[str, ...]:
    """What makes the photographs."""
    script = str(ROOT / "scripts" / "build_image_tree.py")
    return (script, IMAGES, "--images", str(count), "--classes", "10", "--seed", "0")


def jobs() -> list[Job]:
    """All of them: first what the others' figures rest on, then the kernels, the paper's table,
    whole steps from the most used model on, and last what is an option."""
    photos = f"task=vision/classify data=image_folder data.root={IMAGES} data.batch_size=256"
    digits = "task=vision/classify model.dim=16 model.depth=1 model.heads=1 data.batch_size=8"
    dna = "task=dna/pretrain data.length=1024 data.batch_size=64"
    bases = "task=dna/pretrain data.length=64 data.batch_size=2"
    text = "task=language/lm data.length=1024 data.batch_size=16 model.vocab_size=32000"
    lines = "task=language/lm data.length=32 data.batch_size=2"
    sound = "task=speech/pretrain data.batch_size=16"
    little = ("shape=64x128", "rounds=3", "device=cpu")
    tiny = ("model=llama_tiny", "depth=1", "tokens=16", "passes=1", "rounds=1", "device=cpu")
    return [
        Job("tests", gpu_tests(), gpu_tests(), 120, 420),
        Job("norms", bench("norms", "--save"), bench("norms", *little, "--save"), 120, 420),
        Job(
            "llama",
            bench("llama", "passes=20", "--save"),
            bench("llama", *tiny, "--save"),
            180,
            420,
        ),
        Job(
            "norms-graph",  # the device's time alone
            bench("norms", "--graph", "--save"),
            bench("norms", *little),
            120,
            420,
        ),
        Job("images", image_tree(600), image_tree(20), 10, 90, makes=IMAGES),
        steps("step-vit_base", full=f"{photos} model=vit_base --peer", small=digits, takes=230),
        steps("step-llama_124m", full=f"{text} model=llama_124m --peer", small=lines),
        steps("step-hyenadna", full=f"{dna} model=hyenadna_tiny_1k", small=bases),
        Job(
            "fusion",
            bench("fusion", "--save"),
            bench("fusion", "dim=32", "rows=196", "device=cpu", "--save"),
            90,
            240,
        ),
        Job("norms-add", bench("norms", "--add"), bench("norms", *little, "--add"), 120, 420),
        steps(
            "step-wav2vec2_base",
            full=f"{sound} model=wav2vec2_base --peer seconds=10",
            small="task=speech/pretrain model=wav2vec2_tiny data.batch_size=2",
        ),
        steps("step-vit_small", full=f"{photos} model=vit_small --peer", small=digits),
        steps(
            "step-caduceus",
            full=f"{dna} model=caduceus_ps_1k",
            small=f"{bases} model=caduceus_ps_tiny",
        ),
    ]


# --- running ---


def launch(words: Sequence[str], *, log: Path, limit: float) -> int:
    """Exit code of a Python process that prints to `log`; 124 where the limit ended it."""
    with log.open("w", encoding="utf-8") as out:
        out.write(f"$ python {shlex.join(words)}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own children, such as compilers, end with it
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            out.write(f"ended after {limit:.0f} s\n")
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_words(log: Path) -> str:
    """The last line that a job printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]


def read(path: Path) -> dict[str, Any]:
    """What became of the jobs so far."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole, under another name first: the machine may be taken away at any moment."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def measure(chosen: Sequence[Job], options: argparse.Namespace, *, folder: Path) -> dict[str, Any]:
    """Run them; the record of all."""
    state = folder / ("jobs-small.json" if options.small else "jobs.json")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    record = {} if options.again else read(state)
    start = time.monotonic()
    for job in chosen:
        if record.get(job.name, {}).get("exit") == 0:
            print(f"{job.name}: done before", flush=True)
            continue
        left = 60 * options.minutes - (time.monotonic() - start)
        needs = LEAST_SECONDS if options.small else job.takes
        if left < needs:
            record[job.name] = {"exit": None, "said": f"skipped: {left:.0f} s left, needs {needs}"}
            continue
        words = job.small if options.small else job.words
        print(f"{job.name}: python {shlex.join(words)}", flush=True)
        if job.makes:
            shutil.rmtree(job.makes, ignore_errors=True)
        began, log = time.monotonic(), logs / f"{job.name}.log"
        code = launch(words, log=log, limit=min(job.limit, left))
        took = round(time.monotonic() - began, 1)
        record[job.name] = {"exit": code, "seconds": took, "said": last_words(log)}
        write(state, record)
        copy(folder, options.out)
    write(state, record)
    copy(folder, options.out)
    return record


def copy(folder: Path, out: Path | None) -> None:
    """All that is there so far."""
    if out is not None:
        shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)


def table(chosen: Sequence[Job], record: dict[str, Any]) -> str:
    """A line a job."""
    lines = [f"{'job':<20}{'exit':>5}{'seconds':>9}  last line"]
    for job in chosen:
        own = record.get(job.name, {})
        code, took = own.get("exit"), own.get("seconds")
        shown = ("-" if code is None else code, "-" if took is None else took)
        lines.append(f"{job.name:<20}{shown[0]:>5}{shown[1]:>9}  {own.get('said', '')}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="for all jobs together")
    parser.add_argument("--only", help="names of jobs, comma-separated")
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--out", type=Path, help="a folder to copy results to")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be more than 0")
    known = [job.name for job in jobs()]
    unknown = set((options.only or known[0]).split(",")) - set(known)
    if unknown:
        parser.error(f"--only {sorted(unknown)[0]}: must be of {', '.join(known)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit code."""
    options = parse(argv)
    names = options.only.split(",") if options.only else [job.name for job in jobs()]
    chosen = [job for job in jobs() if job.name in names]
    if options.dry_run:
        for job in chosen:
            words = job.small if options.small else job.words
            print(f"{job.name} (at most {job.limit} s): python {shlex.join(words)}")
        return 0
    import torch

    from suite.benches.saved import FOLDER, device_slug

    if not options.small and not torch.cuda.is_available():
        print("error: there is no NVIDIA GPU here; --small runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.small else "cuda")
    record = measure(chosen, options, folder=Path(FOLDER) / device_slug(device))
    print(table(chosen, record))
    return int(any(record[job.name]["exit"] not in (0, None) for job in chosen))


if __name__ == "__main__":
    sys.exit(main())
