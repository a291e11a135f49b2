"""Labelled sets in folders: GenomicBenchmarks, the Nucleotide Transformer, and yeast's windows."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from suite.errors import ConfigError
from tasks.dna import genomic_benchmarks
from tasks.dna.genomic_benchmarks import GenomicBenchmarksOptions, build_genomic_benchmarks
from tasks.dna.labelled import LABELLED_DATA, LabelledOptions
from tasks.dna.nucleotide_transformer import (
    NucleotideTransformerOptions,
    build_nucleotide_transformer,
)
from tasks.dna.tokens import A, C, G, T, decode
from tasks.dna.yeast import load_genome
from tasks.dna.yeast_coding import CLASSES, LENGTH, build_yeast_coding, coding_starts, free_starts

SET = "human_nontata_promoters"


def yeast(i: int, length: int = 30) -> str:
    """A piece of chromosome I, another for each i."""
    return decode(load_genome().sequences()[0][5000 + 40 * i : 5000 + 40 * i + length])


def texts(split) -> list[str]:
    return [decode(split.sequences[i]) for i in range(len(split))]


def labels(split) -> list[int]:
    return split.sequences.labels.tolist()


# --- GenomicBenchmarks ----------------------------------------------------------------------------


def write_set(folder: Path, classes=("negative", "positive"), *, train=12, test=4) -> None:
    number = 0
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                (folder / part / name / f"{i}.txt").write_text(yeast(number, 25 + i))
                number += 1


@pytest.fixture
def root(tmp_path):
    """Two sets of GenomicBenchmarks' form, of 24 / 8 sequences."""
    write_set(tmp_path / "gb" / SET)
    write_set(tmp_path / "gb" / "demo_human_or_worm", ("worm", "human"))
    return tmp_path / "gb"


def gb(root: Path | None, *, seed: int = 0, **changes):
    given = {"task": SET, "cache": "none"} | changes
    options = GenomicBenchmarksOptions(root=None if root is None else str(root), **given)
    return build_genomic_benchmarks(options, seed=seed)


def test_every_file_is_a_sequence_and_labels_go_by_the_sorted_names(root):
    found = gb(root, task="demo_human_or_worm")
    assert found.info.name == "genomic_benchmarks/demo_human_or_worm"
    assert found.info.extra["class_names"] == ["human", "worm"]
    assert found.info.sizes == {"train": 22, "val": 2, "test": 8}
    folder = root / "demo_human_or_worm/test"
    wanted = [
        (folder / f"{name}/{i}.txt").read_text() for name in ("human", "worm") for i in range(4)
    ]
    assert texts(found.test) == wanted
    assert labels(found.test) == [0] * 4 + [1] * 4
    batch = found.test.fetch([0, 3], epoch=0, train=False)
    assert (batch["ids"] != 4).sum(dim=1).tolist() == [25, 28]
    assert found.info.extra["length"] == 36


def test_files_are_in_the_order_of_their_numbers(root):
    found = gb(root, seed=3)
    held = set(texts(found.val))
    wanted = [
        text
        for name in ("negative", "positive")
        for i in range(12)
        if (text := (root / SET / f"train/{name}/{i}.txt").read_text()) not in held
    ]
    assert texts(found.train) == wanted


def test_the_root_may_be_the_folder_of_the_set(root):
    alone = gb(root / SET, task=None)
    assert alone.info.sha256 == gb(root).info.sha256 == gb(root / SET).info.sha256


def test_another_number_than_was_published_is_said(root):
    assert gb(root).info.extra["notes"] == [
        f"{SET} has 24 / 8 sequences, the published set 27,097 / 9,034"
    ]
    (root / SET).rename(root / "mine")
    assert gb(root, task="mine").info.extra["notes"] == []
    assert gb(root, task="mine").info.license == "unknown"


