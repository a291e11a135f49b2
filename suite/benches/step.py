"""`python -m suite.bench step`: training steps for every norm x backend x compile x precision.

A norm is a small part of a step, so what it costs or gains is to be seen in whole steps: this puts
the norms of one task side by side, in one process and in turns, and a peer's model of the same
shape beside them. Here the command line becomes the cells of the grid; step_grid measures
them and step_table shows them. Nothing heavy is imported before the command is known to be
right.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError

if TYPE_CHECKING:
    from suite.benches.step_cells import Cell

ROUNDS, MIN_ROUNDS = 9, 5
MIN_SECONDS = 0.5
SWITCHES = ("--peer", "--memory", "--json", "--save")
AXES = ("norm", "norm.backend", "run.compile", "trainer.precision")

HELP = f"""\
Time a training step of a task for every norm x backend x compile x precision, side by side.

usage: python -m suite.bench step [key=value ...] [norm=A,B] [norm.backend=A,B] [run.compile=A,B]
           [trainer.precision=A,B] [rounds={ROUNDS}] [steps=N] [--peer] [--memory] [--json] [--save]

key=value is what suite.train takes: task=, model=, data.batch_size=, trainer.accelerator=... Four
of them may be lists, and the grid is their product:
  norm=layernorm,rmsnorm,dyt,derf      the first layernorm of a compile and a precision is what
                                       the others of that compile and precision are compared with
  norm.backend=eager,cpp               for the norms that have it; so is any other norm.KEY
  run.compile=false,default            false or a mode of torch.compile
  trainer.precision=32-true,bf16-mixed
rounds=N   turns of every cell, {MIN_ROUNDS} or more; figures are medians of them
steps=N    steps of a turn; left out: as many as last a quarter of a second
seconds=S  with --peer, for audio alone: length of an example, 4 where it is left out
--peer     a model of the same shape beside them, with its published norm: timm's VisionTransformer
           for the ViTs of vision/classify, transformers' LlamaForCausalLM, GPT2LMHeadModel or
           Wav2Vec2ForPreTraining. What it has not, such as dropout, is then off on our side
--memory   on a CPU, also what steps add to memory, each cell in a process of its own (slow); on a
           GPU it is always measured
--json     everything that was measured, as one JSON object
--save     keep table and JSON under benchmarks/<device>/

A step is zero_grad, the task's step, backward, clipping where trainer.gradient_clip_val asks for
it, and optimizer.step, in a plain loop over one batch: the first of training, or with --peer the
one that both have. All cells are held at once, from the same seed, and take turns in random order
in every round; a ratio is the median of the ratios inside the rounds. Times are process CPU time on
one thread of a CPU, events on a GPU, wall clock otherwise. The learning rate is next to nothing, so
every round trains the same weights. A cell that cannot run is left out with a note. On a GPU the
share of its arithmetic that is used (MFU) is given where its peak is known. What the suite and
Lightning put around a step: suite.bench overhead.

examples
  python -m suite.bench step task=vision/classify norm=layernorm,rmsnorm,dyt,derf
  python -m suite.bench step task=language/lm norm=rmsnorm,dyt run.compile=false,default --peer
  python -m suite.bench step task=vision/classify model=vit_base data=image_folder \\
      data.root=FOLDER data.batch_size=256 norm=layernorm,rmsnorm,dyt,derf \\
      run.compile=false,default trainer.precision=bf16-mixed trainer.accelerator=gpu \\
      --peer --save"""


def run(argv: Sequence[str]) -> int:
    """Measure the grid that `argv` names and print it; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    from suite.bench import number, split_tokens, whole_number

    tokens = [token for token in argv if token not in SWITCHES]
    own, rest = split_tokens(tokens, own=("rounds", "steps", "seconds"))
    rounds = whole_number("rounds", own.get("rounds", str(ROUNDS)), low=MIN_ROUNDS)
    steps = whole_number("steps", own["steps"], low=1) if "steps" in own else None
    seconds = number("seconds", own["seconds"], low=MIN_SECONDS) if "seconds" in own else None
    if seconds is not None and "--peer" not in argv:
        raise ConfigError("seconds: is the length of a peer's audio; add --peer or leave it out")
    cells = plan(rest)
    if "--save" in argv:
        from suite.benches.saved import check_folder
        from suite.build import quiet
        from suite.reference import device_of

        quiet()
        check_folder(device_of(cells[0].config))

    from suite.benches.step_grid import measure

    found = measure(
        cells,
        rounds=rounds,
        steps=steps,
        seconds=seconds,
        extras=[name for name in ("peer", "memory") if f"--{name}" in argv],
    )
    result, text = found.to_dict(), found.to_text()
    print(json.dumps(result, indent=2) if "--json" in argv else text)
    if "--save" in argv:
        save(found.name, device=found.device, result=result, markdown=text, argv=argv)
    return 0


