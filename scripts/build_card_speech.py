"""Build the embedded set of synthetic speech: short sentences about playing cards, by eSpeak NG.

    python -m scripts.build_card_speech [--out FILE]

Needs the PyPI packages `espeakng-loader` (eSpeak NG as a library, with its data), `soundfile` and
`torchaudio`. A closed vocabulary of 22 words, so that a model of 0.4 million parameters learns it
on one core in minutes. The vocabulary holds every word of the five recorded "cards" clips of
Debian's pocketsphinx-testdata, on which a model may be tried out of its domain.

eSpeak NG's output depends on what it spoke before, so everything is spoken once, in one order, in
one process; then it repeats. Variants with "breath" (f2, f3 and f5 are such) are not used, because
their noise is another one in each process, nor those that clip. The figures that are printed
belong in tasks/speech/assets/DATA.md.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from scripts.clip_zip import RATE, Audio, Clip, report, write_zip

OUT = Path(__file__).parents[1] / "tasks" / "speech" / "assets" / "cards_synthetic.zip"
SEED = 0
RANKS = (
    *("ace", "two", "three", "four", "five", "six", "seven"),
    *("eight", "nine", "ten", "jack", "queen", "king"),
)
SUITS = ("clubs", "diamonds", "hearts", "spades")
VERBS = ("play", "take")
LANGUAGE = "en-us"
VARIANTS = {  # a variant is a timbre; none is in two splits
    "train": (
        *("m1", "m2", "m3", "m5", "m6", "m7", "Mike", "Michael", "Mario"),
        *("max", "rob", "robert", "norbert", "adam"),
        *("f1", "Andrea", "Annie", "belinda", "grandma", "shelby"),
    ),
    "val": ("m4", "f4"),
    "test": ("Alex", "aunty"),
}
EACH = {"train": 14, "val": 20, "test": 20}  # utterances of a voice
SHORTEST, LONGEST = 0.8, 2.5  # seconds; another sentence is drawn instead
RATES, PITCHES = (140, 190), (35, 65)  # words a minute; eSpeak NG's scale of 0 to 100
PEAK = 0.5
SILENCE = 0.05  # seconds before and after; the library gives next to none

# espeak-ng/speak_lib.h
SYNCHRONOUS, CHARS_UTF8, POSITION_CHARACTER = 2, 1, 1
RATE_PARAMETER, PITCH_PARAMETER = 1, 3
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def sentence(rng: Random) -> str:
    """One sentence of the grammar, in small letters."""

    def card() -> str:
        return f"{rng.choice(RANKS)} of {rng.choice(SUITS)}"

    forms: tuple[Callable[[], str], ...] = (
        card,
        lambda: f"the {card()}",
        lambda: f"{card()} {card()}",
        lambda: f"{card()} {card()} {card()}",
        lambda: f"{card()} and {card()}",
        lambda: f"the {card()} and the {card()}",
        lambda: f"{rng.choice(RANKS)} {card()}",
        lambda: f"{rng.choice(RANKS)} {rng.choice(RANKS)}",
        lambda: f"{rng.choice(VERBS)} the {card()}",
        lambda: f"{rng.choice(VERBS)} {card()}",
    )
    return rng.choice(forms)()


class Synthesizer:
    """eSpeak NG through ctypes; speaks into a buffer."""

    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        folder = Path(espeakng_loader.get_data_path())
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, str(folder).encode(), 0)
        if self.rate <= 0:
            raise OSError(f"eSpeak NG does not find its data in {folder}")
        self.variants = {path.name for path in (folder / "voices" / "!v").iterdir()}
        self._parts: list[Audio] = []
        self._callback = Callback(self._receive)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _: int | None) -> int:
        if samples and count:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, *, voice: str, rate: int, pitch: int) -> Audio:
        """int16 samples at `self.rate`. voice: a language and a variant, as in "en-us+f3"."""
        known = voice.partition("+")[2] in self.variants  # the library passes over an unknown one
        if not known or self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(RATE_PARAMETER, rate, 0)
        self.library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        self._parts.clear()
        spoken = text.encode() + b"\0"
        self.library.espeak_Synth(
            spoken, len(spoken), 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None
        )
        return np.concatenate(self._parts)


def at_16_khz(audio: Audio, *, rate: int) -> Audio:
    """Resampled, scaled to the peak and padded with silence.

    Rounded to int16, so that the last bits do not matter.
    """
    import torch
    import torchaudio.functional

    samples = torch.from_numpy(audio.astype(np.float32))
    resampled = torchaudio.functional.resample(samples, rate, RATE).numpy()
    scaled = np.rint(resampled * (PEAK * 32768 / np.abs(resampled).max())).astype(np.int16)
    return np.pad(scaled, round(SILENCE * RATE))


def utter(synthesizer: Synthesizer, rng: Random, *, voice: str) -> tuple[str, Audio]:
    """A sentence of a fitting length and how the voice says it."""
    while True:
        text = sentence(rng)
        rate, pitch = rng.randint(*RATES), rng.randint(*PITCHES)
        audio = synthesizer.speak(text, voice=voice, rate=rate, pitch=pitch)
        if SHORTEST <= len(audio) / synthesizer.rate <= LONGEST:
            return text, at_16_khz(audio, rate=synthesizer.rate)


def build() -> list[Clip]:
    """All clips, voice by voice."""
    synthesizer, rng = Synthesizer(), Random(SEED)
    clips = []
    for split, variants in VARIANTS.items():
        for voice in (f"{LANGUAGE}+{variant}" for variant in variants):
            for place in range(EACH[split]):
                text, audio = utter(synthesizer, rng, voice=voice)
                name = f"{split}-{voice}-{place:02d}"
                clips.append(Clip(name, split, text.upper(), voice, audio))
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    clips = build()
    report(options.out, write_zip(options.out, clips))
    print(f"vocabulary: {len({word for clip in clips for word in clip.text.split()})} words")


if __name__ == "__main__":
    main()
