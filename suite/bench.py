"""What the suite costs, as ratios against references (`python -m suite.bench WHAT ...`).

A time depends on the machine and on what else runs on it; a ratio of two things that are timed in
turn depends far less. So every command here times ours and the reference round by round, in random
order, and prints the median ratio with its spread. One command a line in `COMMANDS`; nothing heavy
is imported before a command is known to be right.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import SIGINT
from typing import TYPE_CHECKING

from suite.errors import ConfigError, DataError, DivergedError, Stopped
from suite.registry import benches, check_choice, load_bench
from suite.train import complain, say

if TYPE_CHECKING:
    from suite.config import Config

MIN_ROUNDS = 5
MIN_SECONDS = 0.5
REFERENCE_NORM = "layernorm"  # what references were published with


@dataclass(frozen=True)
class Command:
    """One thing that can be measured. run: its arguments -> exit code; help: a line for
    `--help`."""

    run: Callable[[Sequence[str]], int]
    help: str


def overhead(argv: Sequence[str]) -> int:
    """Time a training step of the suite against a plain loop and print what was found."""
    if {"--help", "-h"} & set(argv):
        print(OVERHEAD_HELP)
        return 0
    as_json = "--json" in argv
    own, rest = split_tokens([a for a in argv if a != "--json"], own=("rounds", "steps"))
    rounds = whole_number("rounds", own.get("rounds", str(MIN_ROUNDS)), low=MIN_ROUNDS)
    steps = whole_number("steps", own["steps"], low=1) if "steps" in own else None
    config = settled(rest, command="overhead")

    from suite.steptime import measure

    found = measure(config, rounds=rounds, steps=steps)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    return 0


def loading(argv: Sequence[str]) -> int:
    """Time the suite's training loader against a plain one and print what was found."""
    if {"--help", "-h"} & set(argv):
        print(LOADING_HELP)
        return 0
    as_json = "--json" in argv
    own, rest = split_tokens([a for a in argv if a != "--json"], own=("rounds", "images"))
    rounds = whole_number("rounds", own.get("rounds", str(MIN_ROUNDS)), low=MIN_ROUNDS)
    images = whole_number("images", own["images"], low=1) if "images" in own else None
    config = settled(rest, command="loading")

    from suite.loading import measure

    found = measure(config, rounds=rounds, images=images)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    return 0


def reference(argv: Sequence[str]) -> int:
    """Time a training step of the suite against the field's own and print what was found."""
    if {"--help", "-h"} & set(argv):
        print(REFERENCE_HELP)
        return 0
    as_json = "--json" in argv
    own, rest = split_tokens([a for a in argv if a != "--json"], own=("rounds", "rows", "seconds"))
    rounds = whole_number("rounds", own.get("rounds", str(MIN_ROUNDS)), low=MIN_ROUNDS)
    rows = whole_number("rows", own.get("rows", "2"), low=1)
    seconds = number("seconds", own["seconds"], low=MIN_SECONDS) if "seconds" in own else None
    left_out = not any(token.startswith("norm=") for token in rest)
    first = [*rest, f"norm={REFERENCE_NORM}"] if left_out else rest
    said: set[str] = set()
    config = settled(first, command="reference", said=said)

    from suite.benches.peers import published_norm
    from suite.reference import measure

    if left_out and (norm := published_norm(config)) != REFERENCE_NORM:
        config = settled([*rest, f"norm={norm}"], command="reference", said=said)
    found = measure(config, rounds=rounds, rows=rows, seconds=seconds)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
    return 0


def settled(argv: Sequence[str], *, command: str, said: set[str] | None = None) -> Config:
    """The configuration that suite.train's tokens name. Raises ConfigError for another action.

    said: notes that were made before, of another configuration.
    """
    from suite.config import load

    loaded = load(argv)
    if loaded.action != "train":
        flag = loaded.action.replace("_", "-")
        raise ConfigError(f"suite.bench {command} times training and takes no {flag}; leave it out")
    for note in loaded.notes:
        if said is None or note not in said:
            say(f"note: {note}")
    if said is not None:
        said.update(loaded.notes)
    return loaded.settled