def test_lower_case_line_ends_and_other_files_are_no_obstacle(root):
    file = root / SET / "test/negative/0.txt"
    wanted = texts(gb(root).test)
    text = file.read_text().lower()
    file.write_text(f"{text[:9]}\r\n{text[9:]}\n")
    (file.parent / "README").write_text("no sequence")
    (file.parent / ".0.txt.swp").write_text("no sequence")
    assert texts(gb(root).test) == wanted


def test_what_was_read_is_kept_until_a_file_changes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(genomic_benchmarks, "KEPT_FROM", 1)
    for path in root.rglob("*.txt"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    options = {"cache": str(tmp_path / "cache")}
    first = gb(root, **options)
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(genomic_benchmarks, "read_all", None)
        assert gb(root, **options).info.sha256 == first.info.sha256
    other = yeast(90, 25)
    (root / SET / "test/negative/0.txt").write_text(other)
    changed = gb(root, **options)
    assert texts(changed.test)[0] == other
    assert changed.info.sha256 != first.info.sha256
    assert kept.is_file()


def test_a_damaged_cache_is_read_again_with_a_note(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(genomic_benchmarks, "KEPT_FROM", 1)
    for path in root.rglob("*.txt"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = gb(root, cache=str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:200])
    assert gb(root, cache=str(tmp_path / "cache")).info.sha256 == first.info.sha256
    assert "is damaged" in capsys.readouterr().err


def remove_class(root: Path) -> None:
    for file in (root / SET / "test/positive").iterdir():
        file.unlink()


def third_class(root: Path) -> None:
    (root / SET / "test/other").mkdir()
    (root / SET / "test/other/0.txt").write_text(yeast(0))


def strange_letter(root: Path) -> None:
    (root / SET / "train/positive/7.txt").write_text("ACGTACGZACGT")


def empty_file(root: Path) -> None:
    (root / SET / "train/positive/7.txt").write_text("\n")


def one_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / SET / part / "negative").rename(root / f"{part}-negative")


def intervals(root: Path) -> None:
    for part in ("train", "test"):
        (root / SET / part).rename(root / f"old-{part}")
        (root / SET / part).mkdir()
        with gzip.open(root / SET / part / "negative.csv.gz", "wt") as table:
            table.write("id,region,start,end,strand\n0,chr1,1,252,+\n")


def no_test(root: Path) -> None:
    (root / SET / "test").rename(root / "elsewhere")


def folder_for_file(root: Path) -> None:
    (root / SET / "train/positive/99.txt").mkdir()


WRONG = {
    "no root": (None, {"root": None}, r"needs data\.root=FOLDER, the one that holds <dataset>"),
    "no such root": (None, {"root": Path("nowhere/gb")}, "there is no such folder"),
    "no task": (None, {"task": None}, rf"needs data\.task=NAME.*demo_human_or_worm, {SET}"),
    "misspelt": (
        None,
        {"task": "human_nontata_promoter"},
        rf"no such set\. Did you mean data\.task={SET}\?",
    ),
    "not here": (
        None,
        {"task": "human_enhancers_cohn"},
        "no such set. data.root=.* has demo_human",
    ),
    "empty class": (remove_class, {}, r"the class .*test/positive is empty; it needs a \.txt file"),
    "third class": (third_class, {}, "has the class 'other', which train has not"),
    "letter": (
        strange_letter,
        {},
        r"train/positive/7\.txt: letter 'Z' at position 8 is not an IUPAC",
    ),
    "empty file": (empty_file, {}, r"train/positive/7\.txt is empty; remove it"),
    "one class": (one_class, {}, r"there is one class alone \(positive\)"),
    "intervals": (intervals, {}, r"intervals \(\.csv\.gz\) and no sequences; .*download_dataset"),
    "no test": (no_test, {}, "has no folder test; it needs train and test"),
    "folder": (folder_for_file, {}, r"99\.txt cannot be read \(Is a directory\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_folders_of_another_form_are_one_line(root, name):
    spoil, changes, message = WRONG[name]
    if spoil is not None:
        spoil(root)
    with pytest.raises(ConfigError, match=message) as caught:
        gb(changes.get("root", root), **{key: changes[key] for key in changes if key != "root"})
    assert "\n" not in str(caught.value)


def test_the_folder_of_another_set_is_not_taken_for_the_one_asked_for(root):
    with pytest.raises(ConfigError, match="is the folder of one set, 'human_nontata_promoters'"):
        gb(root / SET, task="human_enhancers_cohn")


# --- the Nucleotide Transformer -------------------------------------------------------------------


def write_fasta(file: Path, count: int, *, first: int, header: str = ">seq{i}|{label}") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        text = yeast(first + i, 36)
        lines += [header.format(i=i, label=i % 2), text[:20], text[20:]]
    file.write_text("\n".join(lines) + "\n")


def nt(root: Path | None, *, task: str | None = "H3"):
    options = NucleotideTransformerOptions(root=None if root is None else str(root), task=task)
    return build_nucleotide_transformer(options, seed=0)


LAYOUTS = {
    "published": ("H3/train.fna", "H3/test.fna"),
    "HyenaDNA's": ("H3/H3_train.fasta", "H3/H3_test.fasta"),
    "HyenaDNA's enhancers": ("H3/all_train_H3.fasta", "H3/all_test_H3.fasta"),
    "beside each other": ("H3_train.fa", "H3_test.fa"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "header", [">seq{i}|{label}", ">YAL001C_chr1 {i}:100|x| {label}", ">s{i}_{label}"]
)
def test_the_class_is_the_last_field_of_the_header_or_its_last_letter(tmp_path, layout, header):
    for part, name, count in zip(("train", "test"), LAYOUTS[layout], (20, 6), strict=True):
        write_fasta(tmp_path / name, count, first=50 * (part == "test"), header=header)
    found = nt(tmp_path)
    assert texts(found.test) == [yeast(50 + i, 36) for i in range(6)]
    assert labels(found.test) == [0, 1, 0, 1, 0, 1]
    assert found.info.extra["class_names"] == ["0", "1"]
    assert found.info.extra["published_metric"] == "mcc"
    assert found.info.extra["strand_specific"] is False


def test_splice_sites_depend_on_the_strand(tmp_path):
    for part, count in (("train", 20), ("test", 6)):
        write_fasta(tmp_path / f"splice_sites_donors/{part}.fna", count, first=count)
    found = nt(tmp_path, task="splice_sites_donors")
    assert found.info.extra["strand_specific"] is True
    assert found.info.extra["published_metric"] == "f1"


def test_ten_classes_are_in_the_order_of_their_numbers(tmp_path):
    for part in ("train", "test"):
        lines = [
            f">s|{label}\n{yeast(label + 20 * i, 30 + i)}\n"
            for i in range(2)
            for label in range(12)
        ]
        (tmp_path / f"mine_{part}.fa").write_text("".join(lines))
    assert nt(tmp_path, task="mine").info.extra["class_names"] == [str(i) for i in range(12)]


def spoil(name: str, text: str):
    def apply(root: Path) -> None:
        file = root / name
        file.write_text(text)

    return apply


def as_table(root: Path) -> None:
    (root / "H3").rename(root / "fasta")
    (root / "H3").mkdir()
    (root / "H3/train.csv").write_text("sequence,name,label\n")


WRONG_FASTA = {
    "no root": (None, {"root": None}, r"needs data\.root=FOLDER"),
    "no task": (None, {"task": None}, r"needs data\.task=NAME"),
    "misspelt": (
        None,
        {"task": "H3K4me9"},
        r"has no H3K4me9/train\.fna.*Did you mean data\.task=H3K4me",
    ),
    "path": (None, {"task": "../H3"}, r"data\.task=\.\./H3: a name is expected"),
    "table": (as_table, {}, r"H3/train\.csv is a table, and FASTA files are read; write each row"),
    "no test": (lambda root: (root / "H3/test.fna").unlink(), {}, "has train and no test for it"),
    "letter": (
        spoil("H3/test.fna", ">a|0\nACGT\nAC!T\n>b|1\nACGA\n"),
        {},
        r"test\.fna line 3: letter '!' at position 3 is not an IUPAC base",
    ),
    "no header": (spoil("H3/test.fna", "ACGT\n"), {}, r"test\.fna line 1 is not a FASTA header"),
    "no class": (spoil("H3/test.fna", ">a|\nACGT\n"), {}, "line 1: the header has no class"),
    "no bases": (spoil("H3/test.fna", ">a|0\n\n>b|1\nAC\n"), {}, "line 1: the sequence is empty"),
    "empty": (spoil("H3/test.fna", ""), {}, r"test\.fna is empty; it needs"),
    "new class": (
        spoil("H3/test.fna", ">a|0\nACGT\n>b|1\nACGA\n>c|2\nACG\n"),
        {},
        "test.fna has the class '2', which train has not",
    ),
    "missing class": (spoil("H3/test.fna", ">a|0\nAC\n"), {}, "'1', which test has not"),
    "names": (
        spoil("H3/train.fna", "".join(f">x|gene{i}\nACGT\n" for i in range(101))),
        {},
        "has 101 classes; the last field of each header has to be the class",
    ),
}


@pytest.mark.parametrize("name", WRONG_FASTA)
def test_fasta_files_of_another_form_are_one_line(tmp_path, name):
    for part, count in (("train", 20), ("test", 6)):
        write_fasta(tmp_path / f"H3/{part}.fna", count, first=count)
    apply, changes, message = WRONG_FASTA[name]
    if apply is not None:
        apply(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        nt(changes.get("root", tmp_path), task=changes.get("task", "H3"))
    assert "\n" not in str(caught.value)


# --- yeast's windows ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coding():
    return build_yeast_coding(LabelledOptions(), seed=0)


def test_yeasts_windows_are_as_many_as_published_and_half_of_them_coding(coding):
    assert LABELLED_DATA["yeast_coding"].build is build_yeast_coding
    assert coding.info.sizes == {"train": 8570, "val": 952, "test": 2312}
    for split in (coding.train, coding.val, coding.test):
        assert np.bincount(split.sequences.labels).tolist() == [len(split) // 2] * 2
        assert set(split.sequences.lengths.tolist()) == {LENGTH}
        assert set(np.unique(split.sequences.ids)) == {A, C, G, T}
    assert coding.info.extra["class_names"] == list(CLASSES)
    assert coding.info.extra["strand_specific"] is False


def test_windows_lie_in_exons_or_outside_every_feature(coding):
    genome = load_genome()
    features = genome.features
    exons = set(features.of("CDS").tolist())
    for chrom in (0, 8):
        rows = np.flatnonzero(features.chrom == chrom)
        inside = np.array([row in exons for row in rows])
        start, end = features.start[rows], features.end[rows]
        for at in coding_starts(features, chrom):
            assert ((start[inside] <= at) & (at + LENGTH <= end[inside])).any()
        free = free_starts(features, chrom, genome.lengths[chrom])
        for at in free:
            assert not ((start < at + LENGTH) & (at < end)).any()
        assert (np.diff(free) >= LENGTH).all()


def test_the_test_windows_are_those_of_chromosomes_4_and_14(coding):
    genome = load_genome()
    held_out = [
        decode(genome.sequences()[genome.names.index(name)]) for name in ("chrIV", "chrXIV")
    ]

    def share(split) -> float:
        some = texts(split)[::20]
        return float(np.mean([any(text in other for other in held_out) for text in some]))

    assert share(coding.test) == 1.0
    assert share(coding.val) < 0.1  # repeats, of transposons above all
