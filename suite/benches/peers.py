"""The field's own implementations that a task is compared with: what one says of itself.

`suite.bench reference` sets a task's step against it, `suite.bench step` puts it beside the norms.
What it has not is off on our side, and what it cannot be compared at is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from suite.config import Config, check_devices
from suite.data import Splits
from suite.errors import ConfigError
from suite.module import Batch, SuiteModule
from suite.registry import load_task, task_names

SECONDS = 4.0  # of an example of audio
PUBLISHED_NORM = "layernorm"
PRECISIONS = ("32-true", "bf16-mixed")


class Reference(Protocol):
    """The field's own implementation of a task's step, as `TaskSpec.reference()` returns it.

    name: with its version. notes: what the two sides do differently, a line each.
    It may have besides `audio`, False where a batch has no length in seconds, so that seconds= is
    refused, and `published_norm(config)`, the norm that it has where that is not LayerNorm.
    """

    name: str
    notes: Sequence[str]

    def settle(self, config: Config) -> Config:
        """With everything off that the reference has not. Raises ConfigError where it cannot be."""

    def batch(self, splits: Splits, *, rows: int, seconds: Any) -> Batch:
        """A batch of the task's own data, on the CPU; comes before `build`.

        seconds: of each example, None where it is no audio. Raises ConfigError if there is too
        little.
        """

    def build(self, config: Config) -> nn.Module:
        """Its network at the sizes of `config`, in training mode."""

    def share(self, model: nn.Module, module: SuiteModule) -> None:
        """Give the suite's module the weights of the reference."""

    def loss(self, model: nn.Module, module: SuiteModule, batch: Batch) -> Callable[[], Tensor]:
        """What computes its mean loss, without holding on to `module`; what a collator would make
        is made here, once, as `module` draws it."""

    def same_noise(self, module: SuiteModule, batch: Batch) -> AbstractContextManager[None]:
        """While it lasts, the reference draws its noise as `module` does for `batch`."""


def reference_of(task: str) -> Reference:
    """What the task is compared with. Raises ConfigError if it names nothing."""
    make = load_task(task).reference
    if make is None:
        have = [n for n in task_names() if load_task(n).reference is not None]
        raise ConfigError(
            f"task={task}: names no implementation that suite.bench reference could compare with; "
            f"choose task={' or task='.join(have)}"
        )
    found: Reference = make()
    return found


def published_norm(config: Config) -> str:
    """The norm that the task's reference has."""
    named = getattr(reference_of(config.task_name), "published_norm", None)
    return PUBLISHED_NORM if named is None else str(named(config))


def settle_seconds(seconds: float | None, *, reference: Reference, task: str) -> float | None:
    """The length of an example of audio. Raises ConfigError if it is given for anything else."""
    if getattr(reference, "audio", True):
        return SECONDS if seconds is None else seconds
    if seconds is not None:
        raise ConfigError(
            f"seconds={seconds:g}: is the length of audio, which task={task} has not; leave it out"
        )
    return None


def check_norm(config: Config, *, name: str, published: str) -> None:
    """Raise ConfigError unless the norm is the published one, as it was published."""
    if config.norm_name != published:
        raise ConfigError(
            f"norm={config.norm_name}: {name} has {published} alone; leave norm= out, and compare "
            "norms with suite.bench step"
        )
    for field in ("eps", "weight", "bias", "by_site"):
        if getattr(config.norm, field, None) not in (None, {}):
            raise ConfigError(
                f"norm.{field}: {name} has {published} as it was published; leave norm.{field} out"
            )


def check_rows(rows: int, available: int) -> None:
    """Raise ConfigError if a split has fewer examples than a batch is to have."""
    if rows > available:
        raise ConfigError(
            f"rows={rows}: the training split has {available} examples; take fewer rows"
        )


def check_settings(config: Config, *, command: str = "reference", compiled: bool = False) -> None:
    """Raise ConfigError for what a plain loop over one batch does not do.

    compiled: whether the command compiles the model where run.compile asks for it.
    """
    trainer = config.trainer
    check_devices(config)
    refused = {
        "trainer.devices": trainer.devices not in (1, "1"),
        "trainer.num_nodes": trainer.num_nodes != 1,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
        "trainer.strategy": trainer.strategy != "auto",
        "optim.ema_decay": config.optim.ema_decay is not None,
        "optim.layer_decay": config.optim.layer_decay is not None,
        "run.compile": config.run.compile is not False and not compiled,
        "model.init_from": config.model.init_from is not None,
        "evaluate": config.evaluate is not None,
    }
    for key, wrong in refused.items():
        if wrong:
            raise ConfigError(
                f"{key}: the plain loops of suite.bench {command} have no such thing; leave it out"
            )
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={trainer.precision}: suite.bench {command} takes "
            f"{' or '.join(PRECISIONS)}"
        )
