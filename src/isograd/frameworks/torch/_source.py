"""Which line of the user's program made a node of the autograd graph. Changes nothing that the program computes.

Torch can keep with each node the stack of the call that made it: anomaly mode, here without its checks. Formatting
whole stacks costs 20 to 100 us a node; in their place only the innermost frame of the user's is kept, 3 us a node.
Lines are kept until a graph's shape is known; a later graph of the same shape was made by the same lines.
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.fx import traceback as fx_traceback

GRAPHS = 8
"""Shapes of graphs whose lines are remembered, the latest ones: a GAN has two, a loop with branches a few."""

_STACK = "traceback_"
"""Where torch keeps the stack in a node's metadata: formatted entries, outermost frame first."""

_ENTRY = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)')
_PACKAGE = str(Path(__file__).parents[2])
_LIBRARIES = ("site-packages", "dist-packages")
_TYPED = ("<stdin>", "<string>", "<ipython")
_STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """A line of the user's program. `file`: relative to the working directory or the script's folder, below them."""

    file: str
    line: int
    function: str
    code: str


# ---- keeping lines ------------------------------------------------------------------------------------------------

_wanting: set[int] = set()
_undo: list[Callable[[], None]] = []


def _install() -> None:
    """Switch anomaly mode on; whoever asks for the mode or sets it sees and gets the user's own."""
    if torch.is_anomaly_enabled():
        return  # the user's own: torch keeps the stacks already
    format_stack, enable = fx_traceback.format_stack, torch.set_anomaly_enabled
    is_enabled, is_checked = torch.is_anomaly_enabled, torch.is_anomaly_check_nan_enabled
    checked = is_checked()

    def kept_stack() -> list[str]:
        # While a graph is compiled, torch reads stacks of its own here.
        return format_stack() if fx_traceback.has_preserved_node_meta() else _users_entry(sys._getframe(1))

    def set_anomaly_enabled(enabled: bool, check_nan: bool = True) -> None:
        _restore()
        enable(enabled, check_nan)

    def restore() -> None:
        if is_enabled() and not is_checked():
            enable(False, checked)

    _replace(fx_traceback, "format_stack", kept_stack)
    _replace(torch, "is_anomaly_enabled", lambda: False)
    _replace(torch, "is_anomaly_check_nan_enabled", lambda: checked)
    _replace(torch, "set_anomaly_enabled", set_anomaly_enabled)
    _undo.append(restore)
    enable(True, False)


def _replace(owner: Any, name: str, replacement: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    _undo.append(lambda: setattr(owner, name, original))


def _restore() -> None:
    while _undo:
        _undo.pop()()


def _users_entry(frame: Any) -> list[str]:
    """The innermost frame of the user's, as a traceback writes it; nothing where there is none."""
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            return [f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n']
        frame = frame.f_back
    return []


@functools.lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """Whether a file is the user's: not isograd's, not a library's, not Python's own."""
    if file.startswith("<"):
        return file.startswith(_TYPED)
    if file.startswith(_PACKAGE + os.sep):
        return file.startswith(f"{_PACKAGE}{os.sep}demo{os.sep}")
    parts = Path(file).parts
    if any(library in parts for library in _LIBRARIES):
        return False
    return not any(file.startswith(folder + os.sep) for folder in _STANDARD if folder)


class SourceLines:
    """The lines behind the nodes of the losses' graphs.

    Between `keep(True)` and `pause` new nodes keep their line. `learn` remembers the lines of a graph; `line_of` finds
    the one behind a node of this graph or, for a graph that was made while nothing was kept, of one of the same shape.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], tuple[str | None, ...]] = OrderedDict()
        self._is_complete = False
        self._is_forbidden = False

    def keep(self, wanted: bool) -> None:
        """Whether nodes made from now on keep their line; they do as long as graphs come that are not known yet."""
        if wanted and not self._is_complete and not self._is_forbidden:
            _wanting.add(id(self))
            if not _undo:
                _install()
        else:
            self.pause()

    def pause(self) -> None:
        """Nodes made from now on keep nothing."""
        _wanting.discard(id(self))
        if not _wanting:
            _restore()

    def forbid(self) -> None:
        """Never keep lines again: the watch is over, or regions are compiled or checkpointed, and make their nodes
        elsewhere or a second time.
        """
        self._is_forbidden = True
        self.pause()

    def learn(self, names: tuple[str, ...], nodes: Sequence[Any]) -> None:
        """Take in a graph: its nodes in the order in which they were made, and their names."""
        self._is_complete = names in self._known
        if self._is_complete:
            self._known.move_to_end(names)
            return
        entries = tuple(map(_entry, nodes))
        if any(entries):
            self._known[names] = entries
            while len(self._known) > GRAPHS:
                self._known.popitem(last=False)

    def line_of(self, node: Any, names: tuple[str, ...], index: int) -> SourceLine | None:
        """The line behind `node`, the one at `index` of a graph with these names."""
        entry = _entry(node) or self._remembered(names, index)
        return None if entry is None else _line(entry)

    def _remembered(self, names: tuple[str, ...], index: int) -> str | None:
        """The entry of the graph that agrees with this one around the node, from one of its ends on."""
        for other, entries in reversed(self._known.items()):
            place = _counterpart(names, other, index)
            if place is not None:
                return entries[place]
        return None


def _counterpart(names: tuple[str, ...], other: tuple[str, ...], index: int) -> int | None:
    """The place in `other` of what stands at `index` of `names`, if both agree from one end to beyond it: where they
    part, the same operation may stand for another line.
    """
    if names == other or index + 1 < _agreement(names, other):
        return index
    from_end = len(names) - 1 - index
    return len(other) - 1 - from_end if from_end + 1 < _agreement(names[::-1], other[::-1]) else None


def _agreement(names: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(names, other, strict=False)))


def _entry(node: Any) -> str | None:
    """The user's innermost frame of the stack that a node keeps, as a traceback writes it."""
    for entry in reversed(node.metadata.get(_STACK) or ()):
        found = _ENTRY.match(entry)
        if found is not None and is_users(found["file"]):
            return sys.intern(entry)
    return None


def _line(entry: str) -> SourceLine | None:
    found = _ENTRY.match(entry)
    if found is None:
        return None
    file, number = found["file"], int(found["line"])
    code = linecache.getline(file, number).strip()
    return SourceLine(file=_short(file), line=number, function=found["function"], code=code)


def _short(file: str) -> str:
    """`file` from the working directory or from the script's folder, whichever is shorter; as it is elsewhere."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    folders = [Path.cwd(), *([Path(script).absolute().parent] if script else [])]
    below = [str(Path(file).relative_to(folder)) for folder in folders if Path(file).is_relative_to(folder)]
    return min(below, key=len, default=file)
