"""FASTA and BED files as they are met: what is read, and what is refused in one line."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from suite.errors import ConfigError, DataError
from tasks.dna.fasta import Fasta, fits
from tasks.dna.intervals import merged, read_bed
from tasks.dna.tokens import decode, encode
from tasks.dna.yeast import load_genome

pytest.importorskip("pyfaidx")


@pytest.fixture(scope="module")
def letters() -> dict[str, str]:
    """Yeast with the marks of hg38: repeats in lower case, a run of N."""
    genome = load_genome()
    first, second = decode(genome.ids[0][5_000:7_017]), decode(genome.ids[1][:1_200])
    return {
        "chr1": first[:100] + first[100:500].lower() + "N" * 333 + first[500:],
        "chr2": second.lower(),
        "chrUn_x": "ACGTRYKM",
    }


def fasta_of(letters: dict[str, str], *, width: int = 60, end: str = "\n") -> bytes:
    lines = []
    for name, text in letters.items():
        lines.append(f">{name} of yeast")
        lines += [text[i : i + width] for i in range(0, len(text), width)]
    return (end.join(lines) + end).encode()


@pytest.fixture
def file(tmp_path, letters) -> Path:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_of(letters))
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "end"), [(60, "\n"), (50, "\r\n"), (100_000, "\n")])
def test_any_span_is_read_in_upper_case(tmp_path, letters, width, end):
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_of(letters, width=width, end=end))
    fasta = Fasta(path)
    assert fasta.lengths == {name: len(text) for name, text in letters.items()}
    for name, start, stop in (
        ("chr1", 0, 60), ("chr1", 59, 61), ("chr1", 60, 120), ("chr1", 90, 900),
        ("chr2", 1_199, 1_200), ("chr1", 7, 7), ("chr1", 0, len(letters["chr1"])),
        ("chr2", 0, 1_200),
    ):  # fmt: skip
        ids = fasta.fetch(name, start, stop)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, encode(letters[name][start:stop].upper()))


def test_letters_for_several_bases_become_n(file):
    assert decode(Fasta(file).fetch("chrUn_x", 0, 8)) == "ACGTNNNN"


def test_a_letter_that_is_not_iupac_is_named_with_its_place(tmp_path, letters):
    path = tmp_path / "odd.fa"
    path.write_bytes(fasta_of({"chr1": letters["chr1"][:200] + "J" + letters["chr1"][200:]}))
    fasta = Fasta(path)
    fasta.fetch("chr1", 0, 200)
    with pytest.raises(DataError, match=r"odd\.fa: chr1 position 201 has 'J', which is not") as one:
        fasta.fetch("chr1", 150, 400)
    assert "\n" not in str(one.value)


def test_bytes_that_are_not_text_are_one_line(tmp_path):
    path = tmp_path / "odd.fa"
    path.write_bytes(b">chr1\nACGT\n")
    fasta = Fasta(path)
    path.write_bytes(b">chr1\nAC\xff\xfe\n")
    with pytest.raises(DataError, match="chr1 position 1 cannot be read") as one:
        fasta.fetch("chr1", 0, 4)
    assert "\n" not in str(one.value)


# --- the index ------------------------------------------------------------------------------------


def test_the_index_lies_beside_the_file_and_is_used_again(file):
    index = Fasta(file).index
    assert index == file.with_name("genome.fa.fai")
    before = index.stat().st_mtime_ns
    Fasta(file)
    assert index.stat().st_mtime_ns == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["genome.fa", "genome.fa.fai"]


def test_where_the_folder_cannot_be_written_the_index_is_in_the_cache(file, tmp_path, monkeypatch):
    real = os.mkdir

    def locked(path, *args, **kwargs):
        if str(path).startswith(str(file.parent / ".fai-")):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", locked)
    cache = tmp_path / "cache"
    fasta = Fasta(file, cache=str(cache))
    assert fasta.index.is_relative_to(cache / "fasta")
    assert (
        fasta.fetch("chr1", 0, 5).tolist()
        == Fasta(file, cache=str(cache)).fetch("chr1", 0, 5).tolist()
    )
    assert not file.with_name("genome.fa.fai").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("older", [False, True])
def test_an_index_of_what_the_file_was_is_made_anew(file, letters, older):
    """Also where the new file is older than the index, which its time does not show."""
    index = Fasta(file).index
    swapped = {"chr2": letters["chr2"], "chr1": letters["chr1"]}
    file.write_bytes(fasta_of(swapped, width=70))
    step = -60 if older else 60
    os.utime(file, (index.stat().st_mtime + step,) * 2)
    assert not fits(file, index)
    fasta = Fasta(file)
    assert list(fasta.lengths) == ["chr2", "chr1"]
    np.testing.assert_array_equal(
        fasta.fetch("chr1", 65, 200), encode(letters["chr1"][65:200].upper())
    )


def test_an_index_that_is_damaged_is_made_anew(file):
    index = Fasta(file).index
    index.write_text("chr1\tmany\n")
    assert len(Fasta(file).lengths) == 3


def test_a_copy_that_travels_to_another_process_opens_the_file_itself(file):
    fasta = Fasta(file)
    expected = fasta.fetch("chr1", 10, 80)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fasta)).fetch("chr1", 10, 80), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_after_a_fork_the_file_is_opened_again(file):
    fasta = Fasta(file)
    reader = fasta._open()
    assert fasta._open() is reader
    fasta._process = -1  # as a forked process finds it: opened under another number
    assert fasta._open() is not reader


# --- what is refused: FASTA -----------------------------------------------------------------------

WRONG_FASTA = {
    "no file": (None, r"genome\.fa cannot be read \(No such file or directory\); set data\.fasta="),
    "empty": (b"", r"genome\.fa is empty"),
    "not FASTA": (b"chr1\t0\t100\ttrain\n", r"is not FASTA: its first line does not start with"),
    "blank": (b"\n\n\n", r"is not FASTA"),
    "uneven lines": (b">chr1\nACGT\nACGTAC\nACGT\n", r"can be indexed: Line length .*line 3"),
    "duplicate names": (b">chr1\nACGT\n>chr1\nACGT\n", r"two sequences of one name: .*chr1"),
    "no name": (b">chr1\nACGT\n> \nACGT\n", r"Bad sequence name"),
    "odd bytes": (b">chr1\n\xff\xfe\xfd\n", r"holds bytes that are not text"),
    "gzip": (gzip.compress(b">chr1\nACGT\n"), r"is gzip-compressed.*unpack it: gzip -dc .* > "),
}


@pytest.mark.parametrize("name", WRONG_FASTA)
def test_a_fasta_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name):
    content, message = WRONG_FASTA[name]
    path = tmp_path / "genome.fa"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Fasta(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data=genome: ")
    assert not path.with_name("genome.fa.fai").exists()


def test_the_command_for_a_compressed_file_names_it_without_its_suffix(tmp_path):
    (tmp_path / "hg38.fa.gz").write_bytes(gzip.compress(b">chr1\nACGT\n"))
    with pytest.raises(ConfigError, match=r"gzip -dc \S+/hg38\.fa\.gz > \S+/hg38\.fa$"):
        Fasta(tmp_path / "hg38.fa.gz")


def test_a_plain_file_with_a_compressed_ones_name_is_refused(tmp_path, file):
    shutil.copy(file, tmp_path / "genome.fa.gz")
    with pytest.raises(ConfigError, match="has a compressed file's name; unpack it, or rename it"):
        Fasta(tmp_path / "genome.fa.gz")


# --- BED ------------------------------------------------------------------------------------------

LENGTHS = {"chr1": 1_000, "chr2": 500, "chr10": 50}


def bed(tmp_path, content: str | bytes):
    path = tmp_path / "splits.bed"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_bed(path, lengths=LENGTHS)


PLAIN = "chr1\t0\t400\ttrain\nchr1\t400\t600\tvalid\nchr2\t5\t500\ttest\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\t", " "),
        PLAIN.rstrip("\n"),
        "\ufeff" + PLAIN,
        "chrom\tchromStart\tchromEnd\tname\n" + PLAIN,
        "chrom start end split\n" + PLAIN,
        "# a comment\ntrack name=x\nbrowser position chr1\n\n" + PLAIN,
        PLAIN.replace("valid", "val"),
        PLAIN.replace("train", "train\t0\t+"),
    ],
)
def test_bed_files_are_read_however_they_are_written(tmp_path, content):
    assert [each[:4] for each in bed(tmp_path, content)] == [
        ("chr1", 0, 400, "train"),
        ("chr1", 400, 600, "val"),
        ("chr2", 5, 500, "test"),
    ]


WRONG_BED = {
    "beyond the end": (PLAIN + "chr10 0 51 test", r"line 4: end 51 is beyond chr10, which has 50"),
    "start at end": (PLAIN + "chr10 7 7 test", r"line 4: start 7 is not below end 7"),
    "no number": (PLAIN + "chr10 1e1 20 test", r"line 4: '1e1' is not a position"),
    "negative": (PLAIN + "chr10 -1 20 test", r"line 4: '-1' is not a position"),
    "prefix": (PLAIN + "10 0 20 test", r"no sequence '10' .* calls it 'chr10'.*prefix 'chr'"),
    "misspelt": (PLAIN + "chrr2 0 20 test", r"no sequence 'chrr2' .*did you mean 'chr2'\?"),
    "unknown": (PLAIN + "mito 0 20 test", r"no sequence 'mito' .*it has chr1, chr2, chr10"),
    "split": (PLAIN + "chr10 0 20 dev", r"line 4: no such split, 'dev'; column 4 must be train"),
    "no split": (PLAIN + "chr10 0 20", r"line 4: has no split"),
    "two columns": (PLAIN + "chr10 0", r"line 4: 2 column\(s\)"),
    "leak": (
        PLAIN + "chr1 399 401 train",
        r"line 4: chr1:399-401 \(train\) overlaps line 2, 400-600 \(val\); splits must share no",
    ),
    "leak inside": (PLAIN + "chr1 10 20 test", r"line 4: .*overlaps line 1, 0-400 \(train\)"),
    "empty": ("# nothing\n", r"has no intervals; add lines of CHROMOSOME START END SPLIT"),
    "odd bytes": (b"chr1\t0\t4\ttrain\n\xff\xfe", r"is not text"),
    "odd letters": (PLAIN + "chr\u20282\t0\t20\ttest", r"line 4: no sequence 'chr\\u20282'"),
}


@pytest.mark.parametrize("name", WRONG_BED)
def test_a_bed_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name):
    content, message = WRONG_BED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        bed(tmp_path, content)
    assert len(str(caught.value).splitlines()) == 1
    assert "splits.bed" in str(caught.value)


def test_a_bed_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.bed cannot be read .*; set data\.bed=FILE"):
        read_bed(tmp_path / "none.bed", lengths=LENGTHS)


def test_spans_that_overlap_are_one_and_those_that_touch_are_two():
    assert merged([(5, 9), (0, 3), (3, 5), (8, 20), (6, 7)]) == [(0, 3), (3, 5), (5, 20)]