def of_suite(module: str) -> Callable[[Sequence[str]], int]:
    """A command that a module of `suite` holds; it is imported when the command runs."""

    def run(argv: Sequence[str]) -> int:
        found: int = importlib.import_module(module).run(argv)
        return found

    return run


def of_domain(name: str) -> Callable[[Sequence[str]], int]:
    """A command that a domain brings; its module is imported when it runs."""
    return lambda argv: load_bench(name)(argv)


COMMANDS: dict[str, Command] = {
    "norms": Command(of_suite("suite.benches.norms"), "norms by themselves, against a copy's time"),
    "step": Command(
        of_suite("suite.benches.step"), "a training step for norms x compile x precision"
    ),
    "fusion": Command(
        of_suite("suite.benches.fusion"), "what an element-wise norm may be fused with"
    ),
    "safety": Command(of_suite("suite.benches.safety"), "saving, and the guards of a run"),
    "overhead": Command(overhead, "a training step of the suite against a plain PyTorch loop"),
    "loading": Command(loading, "the suite's decoding and augmenting against a plain loader"),
    "reference": Command(reference, "a training step of a task against the field's own code"),
    **{name: Command(of_domain(name), text) for name, (_, text) in benches().items()},
}


def split_tokens(argv: Sequence[str], *, own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of a command's own keys, and the other tokens. Raises ConfigError for a repeat."""
    values: dict[str, str] = {}
    rest = []
    for token in argv:
        key, equals, value = token.partition("=")
        if key not in own or not equals:
            rest.append(token)
        elif key in values:
            raise ConfigError(f"{key} is given twice: {key}={values[key]} and {token}")
        else:
            values[key] = value
    return values, rest


def whole_number(key: str, text: str, *, low: int) -> int:
    """`text` as a whole number of at least `low`. Raises ConfigError."""
    if not text.isdecimal() or int(text) < low:
        raise ConfigError(f"{key}={text}: must be a whole number, {low} or more")
    return int(text)


def number(key: str, text: str, *, low: float) -> float:
    """`text` as a finite number of at least `low`. Raises ConfigError."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not low <= found < math.inf:
        raise ConfigError(f"{key}={text}: must be a number, {low:g} or more")
    return found


def help_text() -> str:
    """What `--help` prints."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{c.help}" for name, c in COMMANDS.items())
    return HELP.format(commands=listed)


HELP = """\
Measure what the suite costs, as ratios against references.

usage: python -m suite.bench COMMAND [key=value ...] [--json]

commands
{commands}

`python -m suite.bench COMMAND --help` says what a command takes and how it measures.
exit codes: 0 done, 1 error while running, 2 a mistake in the command, 130 interrupted"""

OVERHEAD_HELP = f"""\
Time a training step of the suite against a plain PyTorch loop over the same model and batches.

usage: python -m suite.bench overhead [key=value ...] [rounds={MIN_ROUNDS}] [steps=N] [--json]

key=value is what suite.train takes: task=, model=, norm=, data.batch_size=, trainer.accelerator=...
rounds=N   pairs of timings, {MIN_ROUNDS} or more; the figure is the median of their ratios
steps=N    steps that a timing holds; left out: whole logging windows that last a second or more
--json     everything that was measured, as one JSON object

ours    SuiteModule under Lightning's Trainer, as suite.train builds it: metrics, norm statistics,
        the guard against non-finite values, throughput, JSON-lines and TensorBoard logs, checkpoint
        callbacks and the Rich progress bar, which draws as on a terminal, to the null device
plain   zero_grad, the task's step, backward, optimizer.step, scheduler.step
Both start from the same weights and take the same batches, so both end with the same weights; how
far they are apart is printed. Warm-up, start-up, validation and checkpoints are not timed; how long
each timing lasts is this command's choice, so trainer.max_steps and the like have no effect.

examples
  python -m suite.bench overhead task=vision/classify
  python -m suite.bench overhead task=vision/classify data.batch_size=32 rounds=9
  python -m suite.bench overhead run.norm_stats=false trainer.enable_progress_bar=false"""

