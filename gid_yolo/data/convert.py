"""Placeholder while the converter is written."""
from pathlib import Path


def prepare_data(data):
    return Path(data).resolve()
