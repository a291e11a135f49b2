"""Windows of a genome: where they lie, what they hold, and what does not depend on the workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from suite.data import SuiteDataModule
from suite.errors import ConfigError, DataError
from tasks.dna import genome_split
from tasks.dna.genome import GENOME_DATA, GenomeOptions, build_genome
from tasks.dna.intervals import Interval
from tasks.dna.novel import K, kmers, known_kmers, novel_windows
from tasks.dna.tokens import PAD, A, N, T, decode, encode, reverse_complement
from tasks.dna.windows import lay_out
from tasks.dna.yeast import load_genome

pytest.importorskip("pyfaidx")

BED = """chr1 0 3000 train
chr1 3000 4000 valid
chr1 4010 6000 test
chr2 100 1150 train
chr2 1200 1800 train
chr2 1900 2500 valid
"""


@pytest.fixture(scope="module")
def letters() -> dict[str, str]:
    """Two chromosomes cut from yeast, with repeats in lower case."""
    genome = load_genome()
    first, second = decode(genome.ids[0][20_000:26_000]), decode(genome.ids[1][9_000:11_600])
    return {"chr1": first[:700] + first[700:900].lower() + first[900:], "chr2": second}


def write_genome(folder: Path, letters: dict[str, str], bed: str = BED) -> dict[str, str]:
    lines = []
    for name, text in letters.items():
        lines += [f">{name}", *(text[i : i + 60] for i in range(0, len(text), 60))]
    (folder / "g.fa").write_text("\n".join(lines) + "\n")
    (folder / "g.bed").write_text(bed.replace(" ", "\t"))
    return {"fasta": str(folder / "g.fa"), "bed": str(folder / "g.bed")}


@pytest.fixture
def files(tmp_path, letters) -> dict[str, str]:
    return write_genome(tmp_path, letters)


def build(files: dict[str, str], *, seed: int = 0, **changes):
    given = {"length": 100, "cache": "none", "batch_size": 4} | files | changes
    return build_genome(GenomeOptions(**given), seed=seed)


def every(split, *, epoch: int = 0, train: bool = False) -> torch.Tensor:
    return split.fetch(list(range(len(split))), epoch=epoch, train=train)["ids"]


def text_of(letters: dict[str, str], split, window) -> str:
    chrom, start, end = window.tolist()
    return letters[split.chroms[chrom]][start:end].upper()


# --- where windows lie ----------------------------------------------------------------------------


def test_windows_tile_their_intervals_and_hold_their_bases_in_upper_case(files, letters):
    splits = build(files)
    assert splits.info.sizes == {"train": 30 + 10 + 6, "val": 10 + 6, "test": 19}
    for split in (splits.train, splits.val, splits.test):
        for ids, window in zip(every(split), split.windows, strict=True):
            assert decode(ids.numpy()) == text_of(letters, split, window)
    assert splits.train.windows[:2].tolist() == [[0, 0, 100], [0, 100, 200]]
    assert splits.test.windows[-1].tolist() == [0, 5810, 5910]
    assert splits.info.extra["length"] == 100
    notes = splits.info.extra["notes"]
    assert any(note.startswith("train: 50 of 4,650 bases are left out") for note in notes)


def test_window_places_find_the_windows_in_the_sequences(files):
    splits = build(files)
    for split in (splits.train, splits.val, splits.test):
        sequences = split.sequences()
        assert split.bases == sum(map(len, sequences))
        for ids, (number, start, end) in zip(every(split), split.window_places(), strict=True):
            np.testing.assert_array_equal(sequences[number][start:end], ids)


def test_an_interval_shorter_than_a_window_is_one_padded_window(files):
    splits = build(files, length=1_000)
    assert splits.info.sizes == {"train": 3 + 1 + 1, "val": 1 + 1, "test": 1}
    last = every(splits.train)[-1]
    assert (last[:600] != PAD).all()
    assert (last[600:] == PAD).all()
    assert "train: 1 of 5 windows are shorter" in " ".join(splits.info.extra["notes"])


def test_with_extend_windows_grow_and_no_base_is_in_two_splits(files):
    splits = build(files, length=1_000, extend=True)
    assert splits.train.windows[-1].tolist() == [1, 850, 1_850]
    assert splits.val.windows[-1].tolist() == [1, 1_850, 2_600]  # from half-way on: 750 bases
    taken = np.zeros((2, 6_000), int)
    for split in (splits.train, splits.val, splits.test):
        own = np.zeros_like(taken)
        for chrom, start, end in split.windows:
            own[chrom, start:end] = 1
        taken += own
    assert taken.max() == 1
    for split in (splits.train, splits.val):
        sequences = split.sequences()
        number, start, end = split.window_places()[-1]
        row = every(split)[-1]
        np.testing.assert_array_equal(sequences[number][start:end], row[row != PAD])


def test_intervals_of_one_split_that_overlap_are_tiled_once():
    intervals = [Interval("c", 0, 250, "train", 1), Interval("c", 200, 400, "train", 2)]
    layout = lay_out(intervals, lengths={"c": 1_000}, length=100, extend=False)["train"]
    assert layout.regions == (("c", 0, 400),)
    assert layout.places[:, 1].tolist() == [0, 100, 200, 300]
    assert layout.left_out == 0


# --- training: moves and strands ------------------------------------------------------------------


def test_training_windows_move_inside_their_interval_and_others_stay(files, letters):
    splits = build(files, shift=60, rc_augment=False)
    assert torch.equal(every(splits.train), every(build(files).train))
    seen = set()
    for epoch in range(8):
        for i, ids in enumerate(every(splits.train, epoch=epoch, train=True)):
            chrom, start, _ = splits.train.windows[i].tolist()
            whole = letters[splits.train.chroms[chrom]].upper()
            near = [
                m for m in range(-60, 61) if whole[max(0, start + m) :][:100] == decode(ids.numpy())
            ]
            assert near, "not within 60 bases"
            seen.update(near)
    assert min(seen) < -30
    assert max(seen) > 30
    assert torch.equal(every(splits.val, train=False), every(build(files).val))


def test_moved_windows_never_leave_their_interval():
    intervals = [Interval("c", 50, 275, "train", 1), Interval("c", 275, 400, "val", 2)]
    layout = lay_out(intervals, lengths={"c": 1_000}, length=100, extend=False)["train"]
    assert layout.places.tolist() == [[0, 0, 100], [0, 100, 200]]
    assert layout.room.tolist() == [[0, 125], [-100, 25]]


def test_the_strand_is_a_fair_coin_in_training_and_forward_otherwise(files):
    splits = build(files)
    plain = every(splits.train)
    other = torch.from_numpy(reverse_complement(plain.numpy()))
    turned = 0
    for epoch in range(20):
        ids = every(splits.train, epoch=epoch, train=True)
        back = (ids == other).all(1)
        assert ((ids == plain).all(1) | back).all()
        turned += int(back.sum())
    assert 0.44 < turned / (20 * len(plain)) < 0.56
    assert torch.equal(every(build(files, rc_augment=False).train, train=True), plain)


def test_padding_stays_at_the_end_of_a_turned_window(files):
    splits = build(files, length=1_000)
    rows = [every(splits.train, epoch=epoch, train=True)[-1] for epoch in range(12)]
    assert len({tuple(row.tolist()) for row in rows}) == 2
    for row in rows:
        assert (row[:600] != PAD).all()
        assert (row[600:] == PAD).all()


def test_a_window_depends_on_seed_epoch_and_number_alone(files):
    splits = build(files, shift=50)
    whole = every(splits.train, epoch=3, train=True)
    for order in ([5], [7, 5, 40], list(range(45, -1, -1))):
        part = splits.train.fetch(order, epoch=3, train=True)["ids"]
        assert torch.equal(part, whole[order])
    assert torch.equal(every(build(files, shift=50).train, epoch=3, train=True), whole)
    assert not torch.equal(every(splits.train, epoch=4, train=True), whole)
    assert not torch.equal(every(build(files, shift=50, seed=1).train, epoch=3, train=True), whole)


def test_loader_workers_give_the_same_batches(files):
    splits = build(files, shift=50, num_workers=2)
    module = SuiteDataModule(splits, options=GenomeOptions(batch_size=4, num_workers=2), seed=0)
    splits.train.fetch([0], epoch=0, train=True)  # the file is open here when the workers start
    loader = module.train_dataloader()
    with_workers = DataLoader(
        loader.dataset,
        sampler=list(loader.sampler)[:4],
        batch_size=None,
        num_workers=2,
    )
    for batch, where in zip(with_workers, list(loader.sampler), strict=False):
        again = splits.train.fetch(where.indices, epoch=where.epoch, train=True)
        assert torch.equal(batch["ids"], again["ids"])
        assert batch["sample_id"].tolist() == where.indices


# --- windows that repeat what was trained on ------------------------------------------------------


def test_a_kmer_and_its_reverse_complement_have_one_code():
    ids = encode("ACGTTGCATTTACGGCATCAGGCATCATTTACNACGGGCATTTACAGGGCATATTTAC")
    codes, whole = kmers(ids)
    back, whole_back = kmers(reverse_complement(ids))
    np.testing.assert_array_equal(codes[whole], back[::-1][whole])
    np.testing.assert_array_equal(whole, whole_back[::-1])
    assert whole.tolist() == [not any(ids[i : i + K] == N) for i in range(len(ids) - K + 1)]
    assert kmers(ids[: K - 1])[0].shape == (0,)


def reference_novel(sequences, places, trained) -> list[bool]:
    """By sets of strings: whether no base of a window is in a 24-mer that `trained` has."""
    known = set()
    for ids in trained:
        for text in (decode(ids), decode(reverse_complement(ids))):
            known |= {text[i : i + K] for i in range(len(text) - K + 1)}
    out = []
    for number, start, end in places.tolist():
        text = decode(sequences[number])
        spans = range(max(0, start - K + 1), min(end, len(text) - K + 1))
        out.append(not any(text[i : i + K] in known for i in spans if "N" not in text[i : i + K]))
    return out


@pytest.mark.parametrize("piece", [7, 1 << 22])
def test_novel_is_what_sets_of_strings_say(monkeypatch, piece):
    monkeypatch.setattr("tasks.dna.novel.PIECE", piece)
    rng = np.random.default_rng(0)
    train = [
        rng.integers(A, T + 1, 700, dtype=np.uint8),
        rng.integers(A, T + 1, 30, dtype=np.uint8),
    ]
    held = [rng.integers(A, T + 1, size, dtype=np.uint8) for size in (400, 20, 300)]
    held[0][110:150] = train[0][20:60]
    held[0][300] = N
    held[2][200:224] = reverse_complement(train[1][3:27])
    held[2][50:73] = train[0][400:423]  # one base too few
    places = np.array(
        [(n, s, min(s + 50, len(held[n]))) for n in (2, 0, 1) for s in range(0, len(held[n]), 50)]
    )
    novel = novel_windows(held, places, known_kmers(train))
    assert novel.tolist() == reference_novel(held, places, train)
    assert 0 < (~novel).sum() < 6


def test_copies_of_training_sequence_are_not_novel(tmp_path, letters):
    first, second = letters["chr1"], letters["chr2"]
    copied = first[:5_000] + decode(reverse_complement(encode(first[220:280]))) + first[5_060:]
    splits = build(write_genome(tmp_path, {"chr1": copied, "chr2": second}))
    batch = splits.test.fetch(list(range(19)), epoch=0, train=False)
    assert (~batch["novel"]).nonzero().flatten().tolist() == [9, 10]  # 5000-5060 of 4910 and 5010
    assert "novel" not in splits.test.fetch([0], epoch=0, train=True)
    note = "test: 17 of 19 windows have no base in a 24-mer of train and val"
    assert note in splits.info.extra["notes"]


def test_novel_is_left_out_where_it_is_off_or_too_much(files, monkeypatch):
    assert "novel" not in build(files, novel="off").test.fetch([0], epoch=0, train=False)
    monkeypatch.setattr(genome_split, "SMALL", 5_000)
    splits = build(files)
    assert "novel" not in splits.test.fetch([0], epoch=0, train=False)
    assert any("are not told apart" in note for note in splits.info.extra["notes"])
    assert "novel" in build(files, novel="on").test.fetch([0], epoch=0, train=False)


def test_novel_is_kept_and_found_again_and_a_damaged_file_is_passed_over(
    files, tmp_path, monkeypatch
):
    cache = str(tmp_path / "cache")
    first = build(files, cache=cache)
    (kept,) = (tmp_path / "cache" / "novel").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(genome_split, "find_novel", lambda splits: pytest.fail("found anew"))
        again = build(files, cache=cache)
    np.testing.assert_array_equal(again.test.novel, first.test.novel)
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(build(files, cache=cache).test.novel, first.test.novel)


# --- what is refused ------------------------------------------------------------------------------


def test_without_test_intervals_the_validation_is_the_test_too(tmp_path, letters):
    splits = build(write_genome(tmp_path, letters, BED.replace("test", "valid")))
    assert len(splits.test) == len(splits.val)
    assert any("the validation is the test too" in note for note in splits.info.extra["notes"])
    np.testing.assert_array_equal(splits.test.novel, splits.val.novel)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_genome_without_training_or_validation_is_refused(tmp_path, letters, split):
    files = write_genome(tmp_path, letters, BED.replace(split, "test"))
    with pytest.raises(
        ConfigError, match=rf"g\.bed has no intervals of the split '{split}'"
    ) as one:
        build(files)
    assert "\n" not in str(one.value)


@pytest.mark.parametrize("missing", ["fasta", "bed"])
def test_both_files_must_be_named(files, missing):
    with pytest.raises(ConfigError, match=rf"data=genome: needs data\.{missing}=FILE"):
        build(files | {missing: None})


def test_a_letter_that_is_no_base_is_one_line_at_the_start_or_in_training(tmp_path, letters):
    odd = {"chr1": letters["chr1"][:150] + "!" + letters["chr1"][151:], "chr2": letters["chr2"]}
    files = write_genome(tmp_path, odd)
    with pytest.raises(ConfigError, match=r"g\.fa: chr1 position 151 has '!'"):
        build(files)
    splits = build(files, novel="off")
    splits.train.fetch([0], epoch=0, train=True)
    with pytest.raises(DataError, match=r"g\.fa: chr1 position 151 has '!'"):
        splits.train.fetch([1], epoch=0, train=True)


@pytest.mark.parametrize(("field", "value"), [("length", 7), ("shift", -1), ("batch_size", 0)])
def test_options_say_which_of_them_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"^{field} must .*got {value}$"):
        GenomeOptions(**{field: value})


def test_the_digest_follows_both_files(files):
    digest = build(files).info.sha256
    bed = Path(files["bed"])
    bed.write_text(bed.read_text().replace("2500", "2499"))
    assert build(files).info.sha256 != digest


def test_the_choices_are_yeast_first():
    assert list(GENOME_DATA) == ["yeast", "genome"]
    assert GENOME_DATA["yeast"].options.length == 512
    assert GENOME_DATA["genome"].build is build_genome
