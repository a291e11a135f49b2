"""Whole runs of language modelling: figures, samples, resume, weights that move, wrong inputs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_run import crash_at, main, one_line, result, rows, weights
from torch import Tensor

from suite.norms import make_norm
from tasks.language import tokenize
from tasks.language.llama import Llama, LlamaOptions
from tasks.language.shakespeare import load_plays
from tasks.language.text import TextOptions, build_text
from tasks.language.tokens import BYTE_END

ROOT = Path(__file__).parents[2]
LENGTH = 32
SHORT = [
    "task=language/lm",
    f"data.length={LENGTH}",
    "data.batch_size=4",
    "data.eval_batch_size=8",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "task.sample_tokens=0",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "run.tensorboard=false",
    "run.norm_stats=false",
]
STEPS = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
]
ONE = [t.replace("=4", "=1").replace("=2", "=1") for t in STEPS]
LLAMA = [
    "model=llama_tiny",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "model.kv_heads=1",
    "model.hidden_dim=24",
]
GPT2 = [
    "model=gpt2_tiny",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "model.hidden_dim=32",
    "model.max_length=48",
]
MODELS = {"llama": [*LLAMA, "norm=dyt"], "gpt2": [*GPT2, "norm=layernorm"]}
STILL = ["optim.lr=1e-30", "optim.weight_decay=0"]
PLAY = ["data=text", "data.root=corpus/play.txt"]
SHARDED = "trainer.strategy=fully_shard"


def scenes() -> list[str]:
    """The beginnings of some plays."""
    return [play.text[2000:3500].replace("\r\n", "\n") for play in load_plays()[:9]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """play.txt, one text; plays.jsonl, 45 pieces of plays, a document a line."""
    root = tmp_path_factory.mktemp("language") / "corpus"
    root.mkdir()
    (root / "play.txt").write_text("".join(scenes()[:3]))
    pieces = [text[at : at + 300] for text in scenes() for at in range(0, 1500, 300)]
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (root / "plays.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)
    Path("corpus").symlink_to(corpus)


@pytest.fixture(scope="module")
def runs(corpus: Path) -> Path:
    """A run of each model on the embedded plays; folders llama and gpt2."""
    folder = corpus.parent
    for kind, model in MODELS.items():
        tokens = [*SHORT, *STEPS, *model, "task.sample_tokens=12", "task.prompt=KING"]
        assert main([*tokens, f"run.dir={folder / kind}"]) == 0
    return folder


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal, bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What an evaluation wrote to stdout."""
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def of_test(run: Path | str) -> dict[str, float]:
    """What a run's record says of its test."""
    found = result(str(run))["metrics"]
    return {name: value for name, value in found.items() if name.startswith("test/")}


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_on_the_embedded_plays_says_what_a_token_and_a_byte_cost(
    kind: str, runs: Path
) -> None:
    found = result(str(runs / kind))
    assert found["status"] == "done"
    assert (found["primary"]["name"], found["primary"]["direction"]) == ("loss", "min")
    assert found["data"]["name"] == "shakespeare"
    assert found["data"]["license"] == "public domain"
    assert found["throughput"]["unit"] == "tokens"
    assert found["throughput"]["per_s"] > 0
    assert found["throughput"]["mfu"] is None  # of a GPU alone
    m = found["metrics"]
    for split in ("val", "test"):
        nats = m[f"{split}/loss"]
        assert 4.5 < nats < 6.5  # a network that knows nothing pays ln(257) = 5.55
        assert m[f"{split}/perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
        assert m[f"{split}/bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
        assert m[f"{split}/count"] == 2 * 8 * LENGTH
        assert 0 <= m[f"{split}/acc"] <= 1
    assert found["primary"]["test"] == m["test/loss"]
    train = [row["train/loss"] for row in rows(str(runs / kind)) if "train/loss" in row]
    assert train[-1] < train[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_ends_with_a_sample_that_goes_on_from_the_prompt(kind: str, runs: Path) -> None:
    text = (runs / kind / "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("KING")
    assert 1 <= len(text) - len("KING") <= 12
    assert not list(runs.glob(f"{kind}/*.tmp"))


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_evaluates_as_it_was_tested(
    kind: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / kind / "sample.txt").read_bytes()
    assert main([f"evaluate={runs / kind}"]) == 0
    again = printed(capsys)
    assert {name: again[name] for name in of_test(runs / kind)} == of_test(runs / kind)
    assert (runs / kind / "sample.txt").read_bytes() == before
    assert not Path("sample.txt").exists()


def test_every_token_but_the_first_is_asked_once_in_a_whole_evaluation() -> None:
    tokens = [*SHORT, *LLAMA, *PLAY, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    assert main([*tokens, "run.dir=a"]) == 0
    m = result("a")["metrics"]
    assert m["val/count"] == len(held_out()) - 1
    # all of them are bytes but the end of the document
    counted = m["val/bytes_per_token"] * m["val/count"]
    assert counted == pytest.approx(m["val/count"] - 1, abs=1e-3)
    assert m["val/bits_per_byte"] > m["val/loss"] / math.log(2)


def test_training_learns_the_letters_of_a_text() -> None:
    tokens = [*SHORT, *LLAMA, *PLAY, "norm=rmsnorm", "trainer.max_steps=60", "optim.lr=2e-2"]
    assert main([*tokens, "trainer.val_check_interval=20", "run.dir=a"]) == 0
    assert result("a")["metrics"]["test/bits_per_byte"] < 5.5
    assert result("a")["metrics"]["test/acc"] > 0.12


# --- weights that move ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_starts_from_another_ones_weights(
    kind: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*SHORT, *ONE, *MODELS[kind], *PLAY, f"model.init_from={runs / kind}"]
    assert main([*start, *STILL, "run.dir=a"]) == 0
    assert "loaded" in capsys.readouterr().err
    file = runs / kind / "checkpoints" / "best.ckpt"
    before = torch.load(file, weights_only=True)["state_dict"]
    for name, value in weights("a").items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_weights_whose_ids_mean_other_characters_are_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two texts of three characters each: every shape is the same, and no id means the same."""
    Path("abc.txt").write_text("ab\n" * 600)
    Path("xyz.txt").write_text("xy\n" * 600)
    start = [*SHORT, *ONE, *LLAMA, "data=text", "data.encoding=characters"]
    assert main([*start, "data.root=abc.txt", "run.dir=a"]) == 0
    assert main([*start, "data.root=abc.txt", "model.init_from=a", "run.dir=b"]) == 0
    capsys.readouterr()
    for tokens in (["model.init_from=a", "run.dir=c"], ["evaluate=a"]):
        assert main([*start, "data.root=xyz.txt", *tokens]) == 2
        assert "other ids (characters" in one_line(capsys)
    assert main([*SHORT, *ONE, *LLAMA, *PLAY, "model.init_from=a", "run.dir=c"]) == 2
    assert "than the data's (bytes" in one_line(capsys)
    assert not Path("c").exists()


def test_another_norm_is_refused_and_crossing_is_asked_for(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    start = [*SHORT, *ONE, *LLAMA, *PLAY, f"model.init_from={runs / 'llama'}", "run.dir=a"]
    assert main([*start, "norm=rmsnorm"]) == 2
    line = one_line(capsys)
    assert "norm=dyt" in line
    assert "norm=rmsnorm" in line
    assert main([*SHORT, *LLAMA, *PLAY, "norm=rmsnorm", f"evaluate={runs / 'llama'}"]) == 2
    assert "norm=dyt" in one_line(capsys)
    assert not Path("a").exists()
    assert main([*start, "norm=rmsnorm", "model.init_across_norms=true"]) == 0
    said = capsys.readouterr().err
    assert "note: across norms" in said
    assert "alpha" in said


@pytest.fixture
def theirs() -> Any:
    """transformers' LLaMA of our small sizes, saved in the folder hub in several files."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=257, rms_norm_eps=1e-5, **sizes, **heads)
    )
    model.save_pretrained("hub", max_shard_size="10KB")
    assert len(list(Path("hub").glob("model-*.safetensors"))) > 1
    assert Path("hub/model.safetensors.index.json").is_file()
    return model


THEIRS = ["norm=rmsnorm", "model.embed_scale=false"]
HUB = [*SHORT, *ONE, *LLAMA, *PLAY, *THEIRS, "data.eval_batch_size=1"]


def test_a_folder_that_transformers_saved_in_parts_starts_a_run(
    theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*HUB, "model.init_from=hub", *STILL, "run.dir=a"]) == 0
    assert "the file does not say its norm; it is taken as norm=rmsnorm" in capsys.readouterr().err
    after = weights("a")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(after[f"model.{name}"], value, rtol=0, atol=1e-6)
    assert main([*HUB, "norm=dyt", "model.init_from=hub", "run.dir=b"]) == 2
    assert "another norm" in one_line(capsys)
    assert not Path("b").exists()


@pytest.mark.parametrize("place", ["hub", "hub/model.safetensors.index.json"])
def test_it_evaluates_to_the_loss_that_transformers_has(
    place: str, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*HUB, f"evaluate={place}", "run.eval_split=val"]) == 0
    found = printed(capsys)
    ids = torch.from_numpy(held_out()[: LENGTH + 1].astype(np.int64))
    with torch.no_grad():
        logits_TV = theirs(ids[None, :-1]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits_TV, ids[1:])
    assert found["val/loss"] == pytest.approx(float(wanted), rel=1e-5)


def held_out() -> np.ndarray:
    """The ids of play.txt's validation."""
    val: Any = build_text(TextOptions(root="corpus/play.txt", length=LENGTH), seed=0).val
    return np.asarray(val.tokens)


# --- resume ---------------------------------------------------------------------------------------

EPOCHS = [
    "trainer.max_epochs=2",
    "trainer.max_steps=-1",
    "trainer.val_check_interval=null",
    "trainer.check_val_every_n_epoch=1",
    "run.save_every_n_steps=2",
    "data.val_share=0.2",
    "data.batch_size=8",
]
RESUMED = {
    "llama, shifted": [*LLAMA, "norm=dyt"],
    "gpt2, masked": [*GPT2, "norm=derf", "model.dropout=0.1", "data.documents=mask"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_within_an_epoch_is_bit_equal_for_any_number_of_workers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows begin where those of the whole run do, though they move from epoch to epoch."""
    common = [*SHORT, *PLAY, *EPOCHS, *RESUMED[kind], "data.shift=true"]
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


def test_rows_that_move_make_another_training() -> None:
    for shift in ("true", "false"):
        tokens = [*SHORT, *PLAY, *EPOCHS, *LLAMA, "norm=dyt", f"data.shift={shift}"]
        assert main([*tokens, f"run.dir={shift}"]) == 0
    assert different(weights("true"), weights("false"))
    counts = [result(run)["metrics"]["val/count"] for run in ("true", "false")]
    assert counts[0] == counts[1]


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", ["mask", "pad"])
def test_documents_of_a_folder_train_apart(documents: str) -> None:
    """The pages of this repository's docs."""
    few = [*SHORT, *ONE, *LLAMA, "data=text", f"data.root={ROOT / 'docs'}", "data.suffixes=.md"]
    tokens = [*few, "data.test_share=0", "data.val_share=0.2", f"data.documents={documents}"]
    assert main([*tokens, "run.dir=a"]) == 0
    found = result("a")
    assert found["data"]["name"] == "text"
    assert found["data"]["source"] == str(ROOT / "docs")
    assert "the validation is the test too" in " ".join(found["data"]["notes"])
    assert math.isfinite(found["metrics"]["test/bits_per_byte"])
    assert found["config"]["data"]["documents"] == documents


def tokenized() -> None:
    """tokens/, of plays.jsonl, and text/, the same bytes as files in folders train and val."""
    words = ["corpus/plays.jsonl", "--out", "tokens", "--val-share", "0.3", "--workers", "1"]
    assert tokenize.main(words) == 0
    for split in ("train", "val"):
        folder = Path("text") / split
        folder.mkdir(parents=True)
        ids = np.fromfile(f"tokens/{split}.bin", np.uint16)
        ends = np.flatnonzero(ids == BYTE_END)
        for i, document in enumerate(np.split(ids, ends + 1)[:-1]):
            (folder / f"{i:03}.txt").write_bytes(document[:-1].astype(np.uint8).tobytes())


def test_token_files_and_the_texts_that_they_are_of_cost_the_same(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenized()
    found = []
    for data in (["data=token_bin", "data.root=tokens"], ["data=text", "data.root=text"]):
        for documents in ("join", "mask", "pad"):
            capsys.readouterr()
            tokens = [*SHORT, *MODELS["llama"], *data, f"data.documents={documents}"]
            tokens.append("trainer.limit_val_batches=1.0")
            assert main([*tokens, f"evaluate={runs / 'llama'}", "run.eval_split=val"]) == 0
            values = printed(capsys)
            found.append({name: value for name, value in values.items() if "val/" in name})
    assert found[:3] == found[3:]
    joined, masked, padded = found[:3]
    assert joined["val/count"] == masked["val/count"]
    assert joined["val/count"] > padded["val/count"]  # which asks for no document's first byte
    assert joined["val/bits_per_byte"] > 0


def test_token_files_train_and_end_with_a_sample() -> None:
    tokenized()
    tokens = [*SHORT, *ONE, *LLAMA, "data=token_bin", "data.root=tokens", "data.documents=pad"]
    assert main([*tokens, "task.sample_tokens=5", "task.prompt=To be", "run.dir=a"]) == 0
    assert Path("a/sample.txt").read_text(encoding="utf-8").startswith("To be")


# --- large models ---------------------------------------------------------------------------------

DRY = """
import resource, sys
from suite import registry, run, train, trial
registry.load_task("language/lm")
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = most()
code = train.main(["recipe=dyt_llama_7b", "--dry-run"])
print(most() - before)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_dry_run_of_7_billion_parameters_allocates_and_writes_nothing() -> None:
    command = [sys.executable, "-c", DRY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "6,738,415,682 parameters" in done.stderr
    assert "every shape fits" in done.stderr
    assert "nothing was allocated, no batch was run, nothing was written" in done.stderr
    assert int(done.stdout) < 300_000  # kB, of the 26 GB that the weights would take
    here = {path.name for path in Path.cwd().iterdir()}
    assert here - {"cache"} == {"corpus"}  # cache: of matplotlib


def test_one_process_that_shards_trains_as_one_that_does_not(runs: Path) -> None:
    for name, more in (("whole", []), ("shards", [SHARDED])):
        tokens = [*SHORT, *STEPS, *MODELS["llama"], *PLAY, *more]
        assert main([*tokens, f"run.dir={name}"]) == 0
    assert different(weights("whole"), weights("shards")) == []
    assert result("whole")["metrics"] == result("shards")["metrics"]


# --- wrong inputs ---------------------------------------------------------------------------------


def write_wrong() -> None:
    """Files and folders that cannot be used."""
    Image.new("L", (40, 40)).save("picture.txt", format="PNG")
    for name in ("empty", "numbers", "pages", "wide", "bare", "narrow", "hf"):
        Path(name).mkdir()
    Path("numbers/a.csv").write_text("1,2\n")
    Path("blank.txt").write_text("")
    Path("short.txt").write_text("To be, or not to be")
    Path("latin.txt").write_bytes("caf\xe9 ".encode("latin1") * 300)
    Path("greek.txt").write_text(scenes()[0] + "\n" + "αβγδ\n" * 12)
    Path("list.json").write_text("[1, 2]")
    Path("config.json").write_text('{"hidden_size": 16}')
    Path("model.json").write_text('{"model": {"type": "BPE2"}}')
    Path("words.json").write_text("To be")
    ids = np.frombuffer(scenes()[0].encode(), np.uint8)
    for folder, dtype in (("wide", "<u4"), ("bare", "<u2"), ("narrow", "<u2")):
        for split in ("train", "val"):
            ids.astype(dtype).tofile(f"{folder}/{split}.bin")
    Path("narrow/meta.json").write_text('{"vocab_size": 100, "dtype": "uint16"}')
    options = LlamaOptions(dim=16, depth=1, heads=2, kv_heads=1, hidden_dim=32)
    larger = Llama(options, norm=make_norm("rmsnorm"), vocab_size=300).state_dict()
    save_file(larger, "hf.safetensors")
    del larger["model.embed_tokens.weight"]
    save_file(larger, "hf-00001-of-00002.safetensors")
    Path("hf/model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')


TEXT = [*SHORT, *ONE, *LLAMA, "data=text"]
BIN = [*SHORT, *ONE, *LLAMA, "data=token_bin"]
BASE = [*SHORT, *ONE, *LLAMA, *PLAY]
LEARNED = [*SHORT, *ONE, *GPT2, *PLAY]
RECIPE = ["recipe=dyt_llama_7b", "trainer.accumulate_grad_batches=512"]
TOKENIZER = "data.encoding=tokenizer"
WRONG: dict[str, tuple[list[str], list[str], str]] = {
    # the model
    "vocabulary": (BASE, ["model.vocab_size=200"], "model.vocab_size=200: data=text has 257 ids"),
    "odd heads": (BASE, ["model.dim=18"], "model.dim=18: must be a multiple of 2 x heads (4)"),
    "heads": (LEARNED, ["model.heads=3"], "model.heads=3: must divide dim=16"),
    "heads of llama": (
        BASE,
        ["model.heads=3"],
        "model.dim=16: must be a multiple of 2 x heads (6)",
    ),
    "kv_heads": (BASE, ["model.kv_heads=3"], "model.kv_heads=3: must divide heads (2)"),
    "no heads": (BASE, ["model.heads=0"], "model.heads=0: must be at least 1"),
    "rope_theta": (BASE, ["model.rope_theta=0"], "model.rope_theta=0: must be a finite number"),
    "depth": (BASE, ["model.depth=none"], "model.depth=none: "),
    "gelu": (LEARNED, ["model.gelu=tanhh"], "model.gelu=tanhh"),
    "dropout of llama": (BASE, ["model.dropout=0.1"], "model.dropout"),
    "positions": (
        LEARNED,
        ["data.length=64"],
        "data.length=64: the model has positions for rows of 48 tokens; set data.length=48, or "
        "model.max_length=64",
    ),
    "model": (BASE, ["model=llama_6b"], "model=llama_6b"),
    "batchnorm": (BASE, ["norm=batchnorm"], "its statistics look across positions"),
    "batchnorm at a site": (
        BASE,
        ["norm=dyt", "norm.by_site={final: batchnorm}"],
        "its statistics look across positions",
    ),
    "site": (BASE, ["norm=dyt", "norm.alpha_init_by_site.atn=1"], "did you mean 'attn'"),
    "weights": (BASE, ["model.init_from=hf"], "expected .safetensors files beside it"),
    "other sizes": (
        BASE,
        ["norm=rmsnorm", "model.init_from=hf.safetensors"],
        "(vocab_size=257, hidden_dim=24): set model.vocab_size=300 model.hidden_dim=32, if its ids",
    ),
    "a piece": (
        BASE,
        ["norm=rmsnorm", "model.init_from=hf-00001-of-00002.safetensors"],
        "give their folder, which has a model.safetensors.index.json",
    ),
    "no weights": (BASE, ["model.init_from=empty"], "has no checkpoints/best.ckpt"),
    # the texts
    "no root": (TEXT, [], "data=text: needs data.root=PATH"),
    "no such text": (TEXT, ["data.root=nowhere.txt"], "data.root=nowhere.txt is not there"),
    "a PNG": (TEXT, ["data.root=picture.txt"], "picture.txt is no text but a PNG image"),
    "empty folder": (TEXT, ["data.root=empty"], "empty has no files that end in .txt,.md,.text"),
    "other files": (TEXT, ["data.root=numbers"], "(1 other files); set data.root, or data.suff"),
    "empty text": (TEXT, ["data.root=blank.txt"], "blank.txt has no text: 1 files, all empty"),
    "short text": (TEXT, ["data.root=short.txt"], "a row of data.length=32 needs 33"),
    "long rows": (BASE, ["data.length=9000"], "a row of data.length=9,000 needs 9,001"),
    "one token": (BASE, ["data.length=1"], "data.length=1: must be at least 2"),
    "no UTF-8": (
        TEXT,
        ["data.root=latin.txt", "data.encoding=characters"],
        "latin.txt is not UTF-8: byte 3 is 0xe9",
    ),
    "new characters": (
        TEXT,
        ["data.root=greek.txt", "data.encoding=characters"],
        "characters that training does not have",
    ),
    "shares": (BASE, ["data.val_share=0.7", "data.test_share=0.4"], "data.test_share=0.4: must be"),
    "documents": (BASE, ["data.documents=cut"], "data.documents=cut: must be one of"),
    "prompt": (
        BASE,
        ["data.encoding=characters", "task.prompt=\u03b1", "task.sample_tokens=3"],
        "task.prompt",
    ),
    # tokenizers
    "tokenizer alone": (BASE, ["data.tokenizer=list.json"], "data.encoding=tokenizer"),
    "no tokenizer": (BASE, [TOKENIZER], "data.tokenizer must name a tokenizer.json"),
    "a list": (BASE, [TOKENIZER, "data.tokenizer=list.json"], "it has no object `model`"),
    "a config": (BASE, [TOKENIZER, "data.tokenizer=config.json"], "it has no object `model`"),
    "a kind": (BASE, [TOKENIZER, "data.tokenizer=model.json"], "model.json is no tokenizer.json"),
    "no JSON": (BASE, [TOKENIZER, "data.tokenizer=words.json"], "words.json is not JSON"),
    "a folder": (BASE, [TOKENIZER, "data.tokenizer=empty"], "name the tokenizer.json in it"),
    # token files
    "no tokens": (BIN, [], "data=token_bin: needs data.root=FOLDER with train.bin and val.bin"),
    "no .bin": (BIN, ["data.root=empty"], "train.bin is missing"),
    "a file": (BIN, ["data.root=short.txt"], "short.txt is a file; data.root must be a folder"),
    "wrong dtype": (BIN, ["data.root=wide", "data.vocab_size=257"], "set data.dtype=uint32"),
    "no dtype": (BIN, ["data.root=bare", "data.dtype=int64"], "data.dtype=int64: must be one of"),
    "no vocabulary": (BIN, ["data.root=bare"], "set data.vocab_size"),
    "an id beyond": (BIN, ["data.root=narrow"], "and the vocabulary has 100"),
    "prompt of ids": (
        BIN,
        ["data.root=bare", "data.vocab_size=257", "task.prompt=To"],
        "task.prompt: data=token_bin does not say how text becomes tokens",
    ),
    "no end": (
        BIN,
        ["data.root=bare", "data.vocab_size=257", "data.documents=mask"],
        "which id closes a document",
    ),
    # the task, the recipes
    "temperature": (BASE, ["task.temperature=-1"], "task.temperature=-1: must be 0 or more"),
    "no temperature": (BASE, ["task.temperature=inf"], "must be 0 or more and finite"),
    "top_k": (BASE, ["task.top_k=0"], "task.top_k=0: must be at least 1"),
    "sample": (BASE, ["task.sample_tokens=-1"], "task.sample_tokens=-1: must not be negative"),
    "recipe": (["recipe=dyt_llama_8b"], [], "Did you mean recipe=dyt_llama_7b?"),
    "data of a recipe": (RECIPE, [], "data=token_bin: needs data.root=FOLDER"),
    "length of a recipe": (RECIPE, ["data.length=0"], "data.length=0: must be at least 2"),
    "sharded images": (["task=vision/classify", "trainer.accelerator=cpu"], [SHARDED], "say how"),
    "sharded batchnorm": (BASE, [SHARDED, "norm=batchnorm"], "look across positions"),
}


def files_here() -> list[str]:
    """Everything but what is kept for the next start."""
    return sorted(str(path) for path in Path.cwd().rglob("*") if "cache" not in path.parts)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wrong()
    base, tokens, words = WRONG[case]
    if TOKENIZER in tokens:
        pytest.importorskip("tokenizers")
    before = files_here()
    own = [] if base is RECIPE or not base[0].startswith("task=") else ["run.dir=run"]
    assert main([*base, *tokens, *own]) == 2
    captured = capsys.readouterr()
    lines = [x for x in captured.err.splitlines() if not x.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert captured.out == ""
    assert files_here() == before
