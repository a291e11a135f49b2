"""The embedded yeast genome: the file is what DATA.md says, and its FASTA and BED are it."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from suite.errors import ConfigError
from tasks.dna import yeast
from tasks.dna.tokens import A, N, T, decode, encode, reverse_complement
from tasks.dna.twobit import pack, packed_size, unpack
from tasks.dna.yeast import ASSET, KINDS, YeastOptions, build_yeast, emit, load_genome

ROOT = Path(__file__).parents[2]


def load_script():
    """scripts/build_yeast_genome.py, which is in no package."""
    file = ROOT / "scripts" / "build_yeast_genome.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def genome():
    return load_genome()


def documented() -> str:
    """The part of DATA.md on the genome."""
    text = (ASSET.parent / "DATA.md").read_text(encoding="utf-8")
    return text.split("# yeast.npz\n")[1].split("\n# ")[0]


# --- the file -------------------------------------------------------------------------------------


def test_data_md_has_the_digest_and_the_size_of_the_file():
    content = ASSET.read_bytes()
    assert f"- sha256: `{hashlib.sha256(content).hexdigest()}`" in documented()
    assert f"- Size: {len(content):,} bytes" in documented()
    assert len(content) < 3_300_000


def test_the_genome_has_sixteen_chromosomes_of_bases_alone(genome):
    assert len(genome.names) == 16
    assert (genome.names[3], genome.names[15]) == ("chrIV", "chrXVI")
    assert sum(genome.lengths) == 12_071_326
    assert [len(ids) for ids in genome.sequences()] == genome.lengths
    for ids in genome.sequences():
        assert ids.dtype == np.uint8
        assert A <= ids.min() <= ids.max() <= T


def test_chromosome_one_starts_and_ends_as_its_record_does(genome):
    assert decode(genome.ids[0][:20]) == "CCACACCACACCCACACACC"
    assert decode(genome.ids[0][-18:]) == "GTGGGTGTGGTGTGTGTGGG"[-18:]


def test_data_md_counts_the_features(genome):
    features = genome.features
    for kind in KINDS:
        number = len(np.unique(features.number[features.of(kind)]))
        assert f"| {kind} | {number:,} |" in documented()
    assert f"{len(features.kind):,} parts" in documented()


def test_features_lie_on_their_chromosome(genome):
    features, lengths = genome.features, np.array(genome.lengths)
    assert (features.start >= 0).all()
    assert (features.start < features.end).all()
    assert (features.end <= lengths[features.chrom]).all()
    assert set(features.strand.tolist()) == {-1, 1}


def test_nearly_every_coding_sequence_starts_with_atg_and_ends_with_a_stop(genome):
    """Joined over its exons and on its own strand: coordinates, strands and order are right."""
    features = genome.features
    rows = features.of("CDS")
    good = total = 0
    for own in np.split(rows, np.flatnonzero(np.diff(features.number[rows])) + 1):
        exons = [genome.ids[features.chrom[r]][features.start[r] : features.end[r]] for r in own]
        ids = np.concatenate(exons)
        letters = decode(ids if features.strand[own[0]] == 1 else reverse_complement(ids))
        total += 1
        good += letters[:3] == "ATG" and letters[-3:] in ("TAA", "TAG", "TGA")
    assert total == 5_989
    assert good >= 5_980


def test_sequences_cannot_be_changed_by_who_reads_them(genome):
    with pytest.raises(ValueError, match="read-only"):
        genome.sequences()[0][0] = N


def test_another_file_than_was_shipped_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / "yeast.npz"
    broken.write_bytes(ASSET.read_bytes()[:-1])
    monkeypatch.setattr(yeast, "ASSET", broken)
    with pytest.raises(
        ConfigError, match=r"data=yeast: .* is not the file that was shipped"
    ) as one:
        load_genome.__wrapped__()
    assert "\n" not in str(one.value)


# --- two bits and GenBank -------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["", "A", "ACGT", "TTGCA", "ACGTACGTT"])
def test_bases_come_back_from_two_bits(letters):
    packed = pack(encode(letters))
    assert packed.dtype == np.uint8
    assert len(packed) == packed_size(len(letters)) == -(-len(letters) // 4)
    assert decode(unpack(packed, len(letters))) == letters


def test_what_is_not_a_base_does_not_fit_into_two_bits():
    with pytest.raises(ValueError, match="only A, C, G and T"):
        pack(encode("ACGN"))
    with pytest.raises(ValueError, match="5 bases are 2 bytes, got 1"):
        unpack(pack(encode("ACGT")), 5)


LOCATIONS = {
    "3..9": [script.Part(2, 9, 1)],
    "7": [script.Part(6, 7, 1)],
    "<3..>9": [script.Part(2, 9, 1)],
    "complement(3..9)": [script.Part(2, 9, -1)],
    "join(3..9,20..30)": [script.Part(2, 9, 1), script.Part(19, 30, 1)],
    "complement(join(3..9,20..30))": [script.Part(2, 9, -1), script.Part(19, 30, -1)],
    "join(complement(20..30),complement(3..9))": None,
    "order(3..9,12..14)": None,
    "3^4": None,
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_locations_are_read_or_refused(location):
    if (parts := LOCATIONS[location]) is not None:
        assert script.parts_of(location) == parts
        return
    with pytest.raises(ValueError, match="is not understood"):
        script.parts_of(location)


def test_a_location_may_go_on_in_the_next_line():
    table = (
        "     CDS             complement(join(3..9,\n"
        "                     20..30))\n"
        '                     /note="gene            5..6"\n'
        "     mRNA            3..9\n"
        "     tRNA            40..41\n"
    )
    assert list(script.features_of(table)) == [
        ("CDS", [script.Part(2, 9, -1), script.Part(19, 30, -1)]),
        ("tRNA", [script.Part(39, 41, 1)]),
    ]


def test_the_script_writes_the_shipped_file_of_its_arrays(tmp_path):
    with np.load(ASSET, allow_pickle=False) as stored:
        script.write({name: stored[name] for name in stored.files}, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == ASSET.read_bytes()


# --- as FASTA and BED -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    emit(str(folder))
    return folder


@pytest.fixture(scope="module")
def splits(cache):
    return build_yeast(YeastOptions(cache=str(cache)), seed=0)


def test_the_files_are_the_known_ones_and_are_written_once(cache):
    fasta, bed = emit(str(cache))
    assert hashlib.sha256(fasta.read_bytes()).hexdigest() == yeast.FASTA_SHA256
    assert hashlib.sha256(bed.read_bytes()).hexdigest() == yeast.BED_SHA256
    before = fasta.stat().st_ino
    assert emit(str(cache)) == (fasta, bed)
    assert fasta.stat().st_ino == before
    assert fasta.is_relative_to(cache)


def test_a_damaged_file_is_written_anew(cache, tmp_path):
    shutil.copytree(cache / "yeast", tmp_path / "yeast")
    (tmp_path / "yeast" / "yeast.fa").write_text(">chrI\nACGT\n")
    fasta, _ = emit(str(tmp_path))
    assert hashlib.sha256(fasta.read_bytes()).hexdigest() == yeast.FASTA_SHA256
    assert sorted(path.name for path in fasta.parent.iterdir() if ".tmp" in path.name) == []


def test_where_the_cache_cannot_be_written_the_files_are_temporary(tmp_path, capfd):
    (tmp_path / "file").write_text("no folder")
    fasta, bed = emit(str(tmp_path / "file"))
    assert fasta.is_file()
    assert bed.is_file()
    assert not fasta.is_relative_to(tmp_path)
    assert capfd.readouterr().err.count("\n") == 1


def test_the_windows_are_those_that_the_baselines_were_counted_on(splits):
    assert splits.info.sizes == {"train": 17_194, "val": 1_851, "test": 2_992 + 1_531}
    assert splits.info.extra["length"] == 512
    assert splits.info.extra["strand_specific"] is False
    assert int(splits.test.novel.sum()) == 3_985


def test_what_is_read_back_is_the_embedded_genome(splits, genome):
    held = [genome.ids[3], genome.ids[13]]
    for ids, kept in zip(splits.test.sequences(), held, strict=True):
        np.testing.assert_array_equal(ids, kept)
    np.testing.assert_array_equal(splits.val.sequences()[0], genome.ids[15])
    assert len(splits.train.sequences()) == 13
    batch = splits.test.fetch([2_991, 2_992], epoch=0, train=False)
    np.testing.assert_array_equal(batch["ids"][0], genome.ids[3][2_991 * 512 : 2_992 * 512])
    np.testing.assert_array_equal(batch["ids"][1], genome.ids[13][:512])


def test_a_later_start_says_the_same(splits, cache):
    again = build_yeast(YeastOptions(cache=str(cache)), seed=0)
    assert again.info == splits.info
    assert str(Path.home()) not in str(again.info)
    assert str(cache) not in str(again.info)
    np.testing.assert_array_equal(again.val.novel, splits.val.novel)
