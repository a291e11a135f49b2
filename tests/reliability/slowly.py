"""suite.train, slowed down or broken in one place, so that a test can look at what follows.

usage: slowly.py PLACE FOLDER key=value ...   PLACE: start, step, validation, save or test. A rank
that gets there touches FOLDER/PLACE-<rank>; a step or a batch then takes a tenth of a second, the
rest two seconds. Or a fault, with a rank: raise-1, kill-0, exit-1, hang-1: what that rank does in
its eighth step, once: FOLDER/fault says that it was.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = {"start": 2.0, "step": 0.1, "validation": 0.1, "save": 2.0, "test": 0.1}


def main(place: str, folder: str, tokens: list[str]) -> int:
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))

    fault, _, culprit = place.partition("-")

    def break_down(trainer: Any) -> None:
        mark = Path(folder) / "fault"
        if culprit != rank or trainer.global_step != 7 or mark.exists():
            return
        mark.touch()
        if fault == "raise":
            raise RuntimeError("broken on purpose")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exit":
            os._exit(7)
        time.sleep(1000)

    def slow(where: str) -> None:
        if where == place:
            (Path(folder) / f"{place}-{rank}").touch()
            time.sleep(SECONDS[place])

    import torch
    from lightning.pytorch.callbacks import Callback

    import suite.run
    from suite.saving import CheckpointFiles
    from suite.train import main as train

    torch.set_num_threads(1)

    class Slow(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            slow("step")
            break_down(trainer)

        def on_validation_batch_start(self, *args: Any) -> None:
            slow("validation")

        def on_test_batch_start(self, *args: Any) -> None:
            slow("test")

    build, callbacks, save = (
        suite.run.build_parts,
        suite.run.build_callbacks,
        CheckpointFiles.save_checkpoint,
    )

    def build_slowly(*args: Any, **kwargs: Any) -> Any:
        slow("start")
        return build(*args, **kwargs)

    def save_slowly(self: Any, *args: Any, **kwargs: Any) -> None:
        slow("save")
        save(self, *args, **kwargs)

    suite.run.build_parts = build_slowly
    suite.run.build_callbacks = lambda *a, **k: [Slow(), *callbacks(*a, **k)]
    CheckpointFiles.save_checkpoint = save_slowly  # type: ignore[method-assign]
    return train(tokens)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
