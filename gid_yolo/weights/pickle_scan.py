"""What a pickle would make, as inert values: nothing that it names is imported, and nothing that it calls is called."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gid_yolo.weights.inert import Inert, Refused
from gid_yolo.weights.rules import check_array, check_objects, check_value

# What PyTorch's own reader of weights knows; a pickle with any other instruction is not `torch.save`'s
INSTRUCTIONS = frozenset({
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MARK",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING",
    "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
})  # fmt: skip
MOST_INSTRUCTIONS = 2_000_000  # YOLO11x has 70,000
DEEPEST = 200  # containers in each other; modules of a network count three each


class _Reader(pickle.Unpickler):
    """Makes `Inert` objects of whatever a pickle names, and notes them all: what is not kept is made, too."""

    def __init__(self, data: bytes, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(data), encoding=encoding)  # PyTorch's, where none is given
        self.kinds: dict[str, type[Inert]] = {}
        self.made: list[Inert] = []

    def read(self) -> Any:
        """What the pickle holds.

        Raises:
            Refused: It is damaged.
        """
        try:
            return self.load()
        except Refused:
            raise
        except Exception as error:  # damaged bytes can raise any of them
            reason = " ".join(str(error).split())[:100]
            raise Refused(f"its contents are damaged ({type(error).__name__}: {reason})") from error

    def find_class(self, module: str, name: str) -> Any:
        path = _modern(f"{module}.{name}")
        if path not in self.kinds:
            self.kinds[path] = type("Inert", (Inert,), {"path": path, "made": self.made})
        return self.kinds[path]

    def persistent_load(self, pid: Any) -> Any:
        return self.find_class("", "storage")(pid)


def survey(data: bytes, known: Collection[str] | None = INSTRUCTIONS) -> tuple[list[str], Refused | None]:
    """Go through the instructions of a pickle without following them.

    Args:
        data: The pickle.
        known: The instructions that it may have; None for any.

    Returns:
        Everything that it names, in its order, as far as it goes where it is damaged; and why it must not be followed:
        it is damaged, has other instructions, or a reader would set aside more memory for it than it holds.
    """
    names: dict[str, None] = {}
    texts: list[str] = []
    count, problem = 0, None
    try:
        for code, arg, _ in pickletools.genops(data):
            count += 1
            kind = code.name
            if kind in {"GLOBAL", "INST"}:
                names[_modern(str(arg).replace(" ", ".", 1))] = None
            elif kind == "STACK_GLOBAL":
                names[".".join(texts[-2:])] = None
            elif isinstance(arg, str):
                texts = [*texts[-1:], arg]
            # A reader sets aside as many places as the largest index says
            large = isinstance(arg, int) and arg > count and kind.endswith("PUT")
            if large or count > MOST_INSTRUCTIONS or kind == "BYTEARRAY8":
                return list(names), Refused("its pickle is larger than that of any network")
            if problem is None and known is not None and kind not in known:
                problem = Refused(f"torch.save writes no pickle with the instruction {kind}")
    except (ValueError, IndexError, EOFError, OverflowError, UnicodeError) as error:
        problem = Refused(f"its contents are damaged ({' '.join(str(error).split())[:100]})")
    return list(names), problem


def scan(data: bytes, records: Mapping[str, int], ignored: tuple[str, ...] = ()) -> Any:
    """Read a pickle of `torch.save` as inert values, and check that it claims no more than its file holds.

    Args:
        data: The pickle, which `survey` has found nothing wrong with.
        records: Bytes of each storage in the file, by its key.
        ignored: Beginnings of names that its reader makes nothing of.

    Returns:
        Dicts, lists, tuples, numbers and texts as they are, and `Inert` for all else.

    Raises:
        Refused: It is damaged, calls what no checkpoint needs, or claims too much.
    """
    reader = _Reader(data)
    root = reader.read()
    check_objects([made for made in reader.made if not (ignored and made.path.startswith(ignored))], records)
    for value in _walk(root):
        check_value(value, ignored)
    for value in _walk([(made.args, made.state, made.items) for made in reader.made]):  # kept or not
        check_value(value, ignored)
    return root


def check_arrays(data: bytes) -> None:
    """Refuse a pickle that makes anything but NumPy's arrays of numbers, Python 2's included.

    Raises:
        Refused: It does, or is damaged.
    """
    reader = _Reader(data, "latin1")
    reader.read()
    for made in reader.made:
        check_array(made)


def _walk(root: Any) -> Iterator[Any]:
    """Every object once, level by level."""
    seen, level = {id(root)}, [root]
    for _ in range(DEEPEST):
        yield from level
        below = []
        for value in level:
            for child in _children(value):
                if id(child) not in seen:
                    seen.add(id(child))
                    below.append(child)
        level = below
        if not level:
            return
    raise Refused("its values are nested deeper than those of any network")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, Inert):
        yield from (value.args, value.state, value.items)


def _modern(name: str) -> str:
    """Python 3's name for what protocol 2 writes under Python 2's."""
    return name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name
