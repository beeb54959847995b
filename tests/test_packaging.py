import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import gid_yolo
from gid_yolo import cfg
from gid_yolo._version import __version__

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("cfg", "export")  # top-level folders that are installed inside the package


def pyproject() -> dict:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_of(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "gid_yolo" else ("gid_yolo", *parts))


def test_packages_are_the_folders_of_the_tree() -> None:
    folders = {path.parent for top in ("gid_yolo", *MAPPED) for path in (ROOT / top).rglob("*.py")}
    folders |= {ROOT / name for name in MAPPED}
    folders |= {path.parent for path in (ROOT / "cfg").rglob("*.yaml")}  # left out, each is a warning at every install
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == {package_of(folder) for folder in folders}


def test_every_package_has_an_init() -> None:
    for folder in {path.parent for path in (ROOT / "gid_yolo").rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def test_mapped_folders() -> None:
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {"gid_yolo": "gid_yolo", **{f"gid_yolo.{name}": name for name in MAPPED}}
    assert Path(cfg.__file__).resolve().parent == ROOT / "cfg"


def test_data_files_are_packaged() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["gid_yolo.cfg"] for path in (ROOT / "cfg").glob(pattern)}
    assert packaged == {path for path in (ROOT / "cfg").rglob("*") if path.suffix in {".yaml", ".yml"}}
    assert (ROOT / "gid_yolo" / patterns["gid_yolo"][0]).is_file()
    packaged = {path for pattern in patterns["gid_yolo.export"] for path in (ROOT / "export").glob(pattern)}
    assert packaged == {path for path in (ROOT / "export").iterdir() if path.is_file() and path.suffix != ".py"}


def test_scripts_exist() -> None:
    for target in pyproject()["project"]["scripts"].values():
        module, _, function = target.partition(":")
        text = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        assert f"def {function}(" in text


def test_version_is_said_once() -> None:
    project = pyproject()
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gid_yolo._version.__version__"}
    assert gid_yolo.__version__ == __version__ == metadata.version("gid-yolo")


def test_no_python_file_is_long() -> None:
    tops = ("gid_yolo", *MAPPED, "benchmarks", "tests")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for top in tops
        for path in (ROOT / top).rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_every_yaml_is_a_mapping_in_utf8() -> None:
    for path in (ROOT / "cfg").rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_no_file_shadows_a_library() -> None:
    # cfg/ and export/ are on the path of a script that runs inside them: no file there is named like what it imports.
    stems = {path.stem for name in MAPPED for path in (ROOT / name).glob("*.py")} - {"__init__"}
    libraries = {"onnx", "onnxruntime", "onnxslim", "torch", "ultralytics", "timm", "numpy", "yaml", "tensorrt"}
    assert not stems & (libraries | set(sys.stdlib_module_names))
