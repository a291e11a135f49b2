"""The probes against plain references, and on the pixels of the shipped photographs."""

import importlib.util

import numpy as np
import pytest
import torch

from tasks.vision import probe
from tasks.vision.fashion_mnist import MINI_FILE, read_mini
from tasks.vision.probe import Standard, knn_accuracy, linear_accuracy, objective, solve

pytestmark = pytest.mark.vision


def blobs(count, *, seed, features=6, classes=4, spread=1.5):
    """Points around one centre a class; the centres are the same for every seed."""
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (count,), generator=generator)
    return centres[label] + spread * torch.randn(count, features, generator=generator), label


def pixels(split, *, step=1):
    arrays = read_mini(MINI_FILE)
    image = torch.from_numpy(arrays[f"{split}_images"][::step].astype(np.float32)) / 255
    return image.flatten(1), torch.from_numpy(arrays[f"{split}_labels"][::step].astype(np.int64))


def plain_knn(train, label, test, test_label, *, k, temperature, classes):
    """One image at a time, in NumPy, as the definition reads."""
    train, test = train.double().numpy(), test.double().numpy()
    right = 0
    for x, y in zip(test, test_label.tolist(), strict=True):
        similar = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        votes = np.zeros(classes)
        for i in np.argsort(-similar, kind="stable")[:k]:
            votes[label[i]] += np.exp(similar[i] / temperature)
        right += int(votes.argmax() == y)
    return right / len(test)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_is_the_weighted_vote_of_a_plain_loop_however_it_is_chunked(k, monkeypatch):
    train, label = blobs(150, seed=0)
    test, test_label = blobs(80, seed=1)
    given = {"k": k, "temperature": 0.07, "classes": 4}
    wanted = plain_knn(train, label, test, test_label, **given)
    assert 0.4 < wanted < 0.95
    for sizes in ((16_384, 1024), (7, 3), (150, 80)):
        monkeypatch.setattr(probe, "TRAIN_CHUNK", sizes[0])
        monkeypatch.setattr(probe, "TEST_CHUNK", sizes[1])
        assert knn_accuracy(train, label, test, test_label, **given) == wanted


def test_a_near_neighbour_outweighs_two_that_are_farther_when_the_temperature_is_low():
    train = torch.tensor([[1.0, 0.1], [1.0, 0.8], [1.0, 0.8]])
    label, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    for temperature, winner in ((0.07, 0), (10.0, 1)):
        found = knn_accuracy(
            train, label, test, torch.tensor([winner]), k=3, temperature=temperature, classes=2
        )
        assert found == 1.0


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_equal_neighbours_count_in_their_order_and_equal_votes_go_to_the_lowest_class(
    chunk, monkeypatch
):
    monkeypatch.setattr(probe, "TRAIN_CHUNK", chunk)
    same = torch.ones(7, 3)
    label, test = torch.tensor([2, 1, 1, 2, 0, 0, 0]), torch.ones(1, 3)
    for k, winner in ((1, 2), (3, 1), (4, 1), (7, 0)):
        assert knn_accuracy(same, label, test, torch.tensor([winner]), k=k, classes=3) == 1.0


def test_knn_does_not_see_the_length_of_a_feature_and_takes_half_precision():
    train, label = blobs(100, seed=0)
    test, test_label = blobs(50, seed=1)
    wanted = knn_accuracy(train, label, test, test_label, classes=4)
    assert knn_accuracy(train, label, 1000 * test, test_label, classes=4) == wanted
    rounded = knn_accuracy(train.half(), label, test.half(), test_label, classes=4)
    assert rounded == pytest.approx(wanted, abs=0.05)
    collapsed = torch.zeros(100, 2)  # all alike: the majority of the k first
    found = knn_accuracy(collapsed, label, collapsed, label, k=100, classes=4)
    assert found == label.bincount().max() / 100


def test_both_probes_multiply_in_whole_float32_whatever_the_run_allows(monkeypatch):
    def noting(function):
        def noted(*args, **kwargs):
            found.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        return noted

    found, (x, label) = [], blobs(20, seed=0)
    monkeypatch.setattr(probe, "top", noting(probe.top))
    monkeypatch.setattr(probe, "objective", noting(probe.objective))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        knn_accuracy(x, label, x, label, classes=4)
        neighbours = len(found)
        linear_accuracy(x, label, x, label, x, label, classes=4)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert 0 < neighbours < len(found)
    assert set(found) == {"highest"}


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is not installed")
def test_both_probes_agree_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    train, label = blobs(200, seed=0)
    test, test_label = blobs(100, seed=1)
    theirs = KNeighborsClassifier(
        9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.numpy(), label.numpy())
    wanted = theirs.score(test.numpy(), test_label.numpy())
    assert knn_accuracy(train, label, test, test_label, k=9, classes=4) == pytest.approx(wanted)

    scaled = Standard.of(train)(train)
    found = solve(scaled, label, start=torch.zeros(7, 4, dtype=torch.float64), penalty=0.01)
    fit = LogisticRegression(C=1 / (0.01 * 200), tol=1e-8, max_iter=1000)
    fit.fit(scaled.double().numpy(), label.numpy())
    assert np.allclose(found[:-1].T.numpy(), fit.coef_, atol=1e-3)


