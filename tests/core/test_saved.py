"""suite.benches.saved: where a measurement is kept, what its files say, and that they are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.benches import saved
from suite.errors import ConfigError

CPU = torch.device("cpu")
HEADER = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "570.1",
    "cuda": "13.0",
    "threads": 8,
    "python": "3.12.1",
    "system": "Linux",
    "date": "2026-01-02",
    "versions": {"torch": "2.14.1", "triton": None, "liger-kernel": "0.6"},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def kept(result: dict[str, Any], **more: Any) -> Path:
    words = {"markdown": "a table", "command": "python -m suite.bench norms", **more}
    return saved.keep("norms", device=CPU, result=result, **words)


def test_a_cpu_is_named_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "hardware", lambda: {"cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz"})
    assert saved.device_slug(CPU) == "cpu-intel-xeon-cpu-2-00ghz-1-thread"
    torch.set_num_threads(2)
    assert saved.device_slug(CPU).endswith("-2-threads")


def test_a_gpu_is_named_as_its_maker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert saved.device_slug(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"


def test_the_header_says_device_versions_and_day() -> None:
    found = saved.header(CPU)
    assert found["device"] == saved.device_name(CPU)
    assert found["threads"] == 1
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert (found["driver"], found["cuda"]) == (None, None)


def test_header_lines_name_driver_and_cuda_of_a_gpu_and_leave_out_what_is_not_installed() -> None:
    text = "\n".join(saved.header_lines(HEADER))
    assert "NVIDIA H100 80GB HBM3, driver 570.1, CUDA 13.0" in text
    assert "Python 3.12.1, torch 2.14.1, liger-kernel 0.6, Linux" in text
    assert "triton" not in text
    assert "threads" in saved.header_lines({**HEADER, "cuda": None})[0]


def test_files_are_kept_under_the_device_and_open_with_command_and_header() -> None:
    folder = kept({"bench": "norms", "rounds": [1.5, float("nan")]})
    assert folder == Path("benchmarks") / saved.device_slug(CPU)
    found = json.loads((folder / "norms.json").read_text())
    assert (found["bench"], found["rounds"]) == ("norms", [1.5, None])
    assert found["header"]["device"] == saved.device_name(CPU)
    lines = (folder / "norms.md").read_text().splitlines()
    assert lines[:3] == ["```sh", "python -m suite.bench norms", "```"]
    assert lines[4].startswith("- device: ")
    assert lines[-1] == "a table"


def test_the_header_of_the_result_is_not_taken_again() -> None:
    folder = kept({"header": HEADER})
    assert json.loads((folder / "norms.json").read_text())["header"] == HEADER
    assert "- measured: 2026-01-02" in (folder / "norms.md").read_text()


def test_a_second_measurement_replaces_the_first_and_leaves_no_draft() -> None:
    def draw(path: Path) -> None:
        assert path.suffix == ".png"
        path.write_bytes(b"picture")

    kept({"value": 1})
    folder = kept({"value": 2}, pictures={"roofline": draw})
    assert sorted(p.name for p in folder.iterdir()) == ["norms.json", "norms.md", "roofline.png"]
    assert json.loads((folder / "norms.json").read_text())["value"] == 2
    assert (folder / "norms.md").read_text().endswith("![roofline](roofline.png)\n")


def test_a_picture_that_fails_leaves_the_older_one_whole() -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no")

    folder = kept({}, pictures={"roofline": lambda path: path.write_bytes(b"old") and None})
    with pytest.raises(RuntimeError, match="no"):
        kept({}, pictures={"roofline": fail})
    assert (folder / "roofline.png").read_bytes() == b"old"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".tmp")] == []


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured() -> None:
    saved.check_folder(CPU)
    assert not Path("benchmarks").exists()
    Path("benchmarks").write_text("")
    with pytest.raises(ConfigError, match=r"^--save: benchmarks.*not a folder.*leave --save out$"):
        saved.check_folder(CPU)


def test_a_folder_that_cannot_be_written_is_said_in_one_line() -> None:
    Path("benchmarks").write_text("a file")
    with pytest.raises(ConfigError, match=r"--save: benchmarks/.* cannot be written") as caught:
        kept({})
    assert len(str(caught.value).splitlines()) == 1