LOADING_HELP = f"""\
Time the suite's training loader against the plain loop over the same files (vision: torchvision's
ImageFolder, its own transforms and a DataLoader).

usage: python -m suite.bench loading data=image_folder data.root=FOLDER [key=value ...]
                                     [rounds={MIN_ROUNDS}] [images=N] [--json]

key=value is what suite.train takes: data.num_workers=2, data.batch_size=128, data.randaugment=...
rounds=N   pairs of timings, {MIN_ROUNDS} or more; the figure is the median of their ratios
images=N   images that a timing holds, rounded up to whole batches for each worker; left out: 2000,
           or what an epoch has
--json     everything that was measured, as one JSON object

The ratio is our images a second by the plain loop's: 1 is equal, more is faster. Both sides read
the same files in the same order with the same operations, batch size and workers, by turns; no
model runs, and the start of workers is not timed. The folder must hold no broken file.
scripts/build_image_tree.py generates one that is like ImageNet in number, size and form.

examples
  python -m suite.bench loading data=image_folder data.root=TREE data.num_workers=2
  python -m suite.bench loading data=image_folder data.root=TREE data.num_workers=2 \\
      data.randaugment=rand-m9-mstd0.5-inc1 data.erase=0.25"""


REFERENCE_HELP = f"""\
Time a training step of a task against the field's own implementation, and measure the memory of
both (vision/classify: timm's VisionTransformer; speech/pretrain: transformers'
Wav2Vec2ForPreTraining; language/lm: its LlamaForCausalLM or GPT2LMHeadModel).

usage: python -m suite.bench reference task=speech/pretrain [key=value ...]
                                       [rounds={MIN_ROUNDS}] [rows=2] [seconds=4] [--json]

key=value is what suite.train takes: model=, data=, trainer.accelerator=, trainer.precision=32-true
or bf16-mixed. The norm is the one that the reference has.
rounds=N   pairs of timings, {MIN_ROUNDS} or more; the figure is the median of their ratios
rows=N     examples of the batch
seconds=S  length of each, 4 where it is left out; for audio alone, refused for images and tokens
--json     everything that was measured, as one JSON object

ours    the task's step, backward and optimizer.step, in a plain loop
theirs  the reference's, with the same sizes, first weights, batch, optimizer and precision
A ratio below 1 is faster, or smaller, than theirs. First the losses of both are compared, in
float32 on the CPU, with the same random draws. What one side does and the other does not is printed
with the result. Memory is that of each side alone in a process of its own: what steps add to the
weights and the batch, on a GPU what torch allocates there, else the resident set.

examples
  python -m suite.bench reference task=speech/pretrain model=wav2vec2_base rows=2 seconds=4
  python -m suite.bench reference task=vision/classify model=vit_fmnist rows=32
  python -m suite.bench reference task=speech/pretrain model=wav2vec2_base rows=5 seconds=15.6 \\
      trainer.accelerator=gpu trainer.precision=bf16-mixed"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. A mistake is one line on stderr, never a
    traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--help", "-h"):
        print(help_text())
        return 0
    try:
        if not words:
            raise ConfigError(f"say what to measure, one of: {', '.join(COMMANDS)}; see --help")
        check_choice("command", words[0], COMMANDS)
        return COMMANDS[words[0]].run(words[1:])
    except (ConfigError, DataError, DivergedError) as error:
        complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        complain("interrupted")
        return Stopped(SIGINT).exit_code


if __name__ == "__main__":
    sys.exit(main())
