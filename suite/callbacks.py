"""What watches a run: throughput, norm statistics, non-finite guard, progress."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from suite.cache import say_once
from suite.checkpoint import read_checkpoint
from suite.errors import DivergedError
from suite.module import Batch, Observer, SuiteModule
from suite.norms import norm_modules
from suite.sharding import local, whole

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


class NonFiniteGuard(Callback, Observer):
    """Stops a run on a non-finite loss or gradient and names the step, the batch and the sites.

    The gradient norm is the same on all ranks after the all-reduce, so all of them stop together.
    On a CPU the check comes before the update; on a GPU it reads the last step's flag, so as not to
    make the host wait for the device in every step, and before a checkpoint is written. The
    GradScaler of 16-mixed skips such steps by design; two windows of them in a row are too many.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor, Batch | None, int] | None = None
        self._scaled, self._bad_windows = False, 0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._scaled = trainer.precision == "16-mixed"

    def on_gradients(self, module: SuiteModule, norm: Tensor) -> None:
        if self._scaled:
            return
        if norm.device.type != "cuda":
            if not math.isfinite(float(norm)):
                step = module.trainer.global_step + 1
                raise DivergedError(self.describe(module, module.batch, step))
            return
        self._check_last_step(module)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(torch.isfinite(norm), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (event, flag, module.batch, module.trainer.global_step + 1)

    def _check_last_step(self, module: SuiteModule) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            event, flag, batch, step = pending
            event.synchronize()
            if not bool(flag):
                raise DivergedError(self.describe(module, batch, step))

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(module, SuiteModule)
        self._check_last_step(module)

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        finite = math.isfinite(values["train/loss"])
        self._bad_windows = 0 if finite else self._bad_windows + 1
        if self._scaled and self._bad_windows == 2:
            raise DivergedError(self.describe(module, module.batch, module.trainer.global_step))

    def describe(self, module: SuiteModule, batch: Batch | None, step: int) -> str:
        """One line: where the first non-finite value is."""
        epoch = module.current_epoch
        where = f"step {step}, epoch {epoch}, rank {module.global_rank}"
        gradients = [
            n
            for n, p in module.named_parameters()
            if p.grad is not None and not local(p.grad).isfinite().all()
        ]
        if batch is None:
            return f"non-finite gradient at {where}"
        ids = batch["sample_id"].tolist()
        samples = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        found = locate(module, batch)
        if found:
            cause = f"first non-finite output in {found[0]}" + (
                f", then {', '.join(found[1:4])}" if found[1:] else ""
            )
        elif gradients:
            names = ", ".join(gradients[:3])
            cause = f"the forward pass is finite on this rank; non-finite gradients in {names}"
        else:
            cause = "all values are finite on this rank"
        return (
            f"non-finite loss or gradient at {where}: {cause}; samples {samples}. "
            "Lower optim.lr, set trainer.gradient_clip_val=1, or look at these samples"
        )


@torch.no_grad()
def locate(module: SuiteModule, batch: Batch) -> list[str]:
    """Names of the modules whose output is not finite, in forward order, norms with their site."""
    found: list[str] = []
    for name, value in batch.items():
        if value.is_floating_point() and not value.isfinite().all():
            found.append(f"batch[{name!r}]")
    with watch_outputs(module.model, found):
        module.step(batch, "train")
    return found


@contextmanager
def watch_outputs(model: nn.Module, found: list[str]) -> Iterator[None]:
    """While open, append the name of every leaf or norm whose output is not finite."""
    norms = {id(m): m for _, m in norm_modules(model)}
    handles = []

    def hook(label: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(label)

        return look

    for name, child in model.named_modules():
        if id(child) in norms:
            norm: Any = norms[id(child)]
            handles.append(
                child.register_forward_hook(hook(f"{name} ({norm.site}, {norm.norm_name})"))
            )
        elif not list(child.children()):
            handles.append(child.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        better = self.take(found, trainer.global_step)
        # a resumed run may repeat the validation that was the best
        new = better or trainer.global_step == self.best_step
        self.waited = 0 if new else self.waited + 1
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
        if self.path is not None and self.path.is_file():  # it may be later than last.ckpt
            held = (
                read_checkpoint(self.path, lazy=True).get("callbacks", {}).get(self.state_key, {})
            )
            self.take(held.get("metrics", {}), held.get("best_step", 0))
            self.last, self.last_step = state_dict["last"], state_dict["last_step"]
