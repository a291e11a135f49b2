"""Inputs that random ones (tests/fuzz) have found, each kept as a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from suite import registry
from suite.cli import Setting
from suite.config import load
from suite.errors import ConfigError
from suite.fields import wrong_type

LONG = "9" * 5000


def refusal(*argv: str) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(ConfigError) as caught:
        load([*argv, "--print-config"])
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_name_of_very_many_is_refused_without_all_of_them() -> None:
    names = [f"recipe_{i}" for i in range(200)]
    with pytest.raises(ConfigError, match=r"Choose one of: recipe_0, .* and \d+ more, see --list"):
        registry.check_choice("recipe", "nothing", names)
    with pytest.raises(ConfigError, match="Did you mean recipe=recipe_150"):
        registry.check_choice("recipe", "recipe_150x", names)


def test_an_error_repeats_a_long_value_shortened() -> None:
    text = str(Setting(("model", "dim"), "x" * 5000).error(wrong_type("x" * 5000, int)))
    assert text.endswith("must be a whole number")
    assert len(text) < 200


@pytest.mark.parametrize(
    "value", ["!!int x", "\udcff", LONG, "!!binary x", "[" * 3000, "0x" + "f" * 5000]
)
def test_what_yaml_fails_on_is_refused_with_its_key(value: str) -> None:
    assert refusal(f"model.depth={value}").startswith("model.depth")


@pytest.mark.parametrize("key", ["evaluate", "run.resume", "config", "recipe"])
@pytest.mark.parametrize("value", [LONG, "~nobody_at_all/x", "\x00", "x" * 300])
def test_a_path_that_cannot_be_is_refused(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(f"{key}={value}").startswith(f"{key}=")


def test_a_number_of_too_many_digits_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(f"task: vision/classify\nseed: {LONG}\n")
    assert str(file) in refusal(f"config={file}")


def test_a_class_that_is_a_damaged_header_is_refused_shortened(tmp_path: Path) -> None:
    from tasks.dna.nucleotide_transformer import read

    file = tmp_path / "train.fna"
    file.write_bytes(b">a|" + b"\0" * 5000 + b"\nACGT\n")
    with pytest.raises(ConfigError, match=r"line 1: the class .* is no name") as caught:
        read(file)
    assert len(str(caught.value)) < 500 + len(str(file))
