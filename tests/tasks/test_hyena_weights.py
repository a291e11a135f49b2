"""Published HyenaDNA files: the published function, written here once more, from the same numbers.

The network below is that of the paper and of the authors' code, in float64 and plain sums: complex
exponentials, loops over taps, a matrix for the long convolution. No file of theirs is needed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.norms import make_norm
from tasks.dna.hyena import HyenaDNA, HyenaOptions
from tasks.dna.published_hyena import from_hyena, trained_as

DIM, DEPTH, HIDDEN, WIDTH, L_MAX, LENGTH = 6, 2, 10, 8, 21, 13
State = dict[str, Tensor]


def standalone(*, rows: int = 16) -> State:
    """Weights under the names of the authors' standalone file, in float64."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int, scale: float = 0.5) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    state = {"backbone.embeddings.word_embeddings.weight": draw(rows, DIM, scale=1.0)}
    for i in range(DEPTH):
        block = f"backbone.layers.{i}."
        f = block + "mixer.filter_fn."
        freq = 3 + draw(1, WIDTH)
        state |= {
            block + "mixer.in_proj.weight": draw(3 * DIM, DIM),
            block + "mixer.in_proj.bias": draw(3 * DIM),
            block + "mixer.out_proj.weight": draw(DIM, DIM),
            block + "mixer.out_proj.bias": draw(DIM),
            block + "mixer.short_filter.weight": draw(3 * DIM, 1, 3),
            block + "mixer.short_filter.bias": draw(3 * DIM),
            f + "bias": draw(DIM),
            f + "pos_emb.z": features(L_MAX)[None],
            f + "pos_emb.t": torch.linspace(0, 1, L_MAX, dtype=torch.float64)[None, :, None],
            f + "implicit_filter.0.weight": draw(WIDTH, 5),
            f + "implicit_filter.0.bias": draw(WIDTH),
            f + "implicit_filter.2.weight": draw(WIDTH, WIDTH),
            f + "implicit_filter.2.bias": draw(WIDTH),
            f + "implicit_filter.4.weight": draw(WIDTH, WIDTH),
            f + "implicit_filter.4.bias": draw(WIDTH),
            f + "implicit_filter.6.weight": draw(DIM, WIDTH),
            **{f"{f}implicit_filter.{n}.freq": freq for n in (1, 3, 5)},
            f + "modulation.deltas": deltas()[None, None],
            block + "mlp.fc1.weight": draw(HIDDEN, DIM),
            block + "mlp.fc1.bias": draw(HIDDEN),
            block + "mlp.fc2.weight": draw(DIM, HIDDEN),
            block + "mlp.fc2.bias": draw(DIM),
            block + "norm1.weight": 1 + draw(DIM),
            block + "norm1.bias": draw(DIM),
            block + "norm2.weight": 1 + draw(DIM),
            block + "norm2.bias": draw(DIM),
        }
    last = {"backbone.ln_f.weight": 1 + draw(DIM), "backbone.ln_f.bias": draw(DIM)}
    head = {"lm_head.weight": state["backbone.embeddings.word_embeddings.weight"]}
    return state | last | head


def features(length: int) -> Tensor:
    n = torch.arange(length, dtype=torch.float64)
    frequencies = torch.tensor([1e-4, 1.0], dtype=torch.float64)
    wave = torch.exp(-1j * torch.outer(2 * math.pi * n / L_MAX, frequencies))
    return torch.cat([(n / (L_MAX - 1))[:, None], wave.real, wave.imag], dim=1)


def deltas() -> Tensor:
    return torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, DIM, dtype=torch.float64)


def layer_norm(x: Tensor, w: State, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def linear(x: Tensor, w: State, name: str) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, w[name + ".weight"])
    return y + w[name + ".bias"] if name + ".bias" in w else y


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def taps(w: State, name: str, shift: float) -> Tensor:
    """The long filter [L, D]."""
    h = features(LENGTH)
    for n in (0, 2, 4):
        step = linear(h, w, f"{name}implicit_filter.{n}")
        h = torch.sin(w[f"{name}implicit_filter.{n + 1}.freq"] * step)
    t = torch.arange(LENGTH, dtype=torch.float64)[:, None] / (L_MAX - 1)
    return linear(h, w, f"{name}implicit_filter.6") * (torch.exp(-t * deltas().abs()) + shift)


def mixer(x: Tensor, w: State, name: str, shift: float) -> Tensor:
    p, short = linear(x, w, name + "in_proj"), torch.zeros(*x.shape[:2], 3 * DIM).double()
    for t in range(LENGTH):
        for j in range(3):
            if t - 2 + j >= 0:
                short[:, t] += w[name + "short_filter.weight"][:, 0, j] * p[:, t - 2 + j]
    x0, x1, v = (short + w[name + "short_filter.bias"]).split(DIM, dim=-1)
    k, u = taps(w, name + "filter_fn.", shift), x1 * v
    y = u * w[name + "filter_fn.bias"]
    for t in range(LENGTH):
        for s in range(t + 1):
            y[:, t] = y[:, t] + k[t - s] * u[:, s]
    return linear(y * x0, w, name + "out_proj")