def test_the_objective_and_its_gradient_are_those_of_autograd_however_chunked(monkeypatch):
    x, label = blobs(50, seed=0)
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    logits = x.double() @ weight[:-1] + weight[-1]
    wanted = torch.nn.functional.cross_entropy(logits, label)
    wanted = wanted + 0.15 * weight[:-1].square().sum()
    wanted.backward()
    for chunk in (16_384, 7):
        monkeypatch.setattr(probe, "TRAIN_CHUNK", chunk)
        with torch.no_grad():
            loss, gradient = objective(x, label, weight=weight, penalty=0.3)
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
        assert torch.allclose(gradient, weight.grad, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.1, 1e-4])
def test_the_solution_is_the_minimum(penalty):
    x, label = blobs(300, seed=0)
    start = torch.zeros(7, 4, dtype=torch.float64)
    assert objective(x, label, weight=start, penalty=penalty)[1].abs().max() > 0.1
    weight = solve(x, label, start=start, penalty=penalty)
    loss, gradient = objective(x, label, weight=weight, penalty=penalty)
    assert gradient.abs().max() < 1e-4
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        other = weight + 0.01 * torch.randn(weight.shape, generator=generator)
        assert objective(x, label, weight=other, penalty=penalty)[0] > loss


def test_the_linear_probe_classifies_raw_pixels_as_logistic_regression_is_known_to(monkeypatch):
    monkeypatch.setattr(probe, "PENALTIES", (1e-1, 1e-2))
    train, label = pixels("train", step=5)
    given = (train, label, *pixels("val"), *pixels("test"))
    found = linear_accuracy(*given, classes=10)
    assert 0.79 < found.test_acc < 0.86
    assert 0.79 < found.val_acc < 0.86
    assert found.penalty in probe.PENALTIES


def test_the_linear_probe_is_the_same_every_time_and_with_features_scaled_and_moved():
    sets = [blobs(n, seed=i) for i, n in enumerate((200, 100, 100))]
    first = linear_accuracy(*(x for pair in sets for x in pair), classes=4)
    torch.manual_seed(99)
    assert linear_accuracy(*(x for pair in sets for x in pair), classes=4) == first
    scale = torch.tensor([1e-3, 1.0, 1e3, 5.0, 0.2, 1.0])
    moved = [(x * scale + 3 * scale, y) for x, y in sets]
    found = linear_accuracy(*(x for pair in moved for x in pair), classes=4)
    assert found.test_acc == pytest.approx(first.test_acc, abs=0.011)
    assert first.test_acc > 0.5


def test_a_feature_that_does_not_vary_in_training_is_left_out():
    sets = [blobs(n, seed=i) for i, n in enumerate((200, 100, 100))]
    wanted = linear_accuracy(*(x for pair in sets for x in pair), classes=4)
    for constant in (0.0, 0.1, 1e6):
        wider = [(torch.cat([x, torch.full((len(x), 1), constant)], 1), y) for x, y in sets]
        wider[2][0][:, -1] += 50.0  # varies in test alone
        found = linear_accuracy(*(x for pair in wider for x in pair), classes=4)
        assert found.test_acc == pytest.approx(wanted.test_acc, abs=0.011)


def test_of_penalties_that_are_equally_good_the_strongest_is_taken():
    x = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    label = torch.tensor([0, 1]).repeat(10)
    found = linear_accuracy(x, label, x, label, x, label, classes=2)
    assert found == probe.LinearProbe(val_acc=1.0, test_acc=1.0, penalty=max(probe.PENALTIES))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"classes": 3}, "train must have labels from 0 to 2, got 0 to 3"),
        ({"test_MF": torch.zeros(9, 5)}, "test must have 6 features as train, got 5"),
        ({"train_label": torch.zeros(3, dtype=torch.long)}, "train must be features"),
        ({"test_MF": torch.full((9, 6), float("nan"))}, "test must be finite"),
    ],
)
def test_knn_names_what_does_not_fit(change, text):
    train, label = blobs(50, seed=0)
    test, test_label = blobs(9, seed=1)
    given = {"train_NF": train, "train_label": label, "test_MF": test, "test_label": test_label}
    with pytest.raises(ValueError, match=f"^{text}"):
        knn_accuracy(**{**given, "classes": 4, **change})
