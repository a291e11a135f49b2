"""The sections of a config that every task has: how to optimize, how to train, where to run.

Frozen dataclasses of plain values. Their defaults are the suite's defaults, and each checks its own
ranges: a ValueError starts with the field's name, and `suite.config` puts the section in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from suite.errors import ConfigError

# What lightning 2.6 takes, and its short forms; reading its own list would import torch.
PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "bf16-true",
    "16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
)
_PRECISION_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
STRATEGIES = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_true",
    "fsdp",
    "fully_shard",
    "deepspeed",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
)
PROFILERS = ("simple", "advanced", "pytorch")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def _one_of(config: object, field: str, allowed: Iterable[str]) -> None:
    value, names = getattr(config, field), list(allowed)
    if value is not None and value not in names:
        raise ValueError(f"{field} must be one of {', '.join(names)}, got {value}")


def _at_least(config: object, low: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and not (value >= low and math.isfinite(value)):
            raise ValueError(f"{field} must be {low} or more, got {value}")


def _positive(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{field} must be a number above 0, got {value}")


def _share(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{field} must be from 0 to 1, got {value}")


def _batches(field: str, value: int | float | None) -> None:
    bad = isinstance(value, float) and not 0 <= value <= 1
    if bad or (isinstance(value, int) and value < 0):
        raise ValueError(f"{field} must be a whole number or a share from 0.0 to 1.0, got {value}")


@dataclass(frozen=True)
class TrainerConfig:
    """Arguments of Lightning's Trainer under their own names.

    devices: processes a machine: a number, "auto" or -1 (every GPU, or one process on CPU), or GPU
        ids ("0,1").
    max_time: "DD:HH:MM:SS".
    limit_*_batches: a whole number of batches, or a share from 0.0 to 1.0.
    """

    max_epochs: int | None = None
    max_steps: int = -1
    max_time: str | None = None
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int | None = 1
    log_every_n_steps: int = 50
    enable_progress_bar: bool = True
    deterministic: bool | Literal["warn"] = False
    benchmark: bool | None = None
    profiler: str | None = None
    num_sanity_val_steps: int = 0
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range; spell precision in full."""
        object.__setattr__(
            self, "precision", _PRECISION_ALIASES.get(self.precision, self.precision)
        )
        _one_of(self, "accelerator", ACCELERATORS)
        _one_of(self, "strategy", STRATEGIES)
        _one_of(self, "precision", PRECISIONS)
        _one_of(self, "profiler", PROFILERS)
        _at_least(self, 1, "num_nodes", "accumulate_grad_batches", "log_every_n_steps")
        _at_least(self, 1, "max_epochs", "check_val_every_n_epoch")
        _at_least(self, 0, "num_sanity_val_steps")
        _positive(self, "gradient_clip_val")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"max_steps must be 1 or more, or -1 for no limit, got {self.max_steps}"
            )
        if self.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.max_time):
            raise ValueError(
                f"max_time must be days:hours:minutes:seconds (00:01:30:00), got {self.max_time}"
            )
        for field in ("limit_train_batches", "limit_val_batches", "limit_test_batches"):
            _batches(field, getattr(self, field))
        self._check_interval()
        self._check_devices()

    def _check_interval(self) -> None:
        interval = self.val_check_interval
        _batches("val_check_interval", interval)
        if interval == 0:
            raise ValueError("val_check_interval must be above 0, got 0")
        if self.check_val_every_n_epoch is None and not isinstance(interval, int):
            raise ValueError(
                "check_val_every_n_epoch can be null only with a whole number of steps as "
                "trainer.val_check_interval"
            )

    def _check_devices(self) -> None:
        text = str(self.devices)
        if re.fullmatch(r"\d+", text):
            object.__setattr__(self, "devices", int(text))
        elif text == "-1":
            object.__setattr__(self, "devices", "auto")
        if self.devices == 0 or not re.fullmatch(r"auto|\d+|\d+(,\d+)*,?", str(self.devices)):
            raise ValueError(
                f"devices must be 1 or more, auto, -1 or GPU ids such as 0,1, got {text}"
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and weight averaging. Rates are per optimizer step.

    lr: the highest learning rate; min_lr: where cosine and polynomial end.
    warmup_steps, warmup_epochs, warmup_fraction: length of the linear warm-up, one of them at most.
    warmup_scale: share of lr that the warm-up starts from.
    hold_fraction, decay_fraction, final_scale: tri_stage (wav2vec 2.0, arXiv 2006.11477): shares of
        all steps; decay_fraction=null is what remains; the end is final_scale * lr.
    power: exponent of the polynomial schedule.
    decay_norm: weight decay on norm parameters too, for every norm alike.
    decay_bias: weight decay on biases and on what the model exempts, as fairseq has it.
    layer_decay: a layer's learning rate is this share of the next one's; the last layer's is lr.
    ema_decay: exponential moving average of the weights, which is then what is evaluated.
    fused: torch's fused optimizer; null leaves the choice to the suite.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    schedule: Literal["cosine", "constant", "tri_stage", "polynomial"] = "cosine"
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    warmup_fraction: float | None = None
    warmup_scale: float = 0.0
    min_lr: float = 0.0
    hold_fraction: float = 0.4
    decay_fraction: float | None = None
    final_scale: float = 0.05
    power: float = 1.0
    decay_norm: bool = False
    decay_bias: bool = False
    layer_decay: float | None = None
    ema_decay: float | None = None
    fused: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        _positive(self, "lr", "eps", "power")
        _at_least(self, 0, "weight_decay", "min_lr", "warmup_steps", "warmup_epochs")
        _share(self, "warmup_fraction", "hold_fraction", "decay_fraction", "final_scale")
        _share(self, "warmup_scale")
        for field in ("beta1", "beta2", "momentum", "ema_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} must be from 0 up to, but not, 1, got {value}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not be above optim.lr={self.lr}, got {self.min_lr}")
        warmups = ("warmup_steps", "warmup_epochs", "warmup_fraction")
        given = [field for field in warmups if getattr(self, field) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]} cannot be given together with {given[0]}; set one of them to null"
            )
        shares = (self.warmup_fraction or 0) + self.hold_fraction + (self.decay_fraction or 0)
        if self.schedule == "tri_stage" and shares > 1 + 1e-9:
            raise ValueError(
                "hold_fraction plus warmup_fraction and decay_fraction must not be above 1, got "
                f"{shares:g}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and how it is watched.

    dir: its folder; null numbers a new one, runs/<task>/<model>-<norm>-seed<k>-<n>.
    resume: "never"; the folder or checkpoint of the run to go on with; or "auto": run.dir's, or the
        newest unfinished run of this very config, from its newest checkpoint that verifies. Without
        one a new run begins, so that one command can be submitted again and again.
    save_every_n_steps: write checkpoints/last.ckpt every so many steps, besides after each epoch.
    patience: validations without a new best after which training ends; null trains to the end.
    dist_timeout: seconds that a process waits for the others before it gives up.
    nonfinite: what follows a non-finite loss or gradient: "stop" ends the run with exit code 3,
        "skip" leaves the update out, on all processes alike.
    nonfinite_limit: updates that skip may leave out in a whole run.
    compile: false, or a mode of torch.compile.
    matmul_precision: of float32 matrix products on a GPU: "high" is TF32 on NVIDIA's, which the
        published vision runs had, and which PyTorch takes for convolutions anyway.
    eval_split: what `evaluate=` and the end of a run measure.
    norm_stats: log alpha, RMS of the input and saturation of each site.
    """

    dir: str | None = None
    resume: str = "never"
    save_every_n_steps: int | None = None
    patience: int | None = None
    dist_timeout: int = 600
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10
    compile: bool | str = False
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    eval_split: Literal["val", "test"] = "test"
    tensorboard: bool = True
    norm_stats: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        _at_least(self, 1, "dist_timeout", "save_every_n_steps", "patience")
        _at_least(self, 0, "nonfinite_limit")
        _one_of(self, "matmul_precision", ("highest", "high", "medium"))
        _one_of(self, "nonfinite", ("stop", "skip"))
        if self.compile is True:
            object.__setattr__(self, "compile", "default")
        if self.compile is not False:
            _one_of(self, "compile", COMPILE_MODES)
        if self.dir == "":
            raise ValueError("dir must be a folder or null, got an empty text")


@dataclass(frozen=True)
class Config:
    """Everything that a run was asked to do. Read-only after load.

    task, model, data, norm: the options dataclass of the entry that *_name names.
    recipe: the recipe that it started from; kept for the record.
    evaluate: run or checkpoint to evaluate instead of training.
    """

    task_name: str
    model_name: str
    data_name: str
    norm_name: str
    task: Any
    model: Any
    data: Any
    norm: Any
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    run: RunConfig = RunConfig()
    seed: int = 0
    recipe: str | None = None
    evaluate: str | None = None


Action = Literal["train", "dry_run", "evaluate", "print_config", "list", "help", "version"]


@dataclass(frozen=True)
class Loaded:
    """What the command line asked for.

    config: None for help, list and version.
    text: what to print for help, list, version and print_config; empty for the rest.
    notes: lines for stderr about what was left out or taken from the environment.
    """

    action: Action
    config: Config | None = None
    text: str = ""
    notes: tuple[str, ...] = ()

    @property
    def settled(self) -> Config:
        """The config of an action that has one. Raises ConfigError for help, list and version."""
        if self.config is None:
            raise ConfigError(f"--{self.action} has no config")
        return self.config
