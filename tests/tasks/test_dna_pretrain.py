"""dna/pretrain: what is asked for, what is counted, and what a model may not see."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.build import build_model
from suite.config import load
from suite.data import DataInfo, Splits
from suite.errors import ConfigError, DataError
from suite.norms import NORMS, make_norm
from suite.randomness import sample_seeds
from suite.registry import load_task
from tasks.dna.pretrain import SPEC, Pretrain, PretrainOptions, mask_bases, shifted
from tasks.dna.tokens import BOS, MASK, PAD, A, N, T

INFO = DataInfo("x", "", "", "", True, {}, extra={"length": 64})
SHARES = {"mask_share": 0.8, "random_share": 0.1}


class Peek(nn.Module):
    """Answers with the base that it sees, so that what it sees can be read from its loss."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.seen, self.mask = causal, torch.empty(0), None
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        self.seen, self.mask = ids_BL, mask_BL
        return self.scale * F.one_hot(ids_BL, 16).float()


def build(model: nn.Module, info: DataInfo = INFO, **options: Any) -> Pretrain:
    return Pretrain(
        model,  # type: ignore[arg-type]
        options=PretrainOptions(**options),
        info=info,
        optim=load(["task=dna/pretrain"]).settled.optim,
        identity={},
        seed=3,
        nominal=4,
    )


def batch(rows: int = 4, size: int = 24) -> dict[str, Tensor]:
    ids = torch.randint(A, T + 1, (rows, size), generator=torch.Generator().manual_seed(1))
    return {
        "ids": ids,
        "sample_id": torch.arange(rows),
        "epoch": torch.zeros(rows, dtype=torch.int64),
        "valid": torch.ones(rows, dtype=torch.bool),
    }


