"""Class folders: which splits they make, their order and cache, what is refused and skipped."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from suite.cache import cache_folder
from suite.data import SuiteDataModule
from suite.errors import ConfigError, DataError
from tasks.vision import folder, index
from tasks.vision.decode import EXTENSIONS
from tasks.vision.fashion_mnist import MINI_FILE, read_mini
from tasks.vision.folder import (
    ImageFolderOptions,
    build_image_folder,
    build_imagenet,
    preprocessing,
    synsets,
)

pytestmark = pytest.mark.vision

CLASSES = ("bag", "boot", "coat")
LONG_AGO = 1_000_000_000


@pytest.fixture(scope="module")
def photographs():
    """Real images, [N, 28, 28, 3] uint8."""
    images = read_mini(MINI_FILE)["train_images"][:120]
    return np.stack([images, images, images], -1)


def fill(root: Path, photographs, *, each: int = 4, classes=CLASSES, start: int = 0) -> Path:
    """Class folders with `each` images in them: JPEGs, and a PNG among them."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            image = Image.fromarray(photographs[(start + k * each + i) % len(photographs)])
            image.resize((40, 32)).save(root / name / f"{i}.{'png' if i == 1 else 'jpg'}")
    return root


@pytest.fixture
def tree(tmp_path, photographs):
    """train with 3 x 4 images, val with 3 x 2."""
    fill(tmp_path / "data" / "train", photographs)
    fill(tmp_path / "data" / "val", photographs, each=2, start=60)
    return tmp_path / "data"


def options(root: Path | None, **changes) -> ImageFolderOptions:
    given = {"image_size": 16, "cache": "none", "batch_size": 4} | changes
    return ImageFolderOptions(root=None if root is None else str(root), **given)


def build(root: Path | None, **changes):
    return build_image_folder(options(root, **changes), seed=0)


def paths(split) -> list[str]:
    return [split.path_of(i) for i in range(len(split))]


# --- splits and order -----------------------------------------------------------------------------


def test_files_and_classes_stand_in_torchvisions_order(tree, photographs):
    from torchvision.datasets import ImageFolder

    fill(tree / "train" / "boot", photographs, classes=("b", "b-c", "b/c"), each=2)
    (tree / "train" / "boot" / "Z.JPEG").write_bytes(
        (tree / "train" / "boot" / "0.jpg").read_bytes()
    )
    (tree / "train" / "boot" / "notes.txt").write_text("no image")
    built = build(tree)
    theirs = ImageFolder(str(tree / "train"))
    assert paths(built.train) == [path for path, _ in theirs.samples]
    labels = built.train.fetch(list(range(len(built.train))), epoch=0, train=False)["label"]
    assert labels.tolist() == theirs.targets
    assert built.info.extra["class_names"] == CLASSES == tuple(theirs.classes)


def test_hidden_files_and_folders_are_no_data(tree):
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tree / "train" / "bag" / "0.jpg", tree / "train" / "bag" / "._0.jpg")
    built = build(tree)
    assert built.info.classes == 3
    assert len(built.train) == 12


def test_the_val_folder_is_the_test_too_unless_val_is_split_and_a_note_says_which(tree):
    both = build(tree)
    assert both.info.sizes == {"train": 12, "val": 6, "test": 6}
    assert paths(both.val) == paths(both.test)
    assert any("the validation too" in note for note in both.info.extra["notes"])
    apart = build(tree, val="split", val_fraction=0.4)
    assert set(paths(apart.val)) | set(paths(apart.train)) == set(paths(both.train))
    assert len(apart.val) + len(apart.train) == 12
    assert paths(apart.test) == paths(both.val)
    assert any("the test is" in note for note in apart.info.extra["notes"])


def test_three_folders_are_the_three_splits(tree, photographs):
    (tree / "val").rename(tree / "validation")
    fill(tree / "test", photographs, each=1, start=90)
    built = build(tree)
    assert built.info.sizes == {"train": 12, "val": 6, "test": 3}
    assert built.info.extra["notes"] == ()
    (tree / "validation").rename(tree / "elsewhere")
    assert build(tree, val="split", val_fraction=0.4).info.sizes["test"] == 3


