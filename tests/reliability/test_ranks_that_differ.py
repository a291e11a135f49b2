"""A rank that fails before the first step, and ranks that differ in what they would choose.

Run as a script this file is the worker: `test_ranks_that_differ.py FAULT key=value ...` is
suite.train with that fault put into the second rank.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import assert_nothing_is_left, end, result, started

TIMEOUT = 180
BASE = [
    "data.batch_size=32",
    "trainer.limit_train_batches=4",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "run.tensorboard=false",
]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_rank_that_fails_before_the_first_step_is_recorded(tmp_path: Path) -> None:
    """Lightning's observer killed rank 0 as it waited: exit code 137 and no result.json."""
    command = [__file__, "early", *BASE, "trainer.devices=2", "run.dir=run"]
    with started(command, tmp_path) as process:
        code, output = end(process, seconds=TIMEOUT)
        assert code == 1, output
        assert_nothing_is_left(process)
    found = result(tmp_path / "run")
    assert (found["status"], "rank 1" in found["error"]) == ("failed", True)
    assert "error (rank 1): RuntimeError: broken before the start" in output


@pytest.mark.timeout(2 * TIMEOUT)
def test_ranks_of_torchrun_test_the_same_weights_each_example_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone chooses the folder; the best weights are not the last ones."""
    from suite.train import main

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    # the last evaluation batch has 1000 - 31 * 32 = 8 rows, all of them of rank 0
    command = [__file__, "late", *BASE, "data.eval_batch_size=31"]
    with ExitStack() as stack:
        ranks = []
        for rank in ("0", "1"):
            place = {**shared, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"}
            ranks.append(stack.enter_context(started(command, tmp_path, **place)))
        for process in ranks:
            code, output = end(process, seconds=TIMEOUT)
            assert code == 0, output
    (path,) = (tmp_path / "runs").rglob("result.json")
    found = json.loads(path.read_text())
    assert found["primary"]["best_step"] == 4
    assert found["metrics"]["test/count"] == found["metrics"]["val/count"] == 1000
    monkeypatch.chdir(tmp_path)
    assert main([f"evaluate={path.parent}", "trainer.devices=1", "trainer.num_nodes=1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    for name in ("test/loss", "test/acc", "test/acc_top5"):
        assert found["metrics"][name] == pytest.approx(alone[name], rel=1e-5)


def worker(fault: str, tokens: list[str]) -> int:
    """suite.train with the fault."""
    import torch

    import suite.run
    from suite.module import SuiteModule
    from suite.train import main

    torch.set_num_threads(1)
    second = os.environ.get("LOCAL_RANK") == "1"

    if fault == "early" and second:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken before the start")

        suite.run.build_parts = fail
    if fault == "late":
        log, choose = SuiteModule.log_dict, suite.run.choose_place

        def falling(self: Any, values: dict[str, Any], **kwargs: Any) -> None:
            if "val/acc" in values:
                values = {**values, "val/acc": torch.tensor(1.0 / self.trainer.global_step)}
            log(self, values, **kwargs)

        def of_the_first(config: Any) -> Any:
            assert not second
            return choose(config)

        SuiteModule.log_dict = falling  # type: ignore[method-assign, assignment]
        suite.run.choose_place = of_the_first
    return main(tokens)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], sys.argv[2:]))
