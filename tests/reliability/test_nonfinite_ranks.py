"""A NaN on one of two processes: both leave the step out, or both stop with the same words.

Run as a script this file is a worker, one of two: `test_nonfinite_ranks.py OUT.pt CASE ...`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ddp
TIMEOUT = 240
LM = [
    "task=language/lm",
    "model=llama_tiny",
    "model.heads=2",
    "trainer.strategy=fully_shard",
]
# masks differ between one process and two, and Adam makes noise of a gradient that is 0 as large as
# any other (a key's bias has none)
SAME = ["model.dropout=0.0", "optim.name=sgd"]
CASES: dict[str, list[str]] = {
    "nan": SAME,
    "forced": SAME,
    "nan-batchnorm": ["norm=batchnorm", "norm.sync=false"],
    "forced-batchnorm": ["norm=batchnorm", "norm.sync=false"],
    "nan-late": [*SAME, "optim.fused=true", "trainer.accumulate_grad_batches=2"],
    "forced-late": [*SAME, "optim.fused=true", "trainer.accumulate_grad_batches=2"],
    "nan-sharded": [*LM, "optim.fused=false"],
    "forced-sharded": [*LM, "optim.fused=false"],
    "nan-late-sharded": [*LM, "optim.fused=true"],
    "forced-late-sharded": [*LM, "optim.fused=true"],
    "stop": [],
    "stop-late": ["optim.fused=true"],
    "stop-sharded": LM,
    "weights": ["run.save_every_n_steps=1"],
}


def work(out: Path, names: list[str], *, world: int, rank: int) -> None:
    """The cases one after another; what each left goes to `out`."""
    from lightning.pytorch.callbacks import Callback
    from spoiled import INF, NAN, Late, Run, spoiled

    from suite.build import quiet
    from suite.errors import DivergedError
    from suite.nonfinite import NonFiniteGuard

    quiet()
    torch.set_num_threads(1)

    class Poison(Callback):
        """On the second process alone."""

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 3 and rank == 1:
                module.model.head.bias.data[0] = NAN

    def run(name: str) -> dict[str, Any]:
        kind: Any = Late if "late" in name else NonFiniteGuard
        if name.startswith("forced"):
            kind = forced(kind)
        policy = "stop" if name in ("weights", "stop") or "stop-" in name else "skip"
        tokens = [t for t in CASES[name] if world > 1 or "strategy" not in t]
        made = Run(
            f"trainer.devices={world}",
            *tokens,
            without="model.dropout" if "sharded" in name else "",
            guard=kind(policy),
            extra=(Poison(),) if name == "weights" else (),
            world=world,
            folder=Path(name),
        )
        micro = made.config.trainer.accumulate_grad_batches
        sample = made.at(2 * micro, rank=1, world=2)[0] if world > 1 else -1
        if name.startswith(("nan", "stop")):
            if "sharded" in name:
                spoiled(made, sample, lambda run, loss: loss + INF)
            else:
                made.damage({sample: NAN})
        error = None
        try:
            made.fit()
        except DivergedError as found:
            error = str(found)
        held = {n: whole_or_local(t) for n, t in made.weights.items()}
        optimizer = made.trainer.optimizers[0]
        moments = [
            {k: whole_or_local(v) for k, v in s.items() if v is not None}
            for s in optimizer.state.values()
        ]
        return {
            "weights": held,
            "moments": moments,
            "summary": made.guard.summary(),
            "error": error,
            "sample": sample,
            "saved": [str(p) for p in Path(name).rglob("last.ckpt")],
        }

    torch.save({name: run(name) for name in names}, out)


def forced(kind: Any) -> Any:
    """A guard that takes the third step to be bad, where every value is finite."""

    class Forced(kind):  # type: ignore[misc]
        def on_gradients(self, module: Any, norm: Any) -> None:
            super().on_gradients(module, norm * float("nan") if module.updates == 2 else norm)

    return Forced


def whole_or_local(tensor: Any) -> Any:
    from suite.sharding import whole

    return whole(tensor).clone()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has at the end of every case; then one process alone."""
    folder = tmp_path_factory.mktemp("ranks")
    from processes import environment

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GROUP_WORLD_SIZE": "1"}
    alone = ["forced", "forced-late"]
    plans: list[tuple[list[str], dict[str, str]]] = [
        ([*CASES], {**shared, "RANK": "0", "LOCAL_RANK": "0"}),
        ([*CASES], {**shared, "RANK": "1", "LOCAL_RANK": "1"}),
        (alone, {}),
    ]
    tests = str(Path(__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, f"{number}.pt", *names],
            cwd=folder,
            env={**environment(**variables), "EXTRA_PATH": tests},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, (names, variables) in enumerate(plans)
    ]
    try:
        outputs = [w.communicate(timeout=TIMEOUT)[0] for w in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [w.returncode for w in workers] == [0, 0, 0], "\n".join(outputs)
    both = [torch.load(folder / f"{n}.pt", weights_only=True) for n in range(3)]
    return [{**both[i], "output": outputs[i]} for i in range(3)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(torch.equal(a, b))


SKIPS = ["", "-batchnorm", "-late", "-sharded", "-late-sharded"]


@pytest.mark.timeout(TIMEOUT + 20)
@pytest.mark.parametrize("case", SKIPS)
def test_both_leave_the_same_step_out_to_the_bit(found: list[dict[str, Any]], case: str) -> None:
    """As does a training in which that step is left out without any NaN."""
    first, second = found[0][f"nan{case}"], found[1][f"nan{case}"]
    assert first["summary"] == second["summary"] == {"policy": "skip", "skipped": 1, "steps": [3]}
    expected = found[0][f"forced{case}"]
    for part in ("weights", "moments"):
        assert same(first[part], expected[part]), part
        if "batchnorm" not in case:  # whose statistics are each process's own until the next step
            assert same(first[part], second[part]), part
    assert all(t.isfinite().all() for t in first["weights"].values())


@pytest.mark.timeout(TIMEOUT + 20)
@pytest.mark.parametrize("case", ["", "-late"])
def test_one_process_leaves_it_out_as_two_do(found: list[dict[str, Any]], case: str) -> None:
    """But for the order of sums."""
    two, one = found[0][f"nan{case}"], found[2][f"forced{case}"]
    assert one["summary"] == two["summary"]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(TIMEOUT + 20)
@pytest.mark.parametrize("case", ["stop", "stop-late", "stop-sharded"])
def test_both_stop_with_the_line_of_the_one_that_had_it(
    found: list[dict[str, Any]], case: str
) -> None:
    first, second = found[0][case], found[1][case]
    assert first["error"] == second["error"]
    assert "non-finite loss or gradient at step 3, epoch 0, rank 1: first" in first["error"]
    assert ("the loss" if "sharded" in case else "batch['image'], then") in first["error"]
    assert str(first["sample"]) in first["error"].partition("samples")[2]
    assert all(t.isfinite().all() for t in first["weights"].values())


@pytest.mark.timeout(TIMEOUT + 20)
def test_weights_that_are_broken_on_one_process_alone_are_saved_by_none(
    found: list[dict[str, Any]],
) -> None:
    """A save is one for all: the first process writes it."""
    for rank in (0, 1):
        assert "step 3" in found[rank]["weights"]["error"]
        assert "head.bias" in found[rank]["weights"]["error"]
        (path,) = found[0]["weights"]["saved"]
    assert path.endswith("last.ckpt")


@pytest.mark.timeout(TIMEOUT + 20)
def test_a_skipped_step_is_told_once(found: list[dict[str, Any]]) -> None:
    lines = [x for x in found[0]["output"].splitlines() if x.startswith("warning: non-finite")]
    assert len(lines) == sum(name.startswith(("nan", "forced")) for name in CASES)
    assert sum("rank 1" in line for line in lines) >= len(SKIPS)
    assert "warning: non-finite" not in found[1]["output"]


if __name__ == "__main__":
    import os

    sys.path.insert(0, os.environ["EXTRA_PATH"])
    WORLD = int(os.environ.get("WORLD_SIZE", "1"))
    work(Path(sys.argv[1]), sys.argv[2:], world=WORLD, rank=int(os.environ.get("RANK", "0")))
