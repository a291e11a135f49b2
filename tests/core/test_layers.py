"""Attention, MLP and drop path as they are shared by the tasks."""

import pytest
import torch
from torch import nn

from suite.layers import Attention, DropPath, Mlp, drop_path_schedule
from suite.norms import make_norm


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_of_scaled_products(masked):
    torch.manual_seed(0)
    layer = Attention(12, heads=3, qk_norm=make_norm("layernorm")).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = not masked
    parts = [part.view(2, 5, 3, 4).transpose(1, 2) for part in layer.qkv(x).split(12, dim=-1)]
    q, k, v = layer.q_norm(parts[0]), layer.k_norm(parts[1]), parts[2]
    weights = (q @ k.mT / 2).masked_fill(~mask, float("-inf")).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(layer(x, mask if masked else None), expected)


def test_attention_agrees_with_torchs_own_layer():
    torch.manual_seed(0)
    ours, theirs = Attention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide dim, got heads=3 and dim=8"):
        Attention(8, heads=3)


def test_mlp_is_two_linear_layers_around_an_exact_gelu():
    mlp = Mlp(4, hidden_dim=6)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(x), mlp.fc2(nn.functional.gelu(mlp.fc1(x))))


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out.amin(dim=(1, 2)), out.amax(dim=(1, 2)))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)


def test_drop_path_is_off_in_evaluation_and_at_zero_and_draws_nothing():
    x = torch.randn(8, 2)
    state = torch.get_rng_state()
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_path_rate_must_be_a_share():
    with pytest.raises(ValueError, match="p must be at least 0 and below 1"):
        DropPath(1.0)


def test_drop_path_rises_linearly_over_the_blocks():
    assert drop_path_schedule(0.3, depth=4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_schedule(0.3, depth=1) == [0.0]
