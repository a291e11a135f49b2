"""Whole runs of the speech tasks: resume, weights that move, wrong inputs, leaving chance."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from test_run import crash_at, main, one_line, result, rows, weights
from torch import nn

import suite.build

RATE = 16_000
TRAIN, VAL = 20, 6
WORDS = ("one", "two two", "three", "don't four", "five six")
TINY = [
    "model.conv_dim=16",
    "model.dim=16",
    "model.depth=2",
    "model.heads=2",
    "model.hidden_dim=32",
    "model.pos_kernel=8",
    "model.pos_groups=2",
    "model.layer_drop=0.5",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.activation_dropout=0.1",
    "model.input_dropout=0.1",
]
SHORT = [
    "data=manifest",
    "data.train=corpus/train.tsv",
    "data.val=corpus/val.tsv",
    "data.batch_seconds=4",
    "optim.schedule=cosine",
    "optim.warmup_fraction=0.25",
    "trainer.max_epochs=2",
    "trainer.max_steps=-1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]
PRETRAIN = [
    "task=speech/pretrain",
    *SHORT,
    *TINY,
    "model.codes=8",
    "model.code_dim=8",
    "model.feature_dropout=0.1",
    "task.negatives=10",
    "task.temperature_decay=0.9",
    "data.pad=true",
    "data.crop_seconds=0.7",
]
CTC = [
    "task=speech/ctc",
    *SHORT,
    *TINY,
    "model.final_dropout=0.1",
    "task.mask_prob=0.3",
    "task.mask_length=3",
    "task.mask_channel_prob=0.3",
    "task.mask_channel_length=4",
]


def write_corpus(root: Path) -> Path:
    """26 hums of 0.6 to 1.2 s with transcripts, and train.tsv and val.tsv that name them."""
    root.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        lines = ["path\ttranscript"]
        for i in range(count):
            seconds = np.arange(int(random.integers(9600, 19200))) / RATE
            hum = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * seconds) * np.sin(18 * seconds)
            name = f"{split}{i}.wav"
            soundfile.write(root / name, hum + 0.02 * random.standard_normal(len(hum)), RATE)
            lines.append(f"{name}\t{WORDS[i % len(WORDS)]}")
        (root / f"{split}.tsv").write_text("\n".join([*lines, ""]))
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("speech") / "corpus")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)
    Path("corpus").symlink_to(corpus)


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not equal, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- resume ---------------------------------------------------------------------------------------

FROZEN = ["task.freeze_updates=9", "model.freeze_extractor=true"]


@pytest.mark.parametrize(
    "tokens",
    [PRETRAIN, [*PRETRAIN, "data.pad=false"], CTC, [*CTC, *FROZEN]],
    ids=["pretrain", "pretrain-cropped", "ctc", "ctc-frozen"],
)
def test_resume_within_an_epoch_is_bit_equal_for_any_number_of_workers(
    tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pulled in the second epoch, one step or two after a checkpoint was saved."""
    common = [*tokens, "run.save_every_n_steps=2"]
    assert main([*common, "run.dir=whole"]) == 0
    whole = result("whole")
    epoch = whole["steps"] // 2
    assert epoch >= 4
    crash = epoch + 3 if epoch % 2 == 0 else epoch + 2
    for workers, after in ((2, 2), (0, 0)):
        run = f"cut{workers}"
        with monkeypatch.context() as patch:
            crash_at(patch, crash)
            assert main([*common, f"run.dir={run}", f"data.num_workers={workers}"]) == 1
        held = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert epoch < held < crash
        assert main([f"run.resume={run}", f"data.num_workers={after}"]) == 0
        assert different(weights("whole"), weights(run)) == []
        assert result(run)["metrics"] == whole["metrics"]
        assert result(run)["steps"] == whole["steps"]


