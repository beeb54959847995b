"""Every test starts from the same seed, on one thread, and installs nothing."""

import os

os.environ["YOLO_AUTOINSTALL"] = "False"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
