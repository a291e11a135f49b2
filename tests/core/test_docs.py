"""What the README and the docs show works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from suite.registry import load_task

ROOT = Path(__file__).parents[2]


def code_blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


def test_the_norm_of_the_readme_trains_with_no_edit_in_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = [b for b in code_blocks("README.md") if "class MyNorm" in b]
    assert len(source.splitlines()) <= 15
    (tmp_path / "my_norms.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from suite.train import main

    short = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    assert main(["norm=my_norms:MyNorm", "run.dir=a", *short, "trainer.accelerator=cpu"]) == 0
    content = torch.load("a/checkpoints/last.ckpt", weights_only=True)
    assert content["suite"]["norm"]["name"] == "my_norms:MyNorm"


def test_the_task_of_the_page_trains_with_a_file_and_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, names = code_blocks("docs/adding_a_task.md")
    (tmp_path / "rotate.py").write_text(source)
    import tasks.vision

    monkeypatch.setattr(tasks.vision, "__path__", [*tasks.vision.__path__, str(tmp_path)])
    scope: dict[str, tuple[str, ...]] = {}
    exec(names, scope)
    monkeypatch.setattr(tasks, "NAMES", scope["NAMES"])
    monkeypatch.chdir(tmp_path)
    from suite.train import main

    short = ["trainer.max_steps=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    for norm in ("dyt", "layernorm"):
        tokens = ["task=vision/rotate", f"norm={norm}", f"run.dir={norm}", *short]
        assert main([*tokens, "trainer.accelerator=cpu"]) == 0
    assert load_task("vision/rotate").unit == "images"


def test_the_tree_in_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    modules = [p for folder in ("suite", "tasks", "scripts") for p in (ROOT / folder).rglob("*.py")]
    missing = [p.name for p in modules if p.name != "__init__.py" and p.name not in readme]
    assert missing == []


@pytest.mark.parametrize("module", ["suite.train", "suite.sweep", "suite.report", "suite.bench"])
def test_help_is_light(module: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'tasks.vision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_the_page_on_performance_is_what_the_saved_results_say() -> None:
    script = ROOT / "scripts" / "performance_page.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
