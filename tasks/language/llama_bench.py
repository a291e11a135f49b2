"""The efficiency table of the DyT paper: how long a LLaMA takes with each norm, and without one.

The paper (arXiv 2503.10622, tables 14 and 15) times 100 passes of LLaMA-7B over 1 x 4096 tokens in
bfloat16. Its script (github.com/jiachenzhu/DyT, other_tasks/Efficiency) stores the whole model in
bfloat16, takes Hugging Face's LlamaRMSNorm, which is six plain operations, DyT without a bias and
the identity, no torch.compile in table 14, and does forward and cross-entropy, in training also
backward into gradients that add up; there is no optimizer. So is it here. The script has no timing
of layers alone: the paper's "layer" is what a model takes longer than one with identities (14.1 -
2.1 = 13.0 - 1.0), which is "rest" here; "layer" here is the norms alone, one after the other.

Beside the script's own modules stand the suite's: eager, under torch.compile (each norm of "layer",
each block and the last norm of "model") and as our kernels. All sides of a pass take turns in
rounds, in an order drawn for each, over the same weights.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.bench import split_tokens, whole_number
from suite.benches.saved import check_folder, header, keep
from suite.errors import ConfigError
from suite.memory import gib
from suite.norms import NORMS
from suite.registry import check_choice
from suite.train import say
from tasks.language.llama import LLAMA_SIZES, LlamaOptions
from tasks.language.llama_sides import (
    FORMS,
    Place,
    Side,
    base_model,
    compiled_alone,
    free_memory,
    kernel_backend,
    model_of,
    need,
    norms_of,
    sides,
)
from tasks.language.llama_table import HELP, Found, markdown, text

REFERENCE = "rmsnorm"
NORM_NAMES = (REFERENCE, "dyt", "derf", "identity")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PASSES = ("inference", "training")
KEYS = (*("model", "depth", "tokens", "passes", "rounds"), *("norms", "forms", "dtype", "device"))
SWITCHES = ("--json", "--save")
SCALED_TO = 100  # passes, as the paper's figures
BATCHES = 8  # of ids, taken by turns
SLICE_SECONDS = 0.05  # what a timing lasts at least
VOCABULARY = 1024  # where the model leaves it to the data
SMALL = replace(
    LLAMA_SIZES["llama_7b"], dim=512, depth=4, heads=8, kv_heads=8, hidden_dim=1376, vocab_size=4096
)
MODELS = {**{name: LLAMA_SIZES[name] for name in LLAMA_SIZES}, "small": SMALL}

Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What is measured. depth: blocks, None for what fits; passes: of each side, in all rounds."""

    model: str
    tokens: int
    passes: int
    rounds: int
    norms: tuple[str, ...] = NORM_NAMES
    forms: tuple[str, ...] = FORMS
    dtype: str = "bfloat16"
    device: str = "cpu"
    depth: int | None = None

    @property
    def options(self) -> LlamaOptions:
        return MODELS[self.model]

    def place(self, depth: int) -> Place:
        options = replace(self.options, depth=depth)
        vocab = options.vocab_size or VOCABULARY
        return Place(options, vocab, torch.device(self.device), DTYPES[self.dtype])


@dataclass
class Result:
    """What `measure` found. depth: blocks of the models; norms: of "layer"; cut: why the depth is
    not the whole; small: what this is instead of the paper's."""

    setting: Setting
    depth: int
    norm_layers: int
    cut: str
    small: str
    kernel: str
    header: dict[str, Any]
    found: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        options = asdict(replace(self.setting.options, depth=self.depth))
        own = {**vars(self), "setting": asdict(self.setting), "options": options}
        return {"bench": "llama", **own, "found": [found.to_dict() for found in self.found]}


