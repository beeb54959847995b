"""The archives that `torch.save` writes, looked at before they are opened."""

from __future__ import annotations

import collections
import contextlib
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gid_yolo.errors import printable
from gid_yolo.weights.inert import Refused
from gid_yolo.weights.pickle_scan import scan, survey
from gid_yolo.weights.rules import is_data

MOST_ENTRIES = 100_000  # one a tensor
LARGEST_PICKLE = 2**25  # bytes; YOLO11x has 300 kB


class Foreign(Refused):
    """A file that names something that a plain reader would import, and might call."""


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive of `torch.save`, in which nothing may claim more than the file holds.

    Raises:
        Refused: It is compressed, damaged, or not one of `torch.save`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise Refused(f"it is damaged or was cut off ({str(error).rstrip('.')}): copy or download it again") from error
    with archive:
        _check_list(archive, path.stat().st_size)
        yield archive


def _check_list(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    folders = {entry.filename.partition("/")[0] for entry in entries}
    if len(entries) > MOST_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise Refused("its list of contents is no checkpoint's")
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise Refused("its list of contents has names twice")  # PyTorch takes no note of capitals
    for folder in folders:
        if any(f"{folder}/{part}" in archive.NameToInfo for part in ("constants.pkl", "code/__torch__.py")):
            raise Refused("it is a TorchScript program: give the checkpoint that it was made from")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise Refused("its contents are compressed or encrypted, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("its contents claim to be larger than the file")
    if len(folders) != 1 or f"{next(iter(folders))}/data.pkl" not in archive.NameToInfo:
        raise Refused("it is an archive without the contents of a checkpoint")


def look(path: Path, ignored: tuple[str, ...] = ()) -> None:
    """Refuse a file of `torch.save`, of its present or its older format, that could do more than hold values.

    Args:
        path: The file.
        ignored: Beginnings of names that its reader makes nothing of.

    Raises:
        Refused: What is wrong with it.
    """
    if zipfile.is_zipfile(path):
        contents_of(path, ignored)
        return
    with path.open("rb") as file:
        try:
            for _ in range(3):  # its mark, version and machine
                collections.deque(pickletools.genops(file), 0)
            start = file.tell()
            collections.deque(pickletools.genops(file), 0)
        except (ValueError, IndexError, EOFError, OverflowError) as error:
            raise Refused("it is damaged, or no file of torch.save") from error
        length = file.tell() - start
        file.seek(start)
        data = file.read(length)
    check_names(data, ignored)
    scan(data, _AnyStorage(path.stat().st_size), ignored)


class _AnyStorage(dict[str, int]):
    """Storages of the older format, which follow the pickle: none is larger than the file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get(self, key: str, default: Any = None) -> Any:
        self[key] = self.size
        return self.size


def contents_of(path: Path, ignored: tuple[str, ...] = ()) -> Any:
    """The contents of an archive as inert values.

    Raises:
        Refused: It is damaged, or could do more than hold values if it were opened.
    """
    with open_archive(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        if archive.getinfo(f"{folder}/data.pkl").file_size > LARGEST_PICKLE:
            raise Refused("its pickle is larger than that of any network")
        sizes = {entry.filename.removeprefix(f"{folder}/"): entry.file_size for entry in archive.infolist()}
        try:
            wrong = archive.testzip()  # PyTorch does not compare the checksums
            data = archive.read(f"{folder}/data.pkl")
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise Refused(f"it is damaged ({str(error).rstrip('.')[:100]}): copy or download it again") from error
    if wrong is not None:
        raise Refused(f"its entry {printable(wrong)} is damaged: copy or download it again")
    _check_reader(path, sizes, data)
    check_names(data, ignored)
    storages = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
    return scan(data, storages, ignored)


def check_names(data: bytes, ignored: tuple[str, ...] = ()) -> None:
    """Refuse a pickle that names what no checkpoint needs, or that is damaged.

    Raises:
        Refused: Which name; or what is wrong.
    """
    names, problem = survey(data)
    if foreign := [name for name in names if not (is_data(name) or name.startswith(ignored))]:
        raise Foreign(printable(foreign[0]))
    if problem is not None:
        raise problem


def _check_reader(path: Path, sizes: Mapping[str, int], data: bytes) -> None:
    """Refuse an archive in which PyTorch, which will open it, finds something else."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        same = sorted(reader.get_all_records()) == sorted(sizes)
        same = same and all(reader.get_record_size(name) == size for name, size in sizes.items())
        same = same and reader.get_record("data.pkl") == data
    except (RuntimeError, UnicodeError) as error:
        raise Refused("it is damaged: copy or download it again") from error
    if not same:
        raise Refused("its list of contents can be read in two ways")
