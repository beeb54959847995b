"""A file is whole or not there, whoever writes it."""

from pathlib import Path

import pytest

from gid_yolo.files import replaced


def write_half(path: Path) -> None:
    with replaced(path) as part:
        part.write_text("half")
        raise OSError("disk full")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with replaced(path) as part:
        part.write_text("before")
        assert not path.exists()
    assert path.read_text() == "before"
    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"
