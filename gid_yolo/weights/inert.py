"""What stands for the objects of a pickle that is read without making them."""

from __future__ import annotations

from typing import Any, ClassVar


class Refused(ValueError):
    """A pickle that is not opened; the message says why."""


class Inert:
    """Stands for an object: its `path` says of what kind, the rest what it would be made from."""

    path: ClassVar[str] = ""
    made: ClassVar[list[Inert]] = []  # of one pickle, in their order
    called = False
    builds = 0
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any) -> Inert:
        """Make one, as a pickle makes an object without its constructor."""
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, []
        cls.made.append(made)
        return made

    def __init__(self, *args: Any) -> None:
        self.called = True

    def __call__(self, *args: Any) -> Any:
        """Refuse to be called: what a call returns may be anything."""
        raise Refused(f"it calls what {self.path} returns, which no checkpoint needs")

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, dict) else state  # as it is now: it may be changed later
        self.builds += 1

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Note what a list would hold."""
        self.items.append(value)
