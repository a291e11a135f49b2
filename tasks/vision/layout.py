"""Which folders of a tree are training, validation and test, decided from their names alone.

Two layouts are known. ImageNet's: root/train/<class>/... and root/val/<class>/..., with or without
root/test/<class>/...; and one folder, root/<class>/..., that is divided by a hash of the paths.
What is neither gets an error that says what is missing: with a guess, labels would be shifted and
training would go on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.errors import ConfigError, shown
from tasks.vision.decode import EXTENSIONS
from tasks.vision.index import Index

VAL_NAMES = ("val", "validation", "valid")
SPLIT_NAMES = {"train", "test", *VAL_NAMES}
EXPECTED = "expected ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, or ROOT/CLASS/IMAGE"


@dataclass(frozen=True)
class Layout:
    """The folders of class folders. Without val and test: one folder, if `whole`."""

    train: Path
    val: Path | None = None
    test: Path | None = None
    whole: bool = False
    notes: tuple[str, ...] = ()


def find_layout(root: str | None, *, name: str) -> Layout:
    """What `root` holds. name: of the data set, for messages. Raises ConfigError."""
    if root is None:
        raise ConfigError(f"data={name} needs data.root=FOLDER: {EXPECTED}")
    top = Path(root).expanduser()
    folders = subfolders(top, name=name)
    inner = subfolders(top / "train", name=name) if "train" in folders else []
    named = sorted(SPLIT_NAMES.intersection(folders))
    if "train" in folders and not inner and (named != ["train"] or len(folders) == 1):
        raise no_class_folders(top / "train", name)
    if inner and SPLIT_NAMES.issuperset(inner):
        raise ConfigError(
            f"data={name}: {shown(str(top / 'train'))} holds {listed(inner)} and no class folders, "
            f"as if unpacked one level too deep; set data.root={shown(str(top / 'train'))}"
        )
    if inner:
        return split_layout(top, folders, name=name)
    if not folders:
        raise no_class_folders(top, name)
    if named and named != ["train"]:  # alone and without folders in it, train is a class
        raise ConfigError(
            f"data={name}: {shown(root)} has {listed(named)} but no train folder; {EXPECTED}"
            + "; to evaluate= on val alone, set data.val=only" * ("test" not in named)
        )
    deeper = top / "ILSVRC" / "Data" / "CLS-LOC"  # of the archive for ImageNet's competition
    if deeper.is_dir():
        raise ConfigError(f"data={name}: set data.root={shown(str(deeper))}, where train lies")
    return Layout(top, whole=True)


def val_layout(root: str | None, *, name: str) -> Layout:
    """The val folder in `root`, or `root` itself, with nothing to train on. Raises ConfigError."""
    if root is None:
        raise ConfigError(f"data={name} needs data.root=FOLDER: {EXPECTED}")
    top = Path(root).expanduser()
    folders = subfolders(top, name=name)
    val = next((top / folder for folder in VAL_NAMES if folder in folders), top)
    if not subfolders(val, name=name):
        raise no_class_folders(val, name)
    return Layout(val, val)


def split_layout(top: Path, folders: Sequence[str], *, name: str) -> Layout:
    """A root that has a train folder of class folders."""
    vals = [folder for folder in VAL_NAMES if folder in folders]
    if len(vals) > 1:
        raise ConfigError(
            f"data={name}: {shown(str(top))} has {listed(vals)}; leave only the one to be used"
        )
    val = top / vals[0] if vals else None
    if val is not None and not subfolders(val, name=name):
        raise no_class_folders(val, name)
    test = top / "test" if "test" in folders else None
    notes: tuple[str, ...] = ()
    if test is not None and not subfolders(test, name=name):  # ImageNet's has no labels
        notes = (f"{shown(str(test))} is not used: it has no class folders",)
        test = None
    if val is None and test is None:
        raise ConfigError(
            f"data={name}: {shown(str(top))} has train but no val; add {shown(str(top / 'val'))}, "
            f"or set data.root={shown(str(top / 'train'))} to have that folder divided"
        )
    return Layout(top / "train", val, test, notes=notes)


def subfolders(folder: Path, *, name: str) -> list[str]:
    """The names of the folders in `folder`, sorted, but hidden ones. Raises ConfigError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except FileNotFoundError:
        reason = "does not exist"
    except NotADirectoryError:
        reason = "is a file; a folder is needed (unpack an archive first)"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise ConfigError(f"data={name}: {shown(str(folder))} {reason}; {EXPECTED}")


def no_class_folders(folder: Path, name: str) -> ConfigError:
    """The error for a folder that holds no folders; loose images get a word on what to do."""
    where = shown(str(folder))
    with os.scandir(folder) as entries:
        first = next((e.name for e in entries if e.name.lower().endswith(EXTENSIONS)), None)
    if first is None:
        return ConfigError(f"data={name}: {where} has no class folders in it; {EXPECTED}")
    if first.startswith("ILSVRC2012_val"):
        todo = (
            "sort them into folders by their synset with the development kit's "
            "ILSVRC2012_validation_ground_truth.txt, as torchvision.datasets.ImageNet does"
        )
    else:
        todo = f"put each into the folder of its class: {where}/CLASS/{shown(first)}"
    return ConfigError(f"data={name}: {where} holds loose images and no class folders; {todo}")


def check_classes(index: Index, *, name: str) -> None:
    """Raise ConfigError unless there are two classes or more, with an image in each."""
    where, classes = shown(index.root), index.classes
    kinds = ", ".join(EXTENSIONS)
    if not len(index):
        raise ConfigError(f"data={name}: {where} has no images in its class folders ({kinds})")
    if len(classes) < 2:
        raise ConfigError(
            f"data={name}: {where} has one class folder, {shown(classes[0])}; a classifier needs "
            "two classes or more"
        )
    empty = [label for label, count in zip(classes, index.counts(), strict=True) if not count]
    if empty:
        raise ConfigError(
            f"data={name}: {where} has no images ({kinds}) for class {listed(empty)}; "
            "add some or remove the folder"
        )


def check_same_classes(train: Index, other: Index, *, name: str) -> None:
    """Raise ConfigError unless both have the same class folders: labels are places in the list."""
    found = {index.root: set(index.classes) for index in (train, other)}
    parts = []
    for index, rest in ((other, train), (train, other)):
        if only := sorted(found[index.root] - found[rest.root]):
            parts.append(f"{listed(only)} only in {shown(index.root)}")
    if parts:
        raise ConfigError(
            f"data={name}: the class folders differ: {'; '.join(parts)}. Both need the same ones"
        )


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(shown(name) for name in names[:most])
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text
