"""wav2vec 2.0 pre-training: the loss against a slow one and against transformers', its randomness,
its warnings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.build import build_model
from suite.config import load
from suite.data import Splits, SuiteDataModule
from suite.norms import make_norm
from suite.randomness import sample_seeds
from suite.registry import load_task
from tasks.speech import masks
from tasks.speech.alarms import PATIENCE, Alarms
from tasks.speech.contrastive import chance_bits
from tasks.speech.pretrain import Pretrain, PretrainTaskOptions
from tasks.speech.wav2vec2 import frames_of

SMALL = [
    "model.conv_dim=16",
    "model.dim=24",
    "model.depth=2",
    "model.heads=2",
    "model.hidden_dim=32",
    "model.pos_kernel=8",
    "model.pos_groups=2",
    "model.codes=6",
    "model.code_dim=8",
    "model.dropout=0",
    "model.init_std=0.3",
    "task.negatives=7",
]


@pytest.fixture(scope="module")
def splits() -> Splits:
    spec = load_task("speech/pretrain")
    config = load(["task=speech/pretrain"]).settled
    built: Splits = spec.data[config.data_name].build(config.data, seed=0)
    return built


def module(splits: Splits, *tokens: str, norm: str = "layernorm") -> Pretrain:
    torch.set_num_threads(1)
    config = load(["task=speech/pretrain", f"norm={norm}", *SMALL, *tokens]).settled
    spec, factory = load_task("speech/pretrain"), make_norm(norm, config.norm)
    made: Pretrain = spec.module(
        build_model(config, spec, factory, splits),
        options=config.task,
        info=splits.info,
        optim=config.optim,
        identity={"norm": factory.describe()},
        seed=config.seed,
        nominal=1,
    )
    return made


def batch(splits: Splits, size: int = 3) -> dict[str, Tensor]:
    options = load(["task=speech/pretrain"]).settled.data
    return SuiteDataModule(splits, options=options, seed=0).fixed_batch(size)


def drawn(made: Pretrain, given: dict[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """What the step draws, from the same functions."""
    where = {"ids": given["sample_id"], "epoch": given["epoch"]}
    mask, at, used = made._masked(given, sample_seeds(seed, "mask", **where))
    seeds = sample_seeds(seed, "negatives", **where)
    others = masks.negatives(used, count=made.negatives, seeds_B=seeds)
    grid = (at.shape[1], *made.shape)
    noise = masks.gumbel(sample_seeds(seed, "gumbel", **where), *grid)
    return {"mask": mask, "at": at, "used": used, "others": others, "noise": noise}


def slow_loss(made: Pretrain, given: dict[str, Tensor]) -> tuple[float, int]:
    """fairseq's three terms, a frame at a time, from the outputs of the model."""
    draws = drawn(made, given, seed=made.seed)
    out = made.model(
        given["audio"],
        given["length"],
        mask_BT=draws["mask"],
        at_BM=draws["at"],
        noise_BMGV=draws["noise"],
        temperature=made.temperature,
    )
    info, count, squares = 0.0, 0, []
    probs: list[Tensor] = []
    for b, real in enumerate(given["valid"].tolist()):
        if not real:
            continue
        slots = int(draws["used"][b].sum())
        squares.append(out.features_BTC[b, : int(frames_of(given["length"][b]))].square())
        for m in range(slots):
            logits = [similar(out.context_BMC[b, m], out.target_BMC[b, m])]
            for n in draws["others"][b, m].tolist():
                if not torch.equal(out.codes_BMG[b, n], out.codes_BMG[b, m]):
                    logits.append(similar(out.context_BMC[b, m], out.target_BMC[b, n]))
            info -= float(torch.tensor(logits).log_softmax(0)[0])
            probs.append(out.probs_BMGV[b, m])
            count += 1
    mean = torch.stack(probs).mean(0)
    size = mean.numel()
    spread = sum(math.exp(-float((p * p.log()).sum())) for p in mean)
    penalty = float(torch.cat(squares).mean())
    return info + count * (0.1 * (size - spread) / size + 10 * penalty), count


