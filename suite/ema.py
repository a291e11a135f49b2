"""The exponential moving average of the weights, which is what a run with `optim.ema_decay`
measures.

As in the published vision recipes (ModelEma of timm 0.x): it starts from the initial weights, takes
every optimizer step with one constant decay, and holds whatever a state dict holds, so also the
statistics of batch norms. Validation sees the average, the best is chosen on it, and a checkpoint's
`state_dict` is it; `current_model_state` beside it is what training goes on from.

Lightning's EMAWeightAveraging sets its copy up before the model is on its device: on a GPU the
average would stay on the CPU, every step would copy all weights there and wait for them. It also
begins with the weights after the first step, and forgets the last current ones when training ends.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from suite.sharding import load_whole, local, put, whole_tensors


class WeightEMA(Callback):
    """average = decay * average + (1 - decay) * weights after every optimizer step.

    Whole numbers (a batch norm's counter) are copied. The update makes nobody wait for the device.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.held: dict[str, Tensor] = {}  # the copy that the model does not hold: see `swapped`
        self.swapped = False  # True: the model holds the average, and `held` the current weights
        self._floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._wholes: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.swapped = False
            self.held = {n: t.detach().clone() for n, t in state_tensors(pl_module).items()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model is on its device now and, if it is to be, cut over the processes."""
        self._floats, self._wholes = ([], []), ([], [])
        for name, tensor in state_tensors(pl_module).items():
            held = self.held[name]  # without values where the model had none before it was cut
            self.held[name] = tensor.detach().clone() if held.is_meta else held.to(tensor)
            averages, weights = self._floats if tensor.is_floating_point() else self._wholes
            averages.append(local(self.held[name]))
            weights.append(local(tensor.detach()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step  # a resumed one is known only now

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        if self._floats[0]:
            torch._foreach_lerp_(*self._floats, weight=1.0 - self.decay)
        if self._wholes[0]:
            torch._foreach_copy_(*self._wholes)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is measured or saved from here on is the average."""
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        self.swapped = not self.swapped
        for name, tensor in state_tensors(module).items():
            held, shown = local(self.held[name]), local(tensor)
            other = held.clone()
            held.copy_(shown)
            shown.copy_(other)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        first = {id(tensor): name for name, tensor in state_tensors(pl_module).items()}
        names = {n: first[id(t)] for n, t in pl_module.state_dict(keep_vars=True).items()}
        own = checkpoint["state_dict"]
        other = whole_tensors({n: self.held[names[n]] for n in names})
        average, current = (own, other) if self.swapped else (other, own)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The model's weights are `state_dict`, the average."""
        for name in self.held:
            put(self.held[name], checkpoint["state_dict"][name])
        if "current_model_state" in checkpoint:
            load_whole(pl_module, checkpoint["current_model_state"])


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or saved buffer itself, one that has several names under the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
