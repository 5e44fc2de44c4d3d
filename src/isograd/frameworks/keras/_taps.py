"""Where isograd listens to Keras: the one method through which every model comes before it trains.

`fit` and `train_on_batch` call `make_train_function`, on every backend; a custom `train_step` is compiled there, too.
It is replaced while at least one listener is subscribed and put back afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import keras


class Listener(Protocol):
    """What a subscriber is told. None of these may raise."""

    def before_training(self, model: keras.Model) -> None:
        """The model is about to make its train function; it may not be built yet, and neither its optimizer."""

    def made_train_function(self, model: keras.Model) -> None:
        """It has made one: `model.train_function`, not compiled yet."""


_listeners: list[Listener] = []
_original: Any = None


def subscribe(listener: Listener, *, first: bool = False) -> None:
    """Tell `listener` from now on, once, after the others or before them; the first subscriber installs the tap."""
    if listener in _listeners:
        return
    _listeners.insert(0 if first else len(_listeners), listener)
    if _original is None:
        _install()


def unsubscribe(listener: Listener) -> None:
    """Stop telling `listener`; the last one to leave restores Keras. Unknown listeners are ignored."""
    global _original
    if listener in _listeners:
        _listeners.remove(listener)
    if not _listeners and _original is not None:
        _trainer().make_train_function = _original
        _original = None


def _trainer() -> Any:
    """The backend's class that makes train functions."""
    return next(cls for cls in keras.Model.__mro__ if "make_train_function" in vars(cls))


def _install() -> None:
    global _original
    trainer = _trainer()
    original = _original = trainer.make_train_function

    @functools.wraps(original)
    def make_train_function(self: Any, force: bool = False) -> Any:
        if self.train_function is not None and not force:
            return original(self, force)
        for listener in tuple(_listeners):
            listener.before_training(self)
        made = original(self, force)
        for listener in tuple(_listeners):
            listener.made_train_function(self)
        return made

    trainer.make_train_function = make_train_function
