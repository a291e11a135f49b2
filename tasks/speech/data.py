"""The audio sets that `data=` may name; the first of each table is the task's default."""

from __future__ import annotations

from functools import partial

from suite.registry import Choice
from tasks.speech.embedded import (
    CardsRealOptions,
    build_asterisk,
    build_cards,
    build_cards_real,
)
from tasks.speech.librispeech import LibriSpeechOptions, build_librispeech
from tasks.speech.manifest import ManifestOptions, build_manifest
from tasks.speech.split import AudioOptions


def choices(*, words: bool) -> dict[str, Choice]:
    """All sets, with their transcripts or without."""
    return {
        "asterisk_en": Choice(
            AudioOptions(),
            partial(build_asterisk, words=words),
            "12.6 minutes of recorded prompts, one speaker, inside the package",
        ),
        "cards_synthetic": Choice(
            AudioOptions(),
            partial(build_cards, words=words),
            "9 minutes of synthesised sentences about playing cards, inside the package",
        ),
        "librispeech": Choice(
            LibriSpeechOptions(),
            partial(build_librispeech, words=words),
            "960 hours of read English, from data.root",
        ),
        "manifest": Choice(
            ManifestOptions(),
            partial(build_manifest, words=words),
            "audio files that tables name: data.train, data.val and data.test",
        ),
    }


PRETRAIN_DATA = choices(words=False)

_WORDS = choices(words=True)
CTC_DATA = {
    "cards_synthetic": _WORDS.pop("cards_synthetic"),
    "cards_real": Choice(
        CardsRealOptions(),
        partial(build_cards_real, words=True),
        "five recordings of playing cards to evaluate on, from data.root",
    ),
    **_WORDS,
}