def test_chance_is_that_of_one_who_guesses_among_different_codes(splits: Splits) -> None:
    made, given = module(splits), batch(splits)
    with torch.no_grad():
        out = made.step(given, "val")
    draws = drawn(made, given, seed=0)
    with torch.no_grad():
        codes = made.model(
            given["audio"], given["length"], mask_BT=draws["mask"], at_BM=draws["at"]
        ).codes_BMG
    guesses = []
    for b in range(3):
        for m in range(int(draws["used"][b].sum())):
            others = codes[b, draws["others"][b, m]]
            guesses.append(1 + int((others != codes[b, m]).any(-1).sum()))
    found = float(out.logs["chance_bits"]) / float(out.count)
    assert found == pytest.approx(sum(map(math.log2, guesses)) / len(guesses), rel=1e-5)
    assert found < chance_bits(made.negatives)


def similar(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0)) / 0.1


@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
def test_the_step_is_the_loss_of_the_definition(splits: Splits, norm: str) -> None:
    made, given = module(splits, norm=norm), batch(splits)
    given["valid"][1] = False
    with torch.no_grad():
        out = made.step(given, "train")
        expected, count = slow_loss(made, given)
    assert float(out.count) == count
    assert float(out.loss_sum) == pytest.approx(expected, rel=2e-5)


