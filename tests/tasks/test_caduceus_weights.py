"""Published Caduceus checkpoints: the network they were trained as, and what their names say.

The reference below is the published network written from its formulas, with loops and without a
thought for speed: it shares no code with the suite and keeps the official names and order of
channels (both strands side by side in 2C channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.norms import make_norm
from tasks.dna.caduceus import Caduceus, CaduceusOptions
from tasks.dna.heads import LanguageHead
from tasks.dna.published_caduceus import from_caduceus, trained_as

DIM, DEPTH, STATE, KERNEL, INNER = 6, 2, 3, 4, 12
RANK = math.ceil(DIM / 16)
MAP = [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
State = dict[str, Tensor]
TIED = ("in_proj", "out_proj")
KINDS = {
    "ps fused": {"rcps": True, "rcps_strand_swap": True},
    "ps unfused": {"rcps": True, "rcps_strand_swap": False},
    "ph": {"rcps": False, "rcps_strand_swap": False},
}


def official(kind: str, *, rows: int = 16) -> State:
    """A checkpoint of the Hugging Face port with random numbers, in float64."""
    generator = torch.Generator().manual_seed(1)
    ps, fused = kind != "ph", kind == "ps fused"
    wrap, wrap_norm = ("submodule." if ps else ""), ("submodule." if ps and not fused else "")

    def draw(*shape: int, scale: float = 0.5, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    root = "caduceus.backbone."
    words = root + "embeddings.word_embeddings."
    state: State = {words + ("embedding.weight" if ps else "weight"): draw(rows, DIM, scale=1.0)}
    for i in range(DEPTH):
        layer = f"{root}layers.{i}."
        for direction in ("fwd", "rev"):
            mixer = f"{layer}mixer.{wrap}mamba_{direction}."
            state |= {
                mixer + "A_log": draw(INNER, STATE),
                mixer + "D": draw(INNER),
                mixer + "in_proj.weight": draw(2 * INNER, DIM),
                mixer + "conv1d.weight": draw(INNER, 1, KERNEL),
                mixer + "conv1d.bias": draw(INNER),
                mixer + "x_proj.weight": draw(RANK + 2 * STATE, INNER),
                mixer + "dt_proj.weight": draw(INNER, RANK),
                mixer + "dt_proj.bias": draw(INNER, around=-2.0),
                mixer + "out_proj.weight": draw(DIM, INNER),
            }
            for tied in TIED:
                first = f"{layer}mixer.{wrap}mamba_fwd.{tied}.weight"
                state[f"{mixer}{tied}.weight"] = state[first].clone()
        state[f"{layer}norm.{wrap_norm}weight"] = draw(DIM, around=1.0, scale=0.2)
    state[f"{root}norm_f.{wrap_norm}weight"] = draw(DIM, around=1.0, scale=0.2)
    embedding = next(iter(state.values()))
    if not ps:
        return state | {"lm_head.weight": embedding.clone()}
    complement = torch.tensor(MAP[:rows])
    state[words + "complement_map"] = complement
    return state | {
        "lm_head.lm_head.weight": embedding.clone(),
        "lm_head.complement_map": complement,
    }


def mamba(state: State, name: str, h_LC: Tensor) -> Tensor:
    """One Mamba on one sequence, step by step."""
    w = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
    xz = h_LC @ w["in_proj.weight"].T
    x, z = xz[:, :INNER], xz[:, INNER:]
    state_DN = torch.zeros(INNER, STATE, dtype=h_LC.dtype)
    rows = []
    for t in range(len(x)):
        u = w["conv1d.bias"].clone()
        for k in range(KERNEL):
            if t - (KERNEL - 1) + k >= 0:
                u = u + w["conv1d.weight"][:, 0, k] * x[t - (KERNEL - 1) + k]
        u = u * torch.sigmoid(u)
        found = w["x_proj.weight"] @ u
        dt, B, C = found[:RANK], found[RANK : RANK + STATE], found[RANK + STATE :]
        delta = torch.log1p(torch.exp(w["dt_proj.weight"] @ dt + w["dt_proj.bias"]))
        decay = torch.exp(-delta[:, None] * torch.exp(w["A_log"]))
        state_DN = decay * state_DN + (delta * u)[:, None] * B
        y = state_DN @ C + w["D"] * u
        rows.append(w["out_proj.weight"] @ (y * z[t] * torch.sigmoid(z[t])))
    return torch.stack(rows)


def both_ways(state: State, name: str, h_LC: Tensor) -> Tensor:
    reverse = mamba(state, name + "mamba_rev.", h_LC.flip(0)).flip(0)
    return mamba(state, name + "mamba_fwd.", h_LC) + reverse


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def on_strands(f: Callable[[Tensor], Tensor], x: Tensor, *, swap: bool = False) -> Tensor:
    """f on one half of the channels, and turned round on the other, as the official wrappers."""
    first, second = x[:, :DIM], x[:, DIM:]
    if swap:
        first, second = second, first
    return torch.cat([f(first), f(second.flip(0, 1)).flip(0, 1)], dim=1)


def reference(state: State, ids_L: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Hidden state [L, C or 2C] and logits [L, V] of one sequence."""
    ps, fused = kind != "ph", kind == "ps fused"
    wrap, wrap_norm = ("submodule." if ps else ""), ("submodule." if ps and not fused else "")
    root = "caduceus.backbone."
    table = next(value for name, value in state.items() if "word_embeddings" in name)
    hidden = table[ids_L]
    complement = torch.tensor(MAP)
    if ps:
        other = table[complement[ids_L.flip(0)]].flip(0, 1)
        hidden = torch.cat([hidden, other], dim=1)
    residual = torch.zeros_like(hidden)
    for i in range(DEPTH):
        layer = f"{root}layers.{i}."
        weight = state[f"{layer}norm.{wrap_norm}weight"]
        residual = hidden + residual
        name = f"{layer}mixer.{wrap}"
        if ps:
            normed = on_strands(lambda x, w=weight: rms(x, w), residual, swap=fused)
            residual = on_strands(lambda x: x, residual, swap=fused)
            hidden = on_strands(lambda x, n=name: both_ways(state, n, x), normed)
        else:
            hidden = both_ways(state, name, rms(residual, weight))
    weight = state[f"{root}norm_f.{wrap_norm}weight"]
    residual = hidden + residual
    if not ps:
        hidden = rms(residual, weight)
        return hidden, hidden @ table.T
    hidden = on_strands(lambda x: rms(x, weight), residual)
    return hidden, hidden[:, :DIM] @ table.T + hidden[:, DIM:].flip(1) @ table[complement].T


