"""CTC: the loss against a slow forward algorithm, masks, freezing, error rates, the alarm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.build import quiet
from suite.data import DataInfo
from suite.norms import make_norm
from suite.settings import OptimConfig
from tasks.speech.ctc import CTC, CTC_MODELS, CTCTaskOptions, blank_alarm, ctc_loss
from tasks.speech.text import LABELS, decode_rows, encode
from tasks.speech.wav2vec2 import RATE, frames_of

INFO = DataInfo("clips", "", "", "", True, {}, extra={})
TEXTS = ("ALL ACES", "TEN", "TWO OF CLUBS", "A")
SMALL = {"conv_dim": 8, "dim": 16, "depth": 2, "heads": 2, "hidden_dim": 16}


def module(*, model: dict[str, Any] | None = None, **task: Any) -> CTC:
    torch.manual_seed(0)
    options = replace(CTC_MODELS["wav2vec2_tiny"].options, **{**SMALL, **(model or {})})
    return CTC(
        CTC_MODELS["wav2vec2_tiny"].build(options, norm=make_norm("layernorm"), data=INFO),
        options=CTCTaskOptions(**{"mask_channel_length": 4, **task}),
        info=INFO,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        identity={},
        seed=0,
        nominal=4,
    )


def batch(*, epoch: int = 0, texts: tuple[str, ...] = TEXTS, rows: int | None = None) -> dict:
    """Noise of one to two seconds with a transcript each; only the first `rows` are valid."""
    generator = torch.Generator().manual_seed(1)
    length_B = torch.tensor([32_000, 16_000, 24_000, 20_000])[: len(texts)]
    audio_BS = 0.1 * torch.randn(len(texts), 32_000, generator=generator)
    audio_BS[torch.arange(32_000) >= length_B[:, None]] = 0
    ids = [encode(text) for text in texts]
    target_BL = torch.zeros(len(texts), max(map(len, ids)), dtype=torch.int64)
    for row_L, row in zip(target_BL, ids, strict=True):
        row_L[: len(row)] = torch.tensor(row, dtype=torch.int64)
    number_B = torch.arange(len(texts))
    return {
        "audio": audio_BS,
        "length": length_B,
        "target": target_BL,
        "target_length": torch.tensor([len(row) for row in ids]),
        "valid": number_B < (len(texts) if rows is None else rows),
        "sample_id": number_B + 10,
        "epoch": torch.full_like(number_B, epoch),
    }


def slow_ctc(probs: list[list[float]], target: list[int]) -> float:
    """-log of the sum of the probabilities of all paths, by the forward algorithm."""
    labels = [0]
    for label in target:
        labels += [label, 0]
    alpha = [probs[0][label] if s < 2 else 0.0 for s, label in enumerate(labels)]
    for frame in probs[1:]:
        before = alpha
        alpha = []
        for s, label in enumerate(labels):
            total = before[s] + (before[s - 1] if s else 0.0)
            if s > 1 and label not in (0, labels[s - 2]):
                total += before[s - 2]
            alpha.append(total * frame[label])
    total = alpha[-1] + (alpha[-2] if target else 0.0)
    return -math.log(total) if total else 0.0


def masks_of(ctc: CTC, data: dict[str, Tensor]) -> dict[str, Any]:
    found = ctc._left_out(data)
    return {name: found[name] for name in ("mask_BT", "channel_mask_BC")}


def test_the_loss_equals_a_slow_forward_algorithm() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs_BTV = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    targets = [[1, 2, 2, 3], [4], [], [1, 1, 1, 1]]  # the last needs 7 frames
    frames = [6, 4, 5, 6]
    target_BL = torch.tensor([row + [0] * (4 - len(row)) for row in targets])
    found_B = ctc_loss(
        log_probs_BTV,
        torch.tensor(frames),
        target_BL=target_BL,
        target_length_B=torch.tensor([len(row) for row in targets]),
    )
    expected = [
        slow_ctc(probs.exp().tolist()[:n], row)
        for probs, n, row in zip(log_probs_BTV, frames, targets, strict=True)
    ]
    assert expected[3] == 0.0
    assert found_B.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_step_sums_over_utterances_and_counts_seconds() -> None:
    ctc = module().eval()
    with torch.no_grad():
        out = ctc.step(batch(), "val")
        alone = [ctc.step(batch(texts=TEXTS[:n]), "val").loss_sum for n in (1, 2, 3, 4)]
    assert float(out.count) == 4
    assert float(out.units or 0) == pytest.approx(92_000 / RATE)
    assert float(out.loss_sum) == pytest.approx(float(alone[3]), rel=1e-5)
    assert 0 < float(alone[0]) < float(alone[1]) < float(alone[2]) < float(alone[3])


@pytest.mark.parametrize("split", ["train", "val"])
def test_padding_rows_count_for_nothing(split: Any) -> None:
    ctc = module().eval()
    with torch.no_grad():
        padded = ctc.step(batch(rows=2), split)
        alone = ctc.step({name: value[:2] for name, value in batch().items()}, split)
    assert float(padded.count) == 2
    torch.testing.assert_close(padded.loss_sum, alone.loss_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.units, alone.units)
    for name, value in alone.metric_inputs.items():
        assert len(padded.metric_inputs[name]) == len(value) == 2


def test_masks_change_with_the_epoch_the_utterance_and_the_seed_and_with_nothing_else() -> None:
    ctc = module()
    first, again = masks_of(ctc, batch()), masks_of(ctc, batch())
    for name, mask in first.items():
        assert torch.equal(mask, again[name])
        assert not torch.equal(mask, masks_of(ctc, batch(epoch=1))[name])
        assert not torch.equal(mask[0], mask[1])
        turned = {key: value.flip(0) for key, value in batch().items()}
        assert torch.equal(mask, masks_of(ctc, turned)[name].flip(0))
        ctc.seed = 1
        assert not torch.equal(mask, masks_of(ctc, batch())[name])
        ctc.seed = 0
    frames_B = frames_of(batch()["length"])
    behind_BT = torch.arange(first["mask_BT"].shape[1]) >= frames_B[:, None]
    assert not (first["mask_BT"] & behind_BT).any()


def test_an_evaluation_masks_nothing() -> None:
    ctc = module(model={"layer_drop": 0.9}).eval()
    with torch.no_grad():
        first, second = (ctc.step(batch(epoch=e), "val").loss_sum for e in (0, 1))
        logits_BTV, frames_B = ctc.model(batch()["audio"], batch()["length"])
        assert torch.equal(first, second)
        assert not torch.equal(first, ctc.step(batch(), "train").loss_sum)
        unmasked = module(mask_prob=0.0, mask_channel_prob=0.0).eval()
        assert torch.equal(first, unmasked.step(batch(), "train").loss_sum)
    assert logits_BTV.shape == (4, int(frames_B.max()), len(LABELS))


def trained(ctc: CTC, *, steps: int) -> list[dict[str, Tensor]]:
    """The parameters before training and after each of `steps` updates of a real trainer."""
    import lightning as L
    from torch.utils.data import DataLoader

    states = [{name: p.detach().clone() for name, p in ctc.model.named_parameters()}]

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            states.append({name: p.detach().clone() for name, p in ctc.model.named_parameters()})

    quiet()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(ctc, DataLoader([batch()] * steps, batch_size=None))  # type: ignore[arg-type]
    return states


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, p in before.items() if not torch.equal(p, after[name])}


def test_the_encoder_stands_still_for_so_many_updates_and_then_learns() -> None:
    ctc = module(freeze_updates=2, samples=0)
    encoder = {name for name, _ in ctc.model.named_parameters() if not name.startswith("head.")}
    states = trained(ctc, steps=3)
    assert moved(states[0], states[1]) == {"head.weight", "head.bias"}
    assert moved(states[1], states[2]) == {"head.weight", "head.bias"}
    later = moved(states[2], states[3])
    assert {"mask_embedding", "head.weight"} < later
    assert len(later & encoder) > 0.9 * len(encoder)


def test_the_error_rate_of_batches_is_that_of_the_whole() -> None:
    ctc = module().eval()
    collection: Any = ctc.split_metrics["val"]
    with torch.no_grad():
        whole = ctc.step(batch(), "val").metric_inputs
        parts = [
            ctc.step({name: value[rows] for name, value in batch().items()}, "val").metric_inputs
            for rows in (slice(0, 1), slice(1, 4))
        ]
    assert decode_rows(whole["target"]) == list(TEXTS)
    collection.update(**whole)
    expected = collection.compute()
    collection.reset()
    for inputs in parts:
        collection.update(**inputs)
    assert collection.compute() == expected
    assert set(expected) == {"val/wer", "val/cer"}


def test_what_the_network_is_sure_of_has_no_errors() -> None:
    ctc = module().eval()
    data = batch()
    frames = int(frames_of(32_000))
    logits_BTV = torch.zeros(4, frames, len(LABELS))
    logits_BTV[..., 0] = 1
    for row, text in enumerate(TEXTS):
        for i, label in enumerate(encode(text)):
            logits_BTV[row, 2 * i, label] = 9
    found = ctc._decoded(logits_BTV.log_softmax(-1), frames_of(data["length"]), data["target"])
    logs, inputs = found
    collection: Any = ctc.split_metrics["val"]
    collection.update(**inputs)
    assert float(collection.compute()["val/wer"]) == 0
    assert float(logs["hyp_letters"]) == sum(map(len, TEXTS))
    letters_B = torch.tensor([len(text) for text in TEXTS])
    shares_B = 1 - letters_B / frames_of(data["length"])
    assert float(logs["blank_share"]) == pytest.approx(float(shares_B.sum()))


def test_beam_search_takes_the_place_of_greedy() -> None:
    pytest.importorskip("flashlight.lib.text")
    found = []
    for decoder in ("greedy", "beam"):
        ctc = module(decoder=decoder).eval()
        with torch.no_grad():
            ctc.model.head.weight.mul_(200)  # sure of itself
            inputs = ctc.step(batch(rows=3), "val").metric_inputs
        assert inputs["preds"].shape[0] == 3
        found.append(decode_rows(inputs["preds"]))
    assert found[0] == found[1]
    assert all(found[0])


def test_samples_are_shown_after_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    ctc = module(samples=2).eval()
    collection: Any = ctc.split_metrics["val"]
    target_BL = batch()["target"]
    preds_BL = target_BL.clone()
    preds_BL[1] = 0
    collection.update(preds=preds_BL, target=target_BL)
    values = {"val/blank_share": 0.5, "val/hyp_letters": 7.0}
    ctc.after_evaluation("val", values)
    assert capsys.readouterr().err == "val: ALL ACES | ALL ACES\nval: TEN | (nothing)\n"
    ctc.after_evaluation("val", {"val/blank_share": 0.999, "val/hyp_letters": 0.1})
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("warning: the network still says only blank (99.9 % of the frames")


def test_the_alarm_leaves_a_network_alone_that_reads() -> None:
    assert blank_alarm(0.99, letters=40.0) is None
    assert blank_alarm(0.6, letters=0.2) is None
    assert blank_alarm(1.0, letters=0.0) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_prob", 1.2),
        ("mask_channel_prob", -0.1),
        ("mask_length", 0),
        ("mask_channel_length", 0),
        ("freeze_updates", -1),
        ("beam", 0),
        ("samples", -1),
        ("lm_weight", math.inf),
        ("word_score", math.nan),
        ("lm", "words.arpa"),
        ("lexicon", "words.txt"),
    ],
)
def test_an_option_out_of_range_names_itself(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        CTCTaskOptions(**{field: value})


@pytest.mark.parametrize(
    ("settings", "updates", "said"),
    [
        ({"init_from": None, "freeze_extractor": True}, 0, "the convolutions keep their random"),
        ({"init_from": None, "freeze_extractor": False}, 5, "the head reads random features"),
        ({"init_from": "pre", "freeze_extractor": True}, 5, None),
        ({"init_from": None, "freeze_extractor": False}, 0, None),
    ],
)
def test_freezing_what_nobody_has_trained_is_said(
    settings: dict[str, Any], updates: int, said: str | None
) -> None:
    made = module(freeze_updates=updates)
    made.identity = {"config": {"model": settings}}
    found = made._untaught()
    assert (found is None) == (said is None)
    assert said is None or said in str(found)
