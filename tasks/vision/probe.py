"""What features are worth without fine-tuning: k nearest neighbours, and a linear classifier.

A reconstruction loss does not say what an encoder has learnt, and its size depends on the pixels.
Both probes leave the encoder as it is and are deterministic: the same features give the same
figures, whatever the seed, so that norms can be compared by them.

- `knn_accuracy`: cosine similarity; each of the k nearest adds exp(similarity / temperature) to its
  class, as DINO weighs them (arXiv 2104.14294, after arXiv 1805.01978).
- `linear_accuracy`: multinomial logistic regression, solved with L-BFGS instead of trained by SGD:
  it is convex, so there is no learning rate to search and no schedule that suits one norm best.

Shapes: N training features, M others, F their dimensions, K classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TRAIN_CHUNK = 16_384  # training features that are compared at a time
TEST_CHUNK = 1_024  # other features at a time: 64 MiB of similarities
# From strong to weak, so that each solution is a near start for the next. The loss is a mean, so
# they mean the same whatever the number of images.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
MAX_ITERATIONS = 500  # of L-BFGS, for each penalty


@contextmanager
def whole_float32() -> Iterator[None]:
    """Matrix products in full float32, though the run may allow TF32: cosines of features that all
    look alike, and gradients near a minimum, differ by less than it rounds."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- nearest neighbours ---------------------------------------------------------------------------


@whole_float32()
def knn_accuracy(
    train_NF: Tensor,
    train_label: Tensor,
    test_MF: Tensor,
    test_label: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int,
) -> float:
    """The share of test features whose class the vote of their k nearest training features finds.

    Computed in float32, votes in float64. Of equal similarities the lower training index counts, of
    equal votes the lower class wins. Where there are fewer than k training features, all vote.
    Memory stays bounded: similarities of 1,024 x 16,384 at a time. Raises ValueError for features
    and labels that do not fit each other, k < 1, or a temperature that is not above 0.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    train_label = checked(train_NF, train_label, classes=classes, name="train")
    test_label = checked(test_MF, test_label, classes=classes, name="test", like=train_NF)
    right = 0
    for test, label in chunks(test_MF, test_label, size=TEST_CHUNK):
        near, near_label = nearest(test, train_NF, train_label, k=k)
        votes = torch.zeros(len(test), classes, dtype=torch.float64, device=test.device)
        weight = (near.double() / temperature).exp()
        for j in range(weight.shape[1]):  # one index a row at a time: the same order of sums always
            votes.scatter_add_(1, near_label[:, j : j + 1], weight[:, j : j + 1])
        right += int((votes.argmax(1) == label).sum())
    return right / len(test_MF)


def nearest(
    test: Tensor, train_NF: Tensor, train_label: Tensor, *, k: int
) -> tuple[Tensor, Tensor]:
    """Cosine similarities [., k] of the k nearest training features, falling, and their labels."""
    query = functional.normalize(test.float(), dim=1)
    best = query.new_empty(len(test), 0)
    best_label = train_label.new_empty(len(test), 0)
    for features, label in chunks(train_NF, train_label, size=TRAIN_CHUNK):
        similar = query @ functional.normalize(features.float(), dim=1).T
        near, index = top(similar, k)
        best = torch.cat([best, near], 1)
        best_label = torch.cat([best_label, label[index]], 1)
        best, index = top(best, k)  # those of earlier chunks stand first: lower indices
        best_label = best_label.gather(1, index)
    return best, best_label


def top(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling, and where they are; of equal ones the first.

    topk promises no order of equal values, and a sort of whole rows is slow: only rows in which
    they matter are sorted.
    """
    k = min(k, similar.shape[1])
    value, index = similar.topk(k, dim=1)
    inside = (value[:, 1:] == value[:, :-1]).any(1)
    border = (similar >= value[:, -1:]).sum(1) > k
    rows = (inside | border).nonzero().flatten()
    if len(rows):
        order = similar[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
        index[rows] = order
    return value, index


# --- linear classifier ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearProbe:
    """Accuracies of the classifier whose penalty was best in validation, and that penalty."""

    val_acc: float
    test_acc: float
    penalty: float


@whole_float32()
def linear_accuracy(
    train_NF: Tensor,
    train_label: Tensor,
    val_MF: Tensor,
    val_label: Tensor,
    test_MF: Tensor,
    test_label: Tensor,
    *,
    classes: int,
) -> LinearProbe:
    """Logistic regression on the features, each standardised by its training mean and deviation.

    Solved for every penalty of PENALTIES, from the solution of the one before; the first is solved
    from zero. The penalty with the best accuracy in validation is chosen, of equal ones the
    strongest, and measured once on test. Holds a standardised copy of the training features; all
    else is done in chunks. Raises ValueError for features and labels that do not fit each other.
    """
    train_label = checked(train_NF, train_label, classes=classes, name="train")
    val_label = checked(val_MF, val_label, classes=classes, name="val", like=train_NF)
    test_label = checked(test_MF, test_label, classes=classes, name="test", like=train_NF)
    scale = Standard.of(train_NF)
    standardised = scale(train_NF)
    weight = torch.zeros(
        train_NF.shape[1] + 1, classes, dtype=torch.float64, device=train_NF.device
    )
    chosen, best = None, -1.0
    for penalty in PENALTIES:
        weight = solve(standardised, train_label, start=weight, penalty=penalty)
        accuracy = share_right(val_MF, val_label, weight=weight, scale=scale)
        if accuracy > best:
            chosen, best = (penalty, weight), accuracy
    assert chosen is not None
    penalty, weight = chosen
    tested = share_right(test_MF, test_label, weight=weight, scale=scale)
    return LinearProbe(val_acc=best, test_acc=tested, penalty=penalty)


@dataclass(frozen=True)
class Standard:
    """(x - mean) / deviation of each dimension; one that does not vary in training becomes 0."""

    mean_F: Tensor
    inverse_F: Tensor

    @classmethod
    def of(cls, x_NF: Tensor) -> Standard:
        """The training features' mean and deviation, in float64, in two passes."""
        mean = sum_of(part.double() for part in x_NF.split(TRAIN_CHUNK)) / len(x_NF)
        square = sum_of((part.double() - mean) ** 2 for part in x_NF.split(TRAIN_CHUNK))
        deviation = (square / len(x_NF)).sqrt()
        varies = deviation > 1e-6 * mean.abs()  # less is what float32 rounds a constant by
        inverse = torch.where(varies, 1 / deviation.where(varies, deviation.new_tensor(1.0)), 0.0)
        return cls(mean.float(), inverse.float())

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean_F) * self.inverse_F


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """The sum over the rows of all parts, [F]."""
    first = next(parts).sum(0)
    return sum((part.sum(0) for part in parts), first)


