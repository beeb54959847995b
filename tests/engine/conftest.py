"""Tiny runs, so that the engine is tested for real in seconds."""

from pathlib import Path

import pytest
from engine_helpers import FAST, train_teachers, write_data
from ultralytics.utils import SETTINGS


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """Keep runs and relative names inside the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)  # it would put runs into site-packages


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, data) -> dict[str, str]:
    """A checkpoint of every kind of detector."""
    return train_teachers(("retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"), data, tmp_path_factory)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data) -> Path:
    """A teacher trained for one epoch; it has the anchors of retina_nano but another width."""
    from gid_yolo.engine.trainer import GIDTrainer

    folder = tmp_path_factory.mktemp("teacher")
    config = folder / "wide.yaml"
    from gid_yolo.cfg import MODELS_DIR

    config.write_text((MODELS_DIR / "retina_nano.yaml").read_text().replace("fpn_channels: 64", "fpn_channels: 96"))
    trainer = GIDTrainer(overrides={**FAST, "model": str(config), "data": str(data), "save_dir": str(folder / "run")})
    trainer.train()
    return trainer.best
