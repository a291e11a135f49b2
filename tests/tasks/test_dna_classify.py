"""dna/classify: heads of both strands, averaging, whole-set metrics, weights of a pre-training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from suite.config import load
from suite.data import DataInfo
from suite.norms import make_norm
from tasks.dna.caduceus import CaduceusOptions
from tasks.dna.classify import Classify, ClassifyOptions, NovelAccuracy
from tasks.dna.heads import ClassHead, LanguageHead, mean_over
from tasks.dna.hyena import HyenaOptions
from tasks.dna.models import build_classification, build_pretraining
from tasks.dna.tokens import COMPLEMENT, PAD, A, T, encode, other_strand, reverse_complement

SMALL: dict[str, Any] = {"dim": 16, "depth": 2}


def info(*, classes: int = 3, strand_specific: bool = False) -> DataInfo:
    extra = {"length": 64, "strand_specific": strand_specific}
    return DataInfo("x", "", "", "", True, {}, classes=classes, extra=extra)


def caduceus(*, rcps: bool, norm: str = "rmsnorm", task: Any = build_classification) -> nn.Module:
    torch.manual_seed(0)
    options = CaduceusOptions(**SMALL, state=4, rcps=rcps)
    return task(options, norm=make_norm(norm), data=info())


def hyena(task: Any = build_classification, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return task(HyenaOptions(**SMALL, **options), norm=make_norm("dyt"), data=info())


def module(model: nn.Module, *, strand_specific: bool = False, **options: Any) -> Classify:
    return Classify(
        model,  # type: ignore[arg-type]
        options=ClassifyOptions(**options),
        info=info(strand_specific=strand_specific),
        optim=load(["task=dna/classify"]).settled.optim,
        identity={},
        seed=0,
        nominal=4,
    ).eval()


def batch(rows: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(A, T + 1, (rows, 20))
    ids[1, 15:], ids[2, 7:] = PAD, PAD
    return {"ids": ids, "label": torch.arange(rows) % 3, "valid": torch.ones(rows).bool()}


def test_the_mean_is_over_real_positions() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    hidden[1, 2:] = torch.nan
    pooled = mean_over(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, :2].mean(0))


def test_a_language_head_of_both_strands_is_equivariant() -> None:
    embedding = nn.Embedding(16, 6).double()
    head = LanguageHead(6, strands=2, embedding=embedding, std=0.02)
    hidden = torch.randn(2, 9, 12, dtype=torch.float64)
    other = hidden.flip(1, 2)  # what an equivariant backbone gives for the other strand
    comp = torch.from_numpy(COMPLEMENT).long()
    torch.testing.assert_close(head(other), head(hidden).flip(1)[..., comp], rtol=0, atol=1e-15)
    assert head.weight is embedding.weight


def test_a_class_head_of_both_strands_is_invariant() -> None:
    head = ClassHead(6, strands=2, classes=4, std=1.0).double()
    hidden = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(head(hidden.flip(1, 2)), head(hidden), rtol=0, atol=1e-14)


def test_the_whole_classifier_answers_both_strands_alike_even_when_padded() -> None:
    model, ids = caduceus(rcps=True).double().eval(), batch()["ids"]
    with torch.no_grad():
        here, there = model(ids, ids != PAD), model(other_strand(ids), ids != PAD)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_padding_changes_no_answer() -> None:
    for model in (caduceus(rcps=True), caduceus(rcps=False), hyena(), hyena(bidirectional=True)):
        model.double().eval()
        ids = batch()["ids"]
        with torch.no_grad():
            together = model(ids, ids != PAD)
            for row, size in ((0, 20), (1, 15), (2, 7)):
                alone = model(ids[row : row + 1, :size], None)
                torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)


def test_both_strands_are_averaged_in_evaluation_where_the_model_wants_it() -> None:
    model, rows = caduceus(rcps=False), batch()
    chosen = module(model)
    assert chosen.conjoins
    with torch.no_grad():
        found = chosen.step(rows, "val").metric_inputs["preds"]
        mirrored = chosen.step(rows | {"ids": other_strand(rows["ids"])}, "val")
        torch.testing.assert_close(found, mirrored.metric_inputs["preds"], rtol=0, atol=1e-6)
        alone = module(model, conjoin=False).step(rows, "val").metric_inputs["preds"]
    assert (found - alone).abs().max() > 1e-6


def test_strand_specific_data_and_other_models_are_not_averaged() -> None:
    assert not module(caduceus(rcps=False), strand_specific=True).conjoins
    assert not module(caduceus(rcps=True)).conjoins
    assert not module(hyena()).conjoins
    assert module(hyena(), conjoin=True).conjoins


def test_metrics_are_of_the_whole_split_not_means_of_batches() -> None:
    chosen = module(hyena())
    preds, target = torch.randn(90, 3), torch.randint(0, 3, (90,))
    novel = torch.ones(90, dtype=torch.bool)
    whole, parts = chosen.metrics(), chosen.metrics()
    whole.update(preds=preds, target=target, novel=novel)
    for piece in (slice(0, 7), slice(7, 50), slice(50, 90)):
        parts.update(preds=preds[piece], target=target[piece], novel=novel[piece])
    assert {k: float(v) for k, v in parts.compute().items()} == pytest.approx(
        {k: float(v) for k, v in whole.compute().items()}
    )
    assert set(whole.compute()) == {"acc", "mcc", "f1", "auroc", "acc_novel"}


def test_auroc_does_not_depend_on_how_the_split_is_cut() -> None:
    """torchmetrics takes numbers from 0 to 1 for probabilities, batch by batch."""
    found = []
    for size in (1, 7, 60):
        chosen = module(hyena())
        collection = chosen.metrics()
        for start in range(0, 60, size):
            rows = {k: v[start : start + size] for k, v in many_rows().items()}
            with torch.no_grad():
                collection.update(**chosen.step(rows, "val").metric_inputs)
        found.append(float(collection.compute()["auroc"]))
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_rows_that_are_not_valid_change_no_metric() -> None:
    chosen, rows = module(hyena()), many_rows()
    some, none = rows["valid"].clone(), torch.zeros_like(rows["valid"])
    some[40:] = False
    found = []
    for cut in (slice(0, 40), slice(0, 60)):
        collection = chosen.metrics()
        with torch.no_grad():
            part = {k: v[cut] for k, v in (rows | {"valid": some}).items()}
            collection.update(**chosen.step(part, "val").metric_inputs)
            collection.update(**chosen.step(rows | {"valid": none}, "val").metric_inputs)
        found.append({k: float(v) for k, v in collection.compute().items()})
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def many_rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(A, T + 1, (60, 20), generator=generator)
    return {"ids": ids, "label": torch.arange(60) % 3, "valid": torch.ones(60).bool()}


def test_accuracy_on_new_sequences_leaves_the_known_ones_out() -> None:
    metric = NovelAccuracy()
    preds = torch.eye(3)[[0, 1, 2, 0]]
    metric.update(preds, torch.tensor([0, 1, 0, 0]), torch.tensor([True, False, True, True]))
    assert float(metric.compute()) == pytest.approx(2 / 3)
    assert NovelAccuracy().compute().isnan()


@pytest.mark.parametrize("make", [hyena, lambda task: caduceus(rcps=True, task=task)])
def test_a_classifier_starts_from_a_pre_training(make: Any) -> None:
    source, target = make(build_pretraining), make(build_classification)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1)
    head = target.head.weight.clone()
    state, notes = target.adapt(source.state_dict(), whole=False)
    target.load_state_dict(state)
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], value)
    assert torch.equal(target.head.weight, head)
    assert notes == [
        "the head of pre-training was left out",
        "the classifier keeps its first values",
    ]
    missing, _ = target.adapt(source.state_dict(), whole=True)
    assert "head.weight" not in missing  # evaluate= is strict


def test_a_tied_head_that_differs_in_the_file_is_refused() -> None:
    model = hyena(build_pretraining)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"set model\.tie_head=false"):
        model.adapt(state, whole=True)
    untied = hyena(build_pretraining, tie_head=False)
    assert untied.adapt(state, whole=True)[1] == []


def test_weights_of_the_other_family_are_named() -> None:
    layer = "backbone.layers.0.mixer."
    files = {
        "HyenaDNA": {f"{layer}filter_fn.bias": torch.zeros(16)},
        "Caduceus": {f"{layer}submodule.mamba_fwd.D": torch.zeros(32)},
    }
    models = {"HyenaDNA": caduceus(rcps=True), "Caduceus": hyena()}
    for family, state in files.items():
        with pytest.raises(ValueError, match=rf"these are {family}'s? weights"):
            models[family].adapt(state, whole=False)


def test_counts_of_the_authors_metrics_are_left_out() -> None:
    state = {"backbone.layers.0.mixer.submodule.mamba_fwd.D": torch.zeros(32)}
    counted = {**state, "train_torchmetrics.num_tokens.count": torch.zeros(())}
    model = caduceus(rcps=True)
    model.body.swap = True
    found, notes = model.adapt(counted, whole=True)
    assert found.keys() == model.adapt(state, whole=True)[0].keys()
    assert notes[-1] == "1 counts of its training metrics were left out"


def test_a_vocabulary_of_twelve_rows_is_filled_up() -> None:
    model = hyena(build_pretraining)
    state = dict(model.state_dict())
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        state[name] = state[name][:12].clone()
    adapted, notes = model.adapt(state, whole=True)
    assert adapted["lm_head.weight"].shape == (16, 16)
    assert len(notes) == 2


def test_the_reverse_complement_is_an_involution_and_the_map_of_the_ids() -> None:
    ids = encode("ACGTNACCGT")
    assert ids.tolist() == [7, 8, 9, 10, 11, 7, 8, 8, 9, 10]
    assert np.array_equal(reverse_complement(reverse_complement(ids)), ids)
    assert COMPLEMENT.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
    rows = batch()["ids"]
    assert torch.equal(other_strand(other_strand(rows)), rows)
    for row in rows:
        real = row[row != PAD].numpy()
        mirrored = other_strand(row[None])[0]
        assert np.array_equal(mirrored[: len(real)].numpy(), reverse_complement(real))
        assert (mirrored[len(real) :] == PAD).all()


@pytest.mark.parametrize(
    ("letters", "message"),
    [("ACGZ", "letter 'Z' at position 4"), ("AC GT", "letter ' ' at position 3"), ("é", "letter")],
)
def test_a_letter_that_is_no_base_is_named(letters: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(letters)


def test_lower_case_and_ambiguous_letters_are_read() -> None:
    assert encode("acgtuRYswkmbdhvn").tolist() == [7, 8, 9, 10, 10] + [11] * 11
