"""Augmentation: equal to timm's operations, addressed by (seed, epoch, sample) and nothing else."""

import math
import random
from collections import Counter
from itertools import permutations
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, Dataset

from suite.randomness import uniform
from tasks.vision.augment import (
    ASPECT,
    Augment,
    EvalTransform,
    VisionDataOptions,
    cut_box,
    draw_crop,
    draw_erasing,
    flips,
    jitter,
)
from tasks.vision.randaugment import INCREASING, ORIGINAL, Fill, Policy, Step, parse

pytestmark = pytest.mark.vision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "rand-m9-mstd0.5-inc1"
FULL = VisionDataOptions(
    crop="resized", randaugment=RECIPE, erase=0.25, mixup=0.8, cutmix=1.0, drop_last=True
)
BICUBIC = Fill((124, 116, 104), Image.Resampling.BICUBIC)


def photo(width=70, height=50, *, seed=0, mode="RGB"):
    """Smooth colours with some noise: values that every operation changes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = 30 + 0.7 * np.asarray(image) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(5, 240).astype(np.uint8)).convert(mode)


def make(options=FULL, *, image_size=32, seed=0, mean=MEAN, std=STD):
    return Augment(options, image_size=image_size, mean=mean, std=std, seed=seed)


def same_pixels(a, b):
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


# RandAugment


def timm_name(name, *, increasing):
    if name.startswith("Translate"):
        return name + "Rel"
    grows = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return name + "Increasing" if increasing and name in grows else name


@pytest.mark.parametrize("increasing", [True, False])
def test_the_policy_has_the_operations_of_timm(increasing):
    auto = pytest.importorskip("timm.data.auto_augment")
    theirs = auto._RAND_INCREASING_TRANSFORMS if increasing else auto._RAND_TRANSFORMS
    ours = Policy(9, increasing=increasing).operations
    assert {timm_name(name, increasing=increasing) for name in ours} == set(theirs)
    assert len(ours) == 15


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", list(INCREASING))
def test_every_operation_gives_the_pixels_of_timm(name, increasing, mode, monkeypatch):
    auto = pytest.importorskip("timm.data.auto_augment")
    image, fill = photo(mode=mode), BICUBIC if mode == "RGB" else Fill(124, BICUBIC.resample)
    operation = (INCREASING if increasing else ORIGINAL)[name]
    theirs = timm_name(name, increasing=increasing)
    changed = False
    for level in (0.0, 0.7, 3.3, 5.0, 9.0, 9.77, 10.0):
        for sign in (1.0, -1.0) if operation.signed else (1.0,):
            monkeypatch.setattr(auto, "_randomly_negate", lambda value, sign=sign: sign * value)
            to_argument = auto.LEVEL_TO_ARG[theirs]
            arguments = to_argument(level, {}) if to_argument else ()
            if theirs.startswith("Posterize") and arguments == (0,):  # Pillow 13 refuses 0 bits
                expected = Image.new(mode, image.size)
            else:
                expected = auto.NAME_TO_OP[theirs](
                    image, *arguments, fillcolor=fill.color, resample=fill.resample
                )
            argument = operation.argument(sign * level) if operation.argument else None
            assert arguments == (() if argument is None else (argument,))
            found = operation.run(image, argument, fill)
            assert same_pixels(found, expected)
            changed = changed or not same_pixels(found, image)
    assert changed or (name, mode) == ("Color", "L")  # grey has no saturation to change


def test_drawn_operations_have_the_frequencies_signs_and_levels_of_the_recipe():
    policy, rng, draws = parse(RECIPE), random.Random(0), 20_000
    steps = [policy.draw(rng) for _ in range(draws)]
    # 2 operations an image, each applied with probability 0.5
    assert Counter(map(len, steps))[1] / draws == pytest.approx(0.5, abs=0.02)
    names = Counter(step.operation for found in steps for step in found)
    assert set(names) == set(INCREASING)
    for count in names.values():
        assert count / draws == pytest.approx(1 / 15, abs=0.01)
    degrees = [s.argument for found in steps for s in found if s.operation == "Rotate"]
    assert np.mean(np.array(degrees) > 0) == pytest.approx(0.5, abs=0.05)
    levels = np.abs(degrees) / 3
    assert levels.max() == 10
    assert np.mean(levels) == pytest.approx(8.996, abs=0.05)  # 9, less what is clipped at 10
    assert np.std(levels) == pytest.approx(0.49, abs=0.05)
    factors = [s.argument for found in steps for s in found if s.operation == "Brightness"]
    assert np.mean(np.array(factors) > 1) == pytest.approx(0.5, abs=0.05)
    assert min(factors) == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.9)


def test_without_noise_every_level_is_the_magnitude():
    rng = random.Random(0)
    steps = [step for _ in range(300) for step in parse("rand-m6-n3-p1-inc1").draw(rng)]
    assert len(steps) == 900
    assert {abs(s.argument) for s in steps if s.operation == "Rotate"} == {18.0}
    assert {s.argument for s in steps if s.operation == "Posterize"} == {2}
    assert {s.argument for s in steps if s.operation == "AutoContrast"} == {None}


def test_operations_are_drawn_with_replacement():
    policy, rng = parse("rand-m9-p1-inc1"), random.Random(0)
    pairs = [policy.draw(rng) for _ in range(5000)]
    equal = np.mean([a.operation == b.operation for a, b in pairs])
    assert equal == pytest.approx(1 / 15, abs=0.01)


def test_operations_follow_one_another():
    image = photo()
    steps = [Step("Invert", None), Step("Posterize", 2), Step("Invert", None)]
    found = parse(RECIPE).apply(image, steps, fill=BICUBIC)
    expected = 255 - ((255 - np.asarray(image)) & 0b11000000)
    assert np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        (RECIPE, Policy(9, std=0.5, increasing=True)),
        ("rand-m7", Policy(7)),
        ("rand-m0-inc0", Policy(0)),
        ("rand-inc1-p0.25-mstd1-n3-m10", Policy(10, 3, 1.0, 0.25, True)),
    ],
)
def test_a_policy_is_read_from_timms_grammar(text, policy):
    assert parse(text) == policy
    auto = pytest.importorskip("timm.data.auto_augment")
    theirs = auto.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    assert (theirs.num_layers, theirs.ops[0].prob) == (policy.count, policy.probability)
    assert (theirs.ops[0].magnitude, theirs.ops[0].magnitude_std) == (policy.magnitude, policy.std)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must begin with rand-"),
        ("augmix-m3", "must begin with rand-, got 'augmix-m3'"),
        ("rand", "has no magnitude"),
        ("rand-inc1", "has no magnitude"),
        ("rand-m", "has a wrong value 'm'"),
        ("rand-m11", "has a wrong value 'm11'"),
        ("rand-m9.5", "has a wrong value 'm9.5'"),
        ("rand-m9-p.5", "has a wrong value 'p.5'"),
        ("rand-m9-p1.5", "has a wrong value 'p1.5'"),
        ("rand-m9-mstd0.5.5", "has a wrong value 'mstd0.5.5'"),
        ("rand-m9-mstd101", "has a wrong value 'mstd101'"),
        ("rand-m9-inc2", "has a wrong value 'inc2'"),
        ("rand-m9-m8", "has m twice"),
        ("rand-m9-tweights", "has an unknown part 'tweights'"),
        ("rand-m9-", "has an unknown part ''"),
        ("rand-m9--inc1", "has an unknown part ''"),
        ("rand-M9", "has an unknown part 'M9'"),
    ],
)
def test_a_policy_that_cannot_be_read_says_why(text, said):
    with pytest.raises(ValueError, match="randaugment") as error:
        VisionDataOptions(randaugment=text)
    assert said in str(error.value)
    assert "rand-m9-mstd0.5-inc1" in str(error.value)


# One image


def test_an_image_is_a_function_of_seed_epoch_and_id_alone():
    image, augment = photo(), make()
    expected = augment.one(image, epoch=3, sample_id=17)
    assert expected.shape == (3, 32, 32)
    assert expected.dtype == torch.float32
    for other in range(20):  # what came before changes nothing
        augment.one(photo(seed=other), epoch=other, sample_id=other)
    assert torch.equal(augment.one(image, epoch=3, sample_id=17), expected)
    assert torch.equal(make().one(image, epoch=3, sample_id=17), expected)
    for changed in (
        augment.one(image, epoch=4, sample_id=17),
        augment.one(image, epoch=3, sample_id=18),
        make(seed=1).one(image, epoch=3, sample_id=17),
    ):
        assert not torch.equal(changed, expected)


def test_nobody_elses_random_numbers_are_used():
    image, augment = photo(), make(VisionDataOptions(crop="resized", randaugment=RECIPE, erase=1))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augment.one(image, epoch=0, sample_id=0)
    make().mix(torch.randn(4, 3, 8, 8, generator=torch.Generator()), torch.arange(4), ids=[0] * 4,
               epoch=0)  # fmt: skip
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


class Photos(Dataset):
    augment: ClassVar = make()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.augment.one(photo(seed=index), epoch=1, sample_id=index)


def test_workers_and_batches_change_no_pixel():
    alone = torch.stack([Photos()[i] for i in range(8)])
    found = torch.cat(list(DataLoader(Photos(), batch_size=3, num_workers=2)))
    assert torch.equal(found, alone)


def test_the_flip_is_the_one_that_a_data_set_in_memory_draws():
    augment, ids = make(VisionDataOptions()), torch.arange(40)
    assert augment.trivial
    image = photo(32, 32)
    plain = make(VisionDataOptions(flip=False)).one(image, epoch=2, sample_id=0)
    mirrored = uniform(0, "flip", 2, ids=ids)[:, 0] < 0.5
    assert torch.equal(flips(0, 2, ids), mirrored)
    assert 10 < mirrored.sum() < 30
    for i in ids.tolist():
        found = augment.one(image, epoch=2, sample_id=i)
        assert torch.equal(found, plain.flip(-1) if mirrored[i] else plain)


@pytest.mark.parametrize(
    ("options", "trivial"),
    [
        ({}, True),
        ({"flip": False}, True),
        ({"crop": "pad"}, False),
        ({"crop": "resized"}, False),
        ({"randaugment": RECIPE}, False),
        ({"color_jitter": 0.4}, False),
        ({"erase": 0.25}, False),
        ({"mixup": 0.8}, False),
    ],
)
def test_only_a_flip_is_trivial(options, trivial):
    assert make(VisionDataOptions(**options)).trivial is trivial


@pytest.mark.parametrize("size", [(70, 50), (20, 90), (300, 31)])
def test_crops_are_drawn_as_timm_draws_them(size):
    timm_transforms = pytest.importorskip("timm.data.transforms")
    image, rng = Image.new("RGB", size), random.Random(0)
    ours = [draw_crop(size, rng, scale_min=0.08) for _ in range(4000)]
    random.seed(0)
    params = timm_transforms.RandomResizedCropAndInterpolation.get_params
    theirs = [params(image, (0.08, 1.0), ASPECT) for _ in range(4000)]
    assert all(
        0 <= t <= t + h <= size[1] and 0 <= left <= left + w <= size[0] for t, left, h, w in ours
    )
    spread = np.std(theirs, axis=0)
    gap = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert (gap <= 0.1 * spread + 1e-9).all()
    if 3 / 4 <= size[0] / size[1] <= 4 / 3:
        return
    assert max(h * w for _, _, h, w in ours) <= size[0] * size[1]


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (100, 90)])
def test_a_crop_that_never_fits_is_the_centre(size):
    timm_transforms = pytest.importorskip("timm.data.transforms")

    class Largest(random.Random):
        def uniform(self, a, b):
            return 5.0 if b == 1.0 else 0.0  # an area that no image has

    params = timm_transforms.RandomResizedCropAndInterpolation.get_params
    expected = params(Image.new("RGB", size), (5.0, 5.0), ASPECT)
    assert draw_crop(size, Largest(0), scale_min=0.08) == expected


def test_a_padded_crop_moves_the_image_by_at_most_the_border():
    augment = make(
        VisionDataOptions(flip=False, crop="pad", crop_pad=2), mean=(0,) * 3, std=(1,) * 3
    )
    image = photo(32, 32)
    framed = torch.zeros(3, 36, 36)
    framed[:, 2:-2, 2:-2] = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    seen = set()
    for i in range(200):
        found = augment.one(image, epoch=0, sample_id=i)
        where = [
            (y, x) for y in range(5) for x in range(5)
            if torch.equal(found, framed[:, y : y + 32, x : x + 32])
        ]  # fmt: skip
        assert len(where) == 1
        seen.update(where)
    assert len(seen) == 25


def test_an_erased_box_is_noise_of_the_drawn_size_and_nothing_else_changes():
    options = {"flip": False, "crop": "none"}
    image = photo(64, 64)
    plain = make(VisionDataOptions(**options), image_size=64).one(image, epoch=0, sample_id=0)
    augment = make(VisionDataOptions(**options, erase=0.25), image_size=64)
    boxes, noise = [], []
    for i in range(400):
        changed = augment.one(image, epoch=0, sample_id=i) != plain
        if changed.any():
            rows, columns = changed.any(0).any(1).nonzero(), changed.any(0).any(0).nonzero()
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            assert changed[(slice(None), *box)].float().mean() > 0.99
            boxes.append(changed[0][box].numel() / 64**2)
            noise.append(augment.one(image, epoch=0, sample_id=i)[(slice(None), *box)].flatten())
    assert len(boxes) / 400 == pytest.approx(0.25, abs=0.07)
    assert min(boxes) > 0.015
    assert max(boxes) < 0.35
    values = torch.cat(noise)
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.02)


def test_erased_boxes_are_drawn_as_timm_draws_them():
    erasing = pytest.importorskip("timm.data.random_erasing")
    theirs, rng = [], random.Random(0)

    class Canvas(torch.Tensor):
        def __setitem__(self, index, value):
            _, rows, columns = index
            theirs.append((rows.start, columns.start, rows.stop - rows.start,
                           columns.stop - columns.start))  # fmt: skip

    random.seed(0)
    transform = erasing.RandomErasing(1.0, mode="const", device="cpu")
    for _ in range(3000):
        transform(torch.zeros(3, 40, 60).as_subclass(Canvas))
    ours = [draw_erasing(40, 60, rng) for _ in range(3000)]
    gap = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert (gap <= 0.1 * np.std(theirs, axis=0)).all()


def test_jitter_draws_the_order_and_each_factor_around_one(monkeypatch):
    from torchvision.transforms.v2 import functional

    image, calls = photo(), []
    assert same_pixels(jitter(image, strength=0.0, rng=random.Random(0)), image)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    for name in names:
        step = getattr(functional, name)
        monkeypatch.setattr(
            functional,
            name,
            lambda image, factor, name=name, step=step: (
                calls.append((name, factor)) or step(image, factor)
            ),
        )
    rng = random.Random(0)
    for _ in range(300):
        jitter(image, strength=0.4, rng=rng)
    orders = {tuple(name for name, _ in calls[k : k + 3]) for k in range(0, 900, 3)}
    assert orders == set(permutations(names))
    factors = [factor for _, factor in calls]
    assert 0.6 <= min(factors) < 0.62
    assert 1.38 < max(factors) <= 1.4
    assert np.mean(factors) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "part",
    [
        {"crop": "resized"},
        {"crop": "pad"},
        {"randaugment": "rand-m9-n5-mstd0.5-p1-inc1"},
        {"color_jitter": 0.4},
        {"erase": 1.0},
    ],
)
def test_every_part_changes_with_the_seed_the_epoch_and_the_id(part):
    image = photo(48, 40)
    augment, other = (make(VisionDataOptions(flip=False, **part), seed=seed) for seed in (0, 1))
    for found in (
        [augment.one(image, epoch=epoch, sample_id=0) for epoch in range(8)],
        [augment.one(image, epoch=0, sample_id=i) for i in range(8)],
        [made.one(image, epoch=0, sample_id=0) for made in (augment, other)],
    ):
        different = {tuple(pixels.flatten().tolist()) for pixels in found}
        assert len(different) >= min(5, len(found))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_setting_together_keeps_the_shape_and_is_finite(mode):
    bands = len(mode.replace("RGB", "abc"))
    for size in ((70, 50), (33, 200), (32, 32), (9, 5)):
        augment = make(mean=MEAN[:bands], std=STD[:bands])
        for i in range(10):
            found = augment.one(photo(*size, mode=mode), epoch=0, sample_id=i)
            assert found.shape == (bands, 32, 32)
            assert found.isfinite().all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(70, 50), (41, 97), (32, 32)])
def test_evaluation_gives_the_pixels_of_timm(size, crop_pct, interpolation):
    timm_data = pytest.importorskip("timm.data")
    theirs = timm_data.create_transform(
        (3, 32, 32), interpolation=interpolation, crop_pct=crop_pct, mean=MEAN, std=STD
    )
    ours = EvalTransform(
        image_size=32, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD
    )
    image = photo(*size)
    assert torch.equal(ours(image), theirs(image))


# Pairs


def batch_of(rows, *, size=12):
    image = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))
    return image, torch.arange(rows)


def test_a_data_set_without_mixing_gets_its_batch_back():
    image, label = batch_of(4)
    found = make(VisionDataOptions()).mix(image, label, ids=[0, 1, 2, 3], epoch=0)
    assert set(found) == {"image", "label"}
    assert found["image"] is image


def test_mixup_gives_the_images_of_timm():
    timm_mixup = pytest.importorskip("timm.data.mixup")
    image, label = batch_of(40)
    found = make(VisionDataOptions(mixup=0.8)).mix(
        image.clone(), label, ids=label.tolist(), epoch=0
    )
    theirs = timm_mixup.Mixup(mixup_alpha=0.8, mode="pair", num_classes=40)
    for i in range(0, 40, 2):
        lam = found["lam"][i].item()
        theirs._params_per_elem = lambda n, lam=lam: (np.full(n, lam, np.float32), [False])
        expected, _ = theirs(image[i : i + 2].clone(), label[i : i + 2])
        assert torch.allclose(found["image"][i : i + 2], expected, atol=1e-6)
        assert found["label_b"][i : i + 2].tolist() == [i + 1, i]
    assert len(set(found["lam"].tolist())) == 20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.data())
def test_cutmix_takes_the_box_of_timm(height, width, lam, data):
    timm_mixup = pytest.importorskip("timm.data.mixup")
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    with pytest.MonkeyPatch.context() as patch:
        drawn = iter((y, x))
        patch.setattr(np.random, "randint", lambda *_, **__: next(drawn))
        expected = timm_mixup.rand_bbox((3, height, width), lam)
    top, bottom, left, right = cut_box(height, width, lam, y=y, x=x)
    far = {0, 1}  # timm 1.0.3x takes the pixel more that an odd side has
    assert (top, left) == (expected[0], expected[2])
    assert expected[1] - bottom in far
    assert expected[3] - right in far


def test_cutmix_swaps_one_box_and_lam_is_the_share_that_is_left():
    image, label = batch_of(200)
    found = make(VisionDataOptions(cutmix=1.0)).mix(
        image.clone(), label, ids=label.tolist(), epoch=0
    )
    for i in range(0, 200, 2):
        taken = (found["image"][i : i + 2] != image[i : i + 2]).any(1)
        assert torch.equal(taken[0], taken[1])
        expected = torch.where(taken[:, None], image[i : i + 2].flip(0), image[i : i + 2])
        assert torch.equal(found["image"][i : i + 2], expected)
        rows, columns = taken[0].any(1).sum(), taken[0].any(0).sum()
        assert taken[0].sum() == rows * columns
        assert found["lam"][i].item() == pytest.approx(1 - taken[0].sum().item() / 144)
    assert 0.4 < found["lam"].mean() < 0.8  # E[lam] is 0.5 before the boxes are clipped


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_two_labels_is_timms_soft_target_loss(smoothing):
    timm_mixup = pytest.importorskip("timm.data.mixup")
    soft = pytest.importorskip("timm.loss").SoftTargetCrossEntropy()
    image, label = batch_of(10)
    logits = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    found = make().mix(image, label, ids=label.tolist(), epoch=0)
    lam, label_b = found["lam"], found["label_b"]
    ours = lam * nnf.cross_entropy(logits, label, label_smoothing=smoothing, reduction="none")
    ours += (1 - lam) * nnf.cross_entropy(
        logits, label_b, label_smoothing=smoothing, reduction="none"
    )
    for i in range(0, 10, 2):
        pair = slice(i, i + 2)
        target = timm_mixup.mixup_target(label[pair], 10, lam[i].item(), smoothing)
        assert ours[pair].mean().item() == pytest.approx(
            soft(logits[pair], target).item(), rel=1e-5
        )


def test_a_pair_is_mixed_alike_in_every_batch_and_process():
    image, label = batch_of(8)
    whole = make().mix(image.clone(), label, ids=list(range(8)), epoch=5)
    parts = [
        make().mix(image[k : k + 4].clone(), label[k : k + 4], ids=list(range(k, k + 4)), epoch=5)
        for k in (0, 4)
    ]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
    other = make().mix(image.clone(), label, ids=list(range(8)), epoch=6)
    assert not torch.equal(other["lam"], whole["lam"])


def test_padding_is_no_partner_and_an_odd_row_stays():
    image, label = batch_of(7)
    valid = torch.tensor([True, True, False, True, True, False, True])
    found = make().mix(image.clone(), label, ids=list(range(7)), epoch=0, valid=valid)
    assert torch.equal(found["image"][2:], image[2:])
    assert found["lam"][2:].tolist() == [1.0] * 5
    assert torch.equal(found["label_b"][2:], label[2:])
    assert found["label_b"].tolist()[:2] == [1, 0]
    assert not torch.equal(found["image"][:2], image[:2])


def test_shares_of_mixed_pairs_and_of_cutmix_are_the_ones_asked_for():
    image, label = batch_of(4000, size=4)
    options = VisionDataOptions(mixup=0.8, cutmix=1.0, mix_prob=0.7, mix_switch=0.25)
    found = make(options).mix(image.clone(), label, ids=label.tolist(), epoch=0)["image"]
    pairs, before = found.unflatten(0, (-1, 2)), image.unflatten(0, (-1, 2))
    blended = ((pairs != before) & (pairs != before.flip(1))).flatten(1).any(1)
    assert blended.float().mean().item() == pytest.approx(0.7 * 0.75, abs=0.03)
    untouched = (pairs == before).flatten(1).all(1).float().mean().item()
    assert untouched >= 0.27  # not drawn, or a box that is empty at 4 x 4 pixels


# Options


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("crop_pad", 0, "crop_pad must be from 1 to 256, got 0"),
        ("crop_scale_min", 0.0, "crop_scale_min must be above 0"),
        ("crop_scale_min", 1.1, "crop_scale_min must be above 0"),
        ("erase", 2, "erase must be from 0 to 1, got 2"),
        ("erase", math.nan, "erase must be from 0 to 1"),
        ("mix_prob", -0.1, "mix_prob must be from 0 to 1"),
        ("mix_switch", 1.5, "mix_switch must be from 0 to 1"),
        ("color_jitter", -1, "color_jitter must be from 0 to 1"),
        ("mixup", -0.2, "mixup must be 0 or more"),
        ("cutmix", math.inf, "cutmix must be 0 or more"),
        ("batch_size", 0, "batch_size must be at least 1"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(field, value, said):
    with pytest.raises(ValueError) as error:
        VisionDataOptions(**{field: value})
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixup": 0.8, "drop_last": False}, "mixup needs drop_last=true"),
        ({"cutmix": 1.0, "drop_last": False}, "cutmix needs drop_last=true"),
        ({"color_jitter": 0.4, "randaugment": RECIPE}, "color_jitter must be 0 with randaugment"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, said):
    with pytest.raises(ValueError) as error:
        VisionDataOptions(**options)
    assert str(error.value).startswith(said)
