"""Random command lines and random YAML: exit 0, or exit 2 with one line and nothing left behind."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import yaml
from fuzzing import Ended, called, check_refusal, fresh_folder, fuzz, left_in
from hypothesis import event, given
from mutate import damaged
from schema import NASTY, Chosen, broken_tokens, choices, valid_tokens

from suite import train

pytestmark = pytest.mark.timeout(1800)
NAMES = ("config", "recipe", "evaluate", "run.resume", "task", "model", "data", "norm", "run.dir")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SUITE_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def check(argv: list[str]) -> Ended:
    """Print the config of a command line, and hold the answer to what is promised."""
    with fresh_folder() as folder:
        ended = called(train.main, argv)
        left = left_in(folder)
    event(f"exit {ended.code}")
    assert not left
    if ended.code == 0:
        assert not ended.errors, ended.err
    else:
        check_refusal(ended)
    return ended


def check_reads_back(ended: Ended, *, argv: list[str]) -> None:
    """The printed config is YAML, and as config=FILE it prints the very same."""
    assert isinstance(yaml.safe_load(ended.out), dict)
    with fresh_folder() as folder:
        (folder / "printed.yaml").write_text(ended.out, encoding="utf-8")
        again = called(train.main, ["config=printed.yaml", "--print-config"])
    assert again.code == 0, (argv, again.err)
    assert again.out == ended.out, argv


@fuzz()
@given(st.data())
def test_a_line_of_the_schema_is_printed_so_that_it_reads_back_or_refused(
    data: st.DataObject,
) -> None:
    chosen: Chosen = data.draw(choices())
    argv = [*chosen.tokens, *data.draw(valid_tokens(chosen)), "--print-config"]
    ended = check(argv)
    if ended.code == 0:
        check_reads_back(ended, argv=argv)


@fuzz(2)
@given(st.data())
def test_a_broken_line_is_refused_in_one_line(data: st.DataObject) -> None:
    chosen: Chosen = data.draw(choices())
    tokens = data.draw(broken_tokens(chosen))
    line = [*chosen.tokens[: data.draw(st.integers(0, 4))], *tokens, "--print-config"]
    check([token for token in line if token != "--dry-run"])


@fuzz(0.5)
@given(st.data())
def test_every_key_takes_any_text_without_a_traceback(data: st.DataObject) -> None:
    chosen: Chosen = data.draw(choices())
    key, _, _ = data.draw(st.sampled_from(chosen.every_key()))
    argv = [*chosen.tokens, f"{key}={data.draw(st.sampled_from(NASTY))}", "--print-config"]
    ended = check(argv)
    if ended.code == 0:
        check_reads_back(ended, argv=argv)


@fuzz(0.5)
@given(st.sampled_from(NAMES), st.sampled_from(NASTY) | st.text(max_size=30), st.booleans())
def test_a_name_or_a_path_may_be_any_text(key: str, text: str, listing: bool) -> None:
    if listing:
        ended = called(train.main, [f"{key}={text}", "--list"])
        if ended.code:
            check_refusal(ended)
    else:
        check([f"{key}={text}", "--print-config"])


@fuzz(0.5)
@given(st.data())
def test_a_printed_config_with_damage_is_read_or_refused(data: st.DataObject) -> None:
    chosen: Chosen = data.draw(choices())
    text = called(train.main, [*chosen.tokens, "--print-config"]).out.encode()
    check_yaml(data.draw(damaged(text)))


@fuzz(0.5)
@given(st.data())
def test_a_config_file_may_hold_any_value_anywhere(data: st.DataObject) -> None:
    chosen: Chosen = data.draw(choices())
    keys = data.draw(st.lists(st.sampled_from(chosen.every_key()), max_size=4))
    lines = [f"{key}: {{name: {name}}}" for key, name in chosen.names.items()]
    for key, _, _ in keys:
        section, _, field = key.rpartition(".")
        value = data.draw(st.sampled_from(NASTY))
        lines.append(f"{section}:\n  {field}: {value}" if section else f"{field}: {value}")
    lines += data.draw(st.lists(st.sampled_from(NASTY), max_size=1))
    check_yaml("\n".join(lines).encode("utf-8", "surrogateescape"))


@fuzz(0.5)
@given(st.binary(max_size=200))
def test_a_config_file_of_random_bytes_is_refused(content: bytes) -> None:
    check_yaml(content)


def check_yaml(content: bytes) -> None:
    """A file as config= and as recipe=: read, or refused in one line."""
    with fresh_folder() as folder:
        (folder / "given.yaml").write_bytes(content)
        for key in ("config", "recipe"):
            ended = called(train.main, [f"{key}=given.yaml", "--print-config"])
            event(f"exit {ended.code}")
            if ended.code:
                check_refusal(ended)
            else:
                assert not ended.errors, ended.err
        assert left_in(folder) == ["given.yaml"]
