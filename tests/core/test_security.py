"""What comes from elsewhere runs nothing: checkpoints, recipes and runs that were made to do harm.

Every attack is a real file that goes through the real command line. The payload of a pickle makes a
file named `executed`; none may ever be there, and no run's folder either.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from suite import train as entry
from suite.config import load
from suite.errors import ConfigError
from suite.report import main as report
from suite.safety import check_archive, check_values, printable
from suite.sweep import main as sweep

SMALL = ["trainer.accelerator=cpu", "trainer.max_epochs=1", "run.tensorboard=false"]
SMALL += ["model.dim=16", "model.depth=1", "model.heads=1", "data.batch_size=32"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("SUITE_RUN_DIR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    yield
    assert not (tmp_path / "executed").exists(), "code from a file was executed"
    assert not Path("runs").exists(), "something was written"


class Payload:
    """Unpickling it makes a file, which shows that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def refused(capsys: pytest.CaptureFixture[str], *tokens: str) -> str:
    """The one line of an error with exit code 2, without a character that a terminal obeys."""
    code = entry.main([*SMALL, *tokens])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert code == 2, lines
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "Traceback" not in lines[0]
    return lines[0]


def config_error(*tokens: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(tokens))
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- checkpoints ----------------------------------------------------------------------------------


def torch_zip(file: Path, pickled: bytes, **options: Any) -> None:
    """A checkpoint as torch.save lays it out, with any bytes as its data.pkl."""
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(64))
        archive.writestr("a/version", "3\n")


def code_in_a_zip(file: Path, mark: Path) -> None:
    torch_zip(file, pickle.dumps({"state_dict": Payload(mark)}, protocol=2))


def code_in_a_legacy_file(file: Path, mark: Path) -> None:
    with file.open("wb") as out:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Payload(mark), []):
            pickle.dump(part, out, protocol=2)


def code_in_a_bare_pickle(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(mark)))


def code_in_a_tar(file: Path, mark: Path) -> None:
    content = pickle.dumps(Payload(mark), protocol=2)
    with tarfile.open(file, "w") as archive:
        for name in ("storages", "tensors", "pickle", "../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def torchscript(file: Path, mark: Path) -> None:
    torch_zip(file, pickle.dumps({}, protocol=2))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(Payload(mark), protocol=2))


def code_under_an_allowed_name(file: Path, mark: Path) -> None:
    """builtins.eval by way of a class that torch lets through."""
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00acbuiltins\neval\n"
    pickled += b"(X%ctRub." % bytes([1]) + b"\x00" * 3
    torch_zip(file, pickled)


