"""Attention, MLP and drop path: the parts of a pre-norm Transformer that two or more tasks share.

They are written once so that a norm is compared inside the same layers in every domain. Parameter
names are timm's (`qkv`, `q_norm`, `proj`, `fc1`, `fc2`), so published weights load unchanged.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from suite.norms import NormFactory


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one linear layer (arXiv 1706.03762).

    qkv_bias: a bias on that layer. dropout: after the output projection.
    qk_norm: the factory that makes the norms of every head's q and k, at site "qk" (arXiv
        2302.05442); None: no such norms. qk_eps: the eps that the model was published with.
    Raises ValueError if `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        qkv_bias: bool = True,
        qk_norm: NormFactory | None = None,
        qk_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} and dim={dim}")
        head_dim = dim // heads
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(head_dim, site="qk", eps=qk_eps) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim, site="qk", eps=qk_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C].

        mask: bool, broadcasts to [B, H, T, T] (query, key), True where the query may look.
        """
        qkv = rearrange(self.qkv(x_BTC), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.unbind(0)
        q_BHTD, k_BHTD = self.q_norm(q_BHTD), self.k_norm(k_BHTD)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask)
        return self.proj_drop(self.proj(rearrange(out_BHTD, "b h t d -> b t (h d)")))


class Mlp(nn.Module):
    """Two linear layers, an exact GELU between them, dropout after each (arXiv 2010.11929)."""

    def __init__(self, dim: int, *, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch for a share `p` of the examples.

    What stays is divided by 1 - p, so the mean over draws is the input. Off in evaluation and at
    p = 0, where it draws no random number. Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be at least 0 and below 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if self.p == 0.0 or not self.training:
            return x
        keep = 1.0 - self.p
        keep_B1 = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * keep_B1 / keep

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def drop_path_schedule(drop_path: float, *, depth: int) -> list[float]:
    """Rates that rise linearly from 0 at the first block to `drop_path` at the last, as timm's."""
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]
