"""The language models that `model=` names: LLaMA and GPT-2 of every published size.

Sizes: tasks/language/llama.py and tasks/language/gpt2.py.
"""

from __future__ import annotations

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.norms import NormFactory
from suite.registry import Choice
from tasks.language.gpt2 import GPT2, GPT2_SIZES, GPT2Options
from tasks.language.llama import LLAMA_SIZES, Llama, LlamaOptions


def rows_of(options: LlamaOptions | GPT2Options, data: DataInfo) -> int:
    """Rows of the embedding. Raises ConfigError where the data has ids that are beyond them."""
    known = data.extra.get("vocab_size")
    if known is None:
        raise ConfigError(
            f"data={data.name}: does not say how many ids it has, which a language model needs; "
            "choose a data set of task=language/lm"
        )
    rows = options.vocab_size or int(known)
    if rows < known:
        raise ConfigError(
            f"model.vocab_size={rows}: data={data.name} has {known:,} ids; set "
            f"model.vocab_size={known}, or more, or null for the data's own number"
        )
    return rows


def check_length(longest: int | None, data: DataInfo) -> None:
    """Raise ConfigError where the data's rows are longer than the model's positions."""
    length = data.extra.get("length", 0)
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.length={length}: the model has positions for rows of {longest} tokens; set "
            f"data.length={longest}, or model.max_length={length}"
        )


def build_llama(options: LlamaOptions, *, norm: NormFactory, data: DataInfo) -> Llama:
    """`Choice.build` of a LLaMA."""
    return Llama(options, norm=norm, vocab_size=rows_of(options, data))


def build_gpt2(options: GPT2Options, *, norm: NormFactory, data: DataInfo) -> GPT2:
    """`Choice.build` of a GPT-2."""
    check_length(options.max_length, data)
    return GPT2(options, norm=norm, vocab_size=rows_of(options, data))


def help_of(name: str, options: LlamaOptions | GPT2Options) -> str:
    """A line for `--list`."""
    paper = "LLaMA (arXiv 2302.13971)" if name.startswith("llama") else "GPT-2 (Radford 2019)"
    return f"{paper}: {options.depth} layers, {options.dim} channels, {options.heads} heads"


MODELS = {
    **{
        name: Choice(size, build_llama, help_of(name, size), causal=True)
        for name, size in LLAMA_SIZES.items()
    },
    **{
        name: Choice(size, build_gpt2, help_of(name, size), causal=True)
        for name, size in GPT2_SIZES.items()
    },
}