CODE = [
    code_in_a_zip,
    code_in_a_legacy_file,
    code_in_a_bare_pickle,
    code_in_a_tar,
    torchscript,
    code_under_an_allowed_name,
]
KEYS = {
    "model.init_from": lambda file: f"model.init_from={file}",
    "evaluate": lambda file: f"evaluate={file}",
}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize("attack", CODE)
def test_no_checkpoint_runs_code(
    attack: Callable[[Path, Path], None],
    suffix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / f"weights{suffix}"
    attack(file, tmp_path / "executed")
    from suite.checkpoint import read_checkpoint

    for lazy in (False, True):
        with pytest.raises(ConfigError) as caught:
            read_checkpoint(file, lazy=lazy)
        assert "not a readable" in str(caught.value)
        assert str(caught.value).isprintable()
        assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_the_command_line_ends_in_one_line_before_code_of_a_checkpoint_runs(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.ckpt"
    code_in_a_zip(file, tmp_path / "executed")
    assert "not a readable checkpoint of tensors" in refused(capsys, f"{key}={file}")


def make_run(folder: Path, config: str = "") -> Path:
    """A run's folder from elsewhere. config: more lines of its config.yaml."""
    (folder / "checkpoints").mkdir(parents=True)
    task = "" if "task:" in config else "task: vision/classify\n"
    (folder / "config.yaml").write_text(f"{task}trainer:\n  max_epochs: 1\n{config}")
    return folder


def test_a_run_from_elsewhere_runs_no_code_when_it_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # it must not undo ours
    run = make_run(tmp_path / "run")
    code_in_a_zip(run / "checkpoints" / "last.ckpt", tmp_path / "executed")
    refused(capsys, f"run.resume={run}")
    assert not (run / "result.json").exists()


def packed(file: Path) -> None:
    torch_zip(file, pickle.dumps({"a": "0" * 10**7}, protocol=2), compression=zipfile.ZIP_DEFLATED)


def overlapping(file: Path) -> None:
    """Two entries of the table that are one in the file, as in Fifield's bombs."""
    torch_zip(file, pickle.dumps({}, protocol=2))
    with zipfile.ZipFile(file, "a") as archive:
        again = zipfile.ZipInfo("a/data/1")
        first = archive.getinfo("a/data/0")
        for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
            setattr(again, name, getattr(first, name))
        archive.filelist.append(again)
        archive.NameToInfo[again.filename] = again
        archive._didModify = True  # type: ignore[attr-defined]


def longer_than_the_file(file: Path) -> None:
    torch_zip(file, pickle.dumps({}, protocol=2))
    content = bytearray(file.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<LL", 2**31, 2**31)
    file.write_bytes(content)


def two_of_one_name(file: Path) -> None:
    torch_zip(file, pickle.dumps({}, protocol=2))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", pickle.dumps({"b": 1}, protocol=2))


def laughs(file: Path) -> None:
    value: Any = ["ha"]
    for _ in range(40):
        value = [value] * 10
    torch.save({"state_dict": {}, "suite": value}, file)


def nested(file: Path) -> None:
    torch_zip(file, b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 10**4 + b"a" * (10**4 - 1) + b"s.")


def endless(file: Path) -> None:
    value: dict[str, Any] = {}
    value["config"] = value
    torch.save({"suite": value}, file)


def expanded(file: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, file)


def sparse(file: Path) -> None:
    torch.save({"a": torch.sparse_coo_tensor(torch.tensor([[0]]), [1.0], (2**40,))}, file)


def on_meta(file: Path) -> None:
    torch.save({"a": torch.zeros(4, device="meta")}, file)


BOMBS = {
    packed: "is compressed",
    overlapping: "overlaps another",
    longer_than_the_file: "overlaps another or the end of the file",
    two_of_one_name: "two of its parts have one name",
    laughs: "more than 10,000,000 values",
    nested: "nested deeper than 64 levels",
    endless: "it holds itself",
    expanded: "a tensor of 4,096 GiB",
    sparse: "sparse, quantized, or without values",
    on_meta: "sparse, quantized, or without values",
}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(
    bomb: Callable[[Path], None], tmp_path: Path
) -> None:
    from suite.checkpoint import read_checkpoint

    file = tmp_path / "weights.ckpt"
    bomb(file)
    with pytest.raises(ConfigError, match=BOMBS[bomb]):
        read_checkpoint(file, lazy=True)


def test_a_bomb_is_one_line_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(tmp_path / "weights.ckpt")
    line = refused(capsys, f"model.init_from={tmp_path / 'weights.ckpt'}")
    assert "its part a/data.pkl is compressed" in line


def test_what_torch_and_this_suite_save_is_no_bomb(tmp_path: Path) -> None:
    from suite.checkpoint import read_checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    tied = {"a": model[0].weight, "b": model[0].weight, "c": torch.arange(5).expand(7, 5)}
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"state_dict": tied, "o": optimizer.state_dict(), "s": torch.Size([3]), "n": None}
    for legacy in (False, True):
        file = tmp_path / "own.ckpt"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        assert read_checkpoint(file, lazy=True)["state_dict"]["c"].shape == (7, 5)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10**6) + b"{}",
        struct.pack("<Q", 67)
        + b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}',
        struct.pack("<Q", 2) + b"[[",
        b"",
    ],
)
def test_a_safetensors_header_that_says_more_than_the_file_has_is_refused(
    header: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.safetensors").write_bytes(header)
    line = refused(capsys, f"model.init_from={tmp_path / 'a.safetensors'}")
    assert "not a readable safetensors file" in line


@pytest.mark.parametrize(
    "named",
    [
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "/etc/a.safetensors"}}',
        '{"weight_map": {"a": "a\\u0000.safetensors"}}',
        '{"weight_map": {"a": "\\u001b[2Ja.bin"}}',
        '{"weight_map": {"a": ["a"]}}',
        '{"weight_map": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "[1]",
    ],
    ids=["up", "absolute", "nul", "escape", "list", "nested", "no map"],
)
def test_an_index_names_files_beside_it_alone(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(named)
    assert str(index) in refused(capsys, f"model.init_from={index}")


@pytest.mark.parametrize(
    "identity",
    [
        {"norm": [], "config": {}},
        {"norm": {"name": ["dyt"]}, "config": {}},
        {"norm": {"name": "dyt", "by_site": 3}, "config": {}},
        {"norm": {"name": "dyt"}, "config": {"model": [1]}},
        {"norm": {"name": "dyt"}, "meaning": "text"},
        {"norm": {"name": "\x1b[2J"}, "config": {}},
        {"norm": {"name": "dyt"}, "config": {"model": {"heads": [["x"] * 1000] * 1000}}},
    ],
)
def test_an_identity_of_other_kinds_is_a_damaged_file(
    identity: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "suite": identity}, tmp_path / "w.ckpt")
    assert "model.init_from=" in refused(capsys, f"model.init_from={tmp_path / 'w.ckpt'}")


