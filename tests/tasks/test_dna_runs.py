"""Whole runs of the DNA tasks: figures, resume, weights that move, early stopping, wrong inputs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import crash_at, main, one_line, result, rows, weights
from torch import Tensor

from tasks.dna.hyena import decay_rates, time_features
from tasks.dna.tokens import COMPLEMENT, decode
from tasks.dna.yeast import load_genome
from tasks.dna.yeast_coding import windows

LENGTH = 64  # bases of a window
TRAIN, HELD_OUT = 10_000, 5_000  # bases of the splits
COPIED = 640  # bases of the test that the training set has too
SHORT = [
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "run.tensorboard=false",
    "run.norm_stats=false",
]
HYENA = [
    "model=hyenadna_tiny_1k",
    "model.dim=16",
    "model.depth=1",
    "model.hidden_dim=32",
    "model.filter_dim=16",
    "model.l_max=256",
    "model.dropout=0.1",
    "model.tie_head=true",
    "model.embed_std=0.02",
]
CADUCEUS = [
    "model=caduceus_ps_tiny",
    "model.dim=16",
    "model.depth=1",
    "model.state=4",
    "model.tie_head=true",
    "model.embed_std=0.02",
]
PRETRAIN = [
    "task=dna/pretrain",
    "data=genome",
    "data.fasta=corpus/small.fa",
    "data.bed=corpus/small.bed",
    f"data.length={LENGTH}",
    "data.batch_size=16",
    "data.shift=8",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "trainer.max_steps=4",
    *SHORT,
]
CLASSIFY = [
    "task=dna/classify",
    "data=genomic_benchmarks",
    "data.root=corpus/gb",
    "data.task=coding",
    "data.batch_size=8",
    "optim.lr=1e-2",
    "trainer.max_epochs=2",
    *SHORT,
]
QUIET = ["task.baselines=false"]
STILL = ["optim.lr=1e-30", "optim.weight_decay=0"]
CODING, INTERGENIC = "coding", "intergenic"
NOVEL = "bits_per_base_novel"
FILES = (("fasta", "fa"), ("bed", "bed"))


def fasta(path: Path, sequences: dict[str, str]) -> Path:
    """Sequences in lines of 60 letters."""
    lines = []
    for name, letters in sequences.items():
        lines += [f">{name}", *(letters[at : at + 60] for at in range(0, len(letters), 60))]
    path.write_text("\n".join([*lines, ""]))
    return path


def write_genome(root: Path) -> None:
    """Three pieces of yeast; some of the test is in the training set, some is N."""
    genome = load_genome()
    pieces = [decode(ids[20_000 : 20_000 + TRAIN]) for ids in genome.sequences()[:3]]
    train, val, test = pieces[0], pieces[1][:HELD_OUT], pieces[2][:HELD_OUT]
    test = train[:COPIED] + test[COPIED : -2 * LENGTH].lower() + "N" * LENGTH + test[-LENGTH:]
    fasta(root / "small.fa", {"chrI": train, "chrII": val, "chrIII": test})
    bed = f"chrI\t0\t{TRAIN}\ttrain\nchrII\t0\t{HELD_OUT}\tvalid\nchrIII\t0\t{HELD_OUT}\ttest\n"
    (root / "small.bed").write_text(bed)


def write_labelled(root: Path) -> None:
    """48 and 24 windows of yeast, coding and not, as folders and as FASTA with labels."""
    genome = load_genome()
    chroms = genome.sequences()
    for part, chrom, count in (("train", 0, 24), ("test", 3, 12)):
        records = []
        for label, name in enumerate((CODING, INTERGENIC)):
            places = windows(genome.features, chrom=chrom, ids=chroms[chrom])
            starts = [start for start, found in places if found == label][:count]
            folder = root / "gb" / "coding" / part / name
            folder.mkdir(parents=True)
            for i, start in enumerate(starts):
                letters = decode(chroms[chrom][start : start + 90 + i])
                (folder / f"{i}.txt").write_text(letters)
                records.append(f">{name}{i}|{label}\n{letters}\n")
        task = root / "nt" / "coding"
        task.mkdir(parents=True, exist_ok=True)
        (task / f"{part}.fna").write_text("".join(records))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dna") / "corpus"
    root.mkdir()
    write_genome(root)
    write_labelled(root)
    return root


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)
    Path("corpus").symlink_to(corpus)


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What an evaluation wrote to stdout."""
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def of_test(run: str) -> dict[str, float]:
    """What a run's record says of its test."""
    found = result(run)["metrics"]
    return {name: value for name, value in found.items() if name.startswith("test/")}


