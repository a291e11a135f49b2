"""The texts that `data=` may name; the first is the default."""

from __future__ import annotations

from suite.registry import Choice
from tasks.language.shakespeare import ShakespeareOptions, build_shakespeare
from tasks.language.text import TextOptions, build_text
from tasks.language.token_bin import TokenBinOptions, build_token_bin, outline

DATA = {
    "shakespeare": Choice(
        ShakespeareOptions(), build_shakespeare, "plays by Shakespeare, inside the package"
    ),
    "text": Choice(TextOptions(), build_text, "a text file, or a folder of them, in data.root"),
    "token_bin": Choice(
        TokenBinOptions(),
        build_token_bin,
        "token files as nanoGPT's, in data.root (python -m tasks.language.tokenize writes them)",
        outline=outline,
    ),
}
