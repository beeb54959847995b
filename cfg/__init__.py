"""Yaml settings that ship with the package: training defaults, model definitions, recipes, studies."""

from pathlib import Path
from typing import Any

import yaml

CFG_DIR = Path(__file__).resolve().parent
MODELS_DIR = CFG_DIR / "models"
STUDIES_DIR = CFG_DIR / "studies"
RECIPES_DIR = CFG_DIR / "recipes"


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml file with the safe loader.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not yaml, or does not hold a mapping.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a yaml file: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, but holds {type(data).__name__}.")
    return data


def model_names() -> list[str]:
    """Names of the models that ship with the package, as `model=` and `teacher=` take them."""
    return sorted(path.stem for path in MODELS_DIR.glob("*.yaml"))


def study_names() -> list[str]:
    """Names of the studies that ship with the package: the paper's tables, and the verdict."""
    return sorted(path.stem for path in STUDIES_DIR.glob("*.yaml"))


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, as `recipe=` takes them."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
