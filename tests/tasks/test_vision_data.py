"""Fashion-MNIST: the embedded subset, the idx reader, augmentation that is addressed, not drawn."""

import gzip
import hashlib
import pickle
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from suite.errors import ConfigError
from tasks.vision import cifar, idx
from tasks.vision.arrays import ArrayDataOptions, ImageSplit, content_order
from tasks.vision.augment import VisionDataOptions
from tasks.vision.cifar import build_cifar10, build_cifar100
from tasks.vision.data import DATA
from tasks.vision.fashion_mnist import (
    DEBIAN_ROOT,
    FULL_PIXELS,
    MINI_FILE,
    MINI_PIXELS,
    MINI_SHA256,
    FashionMnistOptions,
    build_full,
    build_mini,
    read_mini,
)
from tasks.vision.idx import FILES, MnistOptions, build_mnist, read_idx

pytestmark = pytest.mark.vision

BUILDER = runpy.run_path(
    str(Path(__file__).parents[2] / "scripts" / "build_fashion_mnist.py"), run_name="builder"
)

needs_full_set = pytest.mark.skipif(
    not all((DEBIAN_ROOT / name).is_file() for name in FILES),
    reason=f"Debian's package dataset-fashion-mnist is not installed in {DEBIAN_ROOT}",
)


@pytest.fixture(scope="module")
def mini():
    return build_mini(VisionDataOptions(), seed=0)


def splits_of(built):
    return {"train": built.train, "val": built.val, "test": built.test}


