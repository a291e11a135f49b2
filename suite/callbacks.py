"""What watches a run: norm statistics, progress, the metric that it is judged by."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from suite.cache import say_once
from suite.checkpoint import read_checkpoint
from suite.module import Observer, SuiteModule
from suite.norms import norm_modules
from suite.ranks import from_first
from suite.saving import problem
from suite.sharding import whole

PRODUCT_RANGE = (0.3, 3.0)


class NormStatistics(Callback, Observer):
    """alpha, RMS(input), alpha * RMS(input) and saturation of each site, on logged steps only.

    alpha * RMS(input) at initialisation decides how a point-wise norm trains at small scale: about
    1 is right, and outside 0.3 to 3 the site starves or saturates, which is said once in words.
    With a compiled model only alpha is logged: hooks would break its graph.
    """

    def __init__(self, warn: Callable[[str], None], *, inputs: bool = True) -> None:
        self.warn, self.inputs = warn, inputs
        self._handles: list[Any] = []
        self._seen: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._judged = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._judged = trainer.global_step > 0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._handles or not self.inputs or not (step == 1 or (every and step % every == 0)):
            return
        assert isinstance(module, SuiteModule)
        for _, norm in norm_modules(module.model):
            self._handles.append(norm.register_forward_pre_hook(self._look))

    @torch.no_grad()
    def _look(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        found = {"rms": inputs[0].float().square().mean().sqrt()}
        if hasattr(norm, "saturation"):
            found["saturation"] = norm.saturation(inputs[0]).float()
        if isinstance(getattr(norm, "alpha", None), Tensor):
            found["alpha_rms"] = norm.alpha.float().abs().mean() * found["rms"]
        for name, value in found.items():
            self._seen[norm.site, name].append(value)

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for _, module_norm in norm_modules(module.model):
            norm: Any = module_norm
            if isinstance(getattr(norm, "alpha", None), Tensor):
                self._seen[norm.site, "alpha"].append(whole(norm.alpha).float().mean())
        for (site, name), seen in self._seen.items():
            found = torch.stack(seen)
            values[f"norm/{site}/{name}"] = float(found.mean())
            if name == "alpha_rms" and not self._judged:
                self._judge(site, found)
        self._judged = True
        self._seen.clear()

    def _judge(self, site: str, products: Tensor) -> None:
        low, high = float(products.min()), float(products.max())
        if low < PRODUCT_RANGE[0] or high > PRODUCT_RANGE[1]:
            self.warn(
                f"norm/{site}: alpha x RMS(input) is {low:.2f} to {high:.2f} at the start, outside "
                f"{PRODUCT_RANGE[0]} to {PRODUCT_RANGE[1]}; norm.alpha_init=calibrated sets it to 1"
            )


class SuiteProgressBar(RichProgressBar):
    """Rich's bar with the last logged window, which is already on the host: no sync a step.

    A drawing takes a millisecond or two and Lightning asks for 100 a second, which is one in every
    step, in a thread that competes with training for the interpreter. Here training's own thread
    draws, twice a second.
    """

    SHOWN = ("train/loss", "lr", "grad_norm")
    PAUSE = 0.5  # seconds from one drawing to the next

    def __init__(self, *, console: Mapping[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=round(1 / self.PAUSE), console_kwargs=dict(console or {}))
        self.next_drawing = 0.0

    def refresh(self, hard: bool = False) -> None:
        now = time.perf_counter()
        if hard or now >= self.next_drawing:
            self.next_drawing = now + self.PAUSE
            super().refresh(hard=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        latest = getattr(pl_module, "latest", {})
        shown = {k: f"{latest[k]:.4g}" for k in self.SHOWN if k in latest}
        shown.update(
            {
                k: f"{float(v):.4g}"
                for k, v in trainer.callback_metrics.items()
                if k.startswith("val/") and k != "val/count"
            }
        )
        return shown


class ProgressLines(Callback, Observer):
    """A line for each logged window and validation, for logs and pipes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @rank_zero_only
    def _say(self, module: L.LightningModule, text: str) -> None:
        total = module.total_steps() if isinstance(module, SuiteModule) else None
        seconds = time.perf_counter() - self._start
        step = f"{module.trainer.global_step}{f'/{total}' if total else ''}"
        print(
            f"[{seconds:7.1f} s] step {step}  {text}",
            flush=True,
            file=sys.stderr,
        )

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        names = [k for k in values if k in SuiteProgressBar.SHOWN or k.startswith("throughput/")]
        self._say(module, "  ".join(f"{k} {values[k]:.4g}" for k in names))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.state.fn == "fit":
            shown = (f"{k} {v:.4f}" for k, v in values.items() if k != "val/count")
            self._say(module, "  ".join(shown))


class PrimaryTracker(Callback):
    """The metric that a run is judged by: best value on val, its step, last value.

    It saves the best to `path` itself, so that record and file tell of the same weights:
    ModelCheckpoint forgets its best score when a folder is moved, counts NaN otherwise and misses
    the validation after the last step. None: nothing is saved.
    patience: validations without a new best that end the training; None: it goes on.
    """

    def __init__(
        self, key: str, direction: str, path: Path | None = None, *, patience: int | None = None
    ) -> None:
        self.key, self.sign, self.path = key, 1.0 if direction == "max" else -1.0, path
        self.patience, self.waited = patience, 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.last: float | None = None
        self.last_step: int | None = None
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True  # a run that had ended so, resumed

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.note(trainer)

    def note(self, trainer: L.Trainer) -> None:
        """Take the validation that has just ended, and save the weights if it is the best."""
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        repeated = trainer.global_step == self.last_step  # by a resumed run
        better = self.take(found, trainer.global_step)
        # best.ckpt may be ahead of a resumed run, which comes to its step again
        ahead = self.best_step is not None and trainer.global_step <= self.best_step
        if better or ahead:
            self.waited = 0
        elif not repeated:
            self.waited += 1
        if better and self.path is not None:
            trainer.save_checkpoint(self.path)
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True  # every process has the same values
            say_once(f"no new best in {self.waited} validations: training ends here")

    def take(self, values: Mapping[str, float], step: int) -> bool:
        """Note the metrics of a validation; whether they are the best so far."""
        value = values.get(self.key)
        if value is None:
            return False
        self.last, self.last_step = value, step
        if self.best is None:
            better = not math.isnan(value)
        else:
            better = self.sign * value > self.sign * self.best
        if better:
            self.best, self.best_step, self.metrics = value, step, dict(values)
        return better

    def state_dict(self) -> dict[str, Any]:
        kept = ("best", "best_step", "last", "last_step", "metrics", "waited")
        return {k: getattr(self, k) for k in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in self.state_dict():
            setattr(self, key, state_dict.get(key, getattr(self, key)))
        held = from_first(self._of_file)  # of a node's own disk the others might see another one
        self.take(held.get("metrics", {}), held.get("best_step", 0))
        self.last, self.last_step = state_dict["last"], state_dict["last_step"]

    def _of_file(self) -> dict[str, Any]:
        """What the saved best says of itself: it may be later than last.ckpt."""
        if self.path is None or not self.path.is_file() or problem(self.path) is not None:
            return {}
        found = read_checkpoint(self.path, lazy=True).get("callbacks", {}).get(self.state_key, {})
        return dict(found)
