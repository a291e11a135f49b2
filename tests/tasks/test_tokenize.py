"""A corpus becomes token files: which document goes where, what a kill leaves, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.language import bin_writer, corpus
from tasks.language.encoding import ByteEncoding, CharEncoding, encoding_of
from tasks.language.shakespeare import load_plays
from tasks.language.tokenize import main
from tasks.language.tokens import BYTE_END

FILES = ("train.bin", "val.bin", "test.bin", "meta.json")
SHARES = ("--val-share", "0.2", "--test-share", "0.1")


@pytest.fixture(scope="module")
def speeches() -> list[str]:
    """What stands between blank lines at the beginning of three plays, some of it twice."""
    return [
        part.strip("\n")
        for play in load_plays()[:3]
        for part in play.text[:12_000].replace("\r\n", "\n").split("\n\n")
        if part.strip()
    ]


@pytest.fixture
def json_lines(tmp_path, speeches) -> Path:
    file = tmp_path / "plays.jsonl"
    file.write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(speeches))
    )
    return file


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 4000)


def make(given: Path, out: Path, *more: str, workers: int = 1) -> int:
    return main([str(given), "--out", str(out), "--workers", str(workers), *SHARES, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def texts(folder: Path, name: str, *, end: int = BYTE_END) -> list[str]:
    """The documents of a token file."""
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.fromfile(folder / name, np.dtype(meta["dtype"]))
    assert ids[-1] == end
    encoding = encoding_of(meta["encoding"], folder=folder)
    return [
        encoding.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    ]


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_every_document_comes_back_from_one_split_in_its_order(tmp_path, json_lines, speeches):
    assert make(json_lines, tmp_path / "out") == 0
    found = {name: texts(tmp_path / "out", name) for name in FILES[:3]}
    assert all(found.values())
    for name, some in found.items():
        assert some == [text for text in speeches if text in set(some)], name
    assert sorted(chain(*found.values())) == sorted(speeches)


def test_no_text_is_in_two_splits_even_where_it_is_there_twice(tmp_path, json_lines, speeches):
    assert len(set(speeches)) < len(speeches)  # plays repeat themselves
    make(json_lines, tmp_path / "out")
    train, val, test = (set(texts(tmp_path / "out", name)) for name in FILES[:3])
    assert not train & val
    assert not train & test
    assert not val & test


def test_ids_are_those_of_the_encoding_and_the_end_after_each(tmp_path, json_lines, speeches):
    make(json_lines, tmp_path / "out")
    chosen = set(texts(tmp_path / "out", "val.bin"))
    wanted = [[*ByteEncoding().encode(t), BYTE_END] for t in speeches if t in chosen]
    ids = np.fromfile(tmp_path / "out" / "val.bin", np.uint16)
    assert ids.tolist() == list(chain(*wanted))


@pytest.mark.usefixtures("small_pieces")
def test_the_number_of_workers_changes_no_byte(tmp_path, json_lines):
    assert make(json_lines, tmp_path / "one", workers=1) == 0
    assert make(json_lines, tmp_path / "two", workers=2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == set(FILES)


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_where_pieces_are_cut_changes_no_document(tmp_path, speeches, monkeypatch, piece, document):
    monkeypatch.setattr(corpus, "PIECE", piece)
    file = tmp_path / "play.txt"
    file.write_text("\n\n \n".join(speeches[:60]), newline="\r\n")
    assert make(file, tmp_path / "out", "--document", document) == 0
    wanted = [line for text in speeches[:60] for line in text.split("\n") if line.strip()]
    if document == "paragraph":
        wanted = speeches[:60]
    found = [text for name in FILES[:3] for text in texts(tmp_path / "out", name)]
    assert sorted(found) == sorted(wanted)


def test_a_gzipped_corpus_gives_the_ids_of_the_plain_one(tmp_path, json_lines, small_pieces):
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(json_lines.read_bytes()))
    make(json_lines, tmp_path / "plain")
    make(packed, tmp_path / "gz")
    for name in FILES[:3]:
        assert contents(tmp_path / "plain")[name] == contents(tmp_path / "gz")[name]


def test_the_files_of_a_folder_are_documents_in_the_order_of_their_names(tmp_path):
    given = tmp_path / "texts"
    for play in load_plays()[:30]:
        file = given / play.title[:3] / f"{play.title}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(play.text[:300])
    (given / "notes.md").write_text("not taken")
    (given / ".hidden.txt").write_text("not taken")
    assert make(given, tmp_path / "out") == 0
    files = sorted(given.rglob("[!.]*.txt"), key=lambda f: f.relative_to(given).as_posix())
    ordered = [file.read_text() for file in files]
    train = texts(tmp_path / "out", "train.bin")
    assert train == [text for text in ordered if text in set(train)]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(meta["documents"].values()) == len(ordered) == 30


def test_characters_are_found_first_and_all_have_an_id(tmp_path, json_lines, speeches):
    assert make(json_lines, tmp_path / "out", "--encoding", "characters") == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    encoding = CharEncoding("".join(speeches))
    assert meta["encoding"] == encoding.describe()
    assert (meta["vocab_size"], meta["end"]) == (encoding.vocab_size, encoding.end)
    assert set(texts(tmp_path / "out", "test.bin", end=meta["end"])) <= set(speeches)


def tokenizer_file(folder: Path, speeches: list[str], *, special: bool = True) -> Path:
    """A byte-level BPE of real text, with 300 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    names = ["<|endoftext|>"] if special else []
    made.train_from_iterator(speeches, vocab_size=300, special_tokens=names, show_progress=False)
    made.save(str(folder / "mine.json"))
    return folder / "mine.json"


