"""Beam search: what greedy finds where the network is sure, what the language model says where it
is not, and mistakes in one line."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.errors import ConfigError
from tasks.speech.beam import Beam
from tasks.speech.text import LABELS, collapse, decode_rows, encode

WORDS = r"""\data\
ngram 1=5
ngram 2=2

\1-grams:
-3.0	<unk>	0
-99	<s>	-0.3
-1.0	</s>	0
-2.5	TOO	-0.3
-0.5	TWO	-0.3

\2-grams:
-0.1	<s> TWO
-0.1	TWO </s>

\end\
"""
LEXICON = "TOO T O O |\nTWO T W O |\n"


@pytest.fixture
def _flashlight() -> None:
    pytest.importorskip("flashlight.lib.text")


def made(**changes: Any) -> Beam:
    options = {"lm": None, "lexicon": None, "beam": 20, "lm_weight": 2.0, "word_score": -1.0}
    return Beam(**{**options, **changes})


def posterior(*frames: dict[str, float]) -> Tensor:
    """[1, T, V] log probabilities: what a frame names, and a little for everything else."""
    probs = torch.full((1, len(frames), len(LABELS)), 1e-4)
    for t, frame in enumerate(frames):
        for label, value in frame.items():
            probs[0, t, LABELS.index(label)] = value
    return (probs / probs.sum(-1, keepdim=True)).log()


def written(folder: Path, **texts: str) -> dict[str, str]:
    """option -> path of a file that holds the text."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: str(folder / name) for name in texts}


TWO_OR_TOO = [{"T": 0.9}, {"O": 0.55, "W": 0.45}, {"-": 0.9}, {"O": 0.9}, {"|": 0.9}]


@pytest.mark.usefixtures("_flashlight")
def test_it_finds_what_greedy_finds_where_the_network_is_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.tensor([encode("JACK OF HEARTS"), [*encode("TEN OF SPADES"), 0]])
    frames_B = torch.tensor([14, 13])
    noise_BTV = torch.rand(2, 14, 29, generator=generator)
    log_probs_BTV = (noise_BTV + 12 * torch.nn.functional.one_hot(ids_BT, 29)).log_softmax(-1)
    found = decode_rows(made()(log_probs_BTV, frames_B))
    assert found == decode_rows(collapse(ids_BT, frames_B))
    assert found == ["JACK OF HEARTS", "TEN OF SPADES"]


@pytest.mark.usefixtures("_flashlight")
@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_a_language_model_decides_between_two_words(tmp_path: Path, case: Any) -> None:
    log_probs_BTV = posterior(*TWO_OR_TOO)
    frames_B = torch.tensor([5])
    files = written(tmp_path, lexicon=case(LEXICON))
    arpa = WORDS.replace("TOO", case("TOO")).replace("TWO", case("TWO"))
    assert decode_rows(made(**files)(log_probs_BTV, frames_B)) == ["TOO"]
    files |= written(tmp_path, lm=arpa)
    assert decode_rows(made(**files)(log_probs_BTV, frames_B)) == ["TWO"]
    assert decode_rows(made(**files, lm_weight=0.0)(log_probs_BTV, frames_B)) == ["TOO"]


@pytest.mark.usefixtures("_flashlight")
def test_a_model_over_letters_needs_no_lexicon(tmp_path: Path) -> None:
    arpa = WORDS.replace("TOO", "o").replace("TWO", "w")
    log_probs_BTV = posterior(*TWO_OR_TOO)
    assert decode_rows(made()(log_probs_BTV, torch.tensor([5]))) == ["TOO"]
    found = made(**written(tmp_path, lm=arpa))(log_probs_BTV, torch.tensor([5]))
    assert decode_rows(found) == ["TWO"]


@pytest.mark.usefixtures("_flashlight")
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"lm": "no model"}, r"^task.lm=.*lm: is no KenLM model, .arpa or .bin"),
        ({"lm": WORDS}, r"^task.lm=.*: knows no letter.*give task.lexicon=FILE$"),
        ({"lm": WORDS, "lexicon": "ACE A C E |\n"}, r"^task.lm=.*: knows no word of task.lexicon="),
        ({"lexicon": "\n"}, r"^task.lexicon=.*: is empty"),
        ({"lexicon": "TWO T W O |\nTWO2 T W O |"}, r"^task.lexicon=.*, line 2: '2' is none of"),
        ({"lexicon": "TWO T WO |"}, r"^task.lexicon=.*, line 1: 'WO' is no letter"),
        ({"lexicon": "TWO"}, r"^task.lexicon=.*, line 1: 'TWO' has no letters after it"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_gives_one_line(
    tmp_path: Path, texts: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(**written(tmp_path, **texts))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_flashlight")
@pytest.mark.parametrize("option", ["lm", "lexicon"])
def test_a_missing_file_gives_one_line(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"^task.{option}=.*nowhere"):
        made(**{option: str(tmp_path / "nowhere")})


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("flashlight"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'pip install "dyt-suite\[beam\]"') as caught:
        made()
    assert "\n" not in str(caught.value)
