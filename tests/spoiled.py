"""Trainings in this process some of whose samples, losses or gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from suite.build import Parts, build_parts, build_trainer
from suite.callbacks import PrimaryTracker
from suite.config import Config, load
from suite.ema import WeightEMA
from suite.nonfinite import NonFiniteGuard

TINY = [
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "model.dropout=0.1",
    "data.batch_size=8",
    "optim.lr=0.01",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=1",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "run.tensorboard=false",
]
NAN, INF = float("nan"), float("inf")


class Damaged:
    """A split some of whose images hold what they should not. values: sample id -> pixel."""

    def __init__(self, split: Any, values: dict[int, float]) -> None:
        self.split, self.values = split, values

    def __len__(self) -> int:
        return len(self.split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        batch = self.split.fetch(indices, epoch=epoch, train=train)
        for row, index in enumerate(indices):
            if index in self.values:
                batch["image"] = batch["image"].clone()
                batch["image"][row, 0, 0, 0] = self.values[index]
        return batch


class Late(NonFiniteGuard):
    """Reads the flag a step later, as on a GPU, here with the fused kernels of the CPU."""

    @staticmethod
    def _waits(norm: Tensor) -> bool:
        return True


class Run:
    """One training of this process, without suite.train around it. world: of how many it is one.
    without: an option of TINY that the model does not have.
    """

    def __init__(
        self,
        *tokens: str,
        guard: NonFiniteGuard | None = None,
        extra: tuple[Callback, ...] = (),
        world: int = 1,
        folder: Path = Path("run"),
        without: str = "",
    ) -> None:
        named = {t.partition("=")[0]: t for t in (*TINY, *tokens)}
        named.pop(without, None)
        self.config: Config = load(list(named.values())).settled
        self.parts: Parts = build_parts(self.config, processes=world)
        self.guard = guard or NonFiniteGuard()
        self.folder = folder
        checkpoints = self.folder / "checkpoints"
        best = PrimaryTracker("val/acc", "max", checkpoints / "best.ckpt")
        callbacks: list[Callback] = [self.guard, *extra, best]
        if (decay := self.config.optim.ema_decay) is not None:
            callbacks.append(WeightEMA(decay))
        options: Any = {"dirpath": checkpoints, "filename": "last", "enable_version_counter": False}
        callbacks.append(ModelCheckpoint(save_on_train_epoch_end=True, **options))
        if (every := self.config.run.save_every_n_steps) is not None:
            callbacks.append(ModelCheckpoint(every_n_train_steps=every, **options))
        place: Any = {"processes": world, "callbacks": callbacks, "folder": None}
        self.trainer = build_trainer(self.config, **place)
        self.parts.module.folder = self.folder

    def at(self, position: int, *, rank: int = 0, world: int = 1) -> list[int]:
        """The samples of a micro-batch."""
        sampler = self.parts.data.train_sampler(rank=rank, world_size=world)
        return list(sampler)[position].indices

    def damage(self, values: dict[int, float]) -> Run:
        splits = self.parts.data.splits
        train: Any = Damaged(splits.train, values)
        self.parts.data.splits = replace(splits, train=train)
        return self

    def fit(self, resume: str | None = None) -> Run:
        data: Any = self.parts.data
        self.trainer.fit(self.parts.module, datamodule=data, ckpt_path=resume, weights_only=True)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.parts.module.model.state_dict()


def spoiled(run: Run, at: int, wrong: Callable[[Run, Tensor], Tensor]) -> Run:
    """Let `wrong` change the loss of the batches that hold that sample."""
    module = run.parts.module
    step = module.step

    def bad_step(batch: Any, split: Any) -> Any:
        out = step(batch, split)
        if split == "train" and at in batch["sample_id"]:
            out.loss_sum = wrong(run, out.loss_sum)
        return out

    module.step = bad_step  # type: ignore[method-assign]
    return run


class NaNGradient(torch.autograd.Function):
    """0 forward, NaN backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], NAN)