def test_a_test_folder_without_classes_is_not_used_and_said_so(tree):
    (tree / "test").mkdir()
    shutil.copy(tree / "val" / "bag" / "0.jpg", tree / "test" / "ILSVRC2012_test_1.JPEG")
    built = build(tree)
    assert paths(built.test) == paths(built.val)
    assert any("test is not used" in note for note in built.info.extra["notes"])


def test_one_folder_is_divided_by_path_so_that_new_files_move_no_old_ones(tmp_path, photographs):
    root = fill(tmp_path / "all", photographs, each=40)
    before = build(root)
    parts = {name: set(paths(getattr(before, name))) for name in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 120
    assert 3 <= len(parts["val"]) <= 25
    assert 3 <= len(parts["test"]) <= 25
    shutil.copy(root / "bag" / "0.jpg", root / "bag" / "00.jpg")
    moved = shutil.copytree(root, tmp_path / "another place")
    after = build(moved)
    for name, old in parts.items():
        new = {path.replace(str(moved), str(root)) for path in paths(getattr(after, name))}
        assert old <= new
    assert before.info.sha256 != after.info.sha256


def test_a_class_may_be_called_train(tmp_path, photographs):
    root = fill(tmp_path / "all", photographs, each=40, classes=("bus", "train"))
    assert build(root).info.extra["class_names"] == ("bus", "train")


# --- the cache ------------------------------------------------------------------------------------


def age(root: Path) -> None:
    """Give every folder an old modification time: a fresh one may change again unseen."""
    for where, _, _ in os.walk(root):
        os.utime(where, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture
def scans(monkeypatch):
    """The roots that have been read from disk."""
    found = []
    real = index.scan

    def counted(root, *, name):
        found.append(root.name)
        return real(root, name=name)

    monkeypatch.setattr(index, "scan", counted)
    return found


def test_a_folder_whose_time_was_set_back_is_read_again(tree, tmp_path, scans):
    """As rsync -a and cp -a leave it: only the change time tells."""
    age(tree)
    build(tree, cache=str(tmp_path / "cache"))
    first = paths(build(tree, cache=str(tmp_path / "cache")).train)
    assert scans == ["train", "val"]
    old = tree / "train" / "boot" / "0.jpg"
    old.rename(old.with_name("7.jpg"))
    age(tree)
    again = paths(build(tree, cache=str(tmp_path / "cache")).train)
    assert scans[2:] == ["train", "val"]
    assert {Path(p).name for p in set(again) - set(first)} == {"7.jpg"}


def test_a_second_start_reads_the_cache_and_gives_the_same_index(tree, tmp_path, scans):
    age(tree)
    first = build(tree, cache=str(tmp_path / "cache"))
    second = build(tree, cache=str(tmp_path / "cache"))
    assert scans == ["train", "val"]
    assert second.info == first.info
    for name in ("train", "val", "test"):
        assert paths(getattr(first, name)) == paths(getattr(second, name))
    assert torch.equal(first.train.labels, second.train.labels)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_an_added_a_removed_and_a_renamed_file_are_noticed(tree, tmp_path, scans):
    cache = str(tmp_path / "cache")
    for change in (
        lambda: shutil.copy(tree / "train" / "bag" / "0.jpg", tree / "train" / "bag" / "9.jpg"),
        lambda: (tree / "train" / "bag" / "9.jpg").unlink(),
        lambda: (tree / "train" / "boot" / "0.jpg").rename(tree / "train" / "boot" / "8.jpg"),
    ):
        age(tree)
        build(tree, cache=cache)
        scans.clear()
        change()
        assert paths(build(tree, cache=cache).train) == paths(build(tree).train)
        assert scans == ["train", "train", "val"]  # train again; both of the build without a cache


def test_a_tree_that_has_just_changed_is_not_cached(tree, tmp_path):
    build(tree, cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("harm", ["cut", "flip", "text", "nothing"])
def test_a_damaged_cache_is_a_note_and_is_built_again(tree, tmp_path, scans, capsys, harm):
    age(tree)
    cache = tmp_path / "cache"
    whole = build(tree, cache=str(cache))
    file = next(cache.glob("index/train-*.npz"))
    content = file.read_bytes()
    at = content.index(b"bag/0.jpg")
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "flip": content[:at] + b"\xff" + content[at + 1 :],
            "text": b"no archive",
            "nothing": b"",
        }[harm]
    )
    again = build(tree, cache=str(cache))
    assert paths(again.train) == paths(whole.train)
    assert scans == ["train", "val", "train"]
    assert "is damaged" in capsys.readouterr().err
    build(tree, cache=str(cache))
    assert len(scans) == 3


def test_the_cache_holds_plain_data_and_of_another_version_is_not_used(
    tree, tmp_path, scans, monkeypatch
):
    age(tree)
    cache = tmp_path / "cache"
    build(tree, cache=str(cache))
    with np.load(next(cache.glob("index/train-*.npz")), allow_pickle=False) as stored:
        assert not any(stored[key].dtype.hasobject for key in stored.files)
        assert json.loads(stored["meta"].tobytes())["version"] == index.VERSION
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    build(tree, cache=str(cache))
    assert scans == ["train", "val"] * 2


def test_a_cache_that_cannot_be_written_is_a_note(tree, tmp_path, capsys):
    age(tree)
    (tmp_path / "file").write_text("in the way")
    assert len(build(tree, cache=str(tmp_path / "file")).train) == 12
    assert "cannot be kept in" in capsys.readouterr().err


def test_the_cache_lies_in_the_users_cache_folder(tree, tmp_path, monkeypatch):
    age(tree)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(tree, cache=None)
    assert len(list((tmp_path / "xdg" / "dyt-suite" / "index").glob("*.npz"))) == 2
    assert cache_folder("none", kind="index") is None


# --- wrong inputs ---------------------------------------------------------------------------------


def loop(root: Path, _) -> None:
    (root / "train" / "bag" / "again").symlink_to(root / "train")


def one_deeper(root: Path, _) -> None:
    root.rename(root.parent / "inner")
    root.mkdir()
    (root.parent / "inner").rename(root / "train")


WRONG = {
    "no root": (lambda root, _: None, None, r"needs data\.root=FOLDER"),
    "no such folder": (lambda root, _: None, "nowhere", "does not exist"),
    "a file": (lambda root, _: None, "train/bag/0.jpg", "is a file; a folder is needed"),
    "nothing in it": (lambda root, _: shutil.rmtree(root) or root.mkdir(), "", "no class folders"),
    "loose images": (lambda root, _: None, "train/bag", r"loose images and no class folders; put"),
    "loose train": (
        lambda root, _: (
            [shutil.rmtree(root / "train" / name) for name in CLASSES]
            and shutil.copy(root / "val" / "bag" / "0.jpg", root / "train")
        ),
        "",
        r"train holds loose images and no class folders",
    ),
    "train without classes beside other folders": (
        lambda root, _: (
            [shutil.rmtree(root / "train" / name) for name in CLASSES] and (root / "meta").mkdir()
        ),
        "",
        r"train has no class folders in it",
    ),
    "an empty class": (
        lambda root, _: (root / "train" / "hat").mkdir(),
        "",
        "no images .* hat; add",
    ),
    "one class": (
        lambda root, _: [
            shutil.rmtree(root / part / name) for part in ("train", "val") for name in CLASSES[1:]
        ],
        "",
        r"has one class folder, bag",
    ),
    "a class only in val": (
        lambda root, photos: fill(root / "val", photos, classes=("hat",)),
        "",
        r"class folders differ: hat only in .*val\.",
    ),
    "a class only in train": (
        lambda root, _: shutil.rmtree(root / "val" / "coat"),
        "",
        r"class folders differ: coat only in .*train\.",
    ),
    "other classes in val": (
        lambda root, _: (root / "val" / "coat").rename(root / "val" / "Coat"),
        "",
        r"differ: Coat only in .*val; coat only in .*train\.",
    ),
    "no images": (
        lambda root, _: [file.rename(file.with_suffix(".dat")) for file in root.glob("train/*/*")],
        "",
        r"has no images in its class folders \(\.jpg,",
    ),
    "train in train": (one_deeper, "", r"holds train, val and no class folders.*/data/train$"),
    "train without val": (
        lambda root, _: shutil.rmtree(root / "val"),
        "",
        "has train but no val; add",
    ),
    "val without train": (
        lambda root, _: shutil.rmtree(root / "train"),
        "",
        "has val but no train",
    ),
    "two val folders": (
        lambda root, _: shutil.copytree(root / "val", root / "validation"),
        "",
        "has val, validation; leave only",
    ),
    "links in a circle": (loop, "", "a link in it leads back"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_tree_that_is_not_one_is_a_line_that_says_what_to_do(tree, photographs, kind):
    spoil, below, message = WRONG[kind]
    spoil(tree, photographs)
    with pytest.raises(ConfigError, match=message) as caught:
        build(None if below is None else tree / below)
    assert str(caught.value).startswith("data=image_folder")
    assert "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_opened_is_one_line(tree, monkeypatch):
    """Without real permissions: they do not bind the superuser, whom containers run tests as."""
    real = os.scandir

    def guarded(path):
        if os.fsdecode(path).endswith("boot"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(index.os, "scandir", guarded)
    with pytest.raises(ConfigError, match=r"train/boot cannot be read \(Permission denied\)"):
        build(tree)


@pytest.mark.parametrize(
    ("changes", "folders", "message"),
    [
        ({"val": "split"}, ("test",), r"^data\.val=split: .* are the three splits"),
        ({}, ("test", "-val"), r"has train and test but no val; with data\.val=split"),
    ],
)
def test_where_validation_comes_from_must_fit_the_folders(
    tree, photographs, changes, folders, message
):
    for name in folders:
        if name.startswith("-"):
            shutil.rmtree(tree / name[1:])
        else:
            fill(tree / name, photographs, each=1)
    with pytest.raises(ConfigError, match=message):
        build(tree, **changes)


def test_too_few_images_to_be_divided_are_refused(tree):
    with pytest.raises(ConfigError, match=r"too few images \(6\) to be divided"):
        build(tree / "val", val_fraction=0.01, test_fraction=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "^image_size must be at least 1"),
        ({"crop_pct": 1.5}, "^crop_pct must be above 0"),
        ({"val_fraction": 0.0}, "^val_fraction must be above 0"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "^val_fraction must be below 1 - test_fraction",
        ),
        ({"mean": [0.5]}, "^mean must be three numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "^std must be three numbers"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderOptions(**changes)


# --- ImageNet -------------------------------------------------------------------------------------


def test_the_synsets_are_the_thousand_of_timm_in_sorted_order():
    timm_data = pytest.importorskip("timm.data")
    assert len(set(synsets())) == 1000
    assert list(synsets()) == sorted(synsets())
    assert list(synsets()) == list(timm_data.ImageNetInfo("imagenet-1k").label_names())


def test_imagenet_takes_its_thousand_folders_and_no_others(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(folder, "synsets", lambda: CLASSES)
    fill(tmp_path / "train", photographs, each=2)
    fill(tmp_path / "val", photographs, each=1, start=50)
    built = build_imagenet(options(tmp_path), seed=0)
    assert (built.info.name, built.info.classes) == ("imagenet", 3)
    assert any("the published set 1,281,167" in note for note in built.info.extra["notes"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"n01440764, n01443537, n01484850 and 997 more missing"):
        build_imagenet(options(tmp_path), seed=0)
    with pytest.raises(ConfigError, match="must hold train and val"):
        build_imagenet(options(tmp_path / "train"), seed=0)


def test_imagenets_loose_validation_images_get_a_line_on_how_to_sort_them(tmp_path, photographs):
    fill(tmp_path / "train", photographs, each=1)
    (tmp_path / "val").mkdir()
    shutil.copy(
        tmp_path / "train" / "bag" / "0.jpg", tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG"
    )
    with pytest.raises(ConfigError, match=r"loose images.*ILSVRC2012_validation_ground_truth\.txt"):
        build_imagenet(options(tmp_path), seed=0)


def test_kaggles_archive_is_pointed_deeper(tmp_path, photographs):
    deeper = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    fill(deeper / "train", photographs, each=1)
    with pytest.raises(ConfigError, match=r"set data\.root=.*CLS-LOC"):
        build_imagenet(options(tmp_path), seed=0)


# --- what a batch holds ---------------------------------------------------------------------------


def test_a_sample_is_alike_in_any_batch_of_its_epoch_and_draws_no_global_randomness(tree):
    split = build(tree, randaugment="rand-m9-mstd0.5-inc1", erase=0.5).train
    state = torch.get_rng_state()
    together = split.fetch([7, 2, 11], epoch=3, train=True)
    again = build(tree, randaugment="rand-m9-mstd0.5-inc1", erase=0.5).train
    for row, i in enumerate([7, 2, 11]):
        alone = again.fetch([i], epoch=3, train=True)
        assert torch.equal(alone["image"][0], together["image"][row])
        assert alone["label"][0] == together["label"][row]
    assert together["image"].shape == (3, 3, 16, 16)
    assert not torch.equal(together["image"], split.fetch([7, 2, 11], epoch=4, train=True)["image"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "crop_pct"), [(24, 0.875), (32, 0.95), (20, 1.0)])
def test_evaluation_preprocessing_is_timms(tree, size, crop_pct):
    timm_data = pytest.importorskip("timm.data")
    split = build(tree, image_size=size, crop_pct=crop_pct).val
    theirs = timm_data.create_transform(
        input_size=size,
        is_training=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        mean=folder.IMAGENET_MEAN,
        std=folder.IMAGENET_STD,
    )
    ours = split.fetch([0, 1], epoch=0, train=False)["image"]
    for row in (0, 1):
        with Image.open(split.path_of(row)) as image:
            torch.testing.assert_close(
                ours[row], theirs(image.convert("RGB")), atol=1e-6, rtol=1e-6
            )


def spoil_file(tree: Path) -> Path:
    path = tree / "train" / "boot" / "2.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_a_file_that_cannot_be_decoded_ends_the_run_with_its_name(tree):
    path = spoil_file(tree)
    split = build(tree).train
    with pytest.raises(DataError) as caught:
        split.fetch([0, 6, 1], epoch=0, train=True)
    message = str(caught.value)
    assert message.startswith(f"data=image_folder: {path} cannot be decoded (")
    assert message.endswith("repair or remove it, or set data.on_error=skip")
    assert "\n" not in message
    assert not split.skips


def test_a_loaders_worker_names_the_file_in_one_line_too(tree):
    path = spoil_file(tree)
    given = options(tree, num_workers=1, batch_size=12)
    module = SuiteDataModule(build_image_folder(given, seed=0), options=given, seed=0)
    with pytest.raises(DataError) as caught:
        list(module.train_dataloader())
    assert str(caught.value).startswith(f"data=image_folder: {path} cannot be decoded (")
    assert "\n" not in str(caught.value)


def test_a_skipped_file_is_a_row_that_is_not_valid_and_is_named_once(tree, capsys):
    path = spoil_file(tree)
    split = build(tree, on_error="skip", mixup=0.8).train
    for train in (True, False, True):
        batch = split.fetch([0, 6, 1, 5], epoch=0, train=train)
        assert batch["valid"].tolist() == [True, False, True, True]
        assert batch["image"][1].abs().sum() == 0
        assert batch["label"].tolist() == [0, 1, 0, 1]
    assert batch["lam"][:2].tolist() == [1, 1]  # its partner stays as it is
    plain = build(tree, on_error="skip").train
    assert torch.equal(
        plain.fetch([0], epoch=0, train=True)["image"][0],
        batch["image"][0],
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert lines[0].endswith("skipped")


def test_after_some_warnings_further_files_are_no_longer_named(tree, monkeypatch, capsys):
    for path in (tree / "train").glob("*/*.jpg"):
        path.write_text("no image")
    monkeypatch.setattr(folder, "MOST_WARNINGS", 2)
    split = build(tree, on_error="skip").train
    assert split.fetch(list(range(12)), epoch=0, train=True)["valid"].sum() == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "further files" in lines[2]


def test_loader_workers_change_nothing_and_pass_the_invalid_rows_on(tree):
    spoil_file(tree)
    batches = {}
    for workers in (0, 2):
        given = options(tree, on_error="skip", num_workers=workers)
        module = SuiteDataModule(build_image_folder(given, seed=0), options=given, seed=0)
        batches[workers] = list(module.train_dataloader())
    assert len(batches[0]) == len(batches[2]) == 3
    for alone, shared in zip(batches[0], batches[2], strict=True):
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[key], shared[key]) for key in alone)
    assert sum(int(batch["valid"].sum()) for batch in batches[0]) == 11


# --- preprocessing of a published checkpoint ------------------------------------------------------


def test_timm_cfg_takes_a_checkpoints_preprocessing_from_timm():
    pytest.importorskip("timm")
    made = preprocessing(ImageFolderOptions(timm_cfg="vit_base_patch16_224.augreg_in21k_ft_in1k"))
    assert (made.image_size, made.crop_pct, made.interpolation) == (224, 0.9, "bicubic")
    assert made.mean == made.std == (0.5, 0.5, 0.5)


def test_timm_cfg_reads_a_config_json(tmp_path):
    section = {
        "input_size": [3, 32, 32],
        "crop_pct": 0.95,
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architecture": "x", "pretrained_cfg": section}))
    given = ImageFolderOptions(timm_cfg=str(file))
    made = preprocessing(given)
    assert (made.image_size, made.crop_pct, made.interpolation) == (32, 0.95, "bilinear")
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ConfigError, match=r"data\.image_size=64: data\.timm_cfg=.* says 32"):
        preprocessing(ImageFolderOptions(timm_cfg=str(file), image_size=64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[1]", "no pretrained_cfg section"),
        ('{"pretrained_cfg": {"input_size": [3, 9, 9]}}', "needs input_size, crop_pct"),
        ('{"pretrained_cfg": {"crop_mode": "squash"}}', "crop_mode is squash"),
        ('{"pretrained_cfg": {"interpolation": "lanczos"}}', "interpolation is lanczos"),
        (
            '{"pretrained_cfg": {"input_size": [3, 9, 9], "crop_pct": 2, "mean": [0, 0, 0], '
            '"std": [1, 1, 1]}}',
            "a crop_pct above 0, 1 at most",
        ),
        (
            '{"pretrained_cfg": {"input_size": [1, 9, 9], "crop_pct": 1, "mean": [0], "std": [1]}}',
            "needs square images of 3 channels",
        ),
    ],
)
def test_a_config_json_that_does_not_fit_is_one_line(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        preprocessing(ImageFolderOptions(timm_cfg=str(file)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet5O", "resnet50.no_such_tag"])
def test_an_unknown_checkpoint_names_the_nearest(name):
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"no such checkpoint\. Nearest: .*resnet50"):
        preprocessing(ImageFolderOptions(timm_cfg=name))


def test_timm_missing_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'pip install "dyt-suite\[timm\]"'):
        preprocessing(ImageFolderOptions(timm_cfg="resnet50"))


def test_every_kind_of_file_that_is_listed_can_be_read(tree):
    for suffix in EXTENSIONS:
        with Image.open(tree / "train" / "coat" / "0.jpg") as image:
            image.save(tree / "train" / "coat" / f"x{suffix}")
    split = build(tree).train
    assert len(split) == 12 + len(EXTENSIONS)
    assert split.fetch(list(range(8, len(split))), epoch=0, train=False)["image"].isfinite().all()
