"""Every test starts from the same seed, on one thread, installs nothing, and has a cache of its own."""

import os

os.environ["YOLO_AUTOINSTALL"] = "False"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> None:
    os.environ["GID_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # also that of processes which a test starts
