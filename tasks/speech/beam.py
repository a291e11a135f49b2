"""Beam search over a CTC network's letters, with a lexicon and a KenLM language model if there are.

What torchaudio's `ctc_decoder` (flashlight) does, made once: it finds the words that maximise
log p(letters) + lm_weight * log p(words) + word_score * words. Extra packages, imported only when a
decoder is made.

A model's or lexicon's letters may be upper or lower case (LibriSpeech's come in both); that none of
the words is known to the model, which would turn it off without a word, is refused. Without a
lexicon `ctc_decoder` (torchaudio 2.11) asks a model for other letters than it means, since its
dictionary of them comes out of a hash table in any order: there we make the model ourselves.

Shapes: B examples, T frames, V labels, L letters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.errors import ConfigError
from tasks.speech.text import BLANK, LABELS, SPACE, encode

INSTALL = 'pip install "dyt-suite[beam]"'
UNKNOWN = "<unk>"
SAMPLE = 1000  # words of a lexicon that are looked up in the language model
Lexicon = dict[str, list[list[str]]]


class Beam:
    """The best hypothesis of each example.

    lm: KenLM file (.arpa or .bin) over the lexicon's words, or without a lexicon over letters and
    "|". lexicon: text file, a word and its letters a line (`ACE A C E |`). beam: hypotheses that
    are kept. Raises ConfigError for missing packages and for files that are not what they should
    be.
    """

    def __init__(
        self,
        *,
        lm: str | None,
        lexicon: str | None,
        beam: int,
        lm_weight: float,
        word_score: float,
    ) -> None:
        _require_packages()
        spellings = None if lexicon is None else read_lexicon(lexicon)
        self.by_words = spellings is not None
        if lm is not None and not Path(lm).is_file():
            raise ConfigError(f"task.lm={lm}: no such file; give a KenLM model, .arpa or .bin")
        options = {"beam_size": beam, "lm_weight": lm_weight, "word_score": word_score}
        try:
            for labels in _cases(spellings):
                self.decoder, known = _decoder(labels, options, lm=lm, lexicon=lexicon)
                if known:
                    return
        except (RuntimeError, UnicodeDecodeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"task.lm={lm}: is no KenLM model, .arpa or .bin, that can be read: {reason}"
            ) from error
        raise ConfigError(f"task.lm={lm}: {_unknown_words(lexicon)}")

    def __call__(self, log_probs_BTV: Tensor, frames_B: Tensor) -> Tensor:
        """log_probs_BTV: float32. Returns letter ids [B, L], zero-padded, on its device."""
        emissions_BTV = log_probs_BTV.detach().float().cpu().contiguous()
        rows: list[list[int]] = []
        for found in self.decoder(emissions_BTV, frames_B.cpu().int()):
            best = found[0] if found else None  # a lexicon may spell nothing in so few frames
            if best is None:
                rows.append([])
            elif self.by_words:
                rows.append(encode(" ".join(best.words)))
            else:
                rows.append(best.tokens.tolist())
        letters_BL = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
        for row_L, row in zip(letters_BL, rows, strict=True):
            row_L[: len(row)] = torch.tensor(row, dtype=torch.int64)
        return letters_BL.to(log_probs_BTV.device)


def _require_packages() -> None:
    try:
        import flashlight.lib.text.decoder.kenlm  # noqa: F401
        import torchaudio.models.decoder  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"task.decoder=beam needs packages that are not here ({error}): {INSTALL}, or take "
            "task.decoder=greedy"
        ) from error


def _decoder(
    labels: str, options: dict[str, Any], *, lm: str | None, lexicon: str | None
) -> tuple[Any, bool]:
    """torchaudio's decoder over `labels`, and whether the model knows any of its words.

    Raises RuntimeError where the model cannot be read.
    """
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary
    from torchaudio.models.decoder import ctc_decoder

    model: Any = lm
    letters = Dictionary([*labels, UNKNOWN])
    if lm is not None and lexicon is None:
        model = KenLM(lm, letters)
    decoder = ctc_decoder(
        lexicon=lexicon,
        tokens=list(labels),
        lm=model,
        blank_token=labels[BLANK],
        sil_token=labels[SPACE],
        **options,
    )
    words = letters if lexicon is None else decoder.word_dict
    return decoder, lm is None or _knows_words(decoder.lm, words)


def read_lexicon(path: str) -> Lexicon:
    """Word -> its spellings, each a list of letters. Raises ConfigError naming the line."""
    found: Lexicon = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.lexicon={path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        word, *letters = line.split() or [""]
        if not word:
            continue
        try:
            encode(word)
        except ValueError as error:
            raise ConfigError(f"task.lexicon={path}, line {number}: {error}") from error
        wrong = [x for x in letters if x.upper() not in LABELS[SPACE:] or len(x) != 1]
        if wrong or not letters:
            said = f"{wrong[0]!r} is no letter" if wrong else f"{word!r} has no letters after it"
            raise ConfigError(
                f"task.lexicon={path}, line {number}: {said}; a line is a word and its letters "
                "with spaces between them: ACE A C E |"
            )
        found.setdefault(word, []).append(letters)
    if not found:
        raise ConfigError(f"task.lexicon={path}: is empty; a line is: ACE A C E |")
    return found


def _cases(spellings: Lexicon | None) -> list[str]:
    """The labels in the lexicon's case; in both, to be tried, if only a letter model could tell."""
    if spellings is None:
        return [LABELS, LABELS.lower()]
    first = next(iter(spellings.values()))[0]
    return [LABELS.lower() if any(letter.islower() for letter in first) else LABELS]


def _knows_words(model: Any, words: Any) -> bool:
    """Whether the language model knows any of the first words of the dictionary."""
    start, unknown = model.start(False), words.get_index(UNKNOWN)
    score = model.score(start, unknown)[1]
    first = range(min(words.index_size(), SAMPLE))
    return any(model.score(start, i)[1] != score for i in first if i != unknown)


def _unknown_words(lexicon: str | None) -> str:
    if lexicon is None:
        return "knows no letter, so its words are whole ones: give task.lexicon=FILE"
    return f"knows no word of task.lexicon={lexicon}: is the case the same in both?"