def model_of(kind: str, state: State) -> tuple[Caduceus, LanguageHead]:
    options: dict[str, Any] = {"dim": DIM, "depth": DEPTH, "state": STATE, **KINDS[kind]}
    model = Caduceus(CaduceusOptions(**options), norm=make_norm("rmsnorm")).double()
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    model.load_state_dict(own)
    head = LanguageHead(DIM, strands=model.strands, embedding=None, std=0.0).double()
    head.load_state_dict({"weight": state["lm_head.weight"]})
    return model.eval(), head


def converted(state: State) -> tuple[State, list[str]]:
    found = from_caduceus(state)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_checkpoint_is_the_published_network(kind: str) -> None:
    state = official(kind)
    model, head = model_of(kind, converted(state)[0])
    ids = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(2))
    hidden = model(ids)
    logits = head(hidden)
    for row in range(2):
        expected_hidden, expected_logits = reference(state, ids[row], kind)
        torch.testing.assert_close(hidden[row], expected_hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits[row], expected_logits, rtol=0, atol=1e-10)
    assert logits.std() > 0.1


def test_crosswise_and_straight_are_two_functions_of_the_same_weights() -> None:
    fused, unfused = (converted(official(kind))[0] for kind in ("ps fused", "ps unfused"))
    assert fused.keys() == unfused.keys()
    ids = torch.randint(7, 11, (1, 9), generator=torch.Generator().manual_seed(2))
    first, second = (model_of(k, fused)[0](ids) for k in ("ps fused", "ps unfused"))
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_a_file_gives_the_same_tensors(kind: str) -> None:
    state = official(kind)
    expected, notes = converted(state)
    lightning = {f"model.{name}": value for name, value in state.items()}
    bare = {n.removeprefix("caduceus."): v for n, v in state.items() if "lm_head" not in n}
    for same in (lightning, {n: v for n, v in state.items() if "complement" not in n}):
        found, again = converted(same)
        assert again == notes
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert converted(bare)[0].keys() == expected.keys() - {"lm_head.weight"}
    one_name = {n: v for n, v in state.items() if "mamba_fwd.in_proj" not in n}
    one_name = {n: v for n, v in one_name.items() if "mamba_rev.out_proj" not in n}
    assert converted(one_name)[0].keys() == expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_say_what_a_file_was_trained_as(kind: str) -> None:
    state = official(kind)
    assert trained_as(state) == KINDS[kind]
    _, notes = converted(state)
    wanted = " ".join(f"model.{k}={str(v).lower()}" for k, v in KINDS[kind].items())
    assert len(notes) == 1
    assert notes[0].endswith(wanted)


def test_other_files_pass_by() -> None:
    model = Caduceus(CaduceusOptions(dim=DIM, depth=1), norm=make_norm("dyt"))
    ours = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    assert from_caduceus(ours) is None
    assert from_caduceus({"backbone.layers.0.mixer.in_proj.weight": torch.ones(2, 2)}) is None
    assert trained_as({}) is None


def test_what_is_not_known_is_passed_on() -> None:
    found, _ = converted(official("ph") | {"decoder.weight": torch.ones(1)})
    assert "decoder.weight" in found


def test_an_embedding_that_is_only_there_as_the_head_is_taken_from_it() -> None:
    state = {n: v for n, v in official("ps fused").items() if "word_embeddings.embedding" not in n}
    found, notes = converted(state)
    assert torch.equal(found["backbone.embedding.weight"], found["lm_head.weight"])
    assert "no embedding" in notes[-1]


def test_twelve_rows_stay_twelve() -> None:
    found, _ = converted(official("ps fused", rows=12))
    assert len(found["backbone.embedding.weight"]) == len(found["lm_head.weight"]) == 12


@pytest.mark.parametrize("tied", TIED)
def test_projections_that_the_directions_do_not_share_are_refused(tied: str) -> None:
    state = official("ps fused")
    state[f"caduceus.backbone.layers.1.mixer.submodule.mamba_rev.{tied}.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=f"mamba_fwd.{tied}.weight and .*mamba_rev.* differ"):
        from_caduceus(state)


def test_other_token_ids_are_refused() -> None:
    state = official("ps fused")
    state["lm_head.complement_map"] = torch.tensor([0, 1, 2, 6, 5, 4, 3, 7])
    with pytest.raises(ValueError, match=r"complement_map is \[0, 1, 2, 6"):
        from_caduceus(state)
    with pytest.raises(ValueError, match="has 8 rows"):
        from_caduceus(official("ph", rows=8))
