"""What a command starts from besides its own words: a YAML file, and torchrun's environment.

The file may be somebody else's. It says values and nothing more: none is evaluated, fetched or
imported, and none says where this machine is written to (see docs/reliability.md).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath

import yaml

from suite import registry
from suite.cli import Request, Setting
from suite.errors import ConfigError, shown
from suite.fields import refuse_interpolation
from suite.safety import address, check_values, unsafe_character

YAML_BYTES = 1 << 20  # of a recipe or a config.yaml, which have some 4 kB
YAML_VALUES, YAML_DEPTH = 100_000, 32  # with what its anchors stand for written out
OWN_FILES = ("config.yaml", "metrics.jsonl", "result.json")  # what a resumed run writes to


@dataclass(frozen=True)
class Location:
    """The YAML file of a command.

    whole: it must name its task (recipes and resolved configs do; a task's own file need not).
    recipe: the name that it was asked for by. of_a_run: the config of a run to resume or evaluate.
    """

    path: Path | None = None
    whole: bool = False
    recipe: str | None = None
    of_a_run: bool = False


def config_folder() -> Path:
    """The folder of the YAML files: `suite/_configs` of a wheel, `configs` of a checkout."""
    installed = Path(str(resources.files("suite"))) / "_configs"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe."""
    return {path.stem: path for path in sorted((config_folder() / "recipes").glob("*.yaml"))}


def opening(path: Path) -> str:
    """The first comment line of a recipe that is not its command."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ")
        if line.startswith("#") and text and not text.startswith(("python -m", "torchrun")):
            return text
    return ""


def locate(request: Request) -> Location:
    """The file to start from: what the command names, else its run's, else the task's own.

    Raises ConfigError for a file that is not there.
    """
    for key, value in request.sources.items():
        if (why := address(value)) is not None:
            raise ConfigError(f"{key}={value}: {why}")
    recipe = request.sources.get("recipe")
    if recipe is not None:
        return Location(_recipe_path(recipe), True, recipe)
    if "config" in request.sources:
        path = Path(request.sources["config"])
        if not os.path.isfile(path):  # noqa: PTH113 (False for a name that is too long)
            raise ConfigError(
                f"config={path}: no such file; give a config.yaml that a run has written"
            )
        return Location(path, True)
    runs = [("evaluate", request.sources.get("evaluate", "never"))]
    runs += [(s.key, str(s.value)) for s in request.settings if s.path == ("run", "resume")]
    for key, run in runs:
        if (why := address(run)) is not None:
            raise ConfigError(f"{key}={run}: {why}")
        if run not in ("never", "auto") and (config := _run_config(key, run)) is not None:
            return Location(config, True, of_a_run=True)
    path = config_folder() / f"{request.choices.get('task', registry.DEFAULT_TASK)}.yaml"
    return Location(path if path.is_file() else None)


def _recipe_path(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        if not os.path.isfile(recipe):  # noqa: PTH113
            raise ConfigError(f"recipe={recipe}: no such file")
        return Path(recipe)
    names = recipes()
    if not names:
        raise ConfigError(
            f"recipe={recipe}: no such recipe; there are none in {config_folder() / 'recipes'}"
        )
    registry.check_choice("recipe", recipe, names)
    return names[recipe]


def _run_config(key: str, run: str) -> Path | None:
    """config.yaml of a run that is given as its folder or as one of its checkpoints.

    None for a file or a Hugging Face folder to evaluate that is not a run's: published weights,
    which the command line describes.
    """
    try:
        path = Path(run).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # also a name that is too long, ~nobody
        raise ConfigError(
            f"{key}={run}: no such run; give a run's folder or one of its checkpoints"
        ) from None
    for folder in (path, path.parent, path.parent.parent):
        # beside published weights may lie somebody else's config.yaml
        ours = (folder == path and path.is_dir()) or (folder / "checkpoints").is_dir()
        if ours and (folder / "config.yaml").is_file():
            if key == "run.resume":
                check_own_files(folder)
            return folder / "config.yaml"
    if key == "evaluate" and (path.is_file() or any(path.glob("model.safetensors*"))):
        return None
    raise ConfigError(
        f"{key}={run}: not a run: no config.yaml there; give a run's folder"
        + (", a file of weights or a folder with model.safetensors" * (key == "evaluate"))
    )


def check_own_files(folder: Path) -> None:
    """Raise ConfigError where going on with a run would write through a link to somewhere else.

    A linked folder, such as checkpoints on a larger disk, is followed.
    """
    for name in OWN_FILES:
        if (folder / name).is_symlink():
            raise ConfigError(
                f"run.resume={shown(folder)}: its {name} is a link, which is never written "
                "through; put the file itself there"
            )


# --- what a file may say --------------------------------------------------------------------------


def read_text(path: Path) -> io.StringIO:
    """The text of a YAML file whose anchors stand for no more than a file could say.

    Raises ConfigError.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(YAML_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > YAML_BYTES:
        raise ConfigError(f"{path}: has more than 1 MB; a recipe has some 4 kB")
    try:
        check_anchors(text, str(path))
    except yaml.YAMLError as error:
        raise not_yaml(path, error) from error
    return io.StringIO(text)


def not_yaml(path: Path, error: Exception) -> ConfigError:
    """The error of a file that is not YAML, or not YAML of plain values."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        return ConfigError(f"{path}:{line} not valid YAML: {error.problem}")
    return ConfigError(
        f"{path}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
    )


def check_anchors(text: str, where: str) -> None:
    """Raise ConfigError for YAML whose aliases make more of it than can be meant.

    Composed only: no value is made, no tag obeyed. Raises yaml.YAMLError for what is not YAML.
    """
    try:
        check_values(_parts(text), most=YAML_VALUES, depth=2 * YAML_DEPTH)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{where}: not a configuration: {why}") from None


def _parts(text: str) -> object:
    """A YAML text's nodes as lists in lists; two aliases of one anchor are one list."""
    made: dict[int, list[object]] = {}
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in made:
            continue
        own = made.setdefault(id(node), [])
        inner = [] if node is None or isinstance(node, yaml.ScalarNode) else node.value
        for part in inner:
            for each in part if isinstance(part, tuple) else (part,):
                waiting.append(each)
                own.append(each)
    for own in made.values():
        own[:] = [made[id(node)] for node in own]
    return made[id(root)]


def refuse_unsafe(setting: Setting, value: object) -> None:
    """Raise ConfigError for a value that would have to be evaluated or fetched, or that no file can
    hold; and, of a file, for what only the command line may say.
    """
    texts = list(_texts(setting, value))
    refuse_interpolation(setting, value)
    for text in texts:
        if setting.path != ("task", "prompt") and (why := address(text)) is not None:
            raise setting.error(f"={text}: {why}")
        if (character := unsafe_character(text)) is not None:
            raise setting.error(
                f"={ascii(text)[1:-1]}: holds {character}, which is no text; leave it out"
            )
        if text.startswith("~"):
            _check_home(setting, text)
        if setting.origin and setting.path[:2] == ("norm", "by_site") and ":" in text:
            raise of_code(setting, text)
    if setting.origin and setting.path in (("run", "dir"), ("run", "resume")):
        parts = PurePath(str(value)).parts
        if value is not None and (str(value).startswith(("/", "~")) or ".." in parts):
            raise setting.error(
                f"={value}: a file may only name a folder below the one you are in; give "
                f"{setting.key}= on the command line"
            )


def refuse_code(path: str, named: Mapping[str, str], chosen: Mapping[str, str]) -> None:
    """Raise ConfigError where a file alone names a class to import as the norm.

    named: the choices of the file at `path`; chosen: those of the command line.
    """
    name = named.get("norm", "")
    if ":" in name and "norm" not in chosen:
        raise of_code(Setting(("norm",), name, path), name)


def of_code(setting: Setting, name: str) -> ConfigError:
    """The error of a file that names a class: whoever starts a run says which code runs."""
    return setting.error(
        f"={name}: code is imported for the command line only; if you trust it, give "
        f"{setting.key}={name} there"
    )


def _texts(setting: Setting, value: object) -> Iterable[str]:
    """The texts in a value, keys too. Raises ConfigError for keys that are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str | int | float):
                raise setting.error(f": the key {key!r} is not text")
            yield from (*_texts(setting, key), *_texts(setting, inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(setting, inner)


def _check_home(setting: Setting, text: str) -> None:
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise setting.error(f"={text}: no such user's home folder") from None


def from_torchrun(
    command_line: Iterable[Setting], environ: Mapping[str, str]
) -> tuple[list[Setting], list[str]]:
    """Settings of trainer.devices and trainer.num_nodes where torchrun has set them, and notes.

    LOCAL_WORLD_SIZE tells torchrun from Lightning's own launcher, which sets WORLD_SIZE alone.
    Raises ConfigError when the command line says something else.
    """
    if "LOCAL_WORLD_SIZE" not in environ:
        return [], []
    origin = "torchrun's environment"
    try:
        local = int(environ["LOCAL_WORLD_SIZE"])
        world = int(environ.get("WORLD_SIZE", local))
        nodes = int(environ.get("GROUP_WORLD_SIZE", world // max(local, 1)))
    except ValueError as error:
        raise ConfigError(
            f"{origin}: WORLD_SIZE and its kin must be whole numbers ({error})"
        ) from error
    if local < 1 or world != local * nodes:
        raise ConfigError(f"{origin}: {world} processes are not {nodes} nodes of {local} each")
    found = {"devices": local, "num_nodes": nodes}
    for setting in command_line:
        name = setting.path[-1]
        if setting.path[0] != "trainer" or name not in found:
            continue
        if str(setting.value) not in (str(found[name]), "auto", "-1"):
            raise setting.error(
                f"={setting.value}: torchrun has started {found[name]}; leave {setting.key} out"
            )
    settings = [Setting(("trainer", name), value, origin) for name, value in found.items()]
    return settings, [f"{origin}: trainer.devices={local} trainer.num_nodes={nodes}"]
