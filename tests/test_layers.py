"""Imports run one way (design, section 1): read from the source, so that an import inside a function counts too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gid_yolo"
ULTRALYTICS = "ultralytics"
# A layer may import nothing of what stands here beside it.
FORBIDDEN = {
    "weights": ["ops", "detectors", "distill", "data", "engine", "model", "export", "analysis", "cli"],
    "ops": ["detectors", "distill", "data", "engine", "model", "export", "analysis", "cli"],
    "detectors": ["distill", "data", "engine", "model", "export", "analysis", "cli"],
    "distill": ["detectors", "data", "engine", "model", "export", "analysis", "cli"],
    "data": ["detectors", "distill", "engine", "model", "export", "analysis", "cli"],
    "engine": ["model", "export", "analysis", "cli"],
}
WITHOUT_ULTRALYTICS = ("weights", "ops", "detectors", "distill", "data")


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names a file imports, wherever the statement stands; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_only_what_is_below(layer: str) -> None:
    files = sources(PACKAGE / layer)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        for above in FORBIDDEN[layer]
        if within(name, f"gid_yolo.{above}")
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", WITHOUT_ULTRALYTICS)
def test_a_layer_without_ultralytics(layer: str) -> None:
    wrong = [path.name for path in sources(PACKAGE / layer) if any(within(n, ULTRALYTICS) for n in imported(path))]
    assert wrong == []


def test_settings_import_nothing_of_ours() -> None:
    names = {name for path in sources(ROOT / "cfg") for name in imported(path)}
    assert not any(within(name, ULTRALYTICS) or within(name, "torch") for name in names)
    assert not any(within(name, "gid_yolo") and not within(name, "gid_yolo.cfg") for name in names)


def test_only_the_engine_model_and_export_subclass_ultralytics() -> None:
    allowed = (PACKAGE / "engine", PACKAGE / "model.py", ROOT / "export")
    wrong, right = [], 0
    for path in sources(PACKAGE, ROOT / "export"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        theirs = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if (isinstance(node, ast.ImportFrom) and within(node.module or "", ULTRALYTICS))
            or (isinstance(node, ast.Import) and any(within(alias.name, ULTRALYTICS) for alias in node.names))
            for alias in node.names
        }
        bases = {
            name.id
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for base in node.bases
            for name in ast.walk(base)
            if isinstance(name, ast.Name)
        }
        if bases & theirs:
            permitted = any(path == place or place in path.parents for place in allowed)
            wrong += [] if permitted else [str(path.relative_to(ROOT))]
            right += permitted
    assert wrong == []
    assert right  # the search does find the classes that are allowed


def test_mapped_folders_are_imported_by_their_package_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(PACKAGE, ROOT / "cfg", ROOT / "export", ROOT / "benchmarks", ROOT / "tests")
        for name in imported(path)
        if within(name, "cfg") or within(name, "export")
    ]
    assert wrong == []


def test_ultralytics_stays_unloaded() -> None:
    code = "import sys, gid_yolo.ops, gid_yolo.distill, gid_yolo.detectors; print('ultralytics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