def test_loss_and_gradients_equal_transformers(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = ["task.penalty_weight=0", "model.feature_grad_mult=1", "model.pre_norm=false"]
    made, given = module(splits, *tokens), batch(splits)
    given["audio"], given["length"] = given["audio"][:, :16000], torch.full((3,), 16000)
    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_codevectors_per_group=6,
        codevector_dim=8,
        proj_codevector_dim=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.65,
        num_negatives=7,
    )
    theirs = transformers.Wav2Vec2ForPreTraining(config).train()
    state, _ = made.model.adapt(theirs.state_dict(), whole=True)
    made.model.load_state_dict(state, strict=True)
    theirs.set_gumbel_temperature(made.temperature)

    draws = drawn(made, given, seed=made.seed)
    frames = draws["mask"].shape[1]
    noise = torch.zeros(3, frames, *made.shape)
    negatives = torch.zeros(3, frames, 7, dtype=torch.long)
    for b in range(3):
        used = draws["used"][b]
        at = draws["at"][b][used]
        noise[b, at] = draws["noise"][b][used]
        negatives[b, at] = draws["at"][b][draws["others"][b][used]] + b * frames

    def given_noise(logits: Tensor, *, tau: float, hard: bool, **_: Any) -> Tensor:
        soft = ((logits + noise.view_as(logits)) / tau).softmax(-1)
        one = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1])
        return one + (soft - soft.detach())  # torch rounds here, and loses equal negatives

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", given_noise)
    expected = theirs(
        given["audio"], mask_time_indices=draws["mask"], sampled_negative_indices=negatives
    ).loss
    expected.backward()
    ours = made.step(given, "train")
    ours.loss_sum.backward()
    assert ours.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    grads, _ = made.model.adapt({k: p.grad for k, p in theirs.named_parameters()}, whole=True)
    compared = 0
    for name, p in made.model.named_parameters():
        if "original" in name:  # the norm's two parameters stand for one weight
            continue
        torch.testing.assert_close(
            p.grad, grads[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared > 40


def test_validation_asks_the_same_of_every_seed_and_training_changes_with_the_epoch(
    splits: Splits,
) -> None:
    given = batch(splits)
    losses = {}
    for seed in (0, 1):
        made = module(splits, f"seed={seed}").eval()
        made.model.load_state_dict(module(splits).model.state_dict())
        with torch.no_grad():
            losses[seed] = [float(made.step(given, "val").loss_sum) for _ in range(2)]
    assert len({x for pair in losses.values() for x in pair}) == 1
    made = module(splits)
    with torch.no_grad():
        first, again = (float(made.step(given, "train").loss_sum) for _ in range(2))
        later = float(made.step({**given, "epoch": given["epoch"] + 1}, "train").loss_sum)
    assert first == again
    assert first != later


def test_what_a_clip_is_batched_with_changes_nothing(splits: Splits) -> None:
    made, given = module(splits, "task.diversity_weight=0", "task.penalty_weight=0"), batch(splits)
    with torch.no_grad():
        whole = made.step(given, "train")
        alone = [made.step({k: v[i : i + 1] for k, v in given.items()}, "train") for i in range(3)]
    assert float(whole.count) == sum(float(a.count) for a in alone)
    total = sum(float(a.loss_sum) for a in alone)
    assert float(whole.loss_sum) == pytest.approx(total, rel=1e-5)


def test_a_batch_of_padding_alone_is_finite_and_counts_for_nothing(splits: Splits) -> None:
    made, given = module(splits), batch(splits)
    given["valid"][:] = False
    out = made.step(given, "train")
    out.loss_sum.backward()
    assert [v.item() for v in (out.loss_sum, out.count, out.units)] == [0.0, 0, 0.0]
    assert all(p.grad.isfinite().all() for p in made.model.parameters() if p.grad is not None)


def test_equalised_masks_have_the_smallest_count_of_the_batch(splits: Splits) -> None:
    given = batch(splits, 8)
    count = {}
    for rule in ("none", "batch"):
        made = module(splits, f"task.mask_equalise={rule}")
        where = {"ids": given["sample_id"], "epoch": given["epoch"]}
        count[rule] = made._masked(given, sample_seeds(0, "mask", **where))[2].sum(dim=1)
    assert set(count["batch"].tolist()) == {int(count["none"].min())}


def test_metrics_of_a_window_are_reported_and_cleared(splits: Splits) -> None:
    made, given = module(splits), batch(splits)
    made.step(given, "train")
    found = made.window_metrics()
    assert set(found) == {"code_perplexity", "prob_perplexity", "temperature"}
    assert 2 <= found["code_perplexity"] <= 12
    assert made.window_metrics() == {}


def test_the_temperature_falls_with_the_updates_to_its_end(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(splits)
    assert made.temperature == 2.0
    monkeypatch.setattr(Pretrain, "updates", property(lambda self: 100_000))
    assert made.temperature == pytest.approx(2 * 0.999995**100_000)
    monkeypatch.setattr(Pretrain, "updates", property(lambda self: 400_000))
    assert made.temperature == 0.5


def test_alarms_say_each_thing_once_and_nothing_of_a_healthy_run() -> None:
    alarms = Alarms(groups=2, codes=320, negatives=100)
    chance = chance_bits(100)
    healthy = {"bits": 3.0, "code_perplexity": 300.0, "same": 0.01}
    assert alarms.judge(**healthy, updates=PATIENCE) == []
    assert alarms.judge(**{**healthy, "bits": chance}, updates=10) == []
    (late,) = alarms.judge(**{**healthy, "bits": chance - 0.01}, updates=PATIENCE)
    assert "chance is 6.658" in late
    (fallen, same) = alarms.judge(bits=0.0, code_perplexity=2.0, same=1.0, updates=50)
    assert "code perplexity 2.0" in fallen
    assert "100% of the negatives" in same
    assert alarms.judge(bits=0.0, code_perplexity=2.0, same=1.0, updates=99) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_prob", 0.0),
        ("mask_length", 0),
        ("negatives", 0),
        ("logit_temperature", 0.0),
        ("diversity_weight", -1.0),
        ("temperature_decay", 0.0),
        ("temperature_end", 3.0),
    ],
)
def test_options_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(PretrainTaskOptions(), **{field: value})
