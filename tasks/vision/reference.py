"""timm's VisionTransformer as the reference for a step of vision/classify with one of our ViTs.

It is the code that most published ViTs were trained with. Sizes, weights, batch and loss are equal;
dropouts and stochastic depth are 0 on both sides, since two implementations do not drop the same.
Its norm is nn.LayerNorm, which the model was published with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from suite.benches.peers import check_norm, check_rows
from suite.config import Config
from suite.data import DataInfo, DataOptions, Splits, SuiteDataModule
from suite.errors import ConfigError
from suite.module import Batch
from tasks.vision.vit import EPS, ViTOptions

NORM = "layernorm"


class ClassifyReference:
    """See suite.benches.peers.Reference."""

    audio = False
    notes: Sequence[str] = (
        "our step counts its hits for the log as well; theirs computes the loss alone",
        "dropout and stochastic depth are off",
    )

    def __init__(self) -> None:
        try:
            import timm
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise ConfigError(
                "task=vision/classify: suite.bench compares it with timm, which is not installed; "
                'pip install "dyt-suite[timm]"'
            ) from None
        self.library: Any = VisionTransformer
        self.name = f"timm {timm.__version__} VisionTransformer"
        self.info: DataInfo | None = None

    def published_norm(self, config: Config) -> str:
        """LayerNorm, whatever the size."""
        return NORM

    def settle(self, config: Config) -> Config:
        """Without dropout and stochastic depth; with the first weights of the model's own class."""
        model: Any = config.model
        if not isinstance(model, ViTOptions):
            raise ConfigError(
                f"model={config.model_name}: suite.bench compares a ViT with {self.name}; choose "
                "model=vit_fmnist, vit_tiny, vit_small, vit_base or vit_large"
            )
        check_norm(config, name=self.name, published=NORM)
        return replace(config, model=replace(model, dropout=0.0, drop_path=0.0, embed_rms=False))

    def batch(self, splits: Splits, *, rows: int, seconds: float | None) -> Batch:
        """The first training images, not augmented."""
        check_rows(rows, len(splits.train))
        self.info = splits.info
        return SuiteDataModule(splits, options=DataOptions(), seed=0).fixed_batch(rows)

    def build(self, config: Config) -> nn.Module:
        """VisionTransformer of the same sizes, in training mode, for the data of `batch`."""
        assert self.info is not None
        m: Any = config.model
        made: nn.Module = self.library(
            img_size=m.image_size,
            patch_size=m.patch_size,
            in_chans=m.in_chans,
            num_classes=self.info.classes,
            global_pool="token" if m.pool == "cls" else "avg",
            embed_dim=m.dim,
            depth=m.depth,
            num_heads=m.heads,
            mlp_ratio=m.mlp_ratio,
            qkv_bias=m.qkv_bias,
            qk_norm=m.qk_norm,
            class_token=m.class_token,
            norm_layer=partial(nn.LayerNorm, eps=EPS),
        )
        return made.train()

    def share(self, model: nn.Module, module: Any) -> None:
        """The reference's weights, whose names are ours."""
        module.model.load_state_dict(model.state_dict(), strict=True)

    def loss(self, model: nn.Module, module: Any, batch: Batch) -> Callable[[], Tensor]:
        """Its mean loss of the batch, smoothed as ours is."""
        smooth = nn.CrossEntropyLoss(label_smoothing=module.options.label_smoothing)
        image, label = batch["image"], batch["label"]

        def mean() -> Tensor:
            found: Tensor = smooth(model(image).float(), label)
            return found

        return mean

    def same_noise(self, module: Any, batch: Batch) -> AbstractContextManager[None]:
        """Neither side draws any."""
        return nullcontext()
