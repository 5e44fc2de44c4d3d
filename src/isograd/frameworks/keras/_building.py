"""Build models before their first train function is made, also on TensorFlow, where Keras waits for the first batch.

A change can only be made of layers that have been built. On JAX and PyTorch `fit` and `train_on_batch` build a model
from the shapes of the first batch; on TensorFlow they would under a distribution strategy. Here they do for the models
that somebody waits for.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import keras


class Waiting(Protocol):
    """Who wants models to be built."""

    def is_waiting_for(self, model: Any) -> bool:
        """Whether this model has to be built before it trains."""


_waiting: list[Waiting] = []
_original: Any = None


def begin(one: Waiting) -> None:
    """Build the models that `one` waits for, from now on."""
    _waiting.append(one)
    if keras.backend.backend() == "tensorflow" and _original is None and _trainer() is not None:
        _install()


def end(one: Waiting) -> None:
    """No longer. The last one to leave restores Keras; unknown ones are ignored."""
    global _original
    if one in _waiting:
        _waiting.remove(one)
    if not _waiting and _original is not None:
        _trainer()._maybe_symbolic_build = _original
        _original = None


def _trainer() -> Any:
    """The class that builds where it must; None in versions of Keras that have none."""
    return next((cls for cls in keras.Model.__mro__ if "_maybe_symbolic_build" in vars(cls)), None)


def _install() -> None:
    global _original
    trainer = _trainer()
    original = _original = trainer._maybe_symbolic_build

    @functools.wraps(original)
    def build(self: Any, iterator: Any = None, data_batch: Any = None) -> Any:
        if any(one.is_waiting_for(self) for one in tuple(_waiting)):
            _build(self, iterator._distributed_dataset.element_spec if data_batch is None else data_batch)
        return original(self, iterator=iterator, data_batch=data_batch)

    trainer._maybe_symbolic_build = build


def _build(model: Any, batch: Any) -> None:
    """Build from a batch, or from the description of one. A model that does not allow it waits for its first batch."""
    try:
        model._symbolic_build(data_batch=keras.tree.map_structure(_symbol, batch))
    except Exception:
        return


def _symbol(value: Any) -> Any:
    if getattr(value, "shape", None) is None:
        return None
    return keras.KerasTensor(tuple(value.shape), keras.backend.standardize_dtype(value.dtype))