def test_a_tokenizer_goes_with_its_ids(tmp_path, json_lines, speeches):
    file = tokenizer_file(tmp_path, speeches)
    assert make(json_lines, tmp_path / "out", "--tokenizer", str(file)) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["vocab_size"] == 300
    found = [t for name in FILES[:3] for t in texts(tmp_path / "out", name, end=meta["end"])]
    assert sorted(found) == sorted(speeches)


def test_meta_json_says_what_the_files_hold(tmp_path, json_lines, speeches):
    make(json_lines, tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["end"]) == ("uint16", 257, 256)
    assert sum(meta["documents"].values()) == len(speeches)
    assert sum(meta["text_bytes"].values()) == sum(len(text.encode()) for text in speeches)
    for name, digest in meta["sha256"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert len(content) == 2 * meta["tokens"][name.removesuffix(".bin")]


def test_more_than_65536_characters_are_written_as_uint32(tmp_path):
    points = [c for c in range(0x20, 0x13000) if not 0xD800 <= c < 0xE000]
    lines = ["".join(map(chr, points[i : i + 5000])) for i in range(0, len(points), 5000)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert make(file, tmp_path / "out", "--encoding", "characters", "--split-seed", "1") == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["dtype"] == "uint32"
    found = [t for name in FILES[:3] for t in texts(tmp_path / "out", name, end=meta["end"])]
    assert sorted(found) == sorted(lines)


# --- stopping and going on ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tasks.language import bin_writer, corpus, tokenize

corpus.PIECE, tokenize.SAVE_SECONDS = 4000, float(sys.argv[1])
add, added = bin_writer.Writer.add, []

def kill(self, *args, **kwargs):
    add(self, *args, **kwargs)
    added.append(1)
    if len(added) == 5:
        for opened in self._files.values():
            opened.flush()  # on the disk, but not in progress.json
        if os.environ["HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does: to every process of the group

if __name__ == "__main__":
    # in a job of the background it is ignored, which this process would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    bin_writer.Writer.add = kill
    sys.exit(tokenize.main(sys.argv[2:]))
"""


def stopped(
    given: Path, out: Path, *, workers: int, seconds: float, how: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, stopped after five pieces."""
    script = out.parent / "killed.py"
    script.write_text(KILLED)
    words = [str(given), "--out", str(out), "--workers", str(workers), *SHARES]
    return subprocess.run(
        [sys.executable, str(script), str(seconds), *words],
        env=os.environ | {"PYTHONPATH": str(Path(corpus.__file__).parents[2]), "HOW": how},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.0), (2, 0.0), (1, 99.0)])
def test_a_killed_run_goes_on_to_the_bytes_of_one_that_was_not(
    tmp_path, json_lines, small_pieces, workers, seconds
):
    out = tmp_path / "out"
    run = stopped(json_lines, out, workers=workers, seconds=seconds, how="kill")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (out / "meta.json").exists()
    assert (out / "parts" / "progress.json").exists() == (seconds == 0)
    assert (out / "parts" / "train.bin").stat().st_size > 0
    assert make(json_lines, out, workers=workers) == 0
    make(json_lines, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_ctrl_c_in_a_terminal_is_one_line_from_all_processes(tmp_path, json_lines, small_pieces):
    out = tmp_path / "out"
    run = stopped(json_lines, out, workers=2, seconds=99.0, how="interrupt")
    said = "error: interrupted; the same command goes on from where this one stopped\n"
    assert (run.returncode, run.stderr) == (130, said)
    assert make(json_lines, out) == 0
    make(json_lines, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["replace", "write"])
def test_a_stop_while_files_are_put_in_their_place_does_no_harm(
    tmp_path, json_lines, monkeypatch, capsys, step
):
    out = tmp_path / "out"
    make(json_lines, tmp_path / "whole")
    with monkeypatch.context() as patch:
        original: Any = Path.replace if step == "replace" else bin_writer.write_at_once

        def stop(file: Path, *args: Any) -> Any:
            if file.name in ("val.bin", "meta.json"):
                raise KeyboardInterrupt
            return original(file, *args)

        if step == "replace":
            patch.setattr(Path, "replace", stop)
        else:
            patch.setattr(bin_writer, "write_at_once", stop)
        assert make(json_lines, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert make(json_lines, out) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_pieces")
def test_ctrl_c_keeps_what_is_done_and_the_next_start_goes_on_behind_it(
    tmp_path, json_lines, monkeypatch, capsys
):
    out, add, added = tmp_path / "out", bin_writer.Writer.add, []

    def interrupted(self, *args, **kwargs):
        added.append(1)
        if len(added) == 4:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    monkeypatch.setattr(bin_writer.Writer, "add", interrupted)
    assert make(json_lines, out) == 130
    error = capsys.readouterr().err
    assert error == "error: interrupted; the same command goes on from where this one stopped\n"
    assert make(json_lines, out) == 0
    assert "goes on with" in capsys.readouterr().err
    make(json_lines, tmp_path / "whole")
    again = len(added) - 4  # pieces of the second start and of the whole run
    assert again == 2 * pieces_of(json_lines) - 3
    assert contents(out) == contents(tmp_path / "whole")


def pieces_of(file: Path) -> int:
    sources = corpus.list_sources(file, suffixes=())
    return len(list(corpus.pieces(sources, cut="file", start=corpus.Position())))


def test_a_folder_that_is_done_is_left_as_it_is(tmp_path, json_lines, capsys):
    make(json_lines, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert make(json_lines, tmp_path / "out", workers=2) == 0
    assert "is done already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_another_command_is_refused(tmp_path, json_lines, capsys):
    make(json_lines, tmp_path / "out")
    assert make(json_lines, tmp_path / "out", "--split-seed", "1") == 2
    assert "--split-seed was 0, now 1" in one_line(capsys)
    os.utime(json_lines, ns=(1, 1))
    assert make(json_lines, tmp_path / "out") == 2
    assert "the files of the input have changed" in one_line(capsys)


@pytest.mark.parametrize("name", ["train.bin", "thesis.tex", "meta.json", "parts/mine.txt"])
def test_a_folder_of_other_things_is_never_written_to(tmp_path, json_lines, capsys, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert make(json_lines, tmp_path / "out") == 2
    assert f"has other things in it ({name})" in one_line(capsys)
    assert [f for f in (tmp_path / "out").rglob("*") if f.is_file()] == [file]


def test_two_processes_do_not_write_one_folder(tmp_path, json_lines, capsys):
    pytest.importorskip("fcntl")
    with bin_writer.Writer(tmp_path / "out"):
        assert make(json_lines, tmp_path / "out") == 2
    assert "is being written by another process" in one_line(capsys)


# --- what is refused ------------------------------------------------------------------------------


def one_line(capsys) -> str:
    error: str = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def png(file: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(file, format="PNG")


WRONG_FILES = {
    "a PNG": (png, "no text but a PNG image"),
    "a pickle": (lambda f: f.write_bytes(pickle.dumps({"text": "a"})), "no text but a pickle"),
    "weights": (lambda f: torch.save({"a": torch.zeros(3)}, f), "no text but a zip archive"),
    "zeros": (lambda f: f.write_bytes(bytes(100)), "no text but binary"),
    "UTF-16": (lambda f: f.write_text("To be", encoding="utf-16"), "no text but UTF-16"),
    "gzip by another name": (lambda f: f.write_bytes(gzip.compress(b"a")), "must end in .gz"),
    "an empty file": (lambda f: f.write_text(""), "is empty"),
    "one document": (lambda f: f.write_text("To be"), "--document paragraph"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_what_is_no_text_is_refused_before_anything_is_written(tmp_path, capsys, kind):
    write, words = WRONG_FILES[kind]
    write(tmp_path / "given.txt")
    assert make(tmp_path / "given.txt", tmp_path / "out") == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "out").exists()


WRONG_WORDS = {
    "no out": (["INPUT"], "required: --out"),
    "no input": (["nothing.txt", "--out", "OUT"], "cannot be read (No such file"),
    "no such flag": (["INPUT", "--out", "OUT", "--wokers", "2"], "unrecognized arguments"),
    "no share": (["INPUT", "--out", "OUT", "--val-share", "0"], "--val-share must be above 0"),
    "too much": (["INPUT", "--out", "OUT", "--val-share", ".5", "--test-share", ".5"], "below 1"),
    "no workers": (["INPUT", "--out", "OUT", "--workers", "0"], "--workers must be at least 1"),
    "no encoding": (["INPUT", "--out", "OUT", "--encoding", "bpe"], "invalid choice: 'bpe'"),
    "no tokenizer": (["INPUT", "--out", "OUT", "--encoding", "tokenizer"], "needs --tokenizer"),
    "its own folder": ([".", "--out", "tokens", "--suffix", ".jsonl"], "lies in the folder"),
    "no such names": ([".", "--out", "OUT", "--suffix", ".rst"], "ends in .rst"),
    "a file as out": (["INPUT", "--out", "INPUT"], "is a file"),
    "an end beyond": (["INPUT", "--out", "OUT", "--end", "257"], "must be below the 257"),
    "an end beyond what is found": (
        ["INPUT", "--out", "OUT", "--encoding", "characters", "--end", "70000"],
        "--end 70000: must be below the",
    ),
    "a JSON array": (["array.json", "--out", "OUT"], "JSON lines are needed"),
}


@pytest.mark.parametrize("kind", WRONG_WORDS)
def test_a_wrong_command_is_one_line(tmp_path, json_lines, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "array.json").write_text('[{"text": "To be"}]')
    words, said = WRONG_WORDS[kind]
    places = {"INPUT": str(json_lines), "OUT": str(tmp_path.parent / f"{tmp_path.name}-out")}
    assert main([places.get(word, word) for word in words]) == 2
    assert said in one_line(capsys)


WRONG_LINES = {
    "no JSON": (b'{"text": "To be"', "line 41 is not JSON"),
    "no field": (b'{"body": "To be"}', "line 41 has no text in the field 'text' (it has body)"),
    "a number": (b'{"text": 3}', "line 41 has no text in the field 'text'"),
    "a list": (b'["To be"]', "line 41 is no object"),
    "Latin-1": (b'{"text": "\xe9"}', "line 41 is not UTF-8 text (byte 10)"),
    "half a character": (b'{"text": "\\ud83d"}', "line 41 has half a character"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_pieces")
def test_a_broken_line_stops_or_is_left_out(tmp_path, json_lines, speeches, capsys, workers):
    lines = json_lines.read_bytes().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    for given, said in list(WRONG_LINES.values())[: 6 if workers == 1 else 1]:
        broken.write_bytes(b"".join([*lines[:40], given + b"\n", *lines[40:]]))
        out = tmp_path / hashlib.sha256(given).hexdigest()
        assert make(broken, out, workers=workers) == 1
        error = one_line(capsys)
        assert said in error
        assert str(broken) in error
        assert make(broken, out, "--broken", "skip", workers=workers) == 0
        capsys.readouterr()
        meta = json.loads((out / "meta.json").read_text())
        assert (meta["broken"], sum(meta["documents"].values())) == (1, len(speeches))


@pytest.mark.parametrize("word", ["BZh", "GIF8", "PAR1"])
def test_a_text_may_begin_with_the_letters_of_another_format(tmp_path, word, speeches):
    file = tmp_path / "given.txt"
    file.write_text("\n\n".join([word, *speeches]))
    assert make(file, tmp_path / "out", "--document", "paragraph") == 0


def test_a_split_without_documents_is_said_and_the_folder_can_be_used(tmp_path, capsys):
    file = tmp_path / "two.jsonl"
    file.write_text('{"text": "To be"}\n{"text": "or not to be"}\n')
    assert main([str(file), "--out", str(tmp_path / "out"), "--val-share", "0.0001"]) == 2
    assert "none of them fell into val" in one_line(capsys)
    seeds = map(str, range(20))
    rest = ["--out", str(tmp_path / "out"), "--val-share", "0.5", "--split-seed"]
    assert 0 in [main([str(file), *rest, seed]) for seed in seeds]


def test_a_tokenizer_without_an_end_needs_one(tmp_path, json_lines, speeches, capsys):
    file = tokenizer_file(tmp_path, speeches, special=False)
    assert make(json_lines, tmp_path / "out", "--tokenizer", str(file)) == 2
    assert "has no token that ends a document" in one_line(capsys)
    assert make(json_lines, tmp_path / "out", "--tokenizer", str(file), "--end", "0") == 0


def test_a_gzip_that_is_cut_off_is_one_line(tmp_path, json_lines, small_pieces, capsys):
    packed = tmp_path / "cut.jsonl.gz"
    packed.write_bytes(gzip.compress(json_lines.read_bytes())[:-4000])
    assert make(packed, tmp_path / "out") == 1
    assert "gzip is damaged or not whole" in one_line(capsys)


def test_help_needs_neither_torch_nor_an_input():
    code = (
        "import sys; from tasks.language.tokenize import main; main(['--help']); "
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    root = str(Path(corpus.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert "--val-share" in run.stdout


def test_a_folder_that_another_process_has_just_finished_is_left_as_it_is(
    tmp_path, json_lines, capsys, monkeypatch
):
    """It was looked at before the other one ended, and is locked after."""
    out = tmp_path / "out"
    assert make(json_lines, out) == 0
    capsys.readouterr()
    before = (out / "meta.json").read_bytes(), (out / "train.bin").stat().st_mtime_ns
    answers = iter([None, {}])
    monkeypatch.setattr("tasks.language.tokenize.finished", lambda out: next(answers))
    monkeypatch.setattr("tasks.language.tokenize.foreign_names", lambda out: [])
    assert make(json_lines, out, "--encoding", "characters") == 2
    assert "just written by another process" in one_line(capsys)
    assert before == ((out / "meta.json").read_bytes(), (out / "train.bin").stat().st_mtime_ns)
