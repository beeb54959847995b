"""A teacher and a student, trained for an epoch."""

import pytest
from engine_helpers import FAST, write_data

from gid_yolo import GID


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, data) -> dict[str, str]:
    files = {}
    for name in ("retina_nano", "fcos_nano"):
        folder = tmp_path_factory.mktemp(name)
        GID(name).train(**FAST, data=str(data), save_dir=str(folder))
        files[name] = str(folder / "weights" / "best.pt")
    return files
