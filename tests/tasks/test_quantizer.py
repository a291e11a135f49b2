"""The Gumbel product quantizer: what it takes, what it hands back, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tasks.speech.quantizer import Quantizer

G, V, C, D = 2, 5, 6, 8


def quantizer(seed: int = 0) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(C, codebooks=G, codes=V, code_dim=D)


def frames(*, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, C, generator=torch.Generator().manual_seed(1)).to(dtype)


def gumbel(*, dtype: torch.dtype = torch.float32) -> Tensor:
    uniform = torch.rand(3, 7, G, V, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return -(-uniform.log()).log()


def test_without_noise_each_codebook_gives_the_vector_of_its_largest_logit() -> None:
    model, x = quantizer(), frames()
    found = model(x)
    logits = model.weight_proj(x)
    for g in range(G):
        codes = logits[..., g * V : (g + 1) * V].argmax(-1)
        assert torch.equal(found.codes[..., g], codes)
        half = found.vectors[..., g * D // G : (g + 1) * D // G]
        assert torch.equal(half, model.codebook[g][codes])
        torch.testing.assert_close(
            found.probs[..., g, :], logits[..., g * V : (g + 1) * V].softmax(-1)
        )


def test_noise_moves_the_choice_but_not_the_probabilities() -> None:
    model, x, noise = quantizer(), frames(), 10 * gumbel()
    plain, noisy = model(x), model(x, noise_BMGV=noise, temperature=2.0)
    assert torch.equal(plain.probs, noisy.probs)
    assert not torch.equal(plain.codes, noisy.codes)
    logits = model.weight_proj(x).unflatten(-1, (G, V))
    assert torch.equal(noisy.codes, (logits + noise).argmax(-1))
    taken = [model.codebook[g][noisy.codes[..., g]] for g in range(G)]
    assert torch.equal(noisy.vectors, torch.cat(taken, dim=-1))


def test_noise_of_zero_takes_what_no_noise_takes() -> None:
    model, x = quantizer(), frames()
    plain, zero = model(x), model(x, noise_BMGV=torch.zeros(3, 7, G, V))
    assert torch.equal(plain.vectors, zero.vectors)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_is_that_of_the_softmax_at_the_temperature(temperature: float) -> None:
    model = quantizer().double()
    x = frames(dtype=torch.float64).requires_grad_()
    noise = gumbel(dtype=torch.float64)
    weights = torch.randn(3, 7, D, dtype=torch.float64)
    (model(x, noise_BMGV=noise, temperature=temperature).vectors * weights).sum().backward()

    logits = model.weight_proj(x).unflatten(-1, (G, V)).detach()
    soft = ((logits + noise) / temperature).softmax(-1)
    score = torch.einsum("btgd,gvd->btgv", weights.unflatten(-1, (G, -1)), model.codebook.detach())
    to_logits = soft * (score - (soft * score).sum(-1, keepdim=True)) / temperature
    assert x.grad is not None
    torch.testing.assert_close(x.grad, to_logits.flatten(-2) @ model.weight_proj.weight)
    assert model.codebook.grad is not None
    hard = torch.nn.functional.one_hot((logits + noise).argmax(-1), V).double()
    to_codebook = torch.einsum("btgv,btgd->gvd", hard, weights.unflatten(-1, (G, -1)))
    torch.testing.assert_close(model.codebook.grad, to_codebook)


def test_the_diversity_of_the_probabilities_has_a_gradient_without_noise() -> None:
    model = quantizer()
    model(frames()).probs.mean((0, 1)).square().sum().backward()
    assert model.weight_proj.weight.grad is not None
    assert model.weight_proj.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("noisy", [True, False])
def test_autocast_changes_nothing(noisy: bool) -> None:
    model, x = quantizer(), frames()
    noise = gumbel() if noisy else None
    plain = model(x, noise_BMGV=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model(x, noise_BMGV=noise)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert model(x.bfloat16(), noise_BMGV=noise).probs.dtype == torch.float32


def test_first_weights_are_fairseqs_in_distribution() -> None:
    torch.manual_seed(0)
    model = Quantizer(256, codebooks=2, codes=320, code_dim=256)
    assert model.weight_proj.weight.std().item() == pytest.approx(1, rel=0.02)
    assert not model.weight_proj.bias.any()
    low, high = model.codebook.min().item(), model.codebook.max().item()
    assert 0 <= low < 0.01
    assert 0.99 < high <= 1
    assert model.codebook.mean().item() == pytest.approx(0.5, rel=0.02)
    used = model(torch.nn.functional.layer_norm(torch.randn(1, 500, 256), (256,))).codes
    assert len(used[..., 0].unique()) > 200