def test_the_embedded_splits_have_the_stated_sizes_and_balanced_classes(mini):
    sizes = {"train": 10_000, "val": 1_000, "test": 1_000}
    assert mini.info.sizes == sizes
    for name, split in splits_of(mini).items():
        assert split.images.shape == (sizes[name], 28, 28)
        assert torch.bincount(split.labels).tolist() == [sizes[name] // 10] * 10


def test_no_embedded_image_is_in_two_splits_or_twice_in_one(mini):
    images = [image.numpy().tobytes() for s in splits_of(mini).values() for image in s.images]
    assert len(set(images)) == len(images) == 12_000


def test_the_embedded_classes_are_mixed(mini):
    """A fixed batch of the first images (calibration, embedding scale) must hold all classes."""
    assert set(mini.train.labels[:128].tolist()) == set(range(10))


def test_the_embedded_file_is_the_one_that_data_md_and_the_info_describe(mini):
    text = (MINI_FILE.parent / "DATA.md").read_text()
    content = MINI_FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == MINI_SHA256 == mini.info.sha256
    assert MINI_SHA256 in text
    assert f"{len(content):,} bytes" in text
    arrays = read_mini(MINI_FILE).values()
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() in text
    assert mini.info.synthetic is False
    assert mini.info.license.startswith("MIT")
    assert mini.info.classes == 10
    assert mini.info.extra["image_size"] == 28
    assert mini.info.extra["in_chans"] == 1


def test_training_images_are_standardised(mini):
    batch = mini.train.fetch(list(range(10_000)), epoch=0, train=False)
    assert batch["image"].shape == (10_000, 1, 28, 28)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert batch["image"].mean().item() == pytest.approx(0.0, abs=1e-4)
    assert batch["image"].std().item() == pytest.approx(1.0, abs=1e-4)
    restored = batch["image"][:5, 0] * MINI_PIXELS[1] + MINI_PIXELS[0]
    torch.testing.assert_close(restored * 255, mini.train.images[:5].float())


def mirrored(split, indices, *, epoch):
    """Which images of a training batch are mirrored. None of these images is symmetric."""
    plain = split.fetch(indices, epoch=epoch, train=False)["image"]
    found = split.fetch(indices, epoch=epoch, train=True)["image"]
    flips = (found != plain).flatten(1).any(1)
    torch.testing.assert_close(
        found, torch.where(flips[:, None, None, None], plain.flip(-1), plain)
    )
    return flips


def test_half_of_the_training_images_are_mirrored_and_other_ones_each_epoch(mini):
    indices = list(range(2000))
    first, second = (mirrored(mini.train, indices, epoch=epoch) for epoch in (0, 1))
    assert 0.45 < first.float().mean() < 0.55
    assert 0.45 < (first != second).float().mean() < 0.55
    assert torch.equal(first, mirrored(mini.train, indices, epoch=0))
    other_seed = build_mini(VisionDataOptions(), seed=1).train
    assert 0.45 < (first != mirrored(other_seed, indices, epoch=0)).float().mean() < 0.55


def test_an_image_is_mirrored_alike_in_any_batch_and_draws_no_global_randomness(mini):
    state = torch.get_rng_state()
    together = mini.train.fetch([5, 900, 17, 5], epoch=3, train=True)
    for row, index in enumerate([5, 900, 17, 5]):
        alone = mini.train.fetch([index], epoch=3, train=True)
        assert torch.equal(alone["image"][0], together["image"][row])
        assert alone["label"][0] == together["label"][row]
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_false_mirrors_nothing():
    split = build_mini(VisionDataOptions(flip=False), seed=0).train
    assert not mirrored(split, list(range(200)), epoch=0).any()


def test_another_file_in_the_place_of_the_embedded_one_is_refused(tmp_path):
    changed = tmp_path / "fashion_mnist_mini.npz"
    with pytest.raises(ConfigError, match=r"cannot be read .*Install dyt-suite again"):
        read_mini(changed)
    changed.write_bytes(MINI_FILE.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="not the file that was shipped"):
        read_mini(changed)


def packed(values: np.ndarray, *, kind: int = 8) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return header + values.tobytes()


def test_an_idx_file_is_read_as_it_was_written(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(gzip.compress(packed(values)))
    assert np.array_equal(read_idx(tmp_path / "a.gz", shape=(2, 3, 4), name="mnist"), values)


GOOD = packed(np.zeros((2, 3), dtype=np.uint8))


def gz(content: bytes) -> bytes:
    """Packed without the time, which would be part of the tests' names."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD, "damaged or not gzip"),
        (gz(GOOD)[:-6], "damaged or not gzip"),
        (gz(GOOD)[:14] + b"\xff" * 20, "damaged or not gzip"),
        (b"", r"begins with nothing, expected the idx header 00000802"),
        (gz(b""), r"begins with nothing, expected the idx header 00000802"),
        (gz(GOOD[:9]), "expected the idx header"),
        (
            gz(b"\x89PNG" + GOOD),
            "begins with 89504e47, expected the idx header 00000802",
        ),
        (gz(packed(np.zeros((2, 3), np.uint8), kind=0x0D)), "begins with 00000d02"),
        (gz(GOOD[:-1]), r"announces \(2, 3\) and holds 5 values, expected \(2, 3\)"),
        (gz(GOOD + b"\0"), r"announces \(2, 3\) and holds 7 values"),
        (gz(packed(np.zeros((3, 3), np.uint8))), r"announces \(3, 3\)"),
    ],
)
def test_a_damaged_idx_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "damaged.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_idx(path, shape=(2, 3), name="mnist")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def little_set(tmp_path, monkeypatch):
    """A folder with 40 + 10 images, 4 and 1 a class, whose sizes pass for the full set's."""
    rng = np.random.RandomState(0)
    for part, count in (("train", 40), ("t10k", 10)):
        images = rng.randint(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(packed(labels)))
    monkeypatch.setattr(idx, "SIZES", {"train": 40, "t10k": 10})
    monkeypatch.setattr(idx, "VAL_PER_CLASS", 1)
    return tmp_path


def test_the_full_set_is_split_by_content_alike_for_every_seed(little_set):
    first, second = (
        build_full(FashionMnistOptions(root=str(little_set)), seed=seed) for seed in (0, 1)
    )
    assert first.info.sizes == {"train": 30, "val": 10, "test": 10}
    assert first.info.sha256 == second.info.sha256
    for name, split in splits_of(first).items():
        assert torch.equal(split.images, splits_of(second)[name].images)
        assert torch.bincount(split.labels).tolist() == [len(split) // 10] * 10
    kept = {image.numpy().tobytes() for image in first.train.images}
    assert not kept & {image.numpy().tobytes() for image in first.val.images}


def test_the_files_may_lie_where_torchvision_puts_them_packed_or_not(little_set):
    here = build_full(FashionMnistOptions(root=str(little_set)), seed=0)
    raw = little_set / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        content = gzip.decompress((little_set / name).read_bytes())
        (raw / name.removesuffix(".gz")).write_bytes(content)
        (little_set / name).unlink()
    there = build_full(FashionMnistOptions(root=str(little_set)), seed=0)
    assert there.info == here.info
    assert torch.equal(there.val.images, here.val.images)


def test_mnist_is_read_alike_and_is_not_mirrored_unless_asked_for(little_set):
    built = build_mnist(MnistOptions(root=str(little_set)), seed=0)
    assert built.info.name == "mnist"
    assert built.info.sizes == {"train": 30, "val": 10, "test": 10}
    assert built.info.extra["class_names"] == tuple("0123456789")
    assert not mirrored(built.train, list(range(30)), epoch=0).any()
    (little_set / FILES[0]).write_bytes(gzip.compress(b"no idx"))
    with pytest.raises(ConfigError, match=r"data=mnist: .* begins with") as caught:
        build_mnist(MnistOptions(root=str(little_set)), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_a_published_set_without_a_root_says_what_is_expected_where(name):
    with pytest.raises(
        ConfigError, match=rf"data={name} needs data.root=FOLDER, with .*"
    ) as caught:
        DATA[name].build(DATA[name].options, seed=0)
    assert ("cifar" if "cifar" in name else FILES[0]) in str(caught.value)
    assert "data.download=true" in str(caught.value)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10"])
def test_nothing_is_downloaded_unless_asked_for_and_no_network_is_one_line(
    name, tmp_path, monkeypatch
):
    tried = []

    def no_network(url, *args, **kwargs):
        tried.append(url)
        raise OSError("no route\nto the host")

    import torchvision.datasets as datasets

    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    options = type(DATA[name].options)
    with pytest.raises(ConfigError):
        DATA[name].build(options(root=str(tmp_path)), seed=0)
    assert not tried
    with pytest.raises(ConfigError, match="no route to the host") as caught:
        DATA[name].build(options(root=str(tmp_path), download=True), seed=0)
    assert tried
    assert "\n" not in str(caught.value)


def test_fashion_mnist_is_not_downloaded_into_debians_folder():
    with pytest.raises(ValueError, match=r"^download needs root=FOLDER"):
        FashionMnistOptions(download=True)


def write_cifar(root: Path, monkeypatch, *, coarse: bool) -> None:
    """Files in CIFAR's format, 40 training and 10 test images, known to torchvision by MD5."""
    import torchvision.datasets as datasets

    made = datasets.CIFAR100 if coarse else datasets.CIFAR10
    folder = root / made.base_folder
    folder.mkdir()
    rng = np.random.RandomState(0)
    key = "fine_labels" if coarse else "labels"
    labels = {"train": np.arange(40) % 2, "test": np.arange(10) % 2}
    lists = {}
    for part, values in labels.items():
        data = rng.randint(0, 256, (len(values), 3072), dtype=np.uint8)
        content = pickle.dumps({"data": data, key: values.tolist()})
        (folder / part).write_bytes(content)
        lists[part] = [[part, hashlib.md5(content).hexdigest()]]
    names = pickle.dumps({made.meta["key"]: ["cat", "dog"]})
    (folder / "meta").write_bytes(names)
    monkeypatch.setattr(made, "train_list", lists["train"])
    monkeypatch.setattr(made, "test_list", lists["test"])
    md5 = hashlib.md5(names).hexdigest()
    monkeypatch.setattr(made, "meta", {**made.meta, "filename": "meta", "md5": md5})
    monkeypatch.setattr(cifar, "TRAIN_SIZE", 40)


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar_is_read_through_torchvision_and_a_tenth_of_each_class_is_held_out(
    coarse, tmp_path, monkeypatch
):
    write_cifar(tmp_path, monkeypatch, coarse=coarse)
    build = build_cifar100 if coarse else build_cifar10
    built = build(ArrayDataOptions(root=str(tmp_path)), seed=0)
    assert built.info.sizes == {"train": 36, "val": 4, "test": 10}
    assert torch.bincount(built.val.labels).tolist() == [2, 2]
    assert built.info.extra["class_names"] == ("cat", "dog")
    assert (built.info.extra["image_size"], built.info.extra["in_chans"]) == (32, 3)
    image = built.test.fetch([3], epoch=0, train=False)["image"]
    assert image.shape == (1, 3, 32, 32)
    mean, std = (torch.tensor(built.info.extra[key])[:, None, None] for key in ("mean", "std"))
    pixels = built.test.images[3].permute(2, 0, 1).float()
    torch.testing.assert_close((image[0] * std + mean) * 255, pixels, atol=1e-4, rtol=0)


def test_a_changed_cifar_file_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, coarse=False)
    file = tmp_path / "cifar-10-batches-py" / "test"
    file.write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(ConfigError, match="not found or corrupted") as caught:
        build_cifar10(ArrayDataOptions(root=str(tmp_path)), seed=0)
    assert "\n" not in str(caught.value)


def photographs(count: int, *, colour: bool) -> np.ndarray:
    """Real images, 28 x 28; in colour three of them make the channels of one."""
    images = read_mini(MINI_FILE)["train_images"]
    return np.stack([images[i : i + count] for i in range(3)], -1) if colour else images[:count]


@pytest.mark.parametrize("colour", [False, True])
def test_augmented_images_are_alike_in_any_batch_and_other_ones_each_epoch(colour):
    chans = 3 if colour else 1
    split = ImageSplit(
        photographs(6, colour=colour),
        np.arange(6),
        options=VisionDataOptions(crop="pad", erase=0.5),
        mean=[0.3] * chans,
        std=[0.4] * chans,
        seed=0,
    )
    together = split.fetch([0, 1, 2, 3, 4, 5], epoch=1, train=True)["image"]
    assert together.shape == (6, chans, 28, 28)
    apart = [split.fetch([i], epoch=1, train=True)["image"] for i in (5, 4, 3, 2, 1, 0)]
    assert torch.equal(together, torch.cat(apart[::-1]))
    assert not torch.equal(together, split.fetch([0, 1, 2, 3, 4, 5], epoch=2, train=True)["image"])


def test_mixing_adds_the_second_label_and_its_share():
    options = VisionDataOptions(mixup=0.8)
    built = build_mini(options, seed=0)
    batch = built.train.fetch([0, 1, 2, 3], epoch=0, train=True)
    assert set(batch) == {"image", "label", "label_b", "lam"}
    assert set(built.train.fetch([0, 1], epoch=0, train=False)) == {"image", "label"}


def test_the_default_batch_is_what_it_was_before_other_augmentation_existed(mini):
    """Bit for bit: shares of 255, less the mean, by the deviation, then mirrored."""
    from suite.randomness import uniform

    ids = torch.arange(64)
    image = mini.train.images[ids].float().div_(255)
    image = image.sub_(MINI_PIXELS[0]).div_(MINI_PIXELS[1]).unsqueeze(1)
    mirror = uniform(0, "flip", 2, ids=ids)[:, 0] < 0.5
    image = torch.where(mirror[:, None, None, None], image.flip(-1), image)
    assert torch.equal(mini.train.fetch(ids.tolist(), epoch=2, train=True)["image"], image)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_the_files_is_one_line_that_says_how_to_get_them(tmp_path, exists):
    root = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(ConfigError) as caught:
        build_full(FashionMnistOptions(root=str(root)), seed=0)
    message = str(caught.value)
    for part in (str(root), FILES[0], "apt install dataset-fashion-mnist", "data.root=FOLDER"):
        assert part in message
    assert "data=fashion_mnist_mini" in message
    assert ("is not a folder" in message) is not exists
    assert "\n" not in message


def test_an_incomplete_folder_names_only_what_is_missing(little_set):
    (little_set / FILES[3]).unlink()
    with pytest.raises(ConfigError, match=f"has no {FILES[3]}; expected there"):
        build_full(FashionMnistOptions(root=str(little_set)), seed=0)


def test_a_label_that_is_no_class_is_refused(little_set):
    labels = np.full(10, 11, dtype=np.uint8)
    (little_set / FILES[3]).write_bytes(gzip.compress(packed(labels)))
    with pytest.raises(ConfigError, match="holds label 11, expected 0 to 9"):
        build_full(FashionMnistOptions(root=str(little_set)), seed=0)


def test_content_order_is_a_permutation_of_each_class_that_ignores_the_files_order():
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = (np.arange(50) % 10).astype(np.uint8)
    orders = content_order(images, labels)
    assert sorted(np.concatenate(orders).tolist()) == list(range(50))
    shuffle = rng.permutation(50)
    for order, again in zip(orders, content_order(images[shuffle], labels[shuffle]), strict=True):
        assert np.array_equal(images[order], images[shuffle][again])


def test_the_builder_writes_equal_bytes_for_equal_arrays(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.uint8).reshape(2, 3), "a": np.zeros(4, dtype=np.uint8)}
    for name in ("first.npz", "second.npz"):
        BUILDER["write"](arrays, tmp_path / name)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    with np.load(tmp_path / "first.npz", allow_pickle=False) as read:
        assert all(np.array_equal(read[name], array) for name, array in arrays.items())


@needs_full_set
def test_the_full_set_is_the_published_one_and_standardised():
    built = build_full(FashionMnistOptions(), seed=0)
    assert built.info.sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    for split in splits_of(built).values():
        assert torch.bincount(split.labels).tolist() == [len(split) // 10] * 10
    pixels = built.train.images.double() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx(FULL_PIXELS, abs=1e-5)


@needs_full_set
def test_the_embedded_subset_is_what_the_builder_makes():
    built = BUILDER["choose"](DEBIAN_ROOT)
    shipped = read_mini(MINI_FILE)
    assert built.keys() == shipped.keys()
    assert all(np.array_equal(built[name], shipped[name]) for name in built)


def test_the_embedded_subset_is_the_default():
    assert next(iter(DATA)) == "fashion_mnist_mini"
