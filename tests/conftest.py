"""Every test starts from the same seed, on one thread, installs nothing, and has a cache of its own."""

import atexit
import os
import shutil
import tempfile

os.environ["YOLO_AUTOINSTALL"] = "False"
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo-settings-")  # those of the user stay as they are

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> None:
    os.environ["GID_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # also that of processes which a test starts
