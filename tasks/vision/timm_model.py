"""Any timm model by name, with every norm in it replaced: `model=timm model.timm_name=resnet50`.

The question that the suite asks, put to models that nobody here wrote. timm builds the model,
`replace_norms` puts the chosen norm at every site, and what cannot be replaced faithfully ends in
one line before training. Nothing is downloaded: weights come by model.init_from=FILE, under timm's
own names, because the model keeps its modules and only its class gets a `forward` with a mask.

Read from timm 1.0.21 to 1.0.31 (https://github.com/huggingface/pytorch-image-models).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from suite.data import DataInfo
from suite.errors import ConfigError
from suite.norms import (
    SITES,
    Kept,
    NormFactory,
    Replaced,
    foreign_norms,
    is_norm,
    norm_modules,
    replace_norms,
)
from suite.norms.known import is_known
from suite.registry import Choice, ModelOptions
from tasks.vision.shape import image_shape


@dataclass(frozen=True)
class TimmOptions(ModelOptions):
    """Settings of a timm model.

    timm_name: one of timm.list_models(), such as resnet50; needed.
    image_size: pixels a side; null is the data's.
    dropout, drop_path: timm's drop_rate and drop_path_rate; 0 also where timm's default is not.
    pool: timm's global_pool, such as avg or token; null is the model's own.
    keep: path globs of norms that stay as timm made them, such as ['*.grn'].
    sites: path glob -> site, where the guess from the path is not what you mean.
    """

    timm_name: str | None = None
    image_size: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    pool: str | None = None
    keep: list[str] | None = None
    sites: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        for site in self.sites.values():
            if site not in SITES:
                raise ValueError(f"sites must be of {', '.join(SITES)}, got {site!r}")


class TimmModel(nn.Module):
    """The part of the class that `adopt` makes, in front of timm's own.

    replaced: the norms that were replaced. kept: (path, type) of those that were not.
    """

    timm_class: type[nn.Module]
    num_classes: int
    replaced: list[Replaced]
    kept: list[Kept]

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """image [B, C, H, W] -> logits [B, classes].

        mask: bool [B], True = a real example. timm's layers know no mask, so they see the real
        examples only, and the other rows of the logits are 0. Where no row is real the first one
        goes through, for DDP's gradients; statistics over the batch then see it.
        """
        if mask is None:
            return super().forward(image)
        rows = mask.bool().nonzero().squeeze(1)
        if not len(rows):
            rows = rows.new_zeros(1)
        logits = super().forward(image[rows])
        return logits.new_zeros(len(image), logits.shape[1]).index_copy(0, rows, logits)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm does not decay, besides norms and biases."""
        listed: set[str] = getattr(super(), "no_weight_decay", set)()
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if any(fnmatchcase(name, glob) for glob in listed)}

    def layer_of(self, name: str) -> int:
        """The layer of a parameter by timm's group_matcher: 0 is the stem, the largest the head."""
        if "_layer_ids" not in vars(self):
            from timm.models import group_parameters

            try:
                matcher = self.group_matcher(coarse=False)  # type: ignore[operator]
            except (AttributeError, AssertionError, NotImplementedError) as error:
                raise ConfigError(
                    f"optim.layer_decay: timm's {self.timm_class.__name__} does not say which "
                    "layer a parameter is of; leave optim.layer_decay out"
                ) from error
            self._layer_ids: dict[str, int] = group_parameters(self, matcher, reverse=True)
        return self._layer_ids[name]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by timm's own class, which can be imported."""
        return _blank, (self.timm_class,), self.__dict__


@cache
def _class(timm_class: Any) -> type[Any]:
    return type(f"Timm{timm_class.__name__}", (TimmModel, timm_class), {"timm_class": timm_class})


def _blank(timm_class: Any) -> Any:
    cls: Any = _class(timm_class)
    return cls.__new__(cls)


def adopt(net: nn.Module, *, replaced: list[Replaced], kept: list[Kept]) -> TimmModel:
    """`net`, in place, with TimmModel's forward; its modules and their names stay as they are."""
    model: Any = net
    timm_class: Any = type(net)
    model.__class__ = _class(timm_class)
    model.replaced, model.kept = replaced, kept
    return model


