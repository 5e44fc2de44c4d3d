"""Hearing of the batches that torch's data loaders hand to the program, in its own process and thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.data import dataloader

Hear = Callable[[Any, Any], None]
"""Called with (the loader's iterator, the batch) before the program gets the batch. It may not raise."""

_iterator: Any = dataloader._BaseDataLoaderIter  # what all iterators of loaders derive from
_listeners: list[Hear] = []
_installed: list[tuple[Any, Any]] = []  # (original, replacement), while there is one


def subscribe(hear: Hear) -> None:
    """Tell `hear` of every batch from now on. The first subscriber replaces the one function that all iterators of
    loaders share; worker processes are not touched.
    """
    _listeners.append(hear)
    if not _installed:
        original = _iterator.__next__
        _installed.append((original, _tapped(original)))
        _iterator.__next__ = _installed[0][1]


def unsubscribe(hear: Hear) -> None:
    """Stop telling `hear`; the last one to leave puts the function back. Unknown listeners are ignored."""
    if hear in _listeners:
        _listeners.remove(hear)
    # Who wrapped the replacement meanwhile keeps it: it tells nobody any more.
    if not _listeners and _installed and _iterator.__next__ is _installed[0][1]:
        _iterator.__next__ = _installed.pop()[0]


def _tapped(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def deliver(self: Any) -> Any:
        batch = original(self)
        for hear in tuple(_listeners):
            hear(self, batch)
        return batch

    return deliver