def published_network(ids: Tensor, w: State, *, shift: float) -> Tensor:
    hidden, residual = w["backbone.embeddings.word_embeddings.weight"][ids], torch.tensor(0.0)
    for i in range(DEPTH):
        block = f"backbone.layers.{i}."
        residual = hidden + residual
        hidden = mixer(layer_norm(residual, w, block + "norm1"), w, block + "mixer.", shift)
        residual = hidden + residual
        h = layer_norm(residual, w, block + "norm2")
        hidden = linear(gelu(linear(h, w, block + "mlp.fc1")), w, block + "mlp.fc2")
    return layer_norm(hidden + residual, w, "backbone.ln_f")


def lightning(state: State) -> State:
    return {f"model.{name}": value for name, value in state.items()}


def checkpointed(state: State) -> State:
    """As with checkpoint_mixer and checkpoint_mlp."""
    wrapped = {n.replace(".mixer.", ".mixer.layer."): v for n, v in state.items()}
    return lightning({n.replace(".mlp.", ".mlp.layer."): v for n, v in wrapped.items()})


def hugging_face(state: State) -> State:
    """As safetensors: of the shared frequencies the first is kept."""
    kept = {n: v for n, v in state.items() if not n.endswith(("3.freq", "5.freq"))}
    return {n if n.startswith("lm_head") else f"hyena.{n}": v for n, v in kept.items()}


def bare(state: State) -> State:
    return {n: v for n, v in state.items() if not n.startswith("lm_head")}


LAYOUTS = (lightning, checkpointed, hugging_face, bare, dict)


def converted(state: State) -> tuple[State, list[str]]:
    found = from_hyena(state)
    assert found is not None
    return found


def ours(**options: Any) -> HyenaDNA:
    small: dict[str, Any] = {
        "dim": DIM,
        "depth": DEPTH,
        "hidden_dim": HIDDEN,
        "filter_dim": WIDTH,
        "l_max": L_MAX,
    }
    options = small | options
    return HyenaDNA(HyenaOptions(**options), norm=make_norm("layernorm")).double().eval()


def backbone_of(state: State) -> State:
    return {n[9:]: v for n, v in state.items() if n.startswith("backbone.")}


@pytest.mark.parametrize("shift", [0.05, 0.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_file_computes_what_it_was_published_for(layout: Any, shift: float) -> None:
    published = standalone()
    state, notes = converted(layout(published))
    model = ours(modulation_shift=shift)
    model.load_state_dict(backbone_of(state), strict=True)
    ids = torch.randint(7, 11, (2, LENGTH))
    expected = published_network(ids, published, shift=shift)
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 0.1
    assert "model.l_max=21" in notes[0]
    assert "modulation_shift" in notes[1]
    if layout is not bare:
        assert torch.equal(state["lm_head.weight"], published["lm_head.weight"])


def test_a_file_says_its_l_max_and_with_another_one_it_is_another_function() -> None:
    published = standalone()
    assert trained_as(lightning(published)) == {"l_max": L_MAX}
    model = ours(l_max=L_MAX + 9)
    model.load_state_dict(backbone_of(converted(published)[0]))
    ids = torch.randint(7, 11, (2, LENGTH))
    expected = published_network(ids, published, shift=0.05)
    assert (model(ids) - expected).abs().max() > 1e-3


def test_a_file_without_the_features_of_time_is_taken_on_trust() -> None:
    published = {n: v for n, v in standalone().items() if ".pos_emb." not in n}
    assert trained_as(published) == {}
    assert "does not say" in converted(published)[1][0]


def test_other_files_pass_by_and_unknown_names_stay_to_be_reported() -> None:
    assert from_hyena({f"backbone.{n}": v for n, v in ours().state_dict().items()}) is None
    assert trained_as({"backbone.layers.0.mixer.mamba_fwd.D": torch.zeros(1)}) is None
    state, _ = converted(lightning(standalone()) | {"decoder.0.weight": torch.zeros(2)})
    assert "decoder.0.weight" in state


def test_a_vocabulary_that_is_not_padded_is_passed_on_as_it_is() -> None:
    state, _ = converted(standalone(rows=12))
    assert state["backbone.embedding.weight"].shape == state["lm_head.weight"].shape == (12, DIM)


def test_shared_frequencies_that_differ_are_refused() -> None:
    state = lightning(standalone())
    name = "model.backbone.layers.1.mixer.filter_fn.implicit_filter.5.freq"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=r"3\.freq and .*5\.freq differ"):
        from_hyena(state)


@pytest.mark.parametrize("buffer", ["pos_emb.z", "pos_emb.t", "modulation.deltas"])
def test_a_trained_buffer_is_refused_and_half_precision_is_not(buffer: str) -> None:
    state = standalone()
    name = f"backbone.layers.0.mixer.filter_fn.{buffer}"
    converted(state | {name: state[name].bfloat16()})
    converted(state | {name: state[name].float()})
    with pytest.raises(ValueError, match=f"{buffer} is not what HyenaDNA computes it as"):
        from_hyena(state | {name: state[name] * 1.05})


def test_layers_of_two_lengths_are_refused() -> None:
    state = standalone()
    state["backbone.layers.1.mixer.filter_fn.pos_emb.t"] = torch.linspace(0, 1, 9)[None, :, None]
    with pytest.raises(ValueError, match=r"several l_max: \[9, 21\]"):
        from_hyena(state)