# --- addresses ------------------------------------------------------------------------------------

ADDRESSES = [
    *("http://x.org/w.ckpt", "https://x.org/w.ckpt", "ftp://x/w.ckpt", "s3://b/w.ckpt"),
    *("gs://b/w.ckpt", "hf://u/m", "file:///etc/passwd", "//server/share", "zip::s3://b/w.zip"),
    "\\\\server\\share",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "key", ["model.init_from", "evaluate", "run.resume", "run.dir", "config", "recipe", "data.root"]
)
def test_an_address_is_refused_in_every_key_that_takes_a_path(key: str, address: str) -> None:
    data = ["data=fashion_mnist"] if key == "data.root" else []
    text = config_error(*data, f"{key}={address}")
    assert text.startswith(f"{key}={address}: ")
    assert "nothing is fetched" in text


# --- YAML -----------------------------------------------------------------------------------------

HEAD = "task: vision/classify\n"
HONEST = HEAD + "trainer: {max_epochs: 1}\n"
LAUGHS = (
    HEAD
    + "model:\n  a0: &a0 [x]\n"
    + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
)
EVIL_YAML = {
    "code": (HEAD + "seed: !!python/object/apply:os.system ['touch ../executed']\n", "not valid"),
    "new": (HEAD + "seed: !!python/object/new:os.system ['touch ../executed']\n", "not valid"),
    "name": (HEAD + "seed: !!python/name:os.system\n", "line 2: not valid YAML"),
    "own tag": (HEAD + "seed: !run x\n", "line 2: not valid YAML"),
    "laughs": (LAUGHS, "more than 100,000 values"),
    "itself": (HEAD + "model: &a\n  x: *a\n", "it holds itself"),
    "huge": (HEAD + "# " + "x" * 2**21, "has more than 1 MB"),
    "nested": (HEAD + "seed: " + "[" * 400 + "]" * 400, "nested"),
    "twice": (HEAD + "seed: 1\nseed: 2\n", "duplicate key"),
    "list": ("- a\n", "must hold sections"),
    "text": ("hello\n", "hello: no such key"),
    "tab": (HEAD + "trainer:\n\tmax_epochs: 1\n", "line 3: not valid YAML"),
    "binary": ("\udc80\udcff\x00", "not UTF-8"),
    "nul": (HEAD + "\x00", "cannot be read"),
    "escape": (HEAD + 'run: {dir: "\\e[2J"}\n', "run.dir=\\x1b[2J: holds \\x1b"),
    "nul text": (HEAD + 'run: {dir: "a\\0b"}\n', "holds \\x00"),
    "bytes key": (HEAD + "norm: {by_site: {!!binary YQ==: dyt}}\n", "is not text"),
    "environment": (HEAD + "run: {dir: '${oc.env:HOME}'}\n", "not evaluated here"),
    "decode": (HEAD + "seed: ${oc.decode:1}\n", "not evaluated here"),
    "create": (HEAD + "norm: {by_site: '${oc.create:{a:1}}'}\n", "not evaluated here"),
    "own resolver": (HEAD + "seed: '${now:%Y}'\n", "not evaluated here"),
    "nested one": (HEAD + "seed: '${oc.env:${run.dir}}'\n", "not evaluated here"),
    "escaped": (HEAD + "run: {dir: '\\${oc.env:HOME}'}\n", "not evaluated here"),
    "in a name": (HEAD + "recipe: '${oc.env:HOME}'\n", "not evaluated here"),
    "whole": ("${oc.env:HOME}\n", "no such key"),
    "in a key": (HEAD + "'${oc.env:HOME}': {a: 1}\n", "no such key"),
    "missing": (HEAD + "seed: ???\n", "not evaluated here"),
    "class": (HEAD + "norm: antigravity:Class\n", "code is imported for the command line only"),
    "classes": (HEAD + "norm: {by_site: {final: 'os:system'}}\n", "code is imported for"),
    "up": (HEAD + "run: {dir: ../../x}\n", "below the one you are in"),
    "absolute": (HEAD + "run: {dir: /tmp/x}\n", "below the one you are in"),
    "home": (HEAD + "run: {dir: ~/x}\n", "below the one you are in"),
    "other run": (HEAD + "run: {resume: /home/x/run}\n", "below the one you are in"),
    "address": (HEAD + "model: {init_from: 'https://x.org/a.ckpt'}\n", "download it first"),
}