def save(name: str, *, device: Any, result: Any, markdown: str, argv: Sequence[str]) -> None:
    """Keep it, and say where."""
    from suite.benches.saved import keep
    from suite.train import say

    command = shlex.join(["python", "-m", "suite.bench", "step", *argv])
    folder = keep(name, device=device, result=result, markdown=markdown, command=command)
    say(f"saved: {folder / name}.md and .json")


def plan(tokens: Sequence[str]) -> list[Cell]:
    """The cells that suite.train's tokens, with lists in AXES, name; those of one precision and
    compile stand together. Raises ConfigError for the first mistake in any of them."""
    from suite.bench import settled
    from suite.benches.peers import check_settings
    from suite.benches.step_cells import cell_of

    axes, fixed = split_axes(tokens)
    of_norm = [token for token in fixed if token.startswith("norm.")]
    others = [token for token in fixed if token not in of_norm]
    norms = axes.pop("norm", [None])
    backends = [f"norm.backend={value}" for value in axes.pop("norm.backend", [])]
    keys = [key for key in ("trainer.precision", "run.compile") if key in axes]
    cells: list[Cell] = []
    said: set[str] = set()
    for values in itertools.product(*(axes[key] for key in keys)):
        around = [*others, *(f"{k}={v}" for k, v in zip(keys, values, strict=True))]
        for norm in norms:
            named = [] if norm is None else [f"norm={norm}"]
            for chosen in settings_of(norm, norms, of_norm=of_norm, backends=backends):
                config = settled([*around, *named, *chosen], command="step", said=said)
                check_settings(config, command="step", compiled=True)
                cells.append(cell_of(config))
    check_distinct(cells)
    return cells


def split_axes(tokens: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Values of the keys that may be lists, and the other tokens. Raises ConfigError."""
    from suite.sweep import split_values

    axes: dict[str, list[str]] = {}
    fixed = []
    for token in tokens:
        if token.partition("=")[0] not in AXES or "=" not in token:
            fixed.append(token)
            continue
        key, values = split_values(token)
        if key in axes:
            raise ConfigError(f"{token}: {key} is given twice; write {key}=a,b for several values")
        axes[key] = values
    return axes, fixed


def settings_of(
    norm: str | None,
    norms: Sequence[str | None],
    *,
    of_norm: Sequence[str],
    backends: Sequence[str],
) -> list[list[str]]:
    """The norm.* tokens of each cell of `norm`: those that it has a field for.

    One that no norm of the list has is left in, for suite.config to refuse.
    """
    fields = {name: fields_of(name) for name in norms if name is not None}

    def fits(token: str) -> bool:
        field = token.partition("=")[0].split(".")[1]
        has = [name for name, known in fields.items() if known is None or field in known]
        return norm is None or norm in has or not has

    own = [token for token in of_norm if fits(token)]
    return [[*own, token] for token in backends if fits(token)] or [own]


def fields_of(norm: str) -> set[str] | None:
    """Fields of a norm's options; None for a norm that is not in the table."""
    from suite.norms import NORMS

    if norm not in NORMS:
        return None
    return {field.name for field in dataclasses.fields(NORMS[norm].options)}


def check_distinct(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where two cells are the same, such as run.compile=true,default."""
    for number, cell in enumerate(cells):
        if any(cell.config == other.config for other in cells[:number]):
            raise ConfigError(f"{cell.name}: stands in the grid twice; name every value once")
