"""Masked autoencoder (He et al., arXiv 2111.06377) with the norm as an argument.

A ViT reads a quarter of the patches; a narrow decoder gets its tokens, a mask token wherever a
patch was hidden, and all positions, and predicts the pixels. Every norm comes from the factory: two
in each block, one after the encoder, one after the decoder, as the DyT paper swaps them (arXiv
2503.10622, section 5): 42 in ViT-B, 66 in ViT-L. Patch embedding, blocks and names are those of
tasks/vision/vit.py, and with the decoder those of the published files, so that they load unchanged.

Shapes: B images, N patches, V visible patches, T tokens (patches, and one more with a class token),
C channels, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.norms import NormFactory
from suite.registry import Choice, ModelOptions
from tasks.vision.mae_weights import to_mae
from tasks.vision.patches import check_images
from tasks.vision.vit import EPS, Block, PatchEmbed

TOKEN_STD = 0.02  # of the class token and the mask token
WAVELENGTH = 10_000.0  # of the slowest sine, over 2 pi


@dataclass(frozen=True)
class MaeOptions(ModelOptions):
    """Settings of a masked autoencoder. The defaults are the published ViT-B/16.

    image_size, patch_size: pixels a side; in_chans: channels of the image.
    dim, depth, heads: of the encoder. decoder_dim, decoder_depth, decoder_heads: of the decoder.
    mlp_ratio: hidden width of both MLPs over their width.
    class_token: a token that stands for no patch; published files have it, fine-tuning without it
        needs model.class_token=false there too.
    """

    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    class_token: bool = True

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads")
        for name in (*sizes, "decoder_dim", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size or self.image_size == self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size ({self.patch_size}), twice it or "
                f"more, got {self.image_size}"
            )
        for name in ("dim", "decoder_dim"):
            heads, width = name.replace("dim", "heads"), getattr(self, name)
            if width % getattr(self, heads):
                raise ValueError(
                    f"{name} must be a multiple of {heads} ({getattr(self, heads)}), got {width}"
                )
            if width % 4:
                raise ValueError(
                    f"{name} must be a multiple of 4 (sines and cosines of two axes), got {width}"
                )
            if not 1 <= self.mlp_ratio * width < math.inf:
                raise ValueError(
                    "mlp_ratio must be finite and give the MLP a width of at least 1, "
                    f"got {self.mlp_ratio}"
                )


class MaskedAutoencoder(nn.Module):
    """The arguments are the norm and `MaeOptions`' fields."""

    def __init__(
        self,
        *,
        norm: NormFactory,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        side, extra = image_size // patch_size, int(class_token)
        self.patch_size, self.patches, self.dim, self.extra = patch_size, side * side, dim, extra
        self.patch_embed = PatchEmbed(dim, patch_size=patch_size, in_chans=in_chans)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.pos_embed = fixed(sincos_positions(dim, side=side, extra=extra))
        self.blocks = nn.ModuleList(
            Block(dim, norm=norm, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = norm(dim, site="final", eps=EPS)

        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = fixed(sincos_positions(decoder_dim, side=side, extra=extra))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, norm=norm, heads=decoder_heads, mlp_ratio=mlp_ratio)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_dim, site="final", eps=EPS)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_chans)
        self._init_weights()

    def _init_weights(self) -> None:
        """The published first weights; the bias of the patch projection stays PyTorch's, too."""
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.dim, -1))  # as if linear
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=TOKEN_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def visible(self, mask_ratio: float) -> int:
        """How many patches stay visible: the published N * (1 - mask_ratio), rounded down."""
        return int(self.patches * (1 - mask_ratio))

    def forward(
        self, image: Tensor, noise_BN: Tensor, *, mask_ratio: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """image [B, in_chans, image_size, image_size] -> (predicted [B, N, P], masked [B, N]).

        noise_BN: the patches with the smallest numbers stay visible. masked: bool, True where the
        encoder did not see the patch. mask: bool [B], True = a real example; norms over the batch
        leave the others out.
        """
        order_BN = noise_BN.argsort(dim=1, stable=True)  # stable: the same on every device
        seen_BV = order_BN[:, : self.visible(mask_ratio)]
        masked_BN = torch.ones_like(noise_BN, dtype=torch.bool).scatter(1, seen_BV, False)
        tokens_BTC = self.encode(image, mask, seen_BV=seen_BV)
        return self.decode(tokens_BTC, mask, order_BN=order_BN), masked_BN

    def encode(
        self, image: Tensor, mask: Tensor | None = None, *, seen_BV: Tensor | None = None
    ) -> Tensor:
        """image -> tokens [B, T, C] after the last norm, of all patches or of `seen_BV` only."""
        x_BTC = self.patch_embed(image) + self.pos_embed[:, self.extra :]
        if seen_BV is not None:
            x_BTC = x_BTC.gather(1, seen_BV.unsqueeze(-1).expand(-1, -1, self.dim))
        if self.cls_token is not None:
            cls_B1C = (self.cls_token + self.pos_embed[:, :1]).expand(len(image), -1, -1)
            x_BTC = torch.cat((cls_B1C.to(x_BTC.dtype), x_BTC), dim=1)
        for block in self.blocks:
            x_BTC = block(x_BTC, mask)
        normed_BTC: Tensor = self.norm(x_BTC, mask)
        return normed_BTC

    def decode(self, tokens_BTC: Tensor, mask: Tensor | None = None, *, order_BN: Tensor) -> Tensor:
        """Tokens of the first patches of `order_BN` -> pixels of all patches [B, N, P]."""
        x_BTC = self.decoder_embed(tokens_BTC)
        cls_BTC, seen_BVC = x_BTC[:, : self.extra], x_BTC[:, self.extra :]
        batch, visible, dim = seen_BVC.shape
        hidden = self.mask_token.to(x_BTC.dtype).expand(batch, self.patches - visible, dim)
        by_noise_BNC = torch.cat((seen_BVC, hidden), dim=1)
        place_BN = order_BN.argsort(dim=1)  # where each patch of the image stands in that order
        x_BNC = by_noise_BNC.gather(1, place_BN.unsqueeze(-1).expand(-1, -1, dim))
        x_BTC = torch.cat((cls_BTC, x_BNC), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x_BTC = block(x_BTC, mask)
        predicted_BTP: Tensor = self.decoder_pred(self.decoder_norm(x_BTC, mask))
        return predicted_BTP[:, self.extra :]

    def features(self, image: Tensor) -> Tensor:
        """image -> [B, C]: the mean over the patch tokens, which is what fine-tuning pools."""
        return self.encode(image)[:, self.extra :].mean(dim=1)

    def adapt(
        self, state: Mapping[str, Tensor], *, whole: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a file, completed by a fresh decoder where it has none, and notes."""
        return to_mae(state, own=self.state_dict(), whole=whole)

    def weights_hint(self, names: set[str]) -> str:
        """What to set so that a file with these names fits; empty if that is not the matter."""
        if ("cls_token" in names) == (self.cls_token is not None):
            return ""
        return f"The file is for model.class_token={str('cls_token' in names).lower()}"

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: embedding 0, blocks, their norm, the decoder's, its head."""
        first, _, rest = name.partition(".")
        depth, number = len(self.blocks), rest.partition(".")[0]
        if first in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        if first == "blocks":
            return int(number) + 1
        if first in ("norm", "decoder_embed", "mask_token", "decoder_pos_embed"):
            return depth + 1
        if first == "decoder_blocks":
            return depth + 2 + int(number)
        return depth + 2 + len(self.decoder_blocks)

    fixed_by_weights = ("heads", "decoder_heads")  # options that no name or shape shows

    def no_weight_decay(self) -> set[str]:
        """None besides norms and biases: the published code decays both tokens."""
        return set()


def fixed(values: Tensor) -> nn.Parameter:
    """A parameter that is saved and not trained."""
    return nn.Parameter(values, requires_grad=False)


def sincos_positions(dim: int, *, side: int, extra: int) -> Tensor:
    """[1, extra + side * side, dim]: sines and cosines of column, then of row; zeros for `extra`.

    Each axis has dim / 4 frequencies from 1 down to nearly 1 / 10,000, and of those first the
    sines, then the cosines (the published order).
    """
    rates = WAVELENGTH ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rates
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)  # [side, dim / 2]
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    patches = torch.cat((column, row), dim=1)
    return torch.cat((patches.new_zeros(extra, dim), patches)).float().unsqueeze(0)


def build_mae(options: MaeOptions, *, norm: NormFactory, data: DataInfo) -> MaskedAutoencoder:
    """The masked autoencoder of `options` for the images of `data`, which need no labels.

    Raises ConfigError if image size or channels differ from the data's, with what to set.
    """
    if not {"image_size", "in_chans"} <= set(data.extra):
        raise ConfigError(
            f"data={data.name}: has no images, which a masked autoencoder needs. "
            "Choose another data set"
        )
    check_images(options, data)
    return MaskedAutoencoder(
        norm=norm,
        image_size=options.image_size,
        patch_size=options.patch_size,
        in_chans=options.in_chans,
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        mlp_ratio=options.mlp_ratio,
        decoder_dim=options.decoder_dim,
        decoder_depth=options.decoder_depth,
        decoder_heads=options.decoder_heads,
        class_token=options.class_token,
    )


TINY = MaeOptions(
    image_size=28,
    patch_size=4,
    in_chans=1,
    dim=64,
    depth=4,
    heads=4,
    decoder_dim=64,
    decoder_depth=2,
    decoder_heads=4,
)

MODELS = {
    "mae_tiny": Choice(TINY, build_mae, "0.3 M parameters, 28 x 28 grey images, patch 4"),
    "mae_vit_base": Choice(MaeOptions(), build_mae, "ViT-B/16, 112 M parameters, 224 x 224"),
    "mae_vit_large": Choice(
        MaeOptions(dim=1024, depth=24, heads=16),
        build_mae,
        "ViT-L/16, 329 M parameters, 224 x 224",
    ),
}