def run(argv: Sequence[str]) -> int:
    """`python -m suite.bench llama`. Raises ConfigError for a mistake in the tokens."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    setting = parse(argv)
    if "--save" in argv:
        check_folder(torch.device(setting.device))
    result = measure(setting)
    print(json.dumps(result.to_dict(), indent=2) if "--json" in argv else text(result))
    if "--save" in argv:
        kept = [token for token in argv if token not in SWITCHES]
        folder = keep(
            "llama",
            device=torch.device(result.setting.device),
            result=result.to_dict(),
            markdown=markdown(result),
            command=" ".join(["python -m suite.bench llama", *kept, "--save"]),
        )
        say(f"kept in {folder}")
    return 0


# --- the command line ---


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the tokens name. Raises ConfigError."""
    own, rest = split_tokens([a for a in argv if a not in SWITCHES], own=KEYS)
    if rest:
        keys = ", ".join(f"{key}=" for key in KEYS)
        raise ConfigError(f"{rest[0]}: suite.bench llama takes {keys}, {' and '.join(SWITCHES)}")
    device = own.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device}: must be cpu, or cuda where there is an NVIDIA GPU")
    gpu = device == "cuda"
    model = own.get("model", "llama_7b" if gpu else "small")
    check_choice("model", model, MODELS)
    dtype = own.get("dtype", "bfloat16")
    check_choice("dtype", dtype, DTYPES)
    usual = {"tokens": 4096 if gpu else 256, "passes": 100 if gpu else 10, "rounds": 5}
    numbers = {k: whole_number(k, own.get(k, str(v)), low=1) for k, v in usual.items()}
    depth = whole_number("depth", own["depth"], low=1) if "depth" in own else None
    whole = MODELS[model].depth
    if depth is not None and depth > whole:
        raise ConfigError(f"depth={depth}: model={model} has {whole} blocks; take 1 to {whole}")
    causal = [name for name, spec in NORMS.items() if spec.causal]
    norms = chosen("norms", own.get("norms", ",".join(NORM_NAMES)), causal)
    if REFERENCE not in norms:
        raise ConfigError(f"norms={own['norms']}: needs {REFERENCE}, with which all are compared")
    forms = chosen("forms", own.get("forms", ",".join(FORMS)), FORMS)
    return Setting(
        model, **numbers, norms=norms, forms=forms, dtype=dtype, device=device, depth=depth
    )


