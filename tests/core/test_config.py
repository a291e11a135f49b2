"""The command line: what it accepts, and that every mistake is one line that says what to do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from suite import checks, registry, sources
from suite.config import (
    Config,
    check_devices,
    check_run_dir,
    comparable_hash,
    diff,
    load,
    to_dict,
    to_yaml,
    world_size,
)
from suite.errors import ConfigError
from suite.registry import Choice, ModelOptions, TaskSpec

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class WideOptions(ModelOptions):
    """Options with one field of every kind that the suite uses."""

    width: int = 8
    depths: tuple[int, ...] = (1, 2)
    rates: dict[str, float] = field(default_factory=dict)
    pool: Literal["avg", "cls"] = "avg"
    patch: Literal[4, 8] = 4
    share: float = 0.5
    title: str = "wide"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be 1 or more, got {self.width}")


@dataclass(frozen=True)
class DeepOptions(ModelOptions):
    layers: int = 3


@dataclass(frozen=True)
class ToyData:
    batch_size: int = 12
    root: str | None = None
    num_workers: int = 0


@dataclass(frozen=True)
class ToyTask:
    smoothing: float = 0.0


class Module:
    """Stands for a LightningModule: config only looks at where it was written."""


def toy_spec(name: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        module=Module,
        models={
            "wide": Choice(WideOptions(), Module, "a wide one"),
            "deep": Choice(DeepOptions(), Module),
        },
        data={"tiny": Choice(ToyData(), Module, "twelve numbers")},
        primary=("acc", "max", "val"),
        unit="numbers",
        options=ToyTask(),
    )


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two toy tasks instead of the real ones, and a folder of YAML files to write to."""
    names = ("toy/one", "toy/two")
    folder = tmp_path / "configs"
    (folder / "toy").mkdir(parents=True)
    (folder / "recipes").mkdir()
    (folder / "toy" / "one.yaml").write_text("trainer:\n  max_epochs: 2\n")
    monkeypatch.setattr(registry, "DEFAULT_TASK", "toy/one")
    monkeypatch.setattr(registry, "task_names", lambda: names)
    monkeypatch.setattr(registry, "load_task", toy_spec)
    monkeypatch.setattr(sources, "config_folder", lambda: folder)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def config_of(*tokens: str) -> Config:
    return load(list(tokens)).settled


