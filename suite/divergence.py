"""Silent divergence, said in words: a loss that climbs, an alpha that runs away, a measure that
falls to its floor.

A run that diverges without a NaN ends with exit code 0 and a worthless model. What is watched here
is on the host already, the values of a logged window, so that it costs no step anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from lightning.pytorch.callbacks import Callback

from suite.module import Observer, SuiteModule

AT_ONCE = 3  # windows whose median is the level of the loss: one bad window is noise
HISTORY = 64  # differences of windows that the noise is estimated from
FEWEST = 8  # of them, before a climb is judged by noise
NOISE = 6.0  # times the noise of a level: a climb
SHARE = 0.5  # of what the loss had fallen by: a climb
ABOVE_START = 1.25  # times the first loss: worse than no training
GROWN, SHRUNK = 10.0, 0.01  # times an alpha's first value: it saturates, it lets nothing through


class DivergenceWatch(Callback, Observer):
    """Warns once for each episode of a loss above its running range or an alpha that runs away.

    warn: gets one line. A task whose training has a measure with a floor declares it in
    `collapse_watch`, name of a logged value -> the lowest that is still sound.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.recent: list[float] = []
        self.jumps: list[float] = []
        self.first: float | None = None
        self.best: float | None = None
        self.noise = 0.0
        self.alphas: dict[str, float] = {}
        self.said: list[str] = []

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        step = module.updates
        loss = values.get("train/loss", math.nan)
        if math.isfinite(loss):
            self._episode("loss", self._climb(loss), step)
        for name, value in values.items():
            if name.startswith("norm/") and name.endswith("/alpha") and math.isfinite(value):
                self._episode(name, self._ran_away(name, value), step)
        lowest: Mapping[str, float] = getattr(module, "collapse_watch", {})
        for name, floor in lowest.items():
            value = values.get(name, math.nan)
            text = f"{name} is {value:.3g}, below {floor:g}: it has collapsed. Lower optim.lr"
            self._episode(name, text if value < floor else None, step)

    def _episode(self, name: str, text: str | None, step: int) -> None:
        if text is None:
            self.said = [n for n in self.said if n != name]
        elif name not in self.said:
            self.said.append(name)
            self.warn(f"step {step}: {text}")

    def _climb(self, loss: float) -> str | None:
        """What is wrong with the level of the loss, if anything.

        Noise judges a loss that has fallen: of one that never did, the best is the first window,
        which is a single step's and by chance as low as it is.
        """
        if self.first is None or self.best is None:
            self.first = self.best = loss
        if self.recent:
            self.jumps = [*self.jumps, abs(loss - self.recent[-1])][-HISTORY:]
        self.recent = [*self.recent, loss][-AT_ONCE:]
        if len(self.recent) < AT_ONCE:
            return None
        level = median(self.recent)
        if level < self.best:
            self.best = level
            # of a normal distribution a median absolute difference is 0.954 deviations
            self.noise = median(self.jumps) / 0.954
        fallen = max(0.0, self.first - self.best)
        limit = self.best + max(NOISE * self.noise, SHARE * fallen)
        above = self.first + (ABOVE_START - 1) * abs(self.first)
        judged = len(self.jumps) >= FEWEST and self.noise > 0
        if level > max(above, limit) or (judged and level > limit):
            return (
                f"train/loss is {level:.4g}, was {self.best:.4g} at its best and {self.first:.4g} "
                "at first: training diverges. Lower optim.lr, lengthen its warm-up, or set "
                "trainer.gradient_clip_val=1"
            )
        return None

    def _ran_away(self, name: str, value: float) -> str | None:
        first = self.alphas.setdefault(name, value)
        if not first or SHRUNK <= abs(value / first) <= GROWN:
            return None
        return (
            f"{name} is {value:.3g}, {first:.3g} at first: it runs away. Lower optim.lr, or give "
            "norm.alpha_init another value"
        )

    def state_dict(self) -> dict[str, Any]:
        kept = ("recent", "jumps", "first", "best", "noise", "alphas", "said")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
