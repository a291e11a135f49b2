"""Text from a language model: sampling one token after the other.

The whole window is computed again for every token. That needs no cache of keys and values, which
each model would have to carry for the sake of a sample at the end of a run.

The number of positions that the model sees is a power of two, or the longest it takes: what is
missing is filled behind the text, where a causal model does not look. So a text of hundreds of
tokens meets a handful of shapes instead of one for each length, and a compiled model is compiled as
often, at no more than twice the positions.

Logits go to the CPU and the choice is made there in float64 by a generator of its own, so that no
other random number moves. What the first process chooses is what all of them go on from: logits of
two GPUs may differ in a last bit, and a process that met the end alone would leave the others of a
sharded model waiting for its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from suite.errors import DivergedError
from suite.randomness import generator
from suite.ranks import of_first

SHORTEST = 16  # positions of the smallest shape


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: list[int],
    *,
    count: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int,
    max_length: int | None,
    vocab_size: int,
    end: int | None = None,
) -> list[int]:
    """The ids that follow `prompt_ids`, without it: `count` of them, or fewer where `end` comes.

    model: ids [1, T] -> logits [1, T, V], causal; left in the mode that it was in. Where there are
        several processes, all of them call this at once.
    temperature: what logits are divided by; 0 takes the most likely id.
    top_k: only the k most likely ids are taken; None: all.
    max_length: how many of the last tokens the model sees; None: as many as it takes.
    vocab_size: only ids below are taken; rows of an embedding that pad it are not.
    end: stop at this id, which is not returned.
    Raises ValueError for an argument out of range, DivergedError for logits that are not finite.
    """
    check_numbers(count=count, temperature=temperature, top_k=top_k, max_length=max_length)
    check_ids(prompt_ids, vocab_size=vocab_size, end=end)
    limits = [n for n in (max_length, getattr(model, "max_length", None)) if n is not None]
    longest = min(limits, default=None)
    device = next(model.parameters()).device
    draws = generator(seed, "generate")
    ids = list(prompt_ids)
    with evaluating(model):
        for _ in range(count):
            window = ids if longest is None else ids[-longest:]
            logits_V = next_logits(model, window, longest=longest, device=device)
            if len(logits_V) < vocab_size:
                raise ValueError(
                    f"vocab_size must be at most the model's {len(logits_V)} rows, got {vocab_size}"
                )
            chosen = choose(
                logits_V[:vocab_size], temperature=temperature, top_k=top_k, draws=draws
            )
            chosen = of_first(chosen, device=device)
            if chosen == end:
                break
            ids.append(chosen)
    return ids[len(prompt_ids) :]


def next_logits(
    model: nn.Module, window: list[int], *, longest: int | None, device: torch.device
) -> Tensor:
    """[V] in float64 on the CPU: what the model says of the token behind the window."""
    length = padded_length(len(window), longest=longest)
    filled = window + window[-1:] * (length - len(window))  # of any valid id
    logits_BTV = model(torch.tensor([filled], device=device))
    logits_V: Tensor = logits_BTV[0, len(window) - 1].double().cpu()
    return logits_V


def padded_length(length: int, *, longest: int | None) -> int:
    """The next power of two, SHORTEST at least, and `longest` at most."""
    padded = max(SHORTEST, 1 << (length - 1).bit_length())
    return padded if longest is None else min(padded, longest)


def choose(
    logits_V: Tensor, *, temperature: float, top_k: int | None, draws: torch.Generator
) -> int:
    """An id by the softmax of the logits; the lowest of equally likely ones comes first."""
    if not logits_V.isfinite().all():
        raise DivergedError("the model's logits are not finite: there is nothing to sample from")
    if temperature == 0:
        return int(logits_V.argmax())
    sorted_K, ids_K = logits_V.sort(descending=True, stable=True)
    sorted_K, ids_K = sorted_K[:top_k], ids_K[:top_k]
    likely_K = ((sorted_K - sorted_K[0]) / temperature).softmax(dim=0)
    return int(ids_K[torch.multinomial(likely_K, 1, generator=draws)])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is again in the one it was in."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


def check_numbers(
    *, count: int, temperature: float, top_k: int | None, max_length: int | None
) -> None:
    """Raise ValueError for one that is out of range."""
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a finite number above, got {temperature}")
    for name, value in (("top_k", top_k), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_ids(prompt_ids: list[int], *, vocab_size: int, end: int | None) -> None:
    """Raise ValueError for an id that the vocabulary does not have, and for a prompt of none."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    if not prompt_ids:
        raise ValueError("prompt_ids must hold at least one id for the model to go on from")
    for name, ids in (("prompt_ids", prompt_ids), ("end", [] if end is None else [end])):
        if wrong := [i for i in ids if not 0 <= i < vocab_size]:
            raise ValueError(f"{name} must be from 0 to {vocab_size - 1}, got {wrong[0]}")
