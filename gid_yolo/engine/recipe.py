"""Arguments from files: the recipes of `cfg/recipes`, and the `args.yaml` of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gid_yolo.cfg import RECIPES_DIR, load_yaml, recipe_names
from gid_yolo.detectors.build import BUILDERS
from gid_yolo.engine.config import check_keys
from gid_yolo.engine.schedule import override
from gid_yolo.engine.values import check_texts
from gid_yolo.errors import UserError

FAMILIES = (*BUILDERS, "yolo")
_OF_ONE_RUN = ("cfg", "mode", "model", "recipe", "resume", "save_dir", "task", "trust")


def expand(given: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Replace `recipe=` and `cfg=` by the arguments they stand for.

    From the weakest to the strongest: the recipe that the `cfg=` file names, that file, `recipe=`, the other arguments.

    Args:
        given: Arguments of a training.
        family: Kind of detector that is trained: retinanet, fcos, faster_rcnn, yolo.

    Returns:
        Arguments without `recipe` and `cfg`; nothing is left to expand when they are written to a run's `args.yaml`.

    Raises:
        UserError: A file that cannot be used, or a recipe for a run that is resumed.
    """
    check_texts(given)
    own, base = dict(given), dict[str, Any]()
    file, recipe = own.pop("cfg", None), own.pop("recipe", None)
    if file:
        of_file = read_cfg(file)
        of_file.pop("model", None)  # the caller has it
        if named := of_file.pop("recipe", None):
            base = read_recipe(named, family)
        base = override(base, of_file)
    if recipe:
        if own.get("resume"):
            raise UserError(f"recipe={recipe} is for a new run: a resumed one keeps the arguments it began with.")
        base = override(base, read_recipe(recipe, family))
    return override(base, own)


def read_recipe(recipe: str | Path, family: str) -> dict[str, Any]:
    """Arguments of a recipe; where it has a section of the detector's kind, that section over the rest.

    Args:
        recipe: Name of a recipe that ships with the package, or a yaml.
        family: Kind of detector that is trained.

    Raises:
        UserError: No such recipe, or one with unknown arguments or with those of a single run.
    """
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        if str(recipe) not in recipe_names():
            raise UserError(f"recipe={recipe} is unknown: choose from {', '.join(recipe_names())}, or give a yaml.")
        path = RECIPES_DIR / f"{recipe}.yaml"
    elif not path.is_file():
        raise UserError(f"recipe={recipe} does not exist: give a yaml, or one of {', '.join(recipe_names())}.")
    try:
        contents = load_yaml(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    sections = {name: contents.pop(name) or {} for name in FAMILIES if name in contents}
    for name, section in (("", contents), *sections.items()):
        where = f"recipe {path}, {name}" if name else f"recipe {path}"
        if not isinstance(section, dict):
            raise UserError(f"{where}: must hold 'key: value' lines.")
        if wrong := [key for key in _OF_ONE_RUN if key in section]:
            raise UserError(f"{where}: {wrong[0]} belongs to a single run, not to a recipe; a run is repeated by cfg=.")
        try:
            check_keys(section)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return override(contents, sections.get(family, {}))


def read_cfg(path: str | Path) -> dict[str, Any]:
    """Arguments from a yaml, e.g. the `args.yaml` of a run, without those that name that run itself.

    Raises:
        UserError: No such file, or not a yaml of arguments.
    """
    if not Path(path).is_file():
        raise UserError(f"cfg={path} does not exist: give a yaml of arguments, e.g. a run's args.yaml.")
    try:
        arguments = load_yaml(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    # No file says that others are to be trusted, nor that it may be overwritten by the run that it describes
    own = {"cfg", "exist_ok", "mode", "resume", "save_dir", "task", "trust"}
    return {key: value for key, value in arguments.items() if key not in own and value is not None}