def error_of(*tokens: str) -> str:
    """The message of the mistake in `tokens`, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load(list(tokens))
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- mistakes -------------------------------------------------------------------------------------

# Found without importing torch.
EARLY = {
    "--norm=dyt": "--norm=dyt: write norm=dyt (flags: --help",
    "--norm": "--norm: write norm=VALUE",
    "-norm=dyt": "write norm=dyt",
    "+optim.lr=1": "write optim.lr=1",
    "--dryrun": "--dryrun: no such flag. Did you mean --dry-run?",
    "--dry-run --print-config": "--dry-run and --print-config cannot be given together",
    "norm": "'norm': write key=value without spaces",
    "=3": "'=3': write key=value without spaces",
    "seed=": "seed=: a value is missing; write seed=VALUE",
    "norm= dyt": "norm=: a value is missing",
    "norm..alpha=1": "a part of the key is missing",
    "norm=dyt norm=derf": "norm is given twice: norm=dyt and norm=derf",
    "optim.lr=1 optim.lr=2": "optim.lr is given twice: optim.lr=1 and optim.lr=2",
    "norm.by_site={} norm.by_site.final=layernorm": "norm.by_site is given twice",
    "norm=dyt,derf": "one norm a run; `python -m suite.sweep norm=dyt,derf` runs a list",
    "task=toy/on": "no such task. Did you mean task=toy/one? Choose one of: toy/one, toy/two",
    "optmi.lr=1": "optmi.lr: no such section. Did you mean optim.lr? Sections: task, model",
    "lr=1": "lr: no such key. Did you mean optim.lr?",
    "epochs=3": "epochs: no such key. Did you mean trainer.max_epochs?",
    "zzz=3": "zzz: no such key. Keys: seed, task",
    "optim.lrr=1": "optim.lrr: no such key. Did you mean optim.lr? Keys of optim: name, lr,",
    "trainer.max_epoch=1": "Did you mean trainer.max_epochs?",
    "optim=adamw": "optim=adamw: a section; write optim.KEY=adamw",
    "optim.lr.x=1": "optim.lr.x: optim.lr has no keys of its own",
    "trainer.max_epochs=abc": "trainer.max_epochs=abc: must be a whole number or null",
    "trainer.max_epochs=1.5": "trainer.max_epochs=1.5: must be a whole number or null",
    "trainer.max_epochs=0": "trainer.max_epochs=0: must be 1 or more",
    "trainer.max_steps=0": "trainer.max_steps=0: must be 1 or more, or -1",
    "trainer.max_time=1:00": "trainer.max_time=1:00: must be days:hours:minutes:seconds",
    "trainer.devices=0": "trainer.devices=0: must be 1 or more, auto",
    "trainer.devices=two": "trainer.devices=two: must be 1 or more, auto",
    "trainer.accelerator=gpuu": "must be one of auto, cpu, gpu",
    "trainer.strategy=dpd": "must be one of auto, ddp",
    "trainer.precision=17": "trainer.precision=17: must be one of 32-true, bf16-mixed",
    "trainer.profiler=x": "must be one of simple, advanced, pytorch",
    "trainer.deterministic=x": "must be true or false or one of warn",
    "trainer.enable_progress_bar=maybe": "must be true or false",
    "trainer.limit_val_batches=1.5": "must be a whole number or a share from 0.0 to 1.0",
    "trainer.limit_val_batches=-1": "must be a whole number or a share from 0.0 to 1.0",
    "trainer.val_check_interval=0": "trainer.val_check_interval=0: must be above 0",
    "trainer.check_val_every_n_epoch=null": "can be null only with",
    "trainer.gradient_clip_val=0": "must be a number above 0",
    "optim.lr=abc": "optim.lr=abc: must be a number",
    "optim.lr=nan": "optim.lr=nan: must be a number above 0",
    "optim.lr=inf": "optim.lr=inf: must be a number above 0",
    "optim.lr=null": "optim.lr=null: must be a number",
    "optim.lr=1e-3,2e-3": "must be a number; `python -m suite.sweep` takes lists",
    "optim.name=adamx": "optim.name=adamx: must be one of adamw, adam, sgd",
    "optim.beta2=1": "optim.beta2=1: must be from 0 up to, but not, 1",
    "optim.min_lr=1": "optim.min_lr=1: must not be above optim.lr=0.001",
    "optim.warmup_steps=3 optim.warmup_fraction=0.1": "cannot be given together with warmup_steps",
    "optim.warmup_fraction=2": "must be from 0 to 1",
    "optim.schedule=tri_stage optim.hold_fraction=0.9 optim.decay_fraction=0.2": "not be above 1",
    "run.nonfinite=sometimes": "run.nonfinite=sometimes: must be one of stop, skip",
    "run.resume=nowhere": "run.resume=nowhere: no such run",
    "run.compile=fast": "must be one of default, reduce-overhead, max-autotune",
    "run.dist_timeout=0": "run.dist_timeout=0: must be 1 or more",
    "run.dir=${oc.env:HOME}": "run.dir=${oc.env:HOME}: not evaluated here; write the value itself",
    "seed=${x}": "seed=${x}: not evaluated here",
    "seed=???": "seed=???: not evaluated here",
    "seed=1.5": "seed=1.5: must be a whole number",
    "seed=true": "seed=true: must be a whole number",
    "seed=-1": "seed=-1: must be from 0 to 4294967295",
    "seed=0,1": "seed=0,1: must be a whole number; `python -m suite.sweep` takes lists",
    "seed=[0": "seed=[0: not a value that YAML can read",
    "seed.x=1": "seed.x: no such section",
    "recipe=foo": "recipe=foo: no such recipe",
    "recipe=foo.yaml": "recipe=foo.yaml: no such file",
    "config=nope": "config=nope: no such file",
    "evaluate=nope": "evaluate=nope: no such run",
    "recipe=a config=b": "recipe= and config= cannot be given together",
}
LATE = {
    "optim.fused=true trainer.precision=16-mixed": "leave optim.fused out",
    "norm=rmsnrm": "norm=rmsnrm: no such norm. Did you mean norm=rmsnorm? Choose one of: ",
    "model=wid": "model=wid: no such model. Did you mean model=wide? Choose one of: wide, deep",
    "data=tny": "data=tny: no such data. Did you mean data=tiny? Choose one of: tiny",
    "norm.alpha_int=1": "norm.alpha_int: no such key. Did you mean norm.alpha_init? Keys of ",
    "norm=layernorm norm.alpha_init=1": "norm=layernorm has no alpha_init, only norm=dyt, derf, ",
    "norm.name=derf": "norm.name=derf: write norm=derf",
    "norm.alpha_init=abc": "norm.alpha_init=abc: must be a positive number or 'calibrated'",
    "norm.alpha_init=0": "norm.alpha_init=0: must be a positive number",
    "norm.alpha_init=nan": "norm.alpha_init=nan: must be a positive number",
    "norm.alpha_init.attn=1": "norm.alpha_init has no keys of its own",
    "norm.alpha_init_by_site.attn=abc": "norm.alpha_init_by_site.attn=abc: must be a number",
    "norm.alpha_init_by_site.attn=0": "norm.alpha_init_by_site.attn=0: must be a positive number",
    "norm.by_site.fianl=layernorm": "norm.by_site has no 'fianl'; did you mean 'final'",
    "norm.by_site.final=layrnorm": "did you mean 'layernorm'",
    "norm.by_site=layernorm": "norm.by_site=layernorm: must be a group of keys",
    "norm=no_such_module:Norm": "norm=no_such_module:Norm: ",
    "norm=json:Nope": "norm=json:Nope: ",
    "model.width=0": "model.width=0: must be 1 or more",
    "model.layers=0": "model.layers=0: model=wide has no layers, only model=deep. Keys of ",
    "model.pool=max": "model.pool=max: must be one of avg, cls",
    "model.patch=5": "model.patch=5: must be one of 4, 8",
    "model.depths=3": "model.depths=3: must be a list such as [a,b]",
    "model.depths=[a]": "model.depths=[a]: must be a list such as [a,b]",
    "model.rates.a=b": "model.rates.a=b: must be a number",
    "task.smoothin=1": "task.smoothin: no such key. Did you mean task.smoothing?",
    "trainer.max_epochs=null": "trainer: no end is set; give trainer.max_epochs, ",
    "trainer.max_epochs=null trainer.max_time=00:01:00:00": "optim.schedule=cosine: needs",
    "trainer.devices=5": "data.batch_size=12: the examples of one step over all processes; must be "
    "a multiple of 5 processes x trainer.accumulate_grad_batches=1, such as 10 or 15",
    "trainer.accumulate_grad_batches=24": "such as 24",
    "norm=batchnorm trainer.devices=2 trainer.accelerator=cpu": "norm=batchnorm: statistics over 2",
    "norm.by_site.final=batchnorm trainer.devices=2 trainer.accelerator=cpu": "norm.by_site.final=",
}


@pytest.mark.parametrize("tokens", [*EARLY, *LATE])
def test_every_mistake_is_one_line_that_says_what_to_do(tokens: str) -> None:
    assert {**EARLY, **LATE}[tokens] in error_of(*tokens.split(" "))


def test_a_line_break_in_a_token_does_not_break_the_line() -> None:
    assert "must be a whole number" in error_of("seed=1\nx")


@pytest.mark.parametrize("token", ["--norm=dyt", "optmi.lr=1", "norm=rmsnrm", "norm.alpha_init=0"])
def test_the_command_ends_with_exit_code_2_one_line_and_nothing_written(
    token: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from suite.train import main

    before = sorted(tmp_path.rglob("*"))
    assert main([token]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert token.lstrip("-").split("=")[0] in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_and_early_mistakes_do_not_import_torch() -> None:
    early = [tokens.split(" ") for tokens in EARLY if "toy" not in tokens]
    code = (
        "import json, sys\n"
        "from suite.config import load\n"
        "from suite.errors import ConfigError\n"
        "assert load(['--help']).text and load(['--version']).text\n"
        "for tokens in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        load(tokens)\n"
        "    except ConfigError:\n"
        "        continue\n"
        "    raise SystemExit(f'accepted: {tokens}')\n"
        "heavy = {'torch', 'lightning', 'tasks.vision.classify'} & set(sys.modules)\n"
        "raise SystemExit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(early)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- values ---------------------------------------------------------------------------------------


def test_an_empty_command_line_takes_the_first_entries_and_the_tasks_own_yaml() -> None:
    config = config_of()
    names = (config.task_name, config.model_name, config.data_name, config.norm_name)
    assert names == ("toy/one", "wide", "tiny", "dyt")
    assert config.trainer.max_epochs == 2
    assert (config.seed, config.recipe, config.evaluate) == (0, None, None)
    assert isinstance(config.model, WideOptions)
    assert isinstance(config.model.depths, tuple)


def test_a_choice_and_a_field_of_it_both_count() -> None:
    config = config_of("norm.alpha_init=0.7", "norm=derf", "norm.alpha_init_by_site.attn=0.8")
    assert config.norm_name == "derf"
    assert config.norm.alpha_init == 0.7
    assert config.norm.alpha_init_by_site == {"attn": 0.8}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("optim.ema_decay=null", None),
        ("norm.alpha_init=2.5", 2.5),
        ("norm.alpha_init=calibrated", "calibrated"),
        ("norm.by_site.final=layernorm", {"final": "layernorm"}),
        ("norm.by_site={final: layernorm}", {"final": "layernorm"}),
        ("norm.shift=true", True),
        ("model.depths=[3,4]", (3, 4)),
        ("model.patch=8", 8),
        ("model.rates.a=1", {"a": 1.0}),
        ("model.title=007", "007"),
        ("model.title=no", "no"),
        ("model.title=a#1", "a#1"),
        ("model.title='quoted'", "quoted"),
        ("model.title=a=b", "a=b"),
        ("model.title=null", "null"),
        ("data.root=~/x", "~/x"),
        ("data.root=null", None),
        ("trainer.precision=16", "16-mixed"),
        ("trainer.precision=bf16", "bf16-mixed"),
        ("trainer.devices=-1", "auto"),
        ("trainer.devices=0,1", "0,1"),
        ("trainer.deterministic=warn", "warn"),
        ("trainer.limit_val_batches=1", 1),
        ("trainer.limit_val_batches=1.0", 1.0),
        ("trainer.max_time=00:00:10:00", "00:00:10:00"),
        ("run.compile=true", "default"),
        ("run.compile=max-autotune", "max-autotune"),
    ],
)
def test_a_value_arrives_with_its_fields_type(token: str, expected: object) -> None:
    section, key = token.partition("=")[0].split(".")[:2]
    value = getattr(getattr(config_of(token), section), key)
    assert value == expected
    assert type(value) is type(expected)


def test_a_config_is_read_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().optim.lr = 1.0  # type: ignore[misc]


def test_a_norm_of_ones_own_comes_in_by_a_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_norm_for_config.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Module):\n"
        "    def __init__(self, dim):\n        super().__init__()\n\n"
        "    def forward(self, x, mask=None):\n        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("norm=my_norm_for_config:Mine", "norm.by_site.final=layernorm")
    assert config.norm_name == "my_norm_for_config:Mine"
    assert config.norm.by_site == {"final": "layernorm"}


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_command_line_wins_over_a_recipe_and_a_recipe_over_the_defaults(configs: Path) -> None:
    write(
        configs / "recipes" / "big.yaml",
        "# python -m suite.train recipe=big\n# A big one: not yet run.\n"
        "task: toy/two\nmodel: {name: deep, layers: 9}\ntrainer: {max_steps: 7}\n"
        "optim: {lr: 0.5, weight_decay: 0.25}\nseed: 4\n",
    )
    config = config_of("recipe=big", "optim.lr=0.125")
    assert (config.task_name, config.model_name, config.model.layers) == ("toy/two", "deep", 9)
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (0.125, 0.25, 4)
    assert config.recipe == "big"
    assert config.trainer.max_epochs is None  # the task's own YAML is not beneath a recipe
    assert "A big one: not yet run." in load(["--list"]).text
    assert "Did you mean recipe=big? Choose one of: big" in error_of("recipe=bgi")
    assert "is for task=toy/two, not task=toy/one" in error_of("recipe=big", "task=toy/one")


def test_a_section_with_a_name_is_left_out_with_a_note_when_another_entry_is_picked(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path / "r.yaml",
        "task: toy/one\nnorm: {name: dyt, alpha_init: 0.25}\ntrainer: {max_epochs: 1}\n",
    )
    assert config_of(f"recipe={path}").norm.alpha_init == 0.25
    loaded = load([f"recipe={path}", "norm=derf"])
    assert loaded.settled.norm.alpha_init == 0.5
    assert loaded.notes == (f"{path}: left out, since they are for norm=dyt: norm.alpha_init",)


def test_a_section_without_a_name_serves_whichever_entry_has_the_field(configs: Path) -> None:
    own = configs / "toy" / "one.yaml"
    write(own, "trainer: {max_epochs: 1}\nnorm: {alpha_init: 0.25}\nmodel: {layers: 5}\n")
    assert config_of().norm.alpha_init == 0.25
    assert config_of("norm=layernorm").norm_name == "layernorm"
    assert config_of("model=deep").model.layers == 5
    write(own, "trainer: {max_epochs: 1}\nnorm: {alpha_int: 0.25}\n")
    assert f"{own}: norm.alpha_int: no such key. Did you mean norm.alpha_init?" in error_of()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: toy/one\noptim: [1\n", "r.yaml: line 3: not valid YAML"),
        (
            "task: toy/one\noptim:\n  lr: 1\n  lr: 2\n",
            "r.yaml: line 4: not valid YAML: found duplicate",
        ),
        ("- a\n", "r.yaml: must hold sections"),
        ("", "r.yaml: names no task"),
        ("optim: {lr: 1}\n", "r.yaml: names no task; it needs `task: "),
        ("task: toy/on\n", "no such task. Did you mean task=toy/one?"),
        ("task: toy/one\nnorm: dty\n", "no such norm. Did you mean norm=dyt?"),
        ("task: toy/one\noptim: 3\n", "r.yaml: optim: must be a section of keys, got 3"),
        ("task: toy/one\noptmi: {lr: 1}\n", "r.yaml: optmi: no such key. Did you mean optim?"),
        (
            "task: toy/one\noptim: {lrr: 1}\n",
            "r.yaml: optim.lrr: no such key. Did you mean optim.lr?",
        ),
        ("task: toy/one\noptim: {lr: abc}\n", "r.yaml: optim.lr=abc: must be a number"),
        ("task: toy/one\noptim: {lr: -1}\n", "r.yaml: optim.lr=-1: must be a number above 0"),
        (
            "task: toy/one\nrun: {dir: '${oc.env:HOME}'}\n",
            "r.yaml: run.dir=${oc.env:HOME}: not eval",
        ),
        ("task: toy/one\nmodel: {depths: [1, '${seed}']}\n", "not evaluated here"),
        ("task: !!python/object/apply:os.getcwd []\n", "r.yaml: line 1: not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(f"recipe={write(tmp_path / 'r.yaml', text)}")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\x00\xff\xfe\x80")
    assert "r.yaml:" in error_of("recipe=r.yaml")


TOKENS = (
    *("model=deep", "model.layers=4", "norm=derf", "norm.alpha_init=calibrated", "seed=3"),
    *("norm.by_site.final=layernorm", "optim.lr=1e-5", "data.root=1e-3", "trainer.precision=16"),
    "run.dir=007",
)


def test_the_printed_config_gives_the_same_config_again(tmp_path: Path) -> None:
    loaded = load([*TOKENS, "--print-config"])
    assert loaded.action == "print_config"
    path = write(tmp_path / "config.yaml", loaded.text)
    assert config_of(f"config={path}") == loaded.settled
    assert config_of(f"config={path}", "norm=derf", "seed=3") == loaded.settled


def test_the_printed_config_keeps_the_name_of_its_recipe(configs: Path, tmp_path: Path) -> None:
    write(
        configs / "recipes" / "r.yaml",
        "task: toy/two\nmodel: {depths: [5]}\ntrainer: {max_steps: 7}\n",
    )
    config = config_of("recipe=r")
    assert config_of(f"config={write(tmp_path / 'c.yaml', to_yaml(config))}") == config


def test_resume_and_evaluate_start_from_the_config_of_their_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = write(run / "checkpoints" / "last.ckpt", "")
    assert "not a run: no config.yaml there" in error_of(f"run.resume={run}")
    write(run / "config.yaml", to_yaml(config_of("model=deep", "norm=derf")))
    for given in (run, checkpoint):
        assert config_of(f"run.resume={given}").model_name == "deep"
        loaded = load([f"evaluate={given}", "run.eval_split=val"])
        assert loaded.action == "evaluate"
        assert loaded.settled.evaluate == str(given)
        assert (loaded.settled.norm_name, loaded.settled.run.resume) == ("derf", "never")


# --- flags ----------------------------------------------------------------------------------------


def test_help_shows_the_defaults_and_wins_over_everything() -> None:
    loaded = load(["--help", "task=toy/one"])
    assert (loaded.action, loaded.config) == ("help", None)
    assert "optim.lr=0.001" in loaded.text
    assert max(map(len, loaded.text.splitlines())) <= 100
    with pytest.raises(ConfigError):
        _ = loaded.settled


def test_list_shows_tasks_models_data_norms_and_recipes() -> None:
    text = load(["--list"]).text
    for line in (
        "toy/two",
        "models of toy/one",
        "a wide one",
        "twelve numbers",
        "layernorm",
        "(none)",
    ):
        assert line in text
    assert "models of toy/two" in load(["--list", "task=toy/two"]).text


def test_dry_run_is_an_action_of_its_own() -> None:
    assert load(["--dry-run"]).action == "dry_run"
    assert load([]).action == "train"


# --- torchrun, devices, folders -------------------------------------------------------------------


def test_devices_and_nodes_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size(config_of()) == 1  # Lightning's own launcher sets WORLD_SIZE alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    loaded = load([])
    trainer = loaded.settled.trainer
    assert (trainer.devices, trainer.num_nodes, world_size(loaded.settled)) == (2, 3, 6)
    assert loaded.notes == ("torchrun's environment: trainer.devices=2 trainer.num_nodes=3",)
    assert world_size(config_of("trainer.devices=2", "trainer.num_nodes=3")) == 6
    assert "trainer.devices=4: torchrun has started 2" in error_of("trainer.devices=4")
    assert "trainer.num_nodes=1: torchrun has started 3" in error_of("trainer.num_nodes=1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "5 processes are not 3 nodes of 2 each" in error_of()
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "must be whole numbers" in error_of()


def test_more_devices_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert check_devices(config_of("trainer.devices=2", "trainer.accelerator=cpu")) == 2
    assert check_devices(config_of("trainer.devices=auto")) == 1
    with pytest.raises(ConfigError, match=r"trainer.devices=3: this machine has 2 CPU cores"):
        check_devices(config_of("trainer.devices=3"))
    with pytest.raises(ConfigError, match=r"trainer.accelerator=gpu: this machine has no GPU"):
        check_devices(config_of("trainer.accelerator=gpu"))
    with pytest.raises(ConfigError, match=r"norm=batchnorm: statistics over 2 processes need GPUs"):
        check_devices(config_of("norm=batchnorm", "trainer.devices=2"))
    assert check_devices(config_of("norm=batchnorm", "norm.sync=false", "trainer.devices=2")) == 2


def test_gpu_ids_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert check_devices(config_of("trainer.devices=0,3")) == 2
    assert check_devices(config_of("trainer.devices=auto")) == 4
    for devices in ("0,4", "1,1"):
        with pytest.raises(ConfigError, match="GPU ids are 0 to 3, each once"):
            check_devices(config_of(f"trainer.devices={devices}"))
    with pytest.raises(ConfigError, match="this machine has 4 GPUs"):
        check_devices(config_of("trainer.devices=6"))
    with pytest.raises(ConfigError, match=r"data.batch_size=10: .* 4 processes"):
        check_devices(config_of("trainer.devices=auto", "data.batch_size=10"))


def test_a_run_never_overwrites_and_its_folder_can_be_written(tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "config.yaml", to_yaml(config_of()))
    for fine in ("empty", "new/below"):
        check_run_dir(config_of(f"run.dir={fine}"))
    check_run_dir(config_of())
    check_run_dir(config_of("run.dir=full", "run.resume=full"))
    for bad, why in (("file", "is a file"), ("file/x", "file is a file"), ("full", "not empty")):
        with pytest.raises(ConfigError, match=rf"run.dir={bad}: .*{why}"):
            check_run_dir(config_of(f"run.dir={bad}"))


def test_a_folder_that_is_not_writable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable; choose another folder"):
        check_run_dir(config_of("run.dir=x"))


# --- comparing ------------------------------------------------------------------------------------


def test_to_dict_is_plain_and_puts_the_name_first() -> None:
    tree = to_dict(config_of("norm=derf"))
    assert next(iter(tree["norm"].items())) == ("name", "derf")
    assert json.loads(json.dumps(tree))["optim"] == tree["optim"]


@pytest.mark.parametrize(
    ("token", "same"),
    [
        ("norm=layernorm", True),
        ("norm.alpha_init=0.9", True),
        ("seed=5", True),
        ("run.tensorboard=false", True),
        ("trainer.log_every_n_steps=1", True),
        ("trainer.devices=2", True),
        ("data.num_workers=2", True),
        ("optim.lr=0.5", False),
        ("trainer.precision=bf16", False),
        ("data.batch_size=24", False),
        ("model.width=9", False),
        ("task=toy/two", False),
        ("task.smoothing=0.1", False),
    ],
)
def test_the_hash_covers_what_a_comparison_must_share(token: str, same: bool) -> None:
    base = ("trainer.max_epochs=2",)
    assert (comparable_hash(config_of(*base, token)) == comparable_hash(config_of(*base))) is same


def test_diff_names_the_keys_that_differ() -> None:
    a, b = config_of(), config_of("optim.lr=0.5", "norm.by_site.final=layernorm", "seed=2")
    assert diff(a, a) == []
    assert sorted(diff(a, to_dict(b))) == ["norm.by_site.final", "optim.lr", "seed"]


# --- the shipped files ----------------------------------------------------------------------------


def test_every_shipped_yaml_loads_for_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from suite.norms import NORMS
    from tasks import NAMES

    for task in NAMES:
        for norm in NORMS:
            assert config_of(f"task={task}", f"norm={norm}").norm_name == norm
    for recipe in sources.recipes():
        assert config_of(f"recipe={recipe}").recipe == recipe