# --- pre-training ---------------------------------------------------------------------------------

MODELS = {"hyena": HYENA, "caduceus": CADUCEUS}


@pytest.mark.parametrize("kind", MODELS)
def test_a_pre_training_says_what_a_base_costs_beside_markov_models(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PRETRAIN, *MODELS[kind], "run.dir=a"]) == 0
    said = capsys.readouterr().err
    found = result("a")
    assert found["status"] == "done"
    assert (found["primary"]["name"], found["primary"]["direction"]) == ("bits_per_base", "min")
    assert found["data"]["sizes"] == {"train": 156, "val": 78, "test": 78}
    assert found["throughput"]["unit"] == "bases"
    m = found["metrics"]
    for split in ("val", "test"):
        nats = m[f"{split}/loss"]
        assert m[f"{split}/bits_per_base"] == pytest.approx(nats / math.log(2), rel=1e-6)
        assert m[f"{split}/perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)
        assert 0 <= m[f"{split}/acc"] <= 1
        assert m[f"{split}/bits_per_base_novel"] > 0
    assert found["primary"]["test"] == m["test/bits_per_base"]
    # all windows of val are new, of test those that were not copied from train
    assert m["val/novel_share"] == 1
    assert m["val/bits_per_base_novel"] == pytest.approx(m["val/bits_per_base"], rel=1e-6)
    assert 0.7 < m["test/novel_share"] < 1 - COPIED / HELD_OUT / 2
    assert m["test/bits_per_base_novel"] != m["test/bits_per_base"]
    assert 1.5 < m["test/markov_bits"] < 2.1
    assert m["test/markov_bits"] < m["test/markov_bits_novel"] + 0.1
    table = said[said.index("bits per base  ") :].splitlines()
    network = next(line.split() for line in table if line.startswith("network"))
    shown = ("bits_per_base", NOVEL)
    if kind == "caduceus":  # what it was shown as [MASK] alone
        shown = ("bits_per_base_hidden", "bits_per_base_hidden_novel")
        assert 0.7 < m["test/hidden_share"] < 0.9
    assert network[1:] == [f"{m[f'test/{name}']:.4f}" for name in shown]
    best_row = f"{m['test/markov_bits']:.4f}"
    assert any(best_row in line for line in table if "add-one" in line or "two-sided" in line)
    backoff = [name for name in m if "backoff" in name]
    assert len(backoff) == (2 if kind == "hyena" else 0)
    assert ("two-sided" in said) == (kind == "caduceus")


def test_count_says_how_many_bases_were_asked_for() -> None:
    few = [*PRETRAIN, *QUIET, "trainer.max_steps=1"]
    assert main([*few, *HYENA, "run.dir=a"]) == 0
    assert result("a")["metrics"]["val/count"] == 78 * LENGTH
    assert result("a")["metrics"]["test/count"] == 78 * LENGTH - LENGTH  # but for the N
    assert main([*few, *HYENA, "task.bos=false", "run.dir=b"]) == 0
    assert result("b")["metrics"]["val/count"] == 78 * (LENGTH - 1)
    assert main([*few, *CADUCEUS, "run.dir=c"]) == 0
    spread = 4 * math.sqrt(0.15 * 0.85 * 78 * LENGTH)
    assert abs(result("c")["metrics"]["val/count"] - 0.15 * 78 * LENGTH) < spread


@pytest.mark.parametrize("tokens", [["task.baselines=false"], ["trainer.limit_test_batches=1"]])
def test_no_baselines_where_they_are_off_or_the_test_is_not_whole(
    tokens: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PRETRAIN, *HYENA, *tokens, "trainer.max_steps=1", "run.dir=a"]) == 0
    assert "add-one" not in capsys.readouterr().err
    assert not [name for name in result("a")["metrics"] if "markov" in name or "backoff" in name]
    assert not Path("cache/dyt-suite/markov").exists()