def chosen(key: str, names: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Comma-separated names. Raises ConfigError for one that is not allowed, or given twice."""
    found = names.split(",")
    for name in found:
        check_choice(key, name, allowed)
    if len(set(found)) < len(found):
        raise ConfigError(f"{key}={names}: a name is given twice; leave one out")
    return tuple(found)


def depth_of(setting: Setting, *, free: int) -> tuple[int, str]:
    """Blocks to measure, and what to say of a cut. Raises ConfigError where they do not fit."""
    whole = setting.options.depth
    wanted = whole if setting.depth is None else setting.depth
    found = need(setting.place(wanted), tokens=setting.tokens, free=free)
    have = f"{gib(free)} are free on {setting.device}"
    if found.depth < wanted and (setting.depth is not None or found.depth == 0):
        advice = f"take depth={found.depth}" if found.depth else "take fewer tokens"
        raise ConfigError(
            f"model={setting.model} depth={wanted}: training it over {setting.tokens} tokens takes "
            f"about {gib(found.total(wanted))}, {have}; {advice}, or a smaller model"
        )
    depth = min(wanted, found.depth)
    if depth == whole:
        return depth, ""
    why = "asked for" if setting.depth is not None else f"what fits: {have}"
    return depth, f"models are cut to {depth} of {whole} blocks ({why})"


# --- measuring ---


def measure(setting: Setting) -> Result:
    """Time every side of every part. Raises ConfigError where a model does not fit."""
    device = torch.device(setting.device)
    depth, cut = depth_of(setting, free=free_memory(device))
    place = setting.place(depth)
    # a cut for want of memory leaves the norms alone as many as the whole model has
    alone = place if setting.depth is not None else setting.place(setting.options.depth)
    count = 2 * alone.options.depth + 1
    kernel = kernel_backend(device)
    result = Result(setting, depth, count, cut, smaller(setting), kernel, header(device))
    forms, result.notes = available(setting)
    every = sides(setting.norms, forms)
    wide: dict[str, Any] = {f"{name}recompile_limit": 4096 for name in ("", "accumulated_")}
    with torch._dynamo.config.patch(wide):  # beyond it sides would run eagerly, unsaid
        layers(result, alone, [s for s in every if (s.norm, s.form) != ("identity", "compiled")])
        models(result, place, every)
    result.found += rest(result.found)
    return result


def smaller(setting: Setting) -> str:
    """What tells this apart from the paper's measurement; "" where nothing does but the device."""
    if (setting.model, setting.tokens, setting.dtype) == ("llama_7b", 4096, "bfloat16"):
        return ""
    return "not the paper's sizes: no figure here can be compared with its seconds"


def available(setting: Setting) -> tuple[tuple[str, ...], list[str]]:
    """The forms that can run, and a note on one that cannot."""
    builds = setting.device == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
    if builds or "compiled" not in setting.forms:
        return setting.forms, []
    left = tuple(form for form in setting.forms if form != "compiled")
    return left, ["compiled is left out: there is no C++ compiler on the PATH"]


def layers(result: Result, place: Place, every: Sequence[Side]) -> None:
    """The norms of a model alone, one after the other on the same activation."""
    drawn = {"device": place.device, "dtype": place.dtype}
    shape = (1, result.setting.tokens, place.options.dim)
    x, dy = (torch.randn(shape, **drawn) for _ in range(2))  # type: ignore[call-overload]

    def make(side: Side, mode: str) -> Work:
        norms = norms_of(side, place)
        if side.form == "compiled":
            norms = compiled_alone(norms)
        leaf = x.detach().requires_grad_(mode == "training")

        def work() -> None:
            with torch.set_grad_enabled(mode == "training"):
                for norm in norms:
                    y = norm(leaf)
                    if mode == "training":
                        torch.autograd.grad(y, (leaf, *norm.parameters()), dy)

        return work

    for mode in PASSES:
        result.found += timed("layer", mode, every, make, result)


def models(result: Result, place: Place, every: Sequence[Side]) -> None:
    """Whole models with the same weights."""
    base = base_model(place)
    shape = (BATCHES, 1, result.setting.tokens)
    batches = torch.randint(place.vocab, shape, device=place.device)

    def make(side: Side, mode: str) -> Work:
        model, turn = model_of(side, place, base), iter(range(10**9))

        def loss() -> Tensor:
            ids = batches[next(turn) % BATCHES]
            logits_BTV: Tensor = model(ids)
            return F.cross_entropy(logits_BTV.flatten(0, 1), ids.flatten())

        if mode == "training":
            return lambda: loss().backward()
        work = torch.no_grad()(loss)
        if side.form == "eager" and not work().isfinite():
            result.notes.append(f"{side.norm}: the model's loss is not finite")
        return work

    for mode in PASSES:
        result.found += timed("model", mode, every, make, result)


def timed(
    part: str,
    mode: str,
    every: Sequence[Side],
    make: Callable[[Side, str], Work],
    result: Result,
) -> list[Found]:
    """Each side's passes, in rounds; one that fails is left out with a note."""
    setting, device = result.setting, torch.device(result.setting.device)
    ready: dict[Side, Work] = {}
    slices: dict[Side, int] = {}
    for side in every:
        try:
            work = make(side, mode)
            seconds(work, 1, device)  # and what is compiled, is compiled
            once = seconds(work, 1, device)
        except Exception as error:  # Triton's and a compiler's have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            result.notes.append(f"{side.name} is left out of {part} {mode}: {reason}")
            continue
        least = math.ceil(SLICE_SECONDS / max(once, 1e-6))
        ready[side], slices[side] = work, max(-(-setting.passes // setting.rounds), least)
    gc.collect()
    order, rounds = random.Random(0), []
    for _ in range(setting.rounds):
        turns = order.sample(list(ready), len(ready))
        took = {side: seconds(ready[side], slices[side], device) / slices[side] for side in turns}
        rounds.append(took)
    say(f"{part} {mode}: {len(ready)} sides, {setting.rounds} rounds")
    return [of_side(part, mode, side, rounds, slices[side]) for side in ready]


def of_side(
    part: str, mode: str, side: Side, rounds: Sequence[dict[Side, float]], passes: int
) -> Found:
    """What the rounds say of one side."""
    against = Side(REFERENCE, side.form)
    ratios = [r[side] / r[against] for r in rounds if against in r]
    scaled = [SCALED_TO * r[side] for r in rounds]
    return Found(part, mode, side.norm, side.form, scaled, ratios, passes)


def rest(found: Sequence[Found]) -> list[Found]:
    """What models take longer than those with identities: the paper's layers.

    Its ratio is that of medians, since differences of single rounds come near zero.
    """
    models = {(f.mode, f.norm, f.form): f for f in found if f.part == "model"}
    made: dict[tuple[str, str, str], Found] = {}
    for (mode, norm, form), f in models.items():
        bare = models.get((mode, "identity", "compiled" if form == "compiled" else "eager"))
        if bare is None or norm == "identity":
            continue
        apart = [a - b for a, b in zip(f.seconds, bare.seconds, strict=True)]
        made[mode, norm, form] = Found("rest", mode, norm, form, apart, [], f.passes)
    for (mode, _, form), f in made.items():
        against = made.get((mode, REFERENCE, form))
        if against is not None and min(f.median, against.median) > 0:  # else it is all noise
            f.ratios = [f.median / against.median]
    return list(made.values())


def seconds(work: Work, passes: int, device: torch.device) -> float:
    """Of so many passes in a row: between two events of a GPU, of this process's own on one
    thread of a CPU (what neighbours take does not count), else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(passes):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(passes):
        work()
    return clock() - begin
