"""alpha from data: alpha = target / RMS(input of the site), set over one batch, site by site.

At small scale alpha x RMS(input) at initialisation decides how a point-wise norm trains: with the
papers' alpha 0.5 it is 0.16 to 0.28 where about 1 is right. Sites are set in the order in which the
forward pass reaches them, so that a later site sees the output of calibrated earlier ones. The
alphas are parameters: a checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from suite.norms.factory import norm_modules
from suite.norms.pointwise import PointwiseNorm


def calibrate(
    model: nn.Module, forward: Callable[[], Any], *, target: float | None = None
) -> dict[str, float]:
    """Set alpha of every point-wise norm that was made with alpha_init="calibrated"; path -> alpha.

    forward: runs the model once over a fixed batch; not called if there is nothing to set. It runs
    in eval mode (put back afterwards), without gradients, and leaves the random state as it was. In
    training over several ranks the caller gives every rank the same batch and weights. Call it
    before torch.compile.
    target: alpha x RMS(input) to reach; None takes each norm's calibrate_target (1). A norm that is
    reached more than once is set the first time. alpha per channel gets one value for all channels.
    Raises ValueError, with the path, for an input of RMS 0 or not finite, and for norms that the
    pass never reached.
    """
    waiting = {
        module: path
        for path, module in norm_modules(model)
        if isinstance(module, PointwiseNorm) and module.to_calibrate
    }
    if not waiting:
        return {}
    alphas: dict[str, float] = {}

    def set_alpha(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = waiting.pop(module, None)
        if path is None:
            return
        x = args[0] if args else kwargs["x"]
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        goal = module.calibrate_target if target is None else target
        alphas[path] = float(goal) / _rms(module, x, mask, path)
        module.alpha.data.fill_(alphas[path])

    hooks = [module.register_forward_pre_hook(set_alpha, with_kwargs=True) for module in waiting]
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if waiting:
        paths = ", ".join(sorted(waiting.values()))
        raise ValueError(f"calibrate: the forward pass never reached {paths}")
    return alphas


def _rms(module: PointwiseNorm, x: Tensor, mask: Tensor | None, path: str) -> float:
    """Root mean square over the elements of x, over its valid positions where there is a mask."""
    x = x.detach().double()
    if mask is not None:
        x = x.movedim(1, -1) if module.channels_first else x
        x = x[
            mask.bool()
            .reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim()))
            .expand(x.shape[:-1])
        ]
    rms = x.square().mean().sqrt().item()
    if not 0 < rms < float("inf"):
        raise ValueError(
            f"calibrate: the input of {path} has RMS {rms}, so alpha cannot be set from it"
        )
    return rms