def test_the_files_that_yeast_writes_are_the_same_data() -> None:
    few = ["trainer.max_steps=2", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2"]
    common = [t for t in PRETRAIN if not t.startswith(("data=", "data.fasta", "data.bed"))]
    common += [*HYENA, *few]
    assert main([*common, "data=yeast", "run.dir=a"]) == 0
    files = [f"data.{kind}=cache/dyt-suite/yeast/yeast.{end}" for kind, end in FILES]
    assert main([*common, "data=genome", *files, "run.dir=b"]) == 0
    a, b = result("a"), result("b")
    assert a["metrics"] == b["metrics"]
    assert a["data"]["sha256"] == b["data"]["sha256"]
    assert a["data"]["sizes"] == b["data"]["sizes"]
    assert different(weights("a"), weights("b")) == []
    assert "val/novel_share" in a["metrics"]


@pytest.mark.parametrize("kind", MODELS)
def test_bits_start_at_those_of_16_letters_and_fall_below_those_of_4(kind: str) -> None:
    """The vocabulary has 16 rows: a network that knows nothing pays log2(16) bits."""
    common = [*PRETRAIN, *QUIET, *MODELS[kind], "model.dropout=0" if kind == "hyena" else "seed=0"]
    assert main([*common, *STILL, "trainer.max_steps=1", "run.dir=first"]) == 0
    first = result("first")["metrics"]
    assert first["val/bits_per_base"] == pytest.approx(4, abs=0.15)
    assert first["val/perplexity"] == pytest.approx(16, rel=0.12)
    steps = ["optim.lr=2e-2", "optim.warmup_steps=5", "trainer.max_steps=80"]
    assert main([*common, *steps, "run.dir=last"]) == 0
    last = result("last")["metrics"]
    for split in ("val", "test"):
        assert 1.5 < last[f"{split}/bits_per_base"] < 2
        assert last[f"{split}/acc"] > 0.27


# --- resume ---------------------------------------------------------------------------------------

EPOCHS = ["trainer.max_steps=-1", "trainer.max_epochs=2", "run.save_every_n_steps=2"]
RESUMED = {
    "hyena": [*PRETRAIN, *QUIET, *HYENA, *EPOCHS],
    "caduceus": [*PRETRAIN, *QUIET, *CADUCEUS, *EPOCHS],
    "classify": [*CLASSIFY, *CADUCEUS, *EPOCHS, "data.batch_size=4", "optim.ema_decay=0.9"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_within_an_epoch_is_bit_equal_for_any_number_of_workers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, masks, strands and moves of the windows are those of the whole run."""
    common = RESUMED[kind]
    assert main([*common, "run.dir=whole"]) == 0
    whole = result("whole")
    epoch = whole["steps"] // 2
    assert epoch >= 9
    crash = epoch + 3 if epoch % 2 == 0 else epoch + 2
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        assert main([*common, "run.dir=cut", "data.num_workers=2"]) == 1
    held = torch.load("cut/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert epoch < held < crash
    assert main(["run.resume=cut", "data.num_workers=0"]) == 0
    assert different(weights("whole"), weights("cut")) == []
    assert result("cut")["metrics"] == whole["metrics"]
    assert result("cut")["steps"] == whole["steps"]


# --- early stopping -------------------------------------------------------------------------------

PATIENT = [*CLASSIFY, *HYENA, *STILL, "trainer.max_epochs=9", "run.patience=2"]
ENDS = "no new best in 2 validations: training ends here"


def validated(run: str) -> list[int]:
    """The steps at which a run was validated."""
    return [row["step"] for row in rows(run) if "val/acc" in row]


def test_patience_ends_the_training_and_the_record_says_when(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is learned, so the first validation stays the best and two more end the run."""
    assert main([*PATIENT, "run.dir=a"]) == 0
    assert capsys.readouterr().err.count(ENDS) == 1
    found = result("a")
    assert found["status"] == "done"
    assert found["config"]["run"]["patience"] == 2
    epoch = found["primary"]["best_step"]
    assert (found["steps"], found["epochs"]) == (3 * epoch, 3)
    assert validated("a") == [epoch, 2 * epoch, 3 * epoch]
    assert found["primary"]["test"] == found["metrics"]["test/acc"]
    held = torch.load("a/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert held == 3 * epoch


def test_patience_counts_on_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PATIENT, "run.dir=whole"]) == 0
    epoch = result("whole")["steps"] // 3
    common = [*PATIENT, "run.save_every_n_steps=2", "run.dir=cut"]
    with monkeypatch.context() as patch:
        crash_at(patch, 2 * epoch + 1)
        assert main(common) == 1
    capsys.readouterr()
    assert main(["run.resume=cut"]) == 0
    assert ENDS in capsys.readouterr().err
    assert result("cut")["steps"] == result("whole")["steps"]
    assert result("cut")["metrics"] == result("whole")["metrics"]


def test_a_run_that_patience_ended_stays_ended_when_it_is_resumed() -> None:
    assert main([*PATIENT, "run.dir=a"]) == 0
    before = result("a")
    assert main(["run.resume=a"]) == 0
    after = result("a")
    assert after["steps"] == before["steps"]
    assert after["metrics"] == before["metrics"]


def test_a_run_that_learns_is_not_ended() -> None:
    tokens = [*PRETRAIN, *QUIET, *HYENA, "trainer.max_steps=-1", "trainer.max_epochs=3"]
    assert main([*tokens, "optim.lr=2e-2", "run.patience=1", "run.dir=a"]) == 0
    assert result("a")["epochs"] == 3


# --- classification -------------------------------------------------------------------------------

NT = [
    "data=nucleotide_transformer",
    "data.root=corpus/nt",
]
LAYOUTS = {"folders": CLASSIFY, "headers": [*CLASSIFY, *NT]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_classifier_from_scratch_has_the_metrics_of_the_whole_set(
    kind: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LAYOUTS[layout], *MODELS[kind], "run.dir=a"]) == 0
    found = result("a")
    assert found["status"] == "done"
    assert found["data"]["sizes"] == {"train": 44, "val": 4, "test": 24}
    m = found["metrics"]
    for name in ("acc", "mcc", "f1", "auroc", "acc_novel"):
        assert -1 <= m[f"test/{name}"] <= 1
    assert m["test/count"] == 24
    assert (m["test/acc"] * 24) == pytest.approx(round(m["test/acc"] * 24), abs=1e-4)
    assert m["test/acc_novel"] == m["test/acc"]
    capsys.readouterr()
    assert main(["evaluate=a"]) == 0
    again = printed(capsys)
    assert {name: again[name] for name in of_test("a")} == of_test("a")


def test_both_layouts_of_one_set_give_one_run() -> None:
    for layout, tokens in LAYOUTS.items():
        assert main([*tokens, *CADUCEUS, f"run.dir={layout}"]) == 0
    assert result("folders")["metrics"] == result("headers")["metrics"]
    assert different(weights("folders"), weights("headers")) == []


@pytest.mark.parametrize("data", ["splice", "yeast_coding"])
def test_the_embedded_sets_train_with_a_few_batches(data: str) -> None:
    own = [t for t in CLASSIFY if not t.startswith(("data=", "data.root", "data.task"))]
    few = [f"trainer.limit_{part}_batches=2" for part in ("train", "val", "test")]
    few += ["trainer.max_epochs=1", "model.l_max=200"]
    assert main([*own, *HYENA, *few, f"data={data}", "run.dir=a"]) == 0
    found = result("a")
    assert found["data"]["name"] == data
    assert found["data"]["synthetic"] is False
    assert found["data"]["license"]
    assert math.isfinite(found["metrics"]["test/loss"])


def test_a_model_of_both_strands_is_warned_of_data_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [t for t in CLASSIFY if not t.startswith(("data=", "data.root", "data.task"))]
    few = [f"trainer.limit_{part}_batches=1" for part in ("train", "val", "test")]
    for model, warned in ((CADUCEUS, True), ([*CADUCEUS, "model.rcps=false"], False)):
        tokens = [*own, *few, "data=splice", "trainer.max_epochs=1", *model]
        assert main([*tokens, f"run.dir=warned-{warned}"]) == 0
        said = capsys.readouterr().err
        assert ("gives both strands one answer" in said) == warned


# --- weights that move ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_fine_tuning_starts_from_a_pre_training_and_evaluates(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [*MODELS[kind], "norm=dyt"]
    assert main([*PRETRAIN, *QUIET, *model, "run.dir=pre"]) == 0
    capsys.readouterr()
    start = [*CLASSIFY, *model, "trainer.max_epochs=1", "model.init_from=pre"]
    assert main([*start, *STILL, "run.dir=tuned"]) == 0
    said = capsys.readouterr().err
    assert "the head of pre-training was left out" in said
    assert "the classifier keeps its first values" in said
    pre = torch.load("pre/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    tuned = weights("tuned")
    backbone = [name for name in pre if name.startswith("model.backbone.")]
    assert len(backbone) > 10
    for name in backbone:
        torch.testing.assert_close(tuned[name], pre[name], rtol=0, atol=1e-6)
    assert not [name for name in tuned if "lm_head" in name]
    assert main(["evaluate=tuned"]) == 0
    again = printed(capsys)
    assert {name: again[name] for name in of_test("tuned")} == of_test("tuned")


def test_a_pre_training_evaluates_as_it_was_tested(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, model in MODELS.items():
        assert main([*PRETRAIN, *model, f"run.dir={kind}"]) == 0
        capsys.readouterr()
        assert main([f"evaluate={kind}"]) == 0
        again = printed(capsys)
        wanted = of_test(kind)
        assert "test/markov_bits" in wanted
        assert {name: again[name] for name in wanted} == wanted


def test_another_norm_is_refused_and_crossing_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [*PRETRAIN, *QUIET, *HYENA, "trainer.max_steps=1", "norm=dyt", "run.dir=pre"]
    assert main(few) == 0
    capsys.readouterr()
    start = [*CLASSIFY, *HYENA, "trainer.max_epochs=1", "norm=layernorm", "model.init_from=pre"]
    assert main([*start, "run.dir=tuned"]) == 2
    assert "norm=dyt" in one_line(capsys)
    assert not Path("tuned").exists()
    assert main([*start, "run.dir=tuned", "model.init_across_norms=true"]) == 0
    said = capsys.readouterr().err
    assert "note: across norms" in said
    assert "alpha" in said


MISMATCHES = {
    "l_max": (HYENA, "model.l_max=200", "256"),
    "modulation_shift": (HYENA, "model.modulation_shift=0", "0.05"),
    "rcps": (CADUCEUS, "model.rcps=false", "true"),
    "rcps_strand_swap": (CADUCEUS, "model.rcps_strand_swap=true", "false"),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_a_run_with_another_option_that_weights_do_not_show_is_refused(
    field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, token, was = MISMATCHES[field]
    assert main([*PRETRAIN, *QUIET, *model, "trainer.max_steps=1", "run.dir=pre"]) == 0
    capsys.readouterr()
    assert main([*CLASSIFY, *model, token, "model.init_from=pre", "run.dir=tuned"]) == 2
    assert f"was trained with model.{field}={was}" in one_line(capsys)
    assert not Path("tuned").exists()


def test_a_head_of_its_own_does_not_fit_a_shared_one(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*PRETRAIN, *QUIET, *HYENA, "trainer.max_steps=1"]
    assert main([*few, "model.tie_head=false", "run.dir=pre"]) == 0
    capsys.readouterr()
    assert main([*few, "model.init_from=pre", "run.dir=again"]) == 2
    assert "tie_head=false" in one_line(capsys)
    assert not Path("again").exists()
    assert main([*few, "model.tie_head=false", "model.init_from=pre", "run.dir=again"]) == 0


# --- published files ------------------------------------------------------------------------------


def as_hyena(state: dict[str, Tensor], *, l_max: int) -> dict[str, Tensor]:
    """Our weights under the names of the authors' checkpoints, with the buffers that they have."""
    theirs = {}
    for name, value in state.items():
        layer = name.replace("backbone.blocks.", "backbone.layers.")
        layer = layer.replace("backbone.embedding.", "backbone.embeddings.word_embeddings.")
        layer = layer.replace("final_norm.", "ln_f.").replace("mixer.skip", "mixer.filter_fn.bias")
        root, is_filter, part = layer.partition("mixer.filter.")
        if not is_filter:
            theirs[layer] = value
        elif part == "freq":
            for sine in (1, 3, 5):
                theirs[f"{root}mixer.filter_fn.implicit_filter.{sine}.freq"] = value
        else:
            kind, _, rest = part.partition(".")
            number, leaf = (6, rest) if kind == "out" else (2 * int(rest[0]), rest[2:])
            theirs[f"{root}mixer.filter_fn.implicit_filter.{number}.{leaf}"] = value
    like = state["backbone.embedding.weight"]
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.blocks.")}
    for block in blocks:
        f = f"backbone.layers.{block}.mixer.filter_fn."
        theirs[f + "pos_emb.z"] = time_features(l_max, l_max=l_max, features=5, like=like)[None]
        theirs[f + "pos_emb.t"] = torch.linspace(0, 1, l_max)[None, :, None]
        theirs[f + "modulation.deltas"] = decay_rates(like.shape[1], like=like)[None, None]
    return {f"model.{name}": value for name, value in theirs.items()}


def as_caduceus(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights of PS under the names of the Hugging Face port, trained without fused norms."""
    theirs = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".mixer.")
        if name == "backbone.embedding.weight":
            theirs["backbone.embeddings.word_embeddings.embedding.weight"] = value
        elif name == "lm_head.weight":
            theirs["lm_head.lm_head.weight"] = value
        elif not dot:
            norm = name.replace(".norm.", ".norm.submodule.")
            theirs[norm.replace("norm_f.", "norm_f.submodule.")] = value
        elif rest.startswith("directions."):
            _, number, part = rest.split(".", 2)
            which = ("fwd", "rev")[int(number)]
            part = part.replace("dt_bias", "dt_proj.bias")
            theirs[f"{first}.mixer.submodule.mamba_{which}.{part}"] = value
        else:
            for which in ("fwd", "rev"):
                theirs[f"{first}.mixer.submodule.mamba_{which}.{rest}"] = value
    complement = torch.from_numpy(COMPLEMENT).long()
    theirs["backbone.embeddings.word_embeddings.complement_map"] = complement
    theirs["lm_head.complement_map"] = complement
    prefix = {"lm_head": "", "backbone": "caduceus."}
    return {prefix[name.partition(".")[0]] + name: value for name, value in theirs.items()}


def best(run: str) -> dict[str, Tensor]:
    """The weights of a run without the module's name."""
    content = torch.load(f"{run}/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value.clone() for name, value in content.items()}


PUBLISHED = {
    "hyena": ([*HYENA, "norm=layernorm"], lambda state: as_hyena(state, l_max=256)),
    "caduceus": ([*CADUCEUS, "norm=rmsnorm"], as_caduceus),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files_evaluate_and_start_both_tasks(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, convert = PUBLISHED[kind]
    assert main([*PRETRAIN, *QUIET, *model, "run.dir=pre"]) == 0
    torch.save({"state_dict": convert(best("pre"))}, "published.ckpt")
    capsys.readouterr()
    assert main([*PRETRAIN, *QUIET, *model, "evaluate=published.ckpt"]) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out[captured.out.index("{") :])
    assert {name: again[name] for name in of_test("pre")} == of_test("pre")
    assert "published names" in captured.err
    own = [*model, "model.init_from=published.ckpt", *STILL]
    assert main([*PRETRAIN, *QUIET, *own, "trainer.max_steps=1", "run.dir=more"]) == 0
    assert main([*CLASSIFY, *own, "trainer.max_epochs=1", "run.dir=tuned"]) == 0
    said = capsys.readouterr().err
    assert "the classifier keeps its first values" in said
    for run in ("more", "tuned"):
        for name, value in best("pre").items():
            if name.startswith("backbone."):
                torch.testing.assert_close(best(run)[name], value, rtol=0, atol=1e-6)
    assert main([*PRETRAIN, *model, "norm=dyt", "model.init_from=published.ckpt"]) == 2
    assert "another norm" in one_line(capsys)


def test_a_published_file_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, token, words in (
        ("hyena", "model.l_max=200", "was trained with model.l_max=256"),
        ("caduceus", "model.rcps=false", "was trained with model.rcps=true"),
    ):
        model, convert = PUBLISHED[kind]
        assert main([*PRETRAIN, *QUIET, *model, "trainer.max_steps=1", f"run.dir={kind}"]) == 0
        torch.save(convert(best(kind)), f"{kind}.pt")
        capsys.readouterr()
        wrong = [*PRETRAIN, *model, token, f"model.init_from={kind}.pt", "run.dir=no"]
        assert main(wrong) == 2
        assert words in one_line(capsys)
        assert not Path("no").exists()


# --- wrong inputs ---------------------------------------------------------------------------------


def write_wrong() -> None:
    """Files and folders that cannot be used."""
    whole = Path("corpus/small.fa").read_text()
    Path("text.fa").write_text("hello\n" + whole)
    Path("empty.fa").write_text("")
    Path("uneven.fa").write_text(whole.replace("\n", "A\n", 3))
    Path("twice.fa").write_text(whole + ">chrI\nACGT\n")
    shutil.copy("corpus/small.fa", "small.fa.gz")
    Path("packed.fa").write_bytes(b"\x1f\x8b\x08\x00 packed")
    at = 5_000
    Path("letter.fa").write_text(whole[:at] + "!" + whole[at + 1 :])
    bed = Path("corpus/small.bed").read_text()
    for name, more in (
        ("beyond", "chrI\t0\t10001\ttrain\n"),
        ("unknown", "chr1\t0\t500\ttrain\n"),
        ("number", "I\t0\t500\ttrain\n"),
        ("split", "chrI\t0\t500\tdev\n"),
        ("unsplit", "chrI\t0\t500\n"),
        ("overlap", "chrI\t100\t500\ttest\n"),
        ("backwards", "chrI\t500\t500\ttrain\n"),
        ("words", "chrI\tzero\t500\ttrain\n"),
    ):
        Path(f"{name}.bed").write_text(bed + more)
    Path("untrained.bed").write_text(bed.replace("train", "test"))
    Path("nothing.bed").write_text("# no intervals\n")
    for name in ("hollow", "single", "odd", "blank"):
        shutil.copytree("corpus/gb/coding", f"gb/{name}")
    for part in ("train", "test"):
        for file in Path(f"gb/hollow/{part}/{CODING}").iterdir():
            file.unlink()
        shutil.rmtree(f"gb/single/{part}/{CODING}")
    Path(f"gb/odd/train/{CODING}/3.txt").write_text("ACGTJ")
    Path(f"gb/blank/train/{CODING}/3.txt").write_text("\n")
    shutil.copytree("corpus/nt", "nt")
    file = Path("nt/coding/train.fna")
    file.write_text(file.read_text().replace(">coding0|0", ">", 1))
    shutil.copytree("corpus/nt/coding", "nt/splice_sites")


GENOME = [*PRETRAIN, *HYENA]
PS = [*PRETRAIN, *CADUCEUS]
GB = [*CLASSIFY, *HYENA, "data.root=gb"]
WRONG: dict[str, tuple[list[str], list[str], str]] = {
    "not FASTA": (GENOME, ["data.fasta=text.fa"], "text.fa is not FASTA: its first line"),
    "empty FASTA": (GENOME, ["data.fasta=empty.fa"], "empty.fa is empty; a FASTA file has"),
    "uneven lines": (
        GENOME,
        ["data.fasta=uneven.fa"],
        "is not FASTA that can be indexed",
    ),
    "one name twice": (GENOME, ["data.fasta=twice.fa"], "has two sequences of one name"),
    "gzip": (GENOME, ["data.fasta=packed.fa"], "gzip -dc"),
    "gzip's name": (GENOME, ["data.fasta=small.fa.gz"], "small.fa.gz has a compressed file's name"),
    "missing FASTA": (GENOME, ["data.fasta=nowhere.fa"], "set data.fasta=FILE"),
    "missing BED": (GENOME, ["data.bed=nowhere.bed"], "set data.bed=FILE"),
    "no BED": (GENOME, ["data.bed=null"], "data=genome: needs data.bed=FILE"),
    "a folder": (GENOME, ["data.fasta=corpus"], "corpus cannot be read (Is a directory)"),
    "letter": (GENOME, ["data.fasta=letter.fa"], "has '!', which is not an IUPAC base"),
    "beyond": (GENOME, ["data.bed=beyond.bed"], "line 4: end 10,001 is beyond chrI, which has"),
    "unknown": (GENOME, ["data.bed=unknown.bed"], "line 4: no sequence 'chr1' in the FASTA file"),
    "prefix": (GENOME, ["data.bed=number.bed"], "which calls it 'chrI'"),
    "split": (GENOME, ["data.bed=split.bed"], "column 4 must be train, valid or test"),
    "no split": (GENOME, ["data.bed=unsplit.bed"], "line 4: has no split; column 4 must be"),
    "overlap": (GENOME, ["data.bed=overlap.bed"], "overlaps line 1, 0-10,000 (train)"),
    "backwards": (GENOME, ["data.bed=backwards.bed"], "start 500 is not below end 500"),
    "words": (GENOME, ["data.bed=words.bed"], "'zero' is not a position"),
    "no train": (GENOME, ["data.bed=untrained.bed"], "has no intervals of the split 'train'"),
    "no intervals": (GENOME, ["data.bed=nothing.bed"], "nothing.bed has no intervals"),
    "short windows": (GENOME, ["data.length=7"], "data.length=7: must be at least 8"),
    "over l_max": (GENOME, ["data.length=300"], "model.l_max is 256; set model.l_max=300"),
    "batchnorm": (GENOME, ["norm=batchnorm"], "its statistics look across positions"),
    "batchnorm at a site": (
        GENOME,
        ["norm=dyt", "norm.by_site={ffn: batchnorm}"],
        "its statistics look across positions",
    ),
    "norm": (GENOME, ["norm=layernrom"], "Did you mean norm=layernorm?"),
    "site": (GENOME, ["norm.by_site.mixr=dyt"], "did you mean 'mixer'"),
    "workers": (GENOME, ["data.num_workers=-1"], "data.num_workers=-1: must"),
    "patience": (GENOME, ["run.patience=0"], "run.patience=0: must be 1 or more"),
    "no steps": (GENOME, ["trainer.max_steps=0"], "trainer.max_steps=0: must be 1 or more"),
    "weights": (GENOME, ["model.init_from=nowhere"], "no such run or file"),
    "causal": (PS, ["task.objective=causal"], "take task.objective=mlm, or a causal model"),
    "mamba_ssm": (PS, ["model.scan=mamba_ssm"], "scan=mamba_ssm runs on NVIDIA GPUs only"),
    "triton": (PS, ["model.scan=triton"], "scan=triton runs on NVIDIA GPUs only"),
    "scan": (PS, ["model.scan=chunkd"], "chunked"),
    "no masks": (PS, ["task.mask_prob=0"], "task.mask_prob=0: must be above 0"),
    "shares": (PS, ["task.random_share=0.5"], "mask_share plus random_share must be at most 1"),
    "one strand": (PS, ["model.bidirectional=false"], "model.bidirectional=false: must be true"),
    "empty class": (GB, ["data.task=hollow"], "the class"),
    "one class": (GB, ["data.task=single"], "there is one class alone (intergenic)"),
    "no such set": (GB, ["data.task=holow"], "Did you mean data.task=hollow?"),
    "odd letter": (GB, ["data.task=odd"], "3.txt: "),
    "blank file": (GB, ["data.task=blank"], "3.txt is empty; remove it or get it again"),
    "no root": (GB, ["data.root=null"], "needs data.root=FOLDER"),
    "no such root": (GB, ["data.root=nowhere"], "data.root=nowhere: there is no such folder"),
    "no label": (GB, [*NT, "data.root=nt"], "train.fna line 1: the header has no class"),
    "longer than l_max": (
        GB,
        [*NT, "data.root=corpus/nt", "model.l_max=90"],
        "model.l_max=113",
    ),
    "strand": (
        GB,
        [*NT, "data.root=nt", "data.task=splice_sites", "data.rc_augment=true"],
        "leave data.rc_augment out",
    ),
    "no max_length": (GB, ["data.max_length=0", "data.task=odd"], "max_length=0: must be at least"),
    "pool": (GB, ["task.pool=max"], "task.pool=max"),
    "conjoin": (GB, ["task.conjoins=true"], "task.conjoin"),
    "conjoin value": (GB, ["task.conjoin=maybe"], "task.conjoin=maybe"),
}


def files_here() -> list[str]:
    """Everything but what is kept for the next start."""
    found = (path for path in Path.cwd().rglob("*") if "cache" not in path.parts)
    return sorted(str(path) for path in found if path.suffix != ".fai")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wrong()
    base, tokens, words = WRONG[case]
    before = files_here()
    assert main([*base, *tokens, "run.dir=run"]) == 2
    captured = capsys.readouterr()
    lines = [x for x in captured.err.splitlines() if not x.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert captured.out == ""
    assert files_here() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_letter_that_training_meets_is_one_line_and_a_failed_run(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where windows that repeat training sequence are not looked for, nobody reads it before."""
    write_wrong()
    tokens = [*GENOME, *QUIET, "data.fasta=letter.fa", "data.novel=off", "trainer.max_steps=20"]
    assert main([*tokens, f"data.num_workers={workers}", "run.dir=a"]) == 1
    line = one_line(capsys)
    assert "letter.fa: chrI position 4,9" in line
    assert "has '!', which is not an IUPAC base" in line
    assert result("a")["status"] == "failed"


def test_a_vision_run_is_no_start(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    assert main(["task=vision/classify", *few, *SHORT, "data.batch_size=8", "run.dir=v"]) == 0
    capsys.readouterr()
    for base in (GENOME, PS, [*CLASSIFY, *HYENA]):
        assert main([*base, "model.init_from=v", "run.dir=run"]) == 2
        assert "these are not weights of this model" in one_line(capsys)
        assert not Path("run").exists()


@pytest.mark.slow
def test_exit_code_and_stderr_of_a_process() -> None:
    tokens = [t for t in GENOME if not t.startswith("data.fasta=")]
    command = [sys.executable, "-m", "suite.train", *tokens, "data.fasta=nowhere.fa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data=genome: ")
    assert not Path("runs").exists()
