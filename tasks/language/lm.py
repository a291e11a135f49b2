"""Language modelling: the next token of every position.

The task of LLaMA in DyT (arXiv 2503.10622, table 4) and of GPT-2 in Derf (arXiv 2512.10938, table
12). loss = sum of -log p(token) / tokens that are asked for, over all processes and accumulation
steps, in nats; padding is never asked for. Bits per byte are the same sum over the UTF-8 bytes that
those tokens stand for, so that runs with different vocabularies compare.

Shapes: B sequences, T positions, V rows of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.data import DataInfo, Split
from suite.errors import ConfigError, DataError
from suite.metrics import is_main_process
from suite.module import Batch, StepOutput, SuiteModule
from suite.randomness import derive
from suite.registry import TaskSpec
from suite.train import say
from tasks.language.generate import generate
from tasks.language.models import MODELS
from tasks.language.reference import LanguageReference
from tasks.language.sets import DATA
from tasks.language.tokens import IGNORE

LN2 = math.log(2)


@dataclass(frozen=True)
class LMOptions:
    """The sample that a run ends with.

    sample_tokens: its length; 0 writes none. prompt: what it goes on from; empty: the beginning of
    a document. temperature, top_k: how it is drawn (0: always the likeliest; null: of all tokens).
    """

    sample_tokens: int = 400
    prompt: str = ""
    temperature: float = 0.8
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens must not be negative, got {self.sample_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, got {self.top_k}")


def cross_entropy(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """-log p of each position's target, [B, T], in at least float32; 0 where nothing is asked."""
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    nats = F.cross_entropy(
        logits_BTV.to(wide).flatten(0, 1),
        target_BT.flatten(),
        reduction="none",
        ignore_index=IGNORE,
    )
    return nats.view_as(target_BT)


class LanguageModelling(SuiteModule):
    """Batch: ids [B, T], target [B, T] (IGNORE where nothing is asked), valid [B], sample_id [B],
    and with data.documents=mask also document [B, T], the document of each position."""

    token_bytes: Tensor | None

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        known = self.info.extra.get("token_bytes")
        table = None if known is None else torch.as_tensor(known)
        self.register_buffer("token_bytes", table, persistent=False)
        self.prompt_ids = self._prompt()

    def _prompt(self) -> list[int]:
        """What the sample goes on from. Raises ConfigError, before training, for what is no text of
        this data."""
        encode, end = (self.info.extra.get(name) for name in ("encode", "end"))
        prompt = self.options.prompt
        if not prompt:
            return [0 if end is None else end]
        if encode is None:
            raise ConfigError(
                f"task.prompt: data={self.info.name} does not say how text becomes tokens; leave "
                "task.prompt out, or write the files with python -m tasks.language.tokenize"
            )
        try:
            ids: list[int] = encode(prompt)
        except ValueError as error:
            raise ConfigError(f"task.prompt: {error}") from None
        if not ids:
            raise ConfigError(f"task.prompt={prompt!r}: has no token; leave it out, or take a word")
        return ids

    def step(self, batch: Batch, split: Split) -> StepOutput:
        target_BT = batch["target"].where(batch["valid"].bool().unsqueeze(1), IGNORE)
        logits_BTV = self.model(batch["ids"], batch.get("document"))
        nats_BT = cross_entropy(logits_BTV, target_BT)
        asked_BT = target_BT != IGNORE
        logs = {"acc": (logits_BTV.argmax(-1) == target_BT).sum()}  # IGNORE is no row's number
        if split != "train" and self.token_bytes is not None:
            logs["bytes_per_token"] = self.token_bytes[target_BT.clamp(min=0)][asked_BT].sum()
        return StepOutput(nats_BT.sum(), asked_BT.sum(), logs=logs)

    @property
    def flops_per_unit(self) -> float | None:
        """Operations of one token, forward and backward."""
        model: Any = self.model
        return float(model.training_flops(self.info.extra["length"]))

    def after_evaluation(self, split: Split, values: dict[str, float]) -> None:
        if not values[f"{split}/count"]:
            raise DataError(f"{split}: no token is asked for; the split is empty")
        values[f"{split}/perplexity"] = math.exp(min(values[f"{split}/loss"], 700.0))
        size = values.get(f"{split}/bytes_per_token")
        if size:
            values[f"{split}/bits_per_byte"] = values[f"{split}/loss"] / size / LN2
        if split == "test" and self.options.sample_tokens:
            self._sample()

    def _sample(self) -> None:
        """Text that the model goes on with; every process makes it, the first one writes it."""
        decode = self.info.extra.get("decode")
        if decode is None:
            return
        model: Any = self.model
        o = self.options
        made = generate(
            model,
            self.prompt_ids,
            count=o.sample_tokens,
            temperature=o.temperature,
            top_k=o.top_k,
            seed=derive(self.seed, "sample"),
            max_length=self.info.extra["length"],  # what it was trained on
            vocab_size=self.info.extra["vocab_size"],
            end=self.info.extra.get("end"),
        )
        if is_main_process():
            text = o.prompt + decode(made)
            lines = ("".join(c if c.isprintable() else "�" for c in t) for t in text.splitlines())
            shown = "\n".join(f"  | {line}" for line in lines)
            say(f"sample of {len(made)} tokens at temperature {o.temperature:g}:\n{shown}")
            if self.folder is not None:
                (self.folder / "sample.txt").write_text(text, encoding="utf-8")


def outline_batch(info: DataInfo, rows: int) -> Batch:
    """A batch of `rows` rows that asks for id 0 everywhere."""
    ids_BT = torch.zeros(rows, int(info.extra["length"]), dtype=torch.long)
    valid_B = torch.ones(rows, dtype=torch.bool)
    return {"ids": ids_BT, "target": ids_BT, "valid": valid_B, "sample_id": torch.arange(rows)}


SPEC = TaskSpec(
    name="language/lm",
    module=LanguageModelling,
    models=MODELS,
    data=DATA,
    primary=("loss", "min", "val"),
    unit="tokens",
    options=LMOptions(),
    outline_batch=outline_batch,
    reference=LanguageReference,
)