def test_what_a_run_draws_follows_the_step_it_resumes_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temperature of the first window after a resume is that of the whole run."""
    common = [*PRETRAIN, "run.save_every_n_steps=2", "trainer.log_every_n_steps=1"]
    assert main([*common, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        assert main([*common, "run.dir=cut"]) == 1
    assert main(["run.resume=cut"]) == 0
    whole = {r["step"]: r for r in rows("whole") if "train/loss" in r}
    again = {r["step"]: r for r in rows("cut") if "train/loss" in r}
    assert again.keys() == whole.keys()
    for step, row in whole.items():
        for name in ("train/loss", "train/bits", "train/code_perplexity", "train/temperature"):
            assert again[step][name] == row[name], (step, name)
    assert whole[5]["train/temperature"] == pytest.approx(2 * 0.9**5, rel=0.12)


def test_frozen_updates_move_the_head_alone() -> None:
    few = [*CTC, *FROZEN, "trainer.max_epochs=null", "trainer.limit_val_batches=1"]
    assert main([*few, "trainer.max_steps=1", "run.dir=a"]) == 0
    assert main([*few, "trainer.max_steps=5", "run.dir=b"]) == 0
    moved = different(weights("a"), weights("b"))
    assert moved == ["model.head.weight", "model.head.bias"]


# --- weights that move ----------------------------------------------------------------------------


def encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "wav2vec2." in name}


def test_fine_tuning_starts_from_a_pre_training_and_evaluates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["trainer.max_steps=2", "trainer.max_epochs=null", "norm=dyt"]
    assert main([*PRETRAIN, *few, "run.dir=pre"]) == 0
    capsys.readouterr()
    from_pre = [*CTC, *few, "model.init_from=pre", "optim.lr=1e-30", "optim.weight_decay=0"]
    assert main([*from_pre, "run.dir=tuned"]) == 0
    said = capsys.readouterr().err
    assert "note: loaded" in said
    assert "the head keeps its initial values, and quantizer, project_q, final_proj" in said
    pre = torch.load("pre/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    tuned = weights("tuned")
    for name, value in encoder(pre).items():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-6)
    assert torch.equal(tuned["model.mask_embedding"], pre["model.mask_embedding"])
    assert not [name for name in tuned if "quantizer" in name or "project_q" in name]
    for split in ("val", "test"):
        assert main(["evaluate=tuned", f"run.eval_split={split}"]) == 0
        out = capsys.readouterr().out
        found = json.loads(out[out.index("{") :])
        for name in ("wer", "cer", "loss", "count"):
            wanted = result("tuned")["metrics"][f"{split}/{name}"]
            assert found[f"{split}/{name}"] == pytest.approx(wanted, rel=1e-5), name
    assert main(["evaluate=pre"]) == 0
    out = capsys.readouterr().out
    wanted = result("pre")["metrics"]["test/bits"]
    assert json.loads(out[out.index("{") :])["test/bits"] == pytest.approx(wanted, rel=1e-5)


def test_a_pre_training_is_no_fine_tuning_and_another_norm_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["trainer.max_steps=1", "trainer.max_epochs=null"]
    assert main([*PRETRAIN, *few, "norm=dyt", "run.dir=pre"]) == 0
    capsys.readouterr()
    assert main([*CTC, "norm=dyt", "evaluate=pre"]) == 2
    assert "is for task=speech/pretrain, not task=speech/ctc" in one_line(capsys)
    shutil.copy("pre/checkpoints/last.ckpt", "file.ckpt")
    assert main([*CTC, "norm=dyt", "evaluate=file.ckpt"]) == 2
    assert "missing head.weight, head.bias" in one_line(capsys)
    for field, value, was in (("heads", "1", "2"), ("pre_norm", "false", "true")):
        same = [token for token in CTC if not token.startswith(f"model.{field}=")]
        changed = [*same, *few, "norm=dyt", "model.init_from=pre", f"model.{field}={value}"]
        assert main([*changed, "run.dir=tuned"]) == 2
        assert f"was trained with model.{field}={was}" in one_line(capsys)
    start = [*CTC, *few, "norm=layernorm", "model.init_from=pre"]
    assert main([*start, "run.dir=tuned"]) == 2
    assert "norm=dyt" in one_line(capsys)
    assert not Path("tuned").exists()
    assert main([*start, "run.dir=tuned", "model.init_across_norms=true"]) == 0
    said = capsys.readouterr().err
    assert "note: across norms" in said
    assert "alpha" in said


def torchaudio_file() -> tuple[Path, nn.Module]:
    models = pytest.importorskip("torchaudio.models")
    from tasks.speech.wav2vec2 import STRIDES

    reference = models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(16, kernel, stride) for kernel, stride in STRIDES],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=True,
        encoder_layer_drop=0.0,
        aux_num_out=29,
    )
    torch.save(reference.state_dict(), "published.pt")
    return Path("published.pt"), reference


def hugging_face_file() -> tuple[Path, nn.Module]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        conv_bias=False,
        feat_extract_norm="group",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_codevectors_per_group=8,
        codevector_dim=8,
        proj_codevector_dim=8,
    )
    reference = transformers.Wav2Vec2ForPreTraining(config)
    save_file(
        {k: v.clone().contiguous() for k, v in reference.state_dict().items()}, "hf.safetensors"
    )
    return Path("hf.safetensors"), reference


def test_published_files_load_through_init_from(capsys: pytest.CaptureFixture[str]) -> None:
    still = ["norm=layernorm", "trainer.max_steps=1", "trainer.max_epochs=null", "optim.lr=1e-30"]
    still += ["optim.weight_decay=0", "trainer.limit_val_batches=1"]
    for make, words in (
        (torchaudio_file, "the file has no mask embedding"),
        (hugging_face_file, "the file has no letters: the head keeps its initial values"),
    ):
        file, reference = make()
        capsys.readouterr()
        run = f"from-{file.suffix[1:]}"
        assert main([*CTC, *still, f"model.init_from={file}", f"run.dir={run}"]) == 0
        said = capsys.readouterr().err
        assert words in said
        assert "taken as norm=layernorm" in said
        assert "model.pre_norm=true is taken on trust" in said
        held = weights(run)["model.wav2vec2.encoder.transformer.layers.1.attention.q_proj.weight"]
        (theirs,) = (
            value
            for name, value in reference.state_dict().items()
            if name.endswith("layers.1.attention.q_proj.weight")
        )
        assert torch.equal(held, theirs)
    assert main([*PRETRAIN, *still, "model.init_from=hf.safetensors", "run.dir=pre"]) == 0
    assert main([*CTC, *still, "norm=dyt", "model.init_from=published.pt", "run.dir=no"]) == 2
    assert "another norm" in one_line(capsys)
    assert not Path("no").exists()


# --- what a run says of itself --------------------------------------------------------------------


def test_results_name_the_metrics_and_what_was_synthesised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["trainer.max_steps=2", "trainer.max_epochs=null", "trainer.limit_val_batches=1"]
    few += ["trainer.limit_test_batches=1", "data.batch_seconds=4"]
    pretrain = [t for t in PRETRAIN if not t.startswith(("data=", "data.train", "data.val"))]
    ctc = [t for t in CTC if not t.startswith(("data=", "data.train", "data.val"))]
    assert main([*pretrain, *few, "run.dir=pre"]) == 0
    assert "chance 3.459 bits = log2(11)" in capsys.readouterr().err
    assert main([*ctc, *few, "run.dir=ctc"]) == 0
    assert ", SYNTHETIC" in capsys.readouterr().err
    pre, tuned = result("pre"), result("ctc")
    assert (pre["data"]["name"], pre["data"]["synthetic"]) == ("asterisk_en", False)
    assert (tuned["data"]["name"], tuned["data"]["synthetic"]) == ("cards_synthetic", True)
    assert pre["primary"]["name"] == "bits"
    assert tuned["primary"]["name"] == "wer"
    for found, names in (
        (pre, ("bits", "total_bits", "acc", "code_perplexity", "prob_perplexity", "same_codes")),
        (tuned, ("wer", "cer", "blank_share", "hyp_letters")),
    ):
        assert found["status"] == "done"
        primary = found["primary"]
        assert (primary["direction"], primary["split"]) == ("min", "val")
        assert primary["best"] == found["metrics"][f"val/{primary['name']}"]
        assert primary["test"] == found["metrics"][f"test/{primary['name']}"]
        wanted = {f"{s}/{n}" for s in ("val", "test") for n in ("loss", "count", *names)}
        assert wanted <= found["metrics"].keys()
        assert all(math.isfinite(found["metrics"][name]) for name in wanted)
        assert found["throughput"]["unit"] == "seconds of audio"
        assert found["throughput"]["per_s"] > 0
        assert found["data"]["license"]
        assert found["data"]["sha256"]


# --- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_cut_after_the_start_ends_the_run_or_is_counted(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its header says more than there is, which only reading it tells."""
    broken = Path("broken")
    write_corpus(broken)
    whole, rate = soundfile.read(broken / "train3.wav")
    soundfile.write(broken / "train3.flac", whole, rate)
    content = (broken / "train3.flac").read_bytes()
    (broken / "train3.flac").write_bytes(content[: len(content) // 2])
    table = (broken / "train.tsv").read_text().replace("train3.wav", "train3.flac")
    (broken / "train.tsv").write_text(table)
    tokens = [*CTC, "data.train=broken/train.tsv", f"data.num_workers={workers}"]
    assert main([*tokens, "run.dir=a"]) == 1
    line = one_line(capsys)
    assert "broken/train3.flac" in line
    assert "data.on_error=skip" in line
    assert result("a")["status"] == "failed"
    assert main([*tokens, "data.on_error=skip", "run.dir=b"]) == 0
    unreadable = result("b")["data"]["unreadable"]["train"]
    assert (unreadable["count"], len(unreadable["files"])) == (1, 1)
    assert "could not be read and were left out" in capsys.readouterr().err


def test_a_file_that_is_no_audio_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_corpus(Path("broken"))
    (broken / "train3.wav").write_text("hello\n")
    few = ["trainer.max_steps=1", "trainer.max_epochs=null", "trainer.limit_val_batches=1"]
    tokens = [*CTC, *few, "data.train=broken/train.tsv", "data.on_error=skip", "run.dir=a"]
    assert main(tokens) == 0
    said = capsys.readouterr().err
    assert "note: train: 1 of 20 clips left out: 1 faulty" in said
    assert "train3.wav: is no audio" in said
    assert "set data.on_error=skip" not in said
    assert result("a")["data"]["sizes"]["train"] == TRAIN - 1


# --- wrong inputs ---------------------------------------------------------------------------------


def write_wrong() -> None:
    """Files, tables and folders that cannot be used."""
    sound = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    soundfile.write("stereo.wav", np.stack([sound, sound], axis=1), RATE)
    soundfile.write("slow.wav", sound, RATE // 2)
    Path("text.wav").write_text("hello\n")
    soundfile.write("good.wav", sound, RATE)
    for name in ("stereo", "slow", "text", "good"):
        Path(f"{name}.tsv").write_text(f"path\ttranscript\n{name}.wav\tone\n")
    Path("silent.tsv").write_text("path\ttranscript\ngood.wav\t\n")
    Path("no-column.tsv").write_text("path\ngood.wav\n")
    Path("digits.tsv").write_text("path\ttranscript\ngood.wav\t42\n")
    Path("crowded.tsv").write_text("path\ttranscript\ngood.wav\t" + "abc " * 20 + "\n")
    Path("empty").mkdir()
    Path("libri/LibriSpeech/dev-clean").mkdir(parents=True)
    Path("cards").mkdir()
    Path("cards/cards.transcription").write_text("<s> </s> (001)\n")
    soundfile.write("cards/001.wav", sound, RATE)
    Path("words.txt").write_text("ONE O N E |\n")


WRONG = {
    "no transcript column": (["data.train=no-column.tsv"], "has no column any of transcript"),
    "stereo": (["data.train=stereo.tsv"], "stereo.wav: has 2 channels"),
    "another rate": (["data.train=slow.tsv"], "slow.wav: is sampled at 8000 Hz"),
    "text": (["data.train=text.tsv"], "text.wav: is no audio"),
    "missing list": (["data.train=nowhere.tsv"], "nowhere.tsv cannot be read"),
    "no words": (["data.train=silent.tsv"], "line 2 has no transcript for good.wav"),
    "digits": (["data.train=digits.tsv"], "(digits.tsv line 2) cannot be spelt"),
    "more letters than frames": (["data.train=crowded.tsv"], "its transcript needs 79"),
    "one line": (["data.train=good.tsv", "data.val=null"], "good.tsv has too few clips (1)"),
    "nothing to train on": (["data.train=null"], "there is nothing to train on"),
    "empty folder": (["data=librispeech", "data.root=empty"], "it has none"),
    "no such split": (["data=librispeech", "data.root=libri"], "it has dev-clean"),
    "words in none": (["data=cards_real", "data.root=cards"], "has no words in its transcripts"),
    "a step of two": (
        ["data.batch_seconds=1", "trainer.devices=2"],
        "a batch of the longest examples has only 1",
    ),
    "too short": (["data.min_seconds=30"], "20 shorter than data.min_seconds=30"),
    "crop": (["data.crop_seconds=0.1"], "data.crop_seconds=0.1: must be a number from min_seconds"),
    "endless crop": (["data.crop_seconds=.inf"], "must be a number from min_seconds"),
    "clips left out": (["data.drop_last=true"], "data.drop_last=true: must be false"),
    "cropped words": (["data.pad=false"], "data.pad=false crops training clips"),
    "heads": (["model.heads=3"], "model.heads=3: must divide dim (16)"),
    "site": (["model.keep_sites=[nowhere]"], "may hold stem, embed, attn, ffn, final"),
    "norm": (["norm=layernrom"], "Did you mean norm=layernorm?"),
    "mask": (["task.mask_prob=2"], "task.mask_prob=2: must be from 0 to 1"),
    "model without search": (["task.lm=lm.arpa"], "task.lm=lm.arpa: is for task.decoder=beam"),
    "lexicon without search": (["task.lexicon=words.txt"], "is for task.decoder=beam"),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps=0: must be 1 or more"),
    "weights": (["model.init_from=nowhere"], "model.init_from=nowhere: no such run or file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wrong()
    tokens, words = WRONG[case]
    given = [*CTC, *tokens]
    if any(t.startswith("data=") for t in tokens):
        given = [t for t in given if not t.startswith(("data.train", "data.val"))]
    before = sorted(str(p) for p in Path.cwd().rglob("*") if "cache" not in p.parts)
    assert main([*given, "run.dir=run"]) == 2
    captured = capsys.readouterr()
    assert [x for x in captured.err.splitlines() if not x.startswith("note")] == [
        x for x in captured.err.splitlines() if x.startswith("error: ")
    ]
    (line,) = [x for x in captured.err.splitlines() if x.startswith("error: ")]
    assert words in line
    assert captured.out == ""
    after = sorted(str(p) for p in Path.cwd().rglob("*") if "cache" not in p.parts)
    assert after == before


def test_a_beam_without_its_files_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    pytest.importorskip("torchaudio.models.decoder")
    for key in ("lm", "lexicon"):
        assert main([*CTC, "task.decoder=beam", f"task.{key}=nowhere", "run.dir=run"]) == 2
        assert f"task.{key}=nowhere" in one_line(capsys)
    assert not Path("run").exists()


def test_one_clip_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    tokens = ["data.batch_seconds=0.3", "trainer.max_epochs=1", "run.dir=a"]
    assert main([*CTC, *tokens, "norm=layernorm"]) == 0
    assert result("a")["steps"] == TRAIN
    assert result("a")["metrics"]["val/count"] == VAL


# --- learning -------------------------------------------------------------------------------------

LEARNING = [
    "task=speech/pretrain",
    "norm=layernorm",
    "model.conv_dim=32",
    "model.dim=64",
    "model.depth=2",
    "model.hidden_dim=128",
    "task.negatives=20",
    "task.mask_length=5",
    "data.batch_seconds=8",
    "data.crop_seconds=1",
    "optim.lr=3e-3",
    "optim.schedule=constant",
    "optim.warmup_fraction=null",
    "trainer.max_steps=180",
    "trainer.limit_val_batches=0",
    "trainer.limit_test_batches=0",
    "trainer.log_every_n_steps=15",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]


def default_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the extractor the first weights that torchaudio's models have: PyTorch's own."""
    whole = suite.build.build_model

    def build_model(*args: Any) -> nn.Module:
        model = whole(*args)
        extractor: Any = model.wav2vec2
        for module in extractor.feature_extractor.modules():
            if isinstance(module, nn.Conv1d):
                module.reset_parameters()
        return model

    monkeypatch.setattr(suite.build, "build_model", build_model)


@pytest.mark.slow
def test_pre_training_leaves_chance_and_would_not_from_torchaudios_first_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bits of the last 15 updates against log2(21), on recorded speech."""
    assert main([*LEARNING, "run.dir=ours"]) == 0
    default_convolutions(monkeypatch)
    assert main([*LEARNING, "run.dir=theirs"]) == 0
    ours, theirs = (
        [r["train/bits"] for r in rows(run) if "train/bits" in r] for run in ("ours", "theirs")
    )
    assert len(ours) == len(theirs)
    assert ours[0] > math.log2(21) - 0.1
    assert ours[-1] < math.log2(21) - 0.1
    assert theirs[-1] > math.log2(21) - 0.03
