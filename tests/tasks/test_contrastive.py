"""The contrastive loss against a slow, readable one, and against transformers'."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tasks.speech.contrastive import CodePerplexity, chance_bits, info_nce, perplexity, same_codes


def example(
    *, slots: int = 9, batch: int = 3, width: int = 6, count: int = 5, codes: int = 4
) -> dict[str, Tensor]:
    context = torch.randn(batch, slots, width, dtype=torch.float64).float()
    code = torch.randint(codes, (batch, slots, 2))
    table = torch.randn(codes * codes, width)
    target = table[code[..., 0] * codes + code[..., 1]]  # equal codes are equal vectors
    drawn = torch.randint(slots - 1, (batch, slots, count))
    drawn = drawn + (drawn >= torch.arange(slots)[:, None])
    return {
        "context_BMC": context,
        "target_BMC": target,
        "codes_BMG": code,
        "negatives_BMK": drawn,
    }


def slow(parts: dict[str, Tensor], *, temperature: float) -> Tensor:
    """The loss of every slot, one number after the other, from the definition."""
    context, target, drawn = (parts[k] for k in ("context_BMC", "target_BMC", "negatives_BMK"))
    loss = torch.zeros(context.shape[:2])
    for b in range(context.shape[0]):
        for m in range(context.shape[1]):

            def similar(other: Tensor, b: int = b, m: int = m) -> float:
                c = context[b, m].double()
                o = other.double()
                return float((c @ o) / (c.norm() * o.norm()) / temperature)

            true = math.exp(similar(target[b, m]))
            others = [
                math.exp(similar(target[b, n]))
                for n in drawn[b, m].tolist()
                if not torch.equal(target[b, n], target[b, m])
            ]
            loss[b, m] = -math.log(true / (true + sum(others)))
    return loss


def test_the_loss_is_that_of_the_definition() -> None:
    parts = example()
    found = info_nce(**parts, temperature=0.1)
    torch.testing.assert_close(found.loss_BM, slow(parts, temperature=0.1), rtol=1e-4, atol=1e-4)


def test_loss_and_gradient_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits_of = transformers.Wav2Vec2ForPreTraining.compute_contrastive_logits
    parts = example()
    context = parts["context_BMC"].requires_grad_()
    ours = info_nce(**parts, temperature=0.1).loss_BM.sum()
    ours.backward()
    mine, context.grad = context.grad, None
    target, drawn = parts["target_BMC"], parts["negatives_BMK"]
    batch = torch.arange(target.shape[0])[:, None, None]
    negatives = target[batch, drawn].permute(2, 0, 1, 3)
    logits = logits_of(target[None], negatives, context, 0.1)
    same = (target == negatives).all(-1)
    logits[1:] = logits[1:].masked_fill(same, -torch.inf)
    theirs = torch.nn.functional.cross_entropy(
        logits.permute(1, 2, 0).flatten(0, 1), torch.zeros(27, dtype=torch.long), reduction="sum"
    )
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine, context.grad)


def test_a_context_that_says_nothing_is_at_chance() -> None:
    parts = example(slots=200, count=100, codes=320, width=256, batch=1)
    parts["target_BMC"] = torch.randn(1, 200, 256)
    parts["context_BMC"] = torch.randn(1, 200, 256)
    loss = info_nce(**parts, temperature=1.0).loss_BM.mean() / math.log(2)
    assert float(loss) == pytest.approx(chance_bits(100), abs=0.02)
    assert chance_bits(100) == pytest.approx(6.658, abs=1e-3)


def test_negatives_with_the_codes_of_the_target_are_left_out() -> None:
    parts = example()
    parts["codes_BMG"] = torch.zeros_like(parts["codes_BMG"])
    found = info_nce(**parts, temperature=0.1)
    assert float(found.loss_BM.abs().max()) == 0.0
    assert not found.hit_BM.any()
    assert float(found.same_BM.min()) == 1.0


def test_a_hit_is_a_target_more_similar_than_every_other_frame() -> None:
    parts = example(codes=50)
    found = info_nce(**parts, temperature=0.1)
    context, target = parts["context_BMC"], parts["target_BMC"]
    for b in range(3):
        for m in range(9):
            cos = torch.nn.functional.cosine_similarity(context[b, m], target[b])
            others = [float(cos[n]) for n in parts["negatives_BMK"][b, m].tolist()]
            assert bool(found.hit_BM[b, m]) == (float(cos[m]) > max(others))


def test_same_codes_need_all_codebooks_to_agree() -> None:
    codes = torch.tensor([[[0, 1], [0, 2], [0, 1]]])
    same = same_codes(codes, torch.tensor([[[1, 2], [0, 2], [0, 1]]]))
    assert same.tolist() == [[[False, True], [False, False], [True, False]]]


def test_the_loss_is_finite_in_gradient_where_negatives_are_left_out() -> None:
    parts = example(codes=2)
    context = parts["context_BMC"].requires_grad_()
    info_nce(**parts, temperature=0.1).loss_BM.sum().backward()
    assert context.grad is not None
    assert context.grad.isfinite().all()


def test_perplexity_goes_from_one_code_to_all_codes_of_each_book() -> None:
    one = torch.zeros(2, 40)
    one[:, 3] = 1.0
    assert float(perplexity(one)) == pytest.approx(2.0)
    assert float(perplexity(torch.full((2, 40), 1 / 40))) == pytest.approx(80.0, rel=1e-5)


def test_perplexity_of_a_set_is_of_its_summed_counts_not_a_mean_of_batches() -> None:
    metric = CodePerplexity(1, 4, sums="code")
    for code in range(4):
        counts = torch.zeros(1, 4)
        counts[0, code] = 5
        metric.update(code_GV=counts, prob_GV=torch.ones(1, 4))
    assert float(metric.compute()) == pytest.approx(4.0)


def test_a_context_that_says_nothing_hits_nothing() -> None:
    parts = example(codes=50)
    parts["context_BMC"] = torch.zeros_like(parts["context_BMC"])
    assert not info_nce(**parts, temperature=0.1).hit_BM.any()