def build_timm(options: TimmOptions, *, norm: NormFactory, data: DataInfo) -> TimmModel:
    """The timm model of `options` for the images and classes of `data`, with `norm` at every site.

    Raises ConfigError if timm has no such model, it does not take the data's images, one of its
    norms cannot be replaced faithfully, or one that was replaced does not run.
    """
    if options.timm_name is None:
        raise ConfigError(
            "model=timm: model.timm_name is not set; name one of timm's models, such as "
            "model.timm_name=resnet50"
        )
    timm, where = _import_timm(), f"model.timm_name={options.timm_name}"
    _check_name(timm, options.timm_name)
    size, chans = _images(options, data)
    net = _create(timm, options, size=size, chans=chans, classes=int(data.classes or 0))
    own_size = _own_size(net)
    _check_patches(net, size, where=where, own_size=own_size)
    replaced = _replace(net, options, norm, where=where)
    model = adopt(net, replaced=replaced, kept=foreign_norms(net, norm))
    _probe(model, size=size, chans=chans, where=where, own_size=own_size)
    return model


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f'model=timm: timm cannot be imported ({error}); pip install "dyt-suite[timm]"'
        ) from error
    return timm


def _check_name(timm: ModuleType, name: str) -> None:
    """Refuse what is no architecture of timm, and what timm would download."""
    if timm.is_model(name):
        return
    text = f"model.timm_name={name}: timm {timm.__version__} has no such model"
    if ":" in name or "/" in name:
        raise ConfigError(
            f"{text}; give the name of an architecture, such as resnet50, and weights as "
            "model.init_from=FILE: nothing is downloaded"
        )
    names = timm.list_models()
    near = get_close_matches(name, names, n=4, cutoff=0.6) or [n for n in names if name in n][:4]
    hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ConfigError(f"{text}; {hint}")


def _images(options: TimmOptions, data: DataInfo) -> tuple[int, int]:
    """(image size, channels) of the data. Raises ConfigError if model.image_size is another."""
    _, size, chans = image_shape(data, model="model=timm")
    if options.image_size not in (None, size):
        raise ConfigError(
            f"model.image_size={options.image_size}: data={data.name} has images of {size} x {size}"
            f"; leave model.image_size out, or set data.image_size={options.image_size} where the "
            "data set takes it"
        )
    return size, chans


def _create(
    timm: ModuleType, options: TimmOptions, *, size: int, chans: int, classes: int
) -> nn.Module:
    """timm's model, without the arguments that its class does not take and does not need."""
    name, where = options.timm_name, f"model.timm_name={options.timm_name}"
    arguments: dict[str, Any] = {
        "img_size": size,
        "in_chans": chans,
        "num_classes": classes,
        "drop_rate": options.dropout,
        "drop_path_rate": options.drop_path,
        "global_pool": options.pool,
    }
    # argument -> (the key that asks for it, whether the model can do without it)
    droppable = {
        "img_size": ("model.image_size", True),
        "in_chans": ("the data's channels", chans == 3),
        "drop_rate": ("model.dropout", options.dropout == 0),
        "drop_path_rate": ("model.drop_path", options.drop_path == 0),
        "global_pool": ("model.pool", False),
    }
    while True:
        try:
            return timm.create_model(name, pretrained=False, **arguments)
        except TypeError as error:
            refused = re.findall(r"'(\w+)'", str(error).partition("unexpected keyword arg")[2])
            if not refused or not set(refused) <= set(arguments) & set(droppable):
                raise ConfigError(f"{where}: timm cannot build it: {_line(error)}") from error
            for key, dispensable in (droppable[argument] for argument in refused):
                if not dispensable:
                    raise ConfigError(
                        f"{where}: the model takes no such argument as {key} asks for "
                        f"({_line(error)}); leave it out, or choose another model"
                    ) from error
            arguments = {k: v for k, v in arguments.items() if k not in refused}
        except (ValueError, RuntimeError, AssertionError, KeyError, ImportError) as error:
            raise ConfigError(
                f"{where}: timm cannot build it for images of {chans} x {size} x {size}, "
                f"{classes} classes and global_pool={options.pool}: {_line(error)}"
            ) from error


def _own_size(net: nn.Module) -> int | None:
    """The image size that timm's weights of this model are for."""
    published: Any = getattr(net, "default_cfg", None) or getattr(net, "pretrained_cfg", None) or {}
    size = published.get("input_size")
    return int(size[-1]) if size else None


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__


