"""model=timm on many families: what is swapped, that it trains, and that the rest is timm's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm_families import FAMILIES, batch, small, timms_own
from torch import Tensor, nn

from suite.checkpoint import read_weights
from suite.norms import foreign_norms, make_norm, norm_modules
from tasks.vision.timm_model import TimmModel

__all__ = ["small"]  # a fixture

OTHER_NORMS = [
    ("vit_tiny_patch16_224", "derf"),
    ("convnext_tiny", "batchnorm"),
    ("swin_tiny_patch4_window7_224", "rmsnorm"),
    ("resnet26d", "batchnorm"),
    ("test_efficientnet", "layernorm"),
    ("maxvit_tiny_rw_224", "layernorm"),
]
CELLS = [*((name, "dyt") for name in FAMILIES), *OTHER_NORMS]


def ran(model: nn.Module, image: Tensor) -> set[str]:
    """Paths of the factory's norms that a forward went through."""
    seen: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: seen.add(path))  # type: ignore[misc]
        for path, module in norm_modules(model)
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_replaced_is_the_whole_list(name: str, small: Callable[..., TimmModel]) -> None:
    model = small(name)
    assert Counter((r.site, r.was) for r in model.replaced) == FAMILIES[name][2]
    assert {r.now for r in model.replaced} == {"dyt"}
    assert model.kept == foreign_norms(model, make_norm("dyt")) == []
    own = timms_own(name)
    owned = {r.path for r in model.replaced}

    def rest(net: nn.Module) -> dict[str, torch.Size]:
        named = net.state_dict().items()
        return {k: v.shape for k, v in named if k.rpartition(".")[0] not in owned}

    assert rest(model) == rest(own)


@pytest.mark.parametrize(("name", "norm"), CELLS)
def test_two_training_steps_and_every_norm_runs(
    name: str, norm: str, small: Callable[..., TimmModel]
) -> None:
    model = small(name, norm).train()
    image, label = batch(name)
    every = {path for path, _ in norm_modules(model)}
    assert len(every) == sum(FAMILIES[name][2].values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label)
        loss.backward()
        bad = [
            parameter_name
            for parameter_name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
        ]
        assert bad == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert all(p.isfinite().all() for p in model.parameters())
    assert ran(model, image) == every
    with torch.no_grad():
        assert ran(model.eval(), image) == every
        assert model(image).shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("vit_tiny_patch16_224", "layernorm"),
        ("deit_tiny_distilled_patch16_224", "layernorm"),
        ("swin_tiny_patch4_window7_224", "layernorm"),
        ("convnext_tiny", "layernorm"),
        ("convnext_atto_rms", "rmsnorm"),
        ("resnet26d", "batchnorm"),
        ("resnetv2_50", "batchnorm"),
        ("test_efficientnet", "batchnorm"),
        ("regnetx_002", "batchnorm"),
    ],
)
def test_with_its_own_norm_a_model_is_timms(
    name: str, norm: str, small: Callable[..., TimmModel], tmp_path: Path
) -> None:
    """timm's state dict loads under its own names, and training and evaluation give the same."""
    own = timms_own(name)
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(own.state_dict(), tmp_path / "timm.safetensors")
    model = small(name, norm)
    described = make_norm(norm).describe()
    read_weights(model, tmp_path / "timm.safetensors", norm=described, key="evaluate")
    image, _ = batch(name)
    for mode in (True, False):
        torch.testing.assert_close(
            model.train(mode)(image), own.train(mode)(image), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_layers_from_the_stem_to_the_head(
    name: str, small: Callable[..., TimmModel]
) -> None:
    model = small(name)
    layers = [model.layer_of(parameter_name) for parameter_name, _ in model.named_parameters()]
    assert min(layers) == 0
    assert sorted(set(layers)) == list(range(max(layers) + 1))
    assert model.layer_of(
        [k for k, _ in model.named_parameters() if "head" in k or "fc." in k or "classifier" in k][
            -1
        ]
    ) == max(layers)
