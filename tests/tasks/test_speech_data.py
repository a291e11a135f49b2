"""Sets of clips: lists of files, the embedded sets, what is left out, and what a batch holds."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from suite.data import SuiteDataModule
from suite.errors import ConfigError, DataError
from suite.shipped import check_shipped
from tasks.speech import embedded, split
from tasks.speech.clips import ZipClips
from tasks.speech.data import CTC_DATA, PRETRAIN_DATA
from tasks.speech.embedded import ASSETS, CardsRealOptions, build_cards_real
from tasks.speech.manifest import ManifestOptions, build_manifest
from tasks.speech.split import AudioOptions
from tasks.speech.text import LABELS, decode, normalise

LENGTHS = (9000, 24000, 16000, 12000, 30000, 20000, 11000, 28000, 13000, 17000)
WORDS = ("one", "two two", "Three", "four", "five six", "don't", "seven", "eight", "nine", "ten")


@pytest.fixture(scope="module")
def speech():
    """Real speech, 30,000 samples at 16 kHz."""
    clips = ZipClips(ASSETS / "asterisk_en.zip")
    return np.concatenate([clips.read(i) for i in range(4)])[:30_000]


@pytest.fixture
def root(tmp_path, speech):
    """Ten clips and a table of them."""
    for i, length in enumerate(LENGTHS):
        soundfile.write(tmp_path / f"clip {i}.wav", speech[:length], 16_000)
    rows = [f"clip {i}.wav\t{text}" for i, text in enumerate(WORDS)]
    (tmp_path / "train.tsv").write_text("\n".join(["path\ttranscript", *rows, ""]))
    return tmp_path


def options(root: Path, **changes) -> ManifestOptions:
    given = {"train": str(root / "train.tsv"), "val_fraction": 0.3, "cache": "none"}
    return ManifestOptions(**(given | changes))


def build(root: Path, *, words: bool = False, **changes):
    return build_manifest(options(root, **changes), seed=0, words=words)


def whole(root: Path, *, words: bool = False, **changes):
    """A train split that holds all ten."""
    return build(root, words=words, val=str(root / "train.tsv"), **changes)


def paths(part) -> list[str]:
    return [part.path_of(i) for i in range(len(part))]


# --- what a batch holds ---------------------------------------------------------------------------


def test_a_batch_is_padded_with_zeros_to_its_longest_and_says_the_lengths(root, speech):
    train = whole(root).train
    batch = train.fetch([0, 4, 2], epoch=0, train=True)
    assert batch.keys() == {"audio", "length"}
    assert batch["length"].tolist() == [9000, 30000, 16000]
    assert batch["length"].dtype == torch.int64
    assert (batch["audio"].shape, batch["audio"].dtype) == ((3, 30000), torch.float32)
    for row, length in enumerate((9000, 30000, 16000)):
        np.testing.assert_allclose(batch["audio"][row, :length], speech[:length], atol=1e-4)
        assert not batch["audio"][row, length:].any()


def test_targets_are_the_letters_of_the_normalised_transcripts(root):
    train = whole(root, words=True).train
    batch = train.fetch([5, 1], epoch=0, train=True)
    assert batch["target"].dtype == batch["target_length"].dtype == torch.int64
    assert batch["target_length"].tolist() == [5, 7]
    assert [decode(row) for row in batch["target"].tolist()] == ["DON'T", "TWO TWO"]
    assert batch["target"].shape == (2, 7)
    assert train.vocabulary == LABELS


@pytest.mark.parametrize("changes", [{}, {"normalize": True}, {"pad": False}])
def test_a_clip_is_alike_in_any_batch_of_its_epoch_and_draws_no_global_randomness(root, changes):
    train = whole(root, crop_seconds=0.6, **changes).train
    state = torch.get_rng_state()
    together = train.fetch([7, 2, 4, 7], epoch=3, train=True)
    again = whole(root, crop_seconds=0.6, **changes).train
    for row, i in enumerate([7, 2, 4, 7]):
        alone = again.fetch([i], epoch=3, train=True)
        length = int(alone["length"][0])
        assert torch.equal(alone["audio"][0], together["audio"][row, :length])
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_lie_inside_the_clip_differ_between_epochs_and_begin_at_the_start_in_evaluation(
    root, speech
):
    splits = whole(root, crop_seconds=0.75)
    crops = [splits.train.fetch([4], epoch=e, train=True)["audio"][0].numpy() for e in range(6)]
    clip = soundfile.read(root / "clip 4.wav", dtype="float32")[0]
    windows = np.lib.stride_tricks.sliding_window_view(clip, 12_000)
    found = [np.flatnonzero((windows[:, :50] == crop[:50]).all(1)).tolist() for crop in crops]
    assert all(starts for starts in found)
    assert len({starts[0] for starts in found}) > 3
    for crop, starts in zip(crops, found, strict=True):
        assert any(np.array_equal(windows[start], crop) for start in starts)
    assert splits.train.lengths.tolist() == [min(length, 12_000) for length in LENGTHS]
    for one in (splits.val, splits.train):
        assert np.array_equal(one.fetch([4], epoch=5, train=False)["audio"][0], clip[:12_000])


def test_without_padding_every_row_of_a_batch_has_the_length_of_its_buckets_shortest(root):
    train = whole(root, pad=False, batch_seconds=4.0).train
    assert np.array_equal(train.lengths, train.buckets.crop_to)
    assert (train.lengths <= np.array(LENGTHS)).all()
    for rows in train.buckets.epoch(0):
        batch = train.fetch(rows.tolist(), epoch=0, train=True)
        assert (batch["length"] == batch["audio"].shape[1]).all()


@pytest.mark.parametrize("pad", [True, False])
def test_every_clip_is_in_one_batch_of_an_epoch_within_the_seconds_and_the_rows(root, pad):
    given = options(root, val=str(root / "train.tsv"), batch_seconds=4.0, batch_size=3, pad=pad)
    module = SuiteDataModule(build_manifest(given, seed=0, words=False), options=given, seed=0)
    batches = list(module.train_dataloader())
    ids = torch.cat([batch["sample_id"][batch["valid"]] for batch in batches])
    assert sorted(ids.tolist()) == list(range(10))
    assert all(batch["audio"].numel() <= 4 * 16_000 for batch in batches)
    assert all(len(batch["audio"]) <= 3 for batch in batches)
    seen = torch.cat([b["sample_id"][b["valid"]] for b in module.val_dataloader()])
    assert sorted(seen.tolist()) == list(range(10))


def test_loader_workers_change_nothing(root):
    batches = {}
    for workers in (0, 2):
        given = AudioOptions(num_workers=workers, crop_seconds=1.0, batch_seconds=60.0)
        splits = PRETRAIN_DATA["cards_synthetic"].build(given, seed=0)
        module = SuiteDataModule(splits, options=given, seed=0, limits={"train": 3})
        batches[workers] = list(module.train_dataloader())
    for alone, shared in zip(batches[0], batches[2], strict=True):
        assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_normalised_clips_have_the_mean_and_variance_of_layer_norm_over_the_whole_clip(root):
    plain = whole(root).train.fetch([4], epoch=0, train=False)["audio"][0]
    wanted = torch.nn.functional.layer_norm(plain, plain.shape)
    cropped = whole(root, normalize=True, crop_seconds=1.0)
    found = cropped.train.fetch([4], epoch=0, train=False)["audio"][0]
    torch.testing.assert_close(found, wanted[:16_000], atol=1e-4, rtol=1e-4)
    assert not split.normalized(np.zeros(100, np.float32)).any()


# --- files that cannot be used --------------------------------------------------------------------


def spoil(root: Path, i: int = 4, share: float = 0.5) -> Path:
    """Damage a flac file whose header still says its length."""
    path = root / f"clip {i}.wav"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_a_file_that_is_damaged_while_training_ends_the_run_with_its_name(root):
    train = whole(root).train
    path = spoil(root)
    with pytest.raises(DataError) as caught:
        train.fetch([1, 4], epoch=0, train=True)
    message = str(caught.value)
    assert message.startswith(f"data=manifest: {path}: is cut short (")
    assert message.endswith("repair or remove it, or set data.on_error=skip")
    assert not train.skips


@pytest.mark.parametrize("pad", [True, False])
def test_a_skipped_file_is_a_row_of_zeros_that_is_not_valid_and_is_named_once(root, capsys, pad):
    train = whole(root, on_error="skip", pad=pad).train
    path = spoil(root)
    for epoch in (0, 1):
        batch = train.fetch([1, 4, 0], epoch=epoch, train=True)
        assert batch["valid"].tolist() == [True, False, True]
        assert not batch["audio"][1].any()
        assert batch["length"][1] == (8000 if pad else train.lengths[4])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert lines[0].endswith("skipped")


def test_an_invalid_row_has_an_empty_target(root):
    train = whole(root, words=True, on_error="skip").train
    spoil(root)
    batch = train.fetch([4, 1], epoch=0, train=True)
    assert batch["target_length"].tolist() == [0, 7]
    assert not batch["target"][0].any()


def test_a_lost_disk_is_never_skipped(root, monkeypatch):
    from tasks.speech import audio

    train = whole(root, on_error="skip").train

    def gone(name):
        raise audio.UnreadableError(name, "cannot be read (Input/output error)")

    monkeypatch.setattr(audio, "check_file", gone)
    with pytest.raises(DataError, match="nothing of this kind is skipped"):
        train.fetch([1], epoch=0, train=True)


def stereo(root: Path, speech) -> None:
    soundfile.write(root / "clip 3.wav", np.stack([speech, speech], 1), 16_000)


def slow(root: Path, speech) -> None:
    soundfile.write(root / "clip 3.wav", speech, 8000)


FAULTS = {
    "stereo": (stereo, r"clip 3\.wav: has 2 channels, .* set data\.mix_channels=true"),
    "8 kHz": (slow, r"clip 3\.wav: is sampled at 8000 Hz, .* set data\.resample=true"),
    "text": (
        lambda root, _: (root / "clip 3.wav").write_text("no audio"),
        r"clip 3\.wav: is no audio .*\(train\.tsv line 5\); repair or remove it, or set data\.on_e",
    ),
    "empty": (
        lambda root, _: (root / "clip 3.wav").write_bytes(b""),
        r"clip 3\.wav: is an empty file \(train\.tsv line 5\)",
    ),
    "missing": (
        lambda root, _: (root / "clip 3.wav").unlink(),
        r"clip 3\.wav: does not exist \(train\.tsv line 5\)",
    ),
    "folder": (
        lambda root, _: ((root / "clip 3.wav").unlink(), (root / "clip 3.wav").mkdir()),
        r"clip 3\.wav: is a folder, not an audio file",
    ),
    "digits": (
        lambda root, _: rewrite(root, "four", "4 four"),
        r"clip 3\.wav: its transcript \(train\.tsv line 5\) cannot be spelt: '4' is none of",
    ),
    "too many letters": (
        lambda root, _: rewrite(root, "four", "abcdefghij " * 5),
        r"clip 3\.wav: has 37 frames, and its transcript needs 54, so that CTC cannot align",
    ),
}


def rewrite(root: Path, old: str, new: str) -> None:
    table = root / "train.tsv"
    table.write_text(table.read_text().replace(old, new))


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_clip_that_cannot_be_used_is_one_line_before_training_or_left_out_and_counted(
    root, speech, kind
):
    harm, message = FAULTS[kind]
    harm(root, speech)
    with pytest.raises(ConfigError, match=message) as caught:
        whole(root, words=True)
    assert str(caught.value).startswith(f"data=manifest: {root}")
    assert "\n" not in str(caught.value)
    left = whole(root, words=True, on_error="skip")
    assert len(left.train) == 9
    assert any(note.startswith("train: 1 of 10 clips left out: 1 ") for note in notes(left))
    assert not any("clip 3.wav" in path for path in paths(left.train))


def notes(splits) -> tuple[str, ...]:
    return splits.info.extra["notes"]


def test_what_the_options_allow_is_used(root, speech):
    stereo(root, speech)
    assert whole(root, mix_channels=True).train.lengths[3] == 30_000
    slow(root, speech)
    train = whole(root, resample=True).train
    assert train.lengths[3] == 60_000
    assert train.fetch([3], epoch=0, train=True)["audio"].shape == (1, 60_000)


def test_short_clips_are_left_out_and_counted(root):
    splits = whole(root, min_seconds=0.8)
    assert sorted(splits.train.lengths.tolist()) == sorted(n for n in LENGTHS if n >= 12_800)
    assert "train: 3 of 10 clips left out: 3 shorter than data.min_seconds=0.8" in notes(splits)
    with pytest.raises(ConfigError, match=r"none of the 10 clips of train can be used: 10 shorter"):
        whole(root, min_seconds=9.0)


def test_for_ctc_long_training_clips_are_left_out_and_evaluation_keeps_all(root):
    splits = whole(root, words=True, crop_seconds=1.0)
    assert sorted(splits.train.lengths.tolist()) == sorted(n for n in LENGTHS if n <= 16_000)
    assert splits.val.lengths.tolist() == list(LENGTHS)
    assert "train: 5 of 10 clips left out: 5 longer than data.crop_seconds=1" in notes(splits)


def test_ctc_refuses_crops_and_a_set_without_words(root):
    with pytest.raises(ConfigError, match=r"^data\.pad=false crops training clips"):
        build(root, words=True, pad=False)
    clips = ZipClips(ASSETS / "cards_synthetic.zip")
    clips.texts = [""] * len(clips.texts)
    from tasks.speech.sets import Part, make_splits

    parts = {name: Part(clips, np.arange(3)) for name in ("train", "val", "test")}
    given = {"about": embedded.CARDS, "options": AudioOptions(), "seed": 0}
    with pytest.raises(ConfigError, match="data=cards_synthetic: train has no words in its trans"):
        make_splits(parts, words=True, **given)
    assert make_splits(parts, words=False, **given).info.sizes["train"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_seconds": 0.0}, "^batch_seconds must be above 0, got 0"),
        ({"min_seconds": 0.01}, r"^min_seconds must be at least 0\.025, one frame"),
        ({"crop_seconds": 0.2}, r"^crop_seconds must be a number from min_seconds, 0\.5, got 0\.2"),
        ({"val_fraction": 1.0}, "^val_fraction must be above 0 and below 1"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ManifestOptions(**changes)


# --- lists of files -------------------------------------------------------------------------------


def test_a_share_is_chosen_by_path_so_that_new_clips_move_no_old_ones(root, speech):
    before = build(root)
    assert len(before.train) + len(before.val) == 10
    assert paths(before.val) == paths(before.test)
    assert any("by a hash of the paths" in note for note in notes(before))
    soundfile.write(root / "new.wav", speech, 16_000)
    with (root / "train.tsv").open("a") as table:
        table.write("new.wav\tnew\n")
    after = build(root)
    assert set(paths(before.train)) <= set(paths(after.train))
    assert set(paths(before.val)) <= set(paths(after.val))
    assert after.info.sha256 != before.info.sha256


def test_three_lists_are_the_three_splits_and_shared_files_are_said(root):
    lines = (root / "train.tsv").read_text().splitlines()
    (root / "val.csv").write_text("text,path\n" + '"one, two",clip 0.wav\n'.replace(",", "", 1))
    (root / "test.tsv").write_text("\n".join([lines[0], *lines[3:5]]))
    splits = build(root, words=True, val=str(root / "val.csv"), test=str(root / "test.tsv"))
    assert splits.info.sizes == {"train": 10, "val": 1, "test": 2}
    assert splits.val.text_of(0) == "ONE TWO"
    assert "1 files of data.val are in data.train too: val is not unseen" in notes(splits)
    assert splits.info.classes == 29
    assert splits.info.extra["labels"] == LABELS


def test_val_alone_is_for_evaluation(root):
    splits = build(root, train=None, val=str(root / "train.tsv"))
    assert splits.info.sizes == {"train": 0, "val": 10, "test": 10}
    assert len(splits.train.buckets) == 0


def test_pretraining_needs_no_transcripts(root):
    (root / "train.tsv").write_text("path\n" + "".join(f"clip {i}.wav\n" for i in range(10)))
    assert build(root).info.classes is None
    with pytest.raises(ConfigError, match="has no column any of transcript, text, sentence"):
        build(root, words=True)


@pytest.mark.parametrize("suffix", ["ltr", "wrd"])
def test_fairseqs_lists_are_read_with_the_transcripts_beside_them(root, suffix):
    rows = [f"clip {i}.wav\t{length}" for i, length in enumerate(LENGTHS)]
    (root / "fair").mkdir()
    (root / "fair" / "train.tsv").write_text("\n".join([str(root), *rows, ""]))
    lines = [normalise(text) for text in WORDS]
    if suffix == "ltr":
        lines = [" ".join(line.replace(" ", "|")) + " |" for line in lines]
    (root / "fair" / f"train.{suffix}").write_text("\n".join([*lines, ""]))
    given = {"train": str(root / "fair" / "train.tsv"), "val": str(root / "train.tsv")}
    splits = build(root, words=True, **given)
    assert [splits.train.text_of(i) for i in range(10)] == [
        splits.val.text_of(i) for i in range(10)
    ]
    assert paths(splits.train) == paths(splits.val)


def test_quotes_are_text_in_a_tsv_and_quote_in_a_csv(root):
    (root / "a.csv").write_text('path,transcript\n"clip 0.wav","five\nsix"\n')
    (root / "b.tsv").write_text("path\ttranscript\nclip 0.wav\tdon't\n")
    assert build(root, words=True, val=str(root / "a.csv")).val.text_of(0) == "FIVE SIX"
    assert build(root, words=True, val=str(root / "b.tsv")).val.text_of(0) == "DON'T"
    (root / "c.tsv").write_text('path\ttranscript\nclip 0.wav\t"one\n')
    with pytest.raises(ConfigError, match="'\"' is none of the letters"):
        build(root, words=True, val=str(root / "c.tsv"))


BAD_LISTS = {
    "none": (None, "cannot be read (No such file or directory)"),
    "nothing": ("", "is empty; it needs a header line"),
    "header alone": ("path\ttranscript\n", "has no clips; add a line for each"),
    "no path column": ("file\ttext\na\tb\n", "line 1, the header, has no column path; it has file"),
    "no transcript column": ("path\tspeaker\na\tb\n", "has no column any of transcript, text"),
    "no transcript": ("path\ttext\nclip 0.wav\t \n", "line 2 has no transcript for clip 0.wav"),
    "no path": ("path\ttext\n\thello\n", "line 2 has no path"),
    "twice": ("path\ttext\na.wav\ta\n\n./a.wav\tb\n", "line 4 has the path of line 2, ./a.wav"),
    "columns": ("path\ttext\na.wav\n", "line 2 has 1 tab-separated columns, the header 2"),
    "no folder": (
        "/nowhere\na.wav\t100\n",
        "or, as fairseq has it, a folder, and /nowhere is none",
    ),
    "latin 1": (b"path\ttext\nclip 0.wav\t\xe9\n", "is not UTF-8 text (byte 21)"),
}


@pytest.mark.parametrize("kind", list(BAD_LISTS))
def test_a_list_that_cannot_be_used_is_one_line(root, kind):
    content, message = BAD_LISTS[kind]
    if content is not None:
        (root / "bad.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
        if kind == "no folder":
            (root / "bad.ltr").write_text("a\n")
    with pytest.raises(ConfigError) as caught:
        build(root, words=True, train=str(root / "bad.tsv"))
    assert str(caught.value).startswith(f"data=manifest: {root / 'bad.tsv'} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.csv", 'path,text\nclip 0.wav,"one\n', r"line 2 is no CSV \(.*\); check its quotes"),
        ("bad.csv", 'path,text\n"clip" 0.wav,one\n', r"line 2 is no CSV \(.*\); check its quotes"),
        ("bad.tsv", "{root}\nclip 0.wav\t9000\n", "neither bad.ltr nor bad.wrd"),
        ("bad.tsv", "{root}\nclip 0.wav 9000\n", "neither bad.ltr nor bad.wrd"),
    ],
)
def test_quotes_and_fairseqs_files_that_do_not_fit_are_one_line(root, name, content, message):
    (root / name).write_text(content.replace("{root}", str(root)))
    with pytest.raises(ConfigError, match=message):
        build(root, words=True, train=str(root / name))


def test_fairseqs_transcripts_must_be_as_many_as_its_clips_and_its_lines_whole(root):
    (root / "bad.tsv").write_text(f"{root}\nclip 0.wav\t9000\n")
    (root / "bad.ltr").write_text("O N E |\nT W O |\n")
    with pytest.raises(ConfigError, match=r"has 1 clips and .*bad\.ltr 2 lines"):
        build(root, words=True, train=str(root / "bad.tsv"))
    (root / "bad.tsv").write_text(f"{root}\nclip 0.wav 9000\n")
    with pytest.raises(ConfigError, match="line 2 is not a path, a tab and the number of samples"):
        build(root, train=str(root / "bad.tsv"))


def test_no_list_at_all_and_a_share_of_nothing_are_one_line(root):
    with pytest.raises(ConfigError, match=r"^data=manifest: needs data\.train=FILE"):
        build(root, train=None)
    with pytest.raises(ConfigError, match=r"too few clips \(10\) for data\.val_fraction=0\.0001"):
        build(root, val_fraction=0.0001)


def test_a_second_start_finds_the_same_set(root, tmp_path):
    first, second = (whole(root, words=True, cache=str(tmp_path / "kept")) for _ in range(2))
    assert first.info == second.info


# --- the embedded sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", [PRETRAIN_DATA, CTC_DATA])
def test_every_entry_has_options_of_its_own_and_a_line_of_help(table):
    for choice in table.values():
        assert isinstance(choice.options, AudioOptions)
        assert choice.options.by_length
        assert choice.help
    assert (next(iter(PRETRAIN_DATA)), next(iter(CTC_DATA))) == ("asterisk_en", "cards_synthetic")


@pytest.mark.parametrize("name", ["asterisk_en", "cards_synthetic"])
def test_an_embedded_set_is_what_was_shipped_and_every_clip_can_be_read(name):
    choice = CTC_DATA[name]
    splits = choice.build(choice.options, seed=0)
    assert splits.info.synthetic == (name == "cards_synthetic")
    texts = [part.text_of(i) for part in (splits.train, splits.val) for i in range(len(part))]
    assert all(texts)
    ids = [set(paths(getattr(splits, part))) for part in ("train", "val", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids))
    for part in (splits.train, splits.val, splits.test):
        for i in range(0, len(part), 7):
            batch = part.fetch([i], epoch=0, train=False)
            assert batch["length"][0] == part.lengths[i]
            assert batch["audio"].abs().max() > 0.01
            assert part.text_of(i) == normalise(part.text_of(i))


def test_clips_whose_words_are_not_known_are_for_pretraining_alone():
    sizes = {
        words: table["asterisk_en"].build(AudioOptions(), seed=0)
        for words, table in ((True, CTC_DATA), (False, PRETRAIN_DATA))
    }
    assert sizes[False].info.sizes["train"] == 406
    assert sizes[True].info.sizes["train"] == 374
    assert "train: 32 of 406 clips left out: 32 without a transcript" in notes(sizes[True])


def test_a_changed_or_missing_file_in_the_package_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        check_shipped(tmp_path / "a.zip", embedded.CARDS_SHA256, name="cards_synthetic")
    (tmp_path / "a.zip").write_text("other")
    with pytest.raises(ConfigError, match=r"is not the file that was shipped .* Install dyt-suite"):
        check_shipped(tmp_path / "a.zip", embedded.CARDS_SHA256, name="cards_synthetic")


def test_the_real_cards_are_for_evaluation_and_say_how_to_get_them(tmp_path, speech):
    given = CardsRealOptions(root=str(tmp_path), cache="none")
    with pytest.raises(ConfigError, match=r"apt install pocketsphinx-testdata"):
        build_cards_real(given, seed=0, words=True)
    for name in ("001", "002"):
        soundfile.write(tmp_path / f"{name}.wav", speech, 16_000)
    table = tmp_path / "cards.transcription"
    table.write_text("<s> ten of clubs  </s> (001)\n<s> five five  </s> (002)\n")
    splits = build_cards_real(given, seed=0, words=True)
    assert splits.info.sizes == {"train": 0, "val": 2, "test": 2}
    assert [splits.val.text_of(i) for i in range(2)] == ["TEN OF CLUBS", "FIVE FIVE"]
    assert not splits.info.synthetic
    table.write_text("ten of clubs\n")
    with pytest.raises(ConfigError, match="line 1 is not <s> WORDS </s>"):
        build_cards_real(dataclasses.replace(given), seed=0, words=True)