def many() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, seen, asked) of 200 windows of 1,000, with N and padding at their ends."""
    ids = torch.randint(A, T + 1, (200, 1000))
    ids[:, 900:950], ids[:, 950:] = N, PAD
    seeds = sample_seeds(0, "mask", ids=torch.arange(200), epoch=torch.zeros(200))
    return ids, *mask_bases(ids, seeds, prob=0.15, **SHARES)


def test_fifteen_percent_of_the_bases_are_asked_for() -> None:
    ids, _, asked = many()
    share = asked.sum() / (200 * 900)
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / (200 * 900))
    assert not asked[:, 900:].any()
    assert ids.shape == asked.shape


def test_of_those_80_percent_are_masked_10_random_and_10_left() -> None:
    ids, seen, asked = many()
    count = int(asked.sum())
    masked = ((seen == MASK) & asked).sum() / count
    changed = ((seen != ids) & (seen != MASK) & asked).sum() / count
    assert abs(masked - 0.8) < 4 * math.sqrt(0.16 / count)
    # a random base is the old one in a quarter of the cases
    assert abs(changed - 0.075) < 4 * math.sqrt(0.075 / count)


def test_a_random_base_is_one_of_four() -> None:
    ids, seen, asked = many()
    random = seen[(seen != ids) & (seen != MASK)]
    assert set(random.tolist()) == {7, 8, 9, 10}
    assert torch.equal(seen[~asked], ids[~asked])


def test_masks_change_with_the_epoch_in_training_and_never_in_validation() -> None:
    module, rows = build(Peek(causal=False)), batch()
    later = rows | {"epoch": rows["epoch"] + 1}
    seen = {}
    for split in ("train", "val"):
        for name, given in (("first", rows), ("later", later), ("again", rows)):
            module.step(given, split)  # type: ignore[arg-type]
            seen[split, name] = module.model.seen
    assert torch.equal(seen["train", "first"], seen["train", "again"])
    assert not torch.equal(seen["train", "first"], seen["train", "later"])
    module.seed = 4
    module.step(rows, "val")
    assert torch.equal(module.model.seen, seen["val", "first"])


def test_a_causal_model_is_asked_for_every_base_given_those_before() -> None:
    module, rows = build(Peek(causal=True)), batch()
    out = module.step(rows, "val")
    assert torch.equal(module.model.seen, shifted(rows["ids"]))
    assert (module.model.seen[:, 0] == BOS).all()
    assert float(out.count) == rows["ids"].numel()


def test_without_bos_the_first_base_is_not_asked_for() -> None:
    module, rows = build(Peek(causal=True), bos=False), batch()
    out = module.step(rows, "val")
    assert torch.equal(module.model.seen, rows["ids"])
    assert float(out.count) == rows["ids"].numel() - len(rows["ids"])
    same = (rows["ids"][:, 1:] == rows["ids"][:, :-1]).sum()
    assert float(out.logs["acc"]) == float(same)


@pytest.mark.parametrize("causal", [True, False])
def test_n_and_padding_are_never_asked_for(causal: bool) -> None:
    module, rows = build(Peek(causal=causal), mask_prob=1.0), batch()
    rows["ids"][0, 5:9], rows["ids"][1, 20:] = N, PAD
    assert float(module.step(rows, "train").count) == rows["ids"].numel() - 8
    assert torch.equal(module.model.mask, rows["ids"] != PAD)


def test_loss_over_log_2_is_bits_per_base() -> None:
    module, rows = build(Peek(causal=True)), batch()
    out = module.step(rows, "val")
    logits = module.model(shifted(rows["ids"]))
    plain = F.cross_entropy(logits.flatten(0, 1), rows["ids"].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss_sum, plain)
    torch.testing.assert_close(out.logs["bits_per_base"], plain / math.log(2))
    values = {"val/loss": 1.2, "val/count": 4.0}
    module.after_evaluation("val", values)
    assert values["val/perplexity"] == pytest.approx(math.exp(1.2))


def test_novel_windows_have_bits_of_their_own() -> None:
    module, rows = build(Peek(causal=True)), batch()
    novel = torch.tensor([True, False, True, False])
    out = module.step(rows | {"novel": novel}, "val")
    alone = module.step({k: v[novel] for k, v in rows.items()}, "val")
    count = float(out.count)
    values = {"val/loss": 1.0, "val/count": count}
    values.update({f"val/{k}": float(v.detach()) / count for k, v in out.logs.items()})
    module.after_evaluation("val", values)
    expected = float(alone.logs["bits_per_base"]) / float(alone.count)
    assert values["val/bits_per_base_novel"] == pytest.approx(expected, rel=1e-6)
    assert "val/novel_nats" not in values


def test_hidden_bases_are_those_shown_as_mask() -> None:
    module, rows = build(Peek(causal=False)), batch(rows=40, size=200)
    rows["novel"] = torch.arange(40) < 20
    out = module.step(rows, "val")
    asked = int(out.count)
    hidden, novel = int(out.logs["hidden_share"]), int(out.logs["hidden_novel_share"])
    assert hidden == int((module.model.seen == MASK).sum())
    assert novel == int((module.model.seen[:20] == MASK).sum())
    assert abs(hidden / asked - 0.8) < 4 * math.sqrt(0.16 / asked)
    # what peeks knows nothing of a hidden base, and a part of what else is asked for
    logits = F.one_hot(torch.tensor([MASK]), 16).float()
    nothing = float(F.cross_entropy(logits, torch.tensor([A]))) * hidden
    assert float(out.logs["hidden_nats"]) == pytest.approx(nothing, rel=1e-4)
    assert float(out.loss_sum) / asked < nothing / hidden
    assert "hidden_share" not in module.step(rows, "train").logs


def test_an_evaluation_that_asks_for_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="test: no base is asked for"):
        build(Peek(causal=True)).after_evaluation("test", {"test/loss": 0.0, "test/count": 0.0})


def test_a_loss_that_is_no_number_at_padding_does_not_count() -> None:
    class Holes(Peek):
        def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
            logits = super().forward(ids_BL, mask_BL)
            return logits.masked_fill(~mask_BL.unsqueeze(-1), math.nan)  # type: ignore[union-attr]

    module, rows = build(Holes(causal=True)), batch()
    rows["ids"][1, 20:] = PAD
    out = module.step(rows, "train")
    out.loss_sum.backward()
    assert out.loss_sum.isfinite()
    assert module.model.scale.grad.isfinite()  # type: ignore[union-attr]


def test_data_without_padding_needs_no_mask() -> None:
    module = build(Peek(causal=True), replace(INFO, extra={"padded": False}))
    module.step(batch(), "train")
    assert module.model.mask is None


def test_next_bases_are_refused_of_a_model_that_sees_them() -> None:
    with pytest.raises(ConfigError, match=r"task\.objective=causal: this model sees the base"):
        build(Peek(causal=False), objective="causal")
    assert not build(Peek(causal=True), objective="mlm").is_causal


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask_prob", 0.0, "mask_prob must be above 0 and at most 1, got 0.0"),
        ("mask_share", 1.5, "mask_share must be from 0 to 1, got 1.5"),
        ("random_share", 0.3, "mask_share plus random_share must be at most 1, got 1.1"),
    ],
)
def test_a_wrong_option_is_one_clear_line(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainOptions(**{key: value})


@pytest.mark.parametrize("norm", [name for name, spec in NORMS.items() if not spec.causal])
def test_norms_across_positions_are_refused_in_the_causal_model(norm: str) -> None:
    config = load(["task=dna/pretrain", f"norm={norm}"]).settled
    splits: Any = Splits(None, None, None, INFO)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"norm={norm}: its statistics look across positions"):
        build_model(config, SPEC, make_norm(norm, config.norm), splits)


def test_windows_longer_than_the_filter_are_refused() -> None:
    config = load(["task=dna/pretrain"]).settled
    info = replace(INFO, extra={"length": 4096})
    splits: Any = Splits(None, None, None, info)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.l_max is 514; set model\.l_max=4096"):
        build_model(config, load_task("dna/pretrain"), make_norm("dyt", config.norm), splits)
