"""Runs suite.train in processes that are forked from one that has imported everything.

So a run that is to be killed costs half a second and not five. Reads a JSON object a line on
stdin: {"argv": [...], "env": {...}, "cwd": ..., "log": file}; answers with the pid, and, for
{"wait": pid}, with its exit code (negative: the signal).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import tasks.vision.classify  # noqa: F401
from suite.train import main


def child(order: dict[str, Any]) -> None:
    """In the forked process: one run, whose exit code is the process's."""
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    rank_zero_only.rank = int(order["env"].get("RANK", 0))  # Lightning looks when it is imported
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 99
    try:
        code = main(order["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(order)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