def _check_patches(net: nn.Module, size: int, *, where: str, own_size: int | None) -> None:
    """timm's patch embedding cuts off what is left over at the edges, and says nothing."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    patch = int(patch[0]) if isinstance(patch, (tuple, list)) else patch
    if isinstance(patch, int) and size % patch:
        good = max(patch, size // patch * patch) if own_size is None else own_size
        raise ConfigError(
            f"{where}: cuts images into patches of {patch} x {patch}, and the data's {size} x "
            f"{size} are no multiple; set data.image_size={good} where the data set takes it"
        )


def _replace(
    net: nn.Module, options: TimmOptions, norm: NormFactory, *, where: str
) -> list[Replaced]:
    """replace_norms, with what it refuses said in the command line's words."""
    keep = options.keep or []
    if not any(is_norm(module) for module in net.modules()):
        raise ConfigError(
            f"{where}: has no norm that norm={norm.name} could be; choose another model"
        )
    try:
        return replace_norms(net, norm, sites=options.sites, keep=keep)
    except ValueError as error:
        text, refused, _ = str(error).partition(". Name them in keep=")
        text = text.removeprefix("replace_norms: ").replace("keep", "model.keep")
        hint = f". To leave them as they are: {keep_words(net, keep)}" if refused else ""
        raise ConfigError(f"{where}: {text}{hint}") from error


def keep_words(net: nn.Module, keep: Sequence[str] = ()) -> str:
    """The model.keep that leaves all norms of unknown types in `net` as they are."""
    norms = {path: is_known(m) for path, m in net.named_modules() if is_norm(m)}
    globs: dict[str, None] = dict.fromkeys(keep)
    for path in (path for path, known in norms.items() if not known):
        short = f"*.{path.rpartition('.')[2]}"
        alone = not any(known and fnmatchcase(other, short) for other, known in norms.items())
        if not any(fnmatchcase(path, glob) for glob in globs):
            globs[short if alone and "." in path else path] = None
    shown = [*globs][:4] + (["..."] if len(globs) > 4 else [])
    return '"model.keep=[' + ",".join(f"'{glob}'" for glob in shown) + ']"'


def _probe(model: TimmModel, *, size: int, chans: int, where: str, own_size: int | None) -> None:
    """Run the model's shapes, in training and in evaluation, before any time is spent on it.

    On the meta device: nothing is computed, and no random number is drawn. It finds images that do
    not fit, outputs that are no logits, and norms that were replaced but do not run, because a
    fused path goes around them. A model that cannot run without values is not tried.
    """
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    image, training = torch.empty(2, chans, size, size, device="meta"), model.training
    try:
        for mode in (True, False):
            _run(model.train(mode), state, image, where=where)
    except NotImplementedError:
        return
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        if "meta" in str(error):
            return
        advice = f"set data.image_size={own_size} where the data set takes it, or "
        raise ConfigError(
            f"{where}: does not take images of {chans} x {size} x {size}: {_line(error)}; "
            f"{advice if own_size not in (None, size) else ''}choose another model"
        ) from error
    finally:
        model.train(training)


def _run(model: TimmModel, state: dict[str, Tensor], image: Tensor, *, where: str) -> None:
    mode = "training" if model.training else "evaluation"
    norms, ran = dict(norm_modules(model)), set()
    handles = [
        module.register_forward_hook(lambda module, args, output: ran.add(module))
        for module in norms.values()
    ]
    try:
        with torch.set_grad_enabled(model.training), torch.compiler.set_stance("force_eager"):
            logits = torch.func.functional_call(model, state, (image,))
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.shape != (2, model.num_classes):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"{where}: gives {what} in {mode}, not logits [images, classes]; choose another model"
        )
    idle = [path for path, module in norms.items() if module not in ran]
    if idle:
        listed = ",".join(f"'{path}'" for path in idle[:4]) + (",..." if len(idle) > 4 else "")
        raise ConfigError(
            f"{where}: {len(idle)} of the replaced norms do not run in {mode}: a fused path goes "
            f'around them, or nothing uses them. Leave them as they are: "model.keep=[{listed}]"'
        )


MODELS = {"timm": Choice(TimmOptions(), build_timm, "any timm model: model.timm_name=resnet50")}