def objective(
    x_NF: Tensor, label: Tensor, *, weight: Tensor, penalty: float
) -> tuple[float, Tensor]:
    """Mean cross-entropy + penalty / 2 * |weight|^2, and its gradient, [F + 1, K] in float64.

    The last row of weight is the bias, which is not penalised. Written out rather than left to
    autograd, so that logits of N x K never exist at once.
    """
    loss = 0.0
    gradient = torch.zeros_like(weight)
    narrow = weight.float()
    for x, y in chunks(x_NF, label, size=TRAIN_CHUNK):
        log_p = (x @ narrow[:-1] + narrow[-1]).log_softmax(1)
        loss -= float(log_p.gather(1, y[:, None]).double().sum())
        error = log_p.exp()
        error[torch.arange(len(y), device=y.device), y] -= 1.0
        gradient[:-1] += x.T @ error
        gradient[-1] += error.double().sum(0)
    gradient /= len(x_NF)
    gradient[:-1] += penalty * weight[:-1]
    return loss / len(x_NF) + 0.5 * penalty * float(weight[:-1].square().sum()), gradient


def solve(x_NF: Tensor, label: Tensor, *, start: Tensor, penalty: float) -> Tensor:
    """The weight [F + 1, K] at which the objective is least, by L-BFGS from start."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        with torch.no_grad():
            loss, weight.grad = objective(x_NF, label, weight=weight, penalty=penalty)
        return loss

    optimizer.step(closure)
    return weight.detach()


def share_right(x_MF: Tensor, label: Tensor, *, weight: Tensor, scale: Standard) -> float:
    narrow, right = weight.float(), 0
    for x, y in chunks(x_MF, label, size=TRAIN_CHUNK):
        right += int(((scale(x) @ narrow[:-1] + narrow[-1]).argmax(1) == y).sum())
    return right / len(x_MF)


# --- both -----------------------------------------------------------------------------------------


def chunks(x: Tensor, label: Tensor, *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of x and their labels, size at a time."""
    yield from zip(x.split(size), label.split(size), strict=True)


def checked(
    x: Tensor, label: Tensor, *, classes: int, name: str, like: Tensor | None = None
) -> Tensor:
    """The labels, on the device of the features. Raises ValueError where the two do not fit."""
    if x.ndim != 2 or not len(x) or label.shape != (len(x),):
        raise ValueError(
            f"{name} must be features [N, F] with labels [N], N at least 1, got "
            f"{list(x.shape)} and {list(label.shape)}"
        )
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have {like.shape[1]} features as train, got {x.shape[1]}")
    if not all(bool(part.isfinite().all()) for part in x.split(TRAIN_CHUNK)):
        raise ValueError(f"{name} must be finite, but has features that are NaN or infinite")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name} must have labels from 0 to {classes - 1}, got {low} to {high}")
    return label.to(device=x.device, dtype=torch.int64)
