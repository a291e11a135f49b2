"""What a command starts from besides its own words: a YAML file, and torchrun's environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from suite import registry
from suite.cli import Request, Setting
from suite.errors import ConfigError


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
    recipe = request.sources.get("recipe")
    if recipe is not None:
        return Location(_recipe_path(recipe), True, recipe)
    if "config" in request.sources:
        path = Path(request.sources["config"])
        if not path.is_file():
            raise ConfigError(
                f"config={path}: no such file; give a config.yaml that a run has written"
            )
        return Location(path, True)
    runs = [("evaluate", request.sources.get("evaluate", "never"))]
    runs += [(s.key, str(s.value)) for s in request.settings if s.path == ("run", "resume")]
    for key, run in runs:
        if run not in ("never", "auto") and (config := _run_config(key, run)) is not None:
            return Location(config, True, of_a_run=True)
    path = config_folder() / f"{request.choices.get('task', registry.DEFAULT_TASK)}.yaml"
    return Location(path if path.is_file() else None)


def _recipe_path(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
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
    path = Path(run).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{key}={run}: no such run; give a run's folder or one of its checkpoints"
        )
    for folder in (path, path.parent, path.parent.parent):
        # beside published weights may lie somebody else's config.yaml
        ours = (folder == path and path.is_dir()) or (folder / "checkpoints").is_dir()
        if ours and (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    if key == "evaluate" and (path.is_file() or any(path.glob("model.safetensors*"))):
        return None
    raise ConfigError(
        f"{key}={run}: not a run: no config.yaml there; give a run's folder"
        + (", a file of weights or a folder with model.safetensors" * (key == "evaluate"))
    )


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
