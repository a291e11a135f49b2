"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) with the norm as an argument.

An image is cut into patches, each patch becomes a token by one linear map, and a pre-norm
Transformer reads them. Parameter names are those of timm's `vit_*_patch16_224`, with the class
token or `global_pool="avg"` (mean over the patch tokens, then `fc_norm`: the form of the DyT paper,
arXiv 2503.10622), so that published weights load unchanged.

Shapes: B batch, N patches, T tokens (N, and one more with a class token), C channels (`dim`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from suite.data import DataInfo
from suite.layers import Attention, DropPath, Mlp, drop_path_schedule
from suite.norms import NormFactory
from suite.registry import Choice, ModelOptions
from tasks.vision.mae_weights import to_vit
from tasks.vision.patches import check_images
from tasks.vision.shape import image_shape

EPS = 1e-6  # what ViT was published with; a norm option overrides it
POSITION_STD = 0.02
CLASS_TOKEN_STD = 1e-6  # timm's


@dataclass(frozen=True)
class ViTOptions(ModelOptions):
    """Settings of a ViT. The defaults are ViT-B/16 as the DyT paper trains it, without drop path.

    image_size, patch_size: pixels a side; in_chans: channels of the image.
    dim, depth, heads, mlp_ratio: width, blocks, attention heads, hidden width of the MLP over dim.
    pool: "avg" is the mean over the patch tokens, then the final norm; "cls" is the final norm,
        then the class token.
    class_token: whether there is one (timm's models have it with either pool).
    qkv_bias, qk_norm: a bias on q, k and v; norms on every head's q and k (site "qk").
    dropout: on the embedding, after the attention's output and after both MLP layers.
    drop_path: rate of the last block; it rises linearly from 0 at the first.
    init: "timm" is truncated normal 0.02 and zero biases in linear layers; "torch" is PyTorch's.
    head_std: deviation of the head's first weights; None is init's (MAE fine-tunes with 2e-5).
    embed_rms: the patch tokens are to be brought to RMS 1 before training by `scale_embedding`.
    """

    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pool: Literal["avg", "cls"] = "avg"
    class_token: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    init: Literal["timm", "torch"] = "timm"
    head_std: float | None = None
    embed_rms: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "in_chans", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), "
                f"got {self.image_size}"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads ({self.heads}), got {self.dim}")
        if not 1 <= self.mlp_ratio * self.dim < math.inf:
            raise ValueError(
                "mlp_ratio must be finite and give the MLP a width of at least 1, "
                f"got {self.mlp_ratio}"
            )
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.head_std is not None and not 0 < self.head_std < math.inf:
            raise ValueError(f"head_std must be above 0 and finite, got {self.head_std}")
        for name, allowed in (("pool", ("avg", "cls")), ("init", ("timm", "torch"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.pool == "cls" and not self.class_token:
            raise ValueError("pool=cls reads the class token: set class_token=true or pool=avg")


class PatchEmbed(nn.Module):
    """Cut an image into square patches and map each to a token: a convolution without overlap."""

    def __init__(self, dim: int, *, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, in_chans, height, width] -> tokens [B, N, C], row by row."""
        return rearrange(self.proj(image), "b c h w -> b (h w) c")


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        *,
        norm: NormFactory,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim, site="attn", eps=EPS)
        self.attn = Attention(
            dim,
            heads=heads,
            qkv_bias=qkv_bias,
            qk_norm=norm if qk_norm else None,
            qk_eps=EPS,
            dropout=dropout,
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm(dim, site="ffn", eps=EPS)
        self.mlp = Mlp(dim, hidden_dim=int(dim * mlp_ratio), dropout=dropout)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x_BTC: Tensor, mask: Tensor | None = None) -> Tensor:
        x_BTC = x_BTC + self.drop_path1(self.attn(self.norm1(x_BTC, mask)))
        return x_BTC + self.drop_path2(self.mlp(self.norm2(x_BTC, mask)))


class ViT(nn.Module):
    """A ViT classifier. The arguments are the norm, the number of classes and `ViTOptions`' fields.

    They are more than ten because they are the published architecture's own knobs.
    embed_rms is only remembered: whoever trains the model gives `scale_embedding` the images.
    """

    def __init__(
        self,
        *,
        norm: NormFactory,
        classes: int,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        pool: Literal["avg", "cls"] = "avg",
        class_token: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        init: Literal["timm", "torch"] = "timm",
        head_std: float | None = None,
        embed_rms: bool = False,
    ) -> None:
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.embed_rms = embed_rms
        self.patch_embed = PatchEmbed(dim, patch_size=patch_size, in_chans=in_chans)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches + int(class_token), dim))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    norm=norm,
                    heads=heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    dropout=dropout,
                    drop_path=rate,
                )
                for rate in drop_path_schedule(drop_path, depth=depth)
            )
        )
        final_norm = norm(dim, site="final", eps=EPS)
        self.norm = final_norm if pool == "cls" else Unchanged()
        self.pool = ClassTokenPool() if pool == "cls" else MeanPool(skip=int(class_token))
        self.fc_norm = final_norm if pool == "avg" else Unchanged()
        self.head = nn.Linear(dim, classes)
        self._init_weights(init)
        if head_std is not None:
            nn.init.trunc_normal_(self.head.weight, std=head_std)

    def _init_weights(self, init: Literal["timm", "torch"]) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=POSITION_STD)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=CLASS_TOKEN_STD)
        if init == "torch":
            return  # every layer has already drawn PyTorch's defaults
        for module in self.modules():  # timm, too, leaves the patch convolution as it is
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, image: Tensor) -> Tensor:
        """image [B, in_chans, image_size, image_size] -> tokens with positions [B, T, C]."""
        tokens_BTC = self.patch_embed(image)
        if self.cls_token is not None:
            cls_B1C = self.cls_token.expand(len(image), -1, -1)
            tokens_BTC = torch.cat((cls_B1C, tokens_BTC), dim=1)
        return tokens_BTC + self.pos_embed

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """image [B, in_chans, image_size, image_size] -> logits [B, classes].

        mask: bool [B], True = a real example; norms over the batch leave the others out.
        """
        x_BTC = self.pos_drop(self.embed(image))
        for block in self.blocks:
            x_BTC = block(x_BTC, mask)
        return self.head(self.fc_norm(self.pool(self.norm(x_BTC, mask)), mask))

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a masked autoencoder under this model's names, and notes; any other file's
        as they are."""
        keep_norm = isinstance(self.pool, ClassTokenPool)
        return to_vit(state, own=self.state_dict(), keep_norm=keep_norm, whole=whole)

    def weights_hint(self, names: set[str]) -> str:
        """What to set so that a file with these names fits; empty if that is not the matter."""
        own = set(self.state_dict())
        wanted = {
            "model.pool=cls": "norm.weight" in names - own,
            "model.pool=avg": "fc_norm.weight" in names - own,
            "model.class_token=true": "cls_token" in names - own,
            "model.class_token=false": "cls_token" in own - names,
            "model.qk_norm=true": "blocks.0.attn.q_norm.weight" in names - own,
            "model.qk_norm=false": "blocks.0.attn.q_norm.weight" in own - names,
            "model.qkv_bias=true": "blocks.0.attn.qkv.bias" in names - own,
            "model.qkv_bias=false": "blocks.0.attn.qkv.bias" in own - names,
        }
        changes = [change for change, needed in wanted.items() if needed]
        return f"The file is for {' '.join(changes)}" if changes else ""

    def layer_of(self, name: str) -> int:
        """The depth of a parameter, for layer-wise learning rates: embedding 0, then the blocks.

        The final norm and the head are one more (timm's and MAE's numbers).
        """
        first, _, rest = name.partition(".")
        if first in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest.partition(".")[0]) + 1 if first == "blocks" else len(self.blocks) + 1

    fixed_by_weights = ("heads",)  # options that no name or shape of a weight shows

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed besides norms and biases (timm's list)."""
        return {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}


class Unchanged(nn.Module):
    """Where timm has an nn.Identity: the final norm stands on the other side of the pooling."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


class ClassTokenPool(nn.Module):
    """The first token."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC[:, 0]


class MeanPool(nn.Module):
    """The mean over the tokens after the first `skip`: timm leaves the class token out."""

    def __init__(self, *, skip: int = 0) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC[:, self.skip :].mean(dim=1)


@torch.no_grad()
def scale_embedding(model: ViT, images: Tensor) -> float:
    """Scale the patch projection until patch + position tokens have RMS 1 over `images`.

    A point-wise norm passes on the scale of its input, so alpha means the same in every model only
    if the embedding has a known scale. It asks nothing of the norm: every norm starts from the same
    weights. Positions and the class token stay as they are.

    images: [B, in_chans, image_size, image_size], the same on every rank, as are the weights.
    Returns the RMS before. Raises ValueError if no scale gives RMS 1.
    """
    patches = model.patch_embed(images.to(model.pos_embed)).double()
    positions = model.pos_embed[:, -patches.shape[1] :].double().expand_as(patches)
    # mean((s * patches + positions)^2) = 1 is a quadratic in s: a s^2 + 2 b s + c = 0
    a, b, c = (patches**2).mean(), (patches * positions).mean(), (positions**2).mean() - 1
    before = math.sqrt((a + 2 * b + c + 1).item())
    if not a > 0 or not c < 0:
        raise ValueError(
            "images must not be blank, and pos_embed must have an RMS below 1, to scale the patch "
            "projection to tokens of RMS 1"
        )
    scale = ((-b + (b * b - a * c).sqrt()) / a).item()
    for parameter in model.patch_embed.parameters():
        parameter.mul_(scale)
    return before


def build_vit(options: ViTOptions, *, norm: NormFactory, data: DataInfo) -> ViT:
    """The ViT of `options` for the images and classes of `data`.

    Raises ConfigError if image size or channels differ from the data's, with what to set.
    """
    classes, _, _ = image_shape(data, model="a ViT classifier")
    check_images(options, data)
    return ViT(
        norm=norm,
        classes=classes,
        image_size=options.image_size,
        patch_size=options.patch_size,
        in_chans=options.in_chans,
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        mlp_ratio=options.mlp_ratio,
        pool=options.pool,
        class_token=options.class_token,
        qkv_bias=options.qkv_bias,
        qk_norm=options.qk_norm,
        dropout=options.dropout,
        drop_path=options.drop_path,
        init=options.init,
        head_std=options.head_std,
        embed_rms=options.embed_rms,
    )


FMNIST = ViTOptions(
    image_size=28,
    patch_size=7,
    in_chans=1,
    dim=64,
    depth=4,
    heads=4,
    class_token=False,
    init="torch",
    embed_rms=True,
)

MODELS = {
    "vit_fmnist": Choice(FMNIST, build_vit, "0.2 M parameters, 28 x 28 grey images, patch 7"),
    "vit_tiny": Choice(
        ViTOptions(dim=192, heads=3), build_vit, "ViT-Ti/16, 5.7 M parameters, 224 x 224"
    ),
    "vit_small": Choice(
        ViTOptions(dim=384, heads=6), build_vit, "ViT-S/16, 22 M parameters, 224 x 224"
    ),
    "vit_base": Choice(ViTOptions(), build_vit, "ViT-B/16, 87 M parameters, 224 x 224"),
    "vit_large": Choice(
        ViTOptions(dim=1024, depth=24, heads=16), build_vit, "ViT-L/16, 304 M parameters, 224 x 224"
    ),
}
