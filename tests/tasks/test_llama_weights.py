"""LLaMA's published function and files: Hugging Face's model, from the same numbers.

And what is said of a file that does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from suite import checkpoint as checkpoints
from suite.errors import ConfigError
from suite.norms import make_norm
from tasks.language.llama import Llama, LlamaOptions
from tasks.language.rope import frequencies

ROWS = 31
SMALL: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 6, "kv_heads": 2, "hidden_dim": 40}
State = dict[str, Tensor]


def build(norm: str = "rmsnorm", *, seed: int = 0, rows: int = ROWS, **options: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaOptions(**(SMALL | options)), norm=make_norm(norm), vocab_size=rows)


@torch.no_grad()
def shaken(model: Llama, by: float = 0.3) -> Llama:
    """Weights far from their first values, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(by * torch.randn(p.shape, generator=generator))
    return model.eval()


def tokens(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(0, ROWS, (rows, length), generator=torch.Generator().manual_seed(2))


def grads(model: nn.Module, logits_BTV: Tensor) -> State:
    weigh = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (logits_BTV.float() * weigh).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def published(**changes: Any) -> Any:
    """transformers' LlamaForCausalLM of the same sizes, with random weights and norms."""
    transformers = pytest.importorskip("transformers")
    sizes = SMALL | changes
    config = transformers.LlamaConfig(
        vocab_size=ROWS,
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["hidden_dim"],
        rms_norm_eps=sizes.get("eps", 1e-5),
        rope_theta=sizes.get("rope_theta", 10_000.0),
        tie_word_embeddings=sizes.get("tie_head", False),
        attn_implementation="eager",
    )
    return shaken(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_heads": 6},
        {"kv_heads": 2},
        {"kv_heads": 1, "rope_theta": 500.0, "eps": 1e-2},
        {"tie_head": True},
    ],
    ids=["every_head", "grouped", "one_kv_head", "tied"],
)
def test_logits_and_gradients_are_those_of_hugging_face(sizes: dict[str, Any], length: int) -> None:
    theirs, ours = published(**sizes), build(**sizes)
    ours.load_state_dict(ours.adapt(theirs.state_dict(), whole=True)[0])
    ids = tokens(length=length)
    expected, found = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5  # far above the tolerance
    wanted, got = grads(theirs, expected), grads(ours, found)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        limit = 1e-5 * max(grad.abs().max().item(), 1.0)
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=limit, msg=name)


def test_parameters_are_named_and_shaped_as_hugging_face_s() -> None:
    choices: tuple[dict[str, Any], ...] = ({}, {"tie_head": True})
    for sizes in choices:
        theirs = {n: p.shape for n, p in published(**sizes).named_parameters()}
        assert {n: p.shape for n, p in build(**sizes).named_parameters()} == theirs


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_that_hugging_face_saved_loads_as_it_is(tmp_path: Path, tied: bool) -> None:
    theirs = published(tie_head=tied)
    theirs.save_pretrained(tmp_path)
    ours = build(tie_head=tied, seed=5).eval()
    notes = load(ours, tmp_path / "model.safetensors")
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert any("does not say its norm" in note for note in notes)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 2}, r"set model\.heads=2$"),
        ({"rms_norm_eps": 1e-6}, r"set model\.eps=1e-06$"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta=500000"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_type=llama3"),
        ({"model_type": "mistral"}, "model_type=mistral, expected llama"),
    ],
)
def test_a_config_beside_the_weights_that_says_otherwise_is_heard(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    published().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ConfigError, match=said):
        load(build(), tmp_path / "model.safetensors")
    file.write_text("no JSON")
    load(build(), tmp_path / "model.safetensors")


def load(model: Llama, file: Path) -> list[str]:
    return checkpoints.init_from(
        model,
        str(file),
        norm=make_norm("rmsnorm").describe(),
        across_norms=False,
        options=model.options,
    )


def saved(path: Path, state: State) -> Path:
    save_file({name: value.detach().clone() for name, value in state.items()}, path)
    return path


def test_rotary_buffers_of_older_files_are_checked_and_dropped(tmp_path: Path) -> None:
    model, f_F = build(), frequencies(4, theta=10_000.0, like=torch.zeros(1))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": f_F.half() for i in range(2)}
    file = saved(tmp_path / "a.safetensors", shaken(build()).state_dict() | buffers)
    assert any("rotary frequencies" in note for note in load(model, file))
    with pytest.raises(ConfigError, match=r"inv_freq is not of model\.rope_theta=500000$"):
        load(build(rope_theta=500_000.0), file)
    with pytest.raises(ConfigError, match=r"heads of 4 channels, here they have 12: set model\.h"):
        load(build(heads=2), file)


def test_a_second_copy_of_a_tied_head_is_dropped_and_another_head_refused() -> None:
    model = build(tie_head=True)
    state = model.state_dict()
    copy = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    assert model.adapt(copy, whole=True)[0].keys() == state.keys()
    del copy["model.embed_tokens.weight"]  # some files keep the other name
    assert model.adapt(copy, whole=True)[0].keys() == state.keys()
    with pytest.raises(ValueError, match=r"is not its embedding: set model\.tie_head=false$"):
        model.adapt(state | {"lm_head.weight": torch.ones(ROWS, 24)}, whole=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({}, {"tie_head": True}, "set model.tie_head=true"),
        ({}, {"embed_scale": True}, "Set model.embed_scale=true"),
        ({"embed_scale": True}, {}, "Set model.embed_scale=false"),
        ({"kv_heads": 6}, {}, "other shape model.layers.0.self_attn.k_proj.weight"),
        ({"depth": 3}, {}, "(depth=3): set model.depth=2"),
    ],
)
def test_a_file_of_another_model_is_refused_in_one_line(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    file = saved(tmp_path / "a.safetensors", build(**theirs).state_dict())
    with pytest.raises(ConfigError) as caught:
        load(build(**ours), file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_piece_of_a_large_model_is_told_so(tmp_path: Path) -> None:
    pieces = [
        {n: p for n, p in build().state_dict().items() if n.startswith(start)}
        for start in (("model.embed_", "model.layers.0."), ("model.layers.1.", "model.norm", "lm"))
    ]
    for piece in pieces:
        with pytest.raises(ConfigError, match="one piece of a model that was saved in several"):
            load(build(), saved(tmp_path / "model-00001-of-00002.safetensors", piece))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layers.0.attention.wq.weight", "Meta's own layout"),
        ("model.layers.0.self_attn.q_proj.bias", "it is no LLaMA"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    state = build().state_dict() | {name: torch.zeros(3)}
    with pytest.raises(ConfigError, match=said):
        load(build(), saved(tmp_path / "a.safetensors", state))


def test_what_no_weight_shows_is_declared() -> None:
    shapes = {n: p.shape for n, p in build().named_parameters()}
    for changed in ({"rope_theta": 7.0}, {"heads": 3, "kv_heads": 1}):
        assert {n: p.shape for n, p in build(**changed).named_parameters()} == shapes
        assert set(Llama.fixed_by_weights) & set(changed)