@pytest.mark.parametrize("key", ["config", "recipe"])
@pytest.mark.parametrize("case", EVIL_YAML)
def test_a_file_of_values_says_values_and_nothing_more(
    case: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/secret")
    content, says = EVIL_YAML[case]
    file = tmp_path / "evil.yaml"
    file.write_bytes(content.encode(errors="surrogateescape"))
    text = config_error(f"{key}={file}")
    assert says in text
    assert "/secret" not in text
    if "no such key" not in says:
        assert text.startswith(str(file))


def test_the_config_of_a_run_from_elsewhere_is_read_as_values(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for case in ("code", "laughs", "environment", "class", "classes", "address", "escape"):
        config, says = EVIL_YAML[case]
        (run / "config.yaml").write_text(config)
        assert says in config_error(f"evaluate={run}"), case


@pytest.mark.parametrize(
    "token",
    [
        *("run.dir=${oc.env:HOME}", "run.dir=a\\${oc.env:HOME}", "model.init_from=${oc.decode:x}"),
        *("seed=${oc.create:{a:1}}", "seed=!!python/object/apply:os.system [ls]", "seed='${now:}'"),
    ],
)
def test_the_command_line_evaluates_nothing_either(token: str) -> None:
    text = config_error(token)
    assert "not evaluated here" in text or "not a value that YAML can read" in text


def test_a_dollar_sign_without_a_brace_is_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(HONEST + "run: {dir: 'cost$5'}\n")
    assert load([f"recipe={tmp_path / 'mine.yaml'}"]).settled.run.dir == "cost$5"
    assert load(["run.dir=$HOME/x"]).settled.run.dir == "$HOME/x"


def test_anchors_of_an_honest_file_are_kept(tmp_path: Path) -> None:
    text = HONEST + "optim:\n  lr: &r 1e-4\n  min_lr: *r\nseed: &s 3\n"
    (tmp_path / "mine.yaml").write_text(text)
    optim = load([f"recipe={tmp_path / 'mine.yaml'}"]).settled.optim
    assert (optim.lr, optim.min_lr) == (1e-4, 1e-4)


def test_a_class_that_the_command_line_names_too_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(HONEST + "norm: torch.nn:LayerNorm\n")
    given = [f"config={tmp_path / 'mine.yaml'}", "norm=torch.nn:LayerNorm"]
    assert load(given).settled.norm_name == "torch.nn:LayerNorm"


# --- runs from elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json"])
def test_a_resumed_run_is_not_written_through_a_link(name: str, tmp_path: Path) -> None:
    run, target = make_run(tmp_path / "run"), tmp_path / "target"
    target.write_text(HEAD)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    assert "is a link, which is never written through" in config_error(f"run.resume={run}")
    assert target.read_text() == HEAD


def result(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "schema": 1,
        "status": "done",
        "error": None,
        "task": "vision/classify",
        "model": "vit",
        "norm": "dyt",
        "norm_options": {},
        "data": {"name": "toy", "license": "x", "sizes": {"train": 1}},
        "seed": 0,
        "primary": {"name": "acc", "direction": "max", "split": "val", "best": 0.5, "test": 0.5},
        "config": {},
        "command": "python -m suite.train",
        "run_dir": "../../elsewhere",
    }
    return {**found, **changes}


def test_a_result_cannot_write_to_the_terminal_or_into_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x07<img src=x onerror=alert(1)> [a](javascript:b) ![c](http://d)\u202e\r\n# x"
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    content = result(
        model=evil,
        data={"name": evil, "license": evil, "source": evil, "sizes": {evil: evil}},
        command=f"```\n<script>{evil}",
        versions={evil: evil},
        hardware={"cpu": evil, "gpus": [evil]},
        status="failed",
        error=evil,
    )
    (run / "result.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    for form in ("terminal", "markdown", "csv"):
        assert report([str(tmp_path / "runs"), "--format", form, "--out", str(out)]) == 0
        shown = capsys.readouterr()
        for text in (shown.out, shown.err):
            assert all(line.isprintable() for line in text.split("\n")), form
    page = (out / "report.md").read_text()
    assert "<img" not in page
    assert "<script" not in page
    assert "](javascript" not in page
    assert "](http" not in page
    assert page.count("```") == 2
    assert "\n# x" not in page
    assert not (tmp_path / "elsewhere").exists()
    assert sorted(p.name for p in out.iterdir()) == ["report.csv", "report.md"]


@pytest.mark.parametrize("name", ["=cmd|'/c calc'!A1", "+1", "@SUM(A1)", "-2+3"])
def test_a_name_that_a_spreadsheet_would_compute_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(model=name)))
    assert report([str(tmp_path), "--format", "csv"]) == 2
    assert "which is no name" in capsys.readouterr().err


BROKEN: dict[str, Any] = {
    "nested": "[" * 10**5,
    "not text": b"\xff\xfe\x00",
    "huge number": json.dumps(result()).replace('"best": 0.5', '"best": ' + "9" * 4000),
    "other kinds": json.dumps(result(metrics=[1], throughput=3)),
    "sizes": json.dumps(result(data={"sizes": [1]})),
    "gpus": json.dumps(result(hardware={"gpus": {"a": 1}})),
    "versions": json.dumps(result(versions="x")),
    "null": "null",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_result_is_a_line_and_not_a_traceback(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = BROKEN[case]
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "result.json").write_bytes(raw)
    code = report([str(tmp_path)])
    err = capsys.readouterr().err
    assert code == (0 if case == "huge number" else 2)
    assert "Traceback" not in err
    assert case == "huge number" or str(tmp_path) in err


def test_metrics_of_any_kind_leave_the_curve_that_can_be_read(tmp_path: Path) -> None:
    from suite.records import read_curve

    lines = ['{"step": 1, "val/acc": 0.5}', '{"step": "x", "val/acc": 1}', "[" * 10**5, "\udc80"]
    lines += ['{"step": 1e400, "val/acc": 1}', '{"step": null, "val/acc": 1}', '{"val/acc": 1}']
    text = "\n".join(lines).encode(errors="surrogateescape")
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert read_curve(tmp_path, key="val/acc") == {1: 0.5}


def test_a_sweep_runs_nothing_that_a_finished_run_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    cell = out / "seed-0"
    cell.mkdir(parents=True)
    command = f"touch {tmp_path / 'executed'}"
    found = result(
        config={"seed": "seed=0"}, command=command, primary={"name": "\x1b[2J", "best": 0.5}
    )
    (cell / "result.json").write_text(json.dumps(found))
    given = ["seed=0,1", "--out", str(out), "--dry-run"]
    code = sweep(given, command=["false"], resolve=lambda tokens: {"seed": tokens[0]})
    text = capsys.readouterr().out
    assert code == 0
    assert "seed-0  [done, skipped]" in text
    assert "touch" not in text
    assert "\x1b" not in text


# --- names and values -----------------------------------------------------------------------------


def test_printable_keeps_honest_text_and_spells_out_the_rest() -> None:
    assert printable("/data/größe 1/图.png") == "/data/größe 1/图.png"
    assert printable("a\x1b[31m\r\x00\u202eb\ud800") == "a\\x1b[31m\\r\\x00\\u202eb\\ud800"
    assert printable("a\nb\tc") == "a b c"


def test_values_are_counted_as_they_would_be_written_out() -> None:
    shared: list[Any] = [1, 2, 3]
    check_values({"a": [shared] * 10}, most=43)
    with pytest.raises(ValueError, match="more than 42 values"):
        check_values({"a": [shared] * 10}, most=42)


def test_an_archive_of_numpy_may_not_be_compressed(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "a.npz", a=np.zeros(10))
    check_archive(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", a=np.zeros(10**6))
    with pytest.raises(ValueError, match="is compressed"):
        check_archive(tmp_path / "b.npz")


@pytest.mark.parametrize("name", ["~nobody-at-all/x", "x" * 5000, "a/" * 3000])
@pytest.mark.parametrize("key", ["model.init_from", "evaluate", "run.resume"])
def test_a_path_that_cannot_be_is_no_such_file(
    key: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such" in refused(capsys, f"{key}={name}")
