"""One folder or file per framework: the only places where a deep-learning framework is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # `isograd run` reads this before the script may set how NumPy computes
    from numpy.typing import ArrayLike

    from isograd._guard import Guard
    from isograd._history import Event, Layer, Parameter

T = TypeVar("T")


class Recorder(Protocol):
    """Where a framework puts what it saw; `isograd._record.RunFile` is one."""

    def add_layers(self, subject: str, layers: Sequence[Layer]) -> None:
        """Append layers: a layer's column is the index of its insertion."""

    def update_layer(self, subject: str, index: int, layer: Layer) -> None:
        """Replace what is known of one layer."""

    def add_parameters(self, subject: str, parameters: Sequence[Parameter]) -> None:
        """Append parameters, likewise."""

    def update_parameter(self, subject: str, index: int, parameter: Parameter) -> None:
        """Replace what is known of one parameter."""

    def set_groups(self, subject: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """The optimizer and hyperparameters of every parameter group."""

    def write_row(self, subject: str, step: int, tier: str, arrays: Mapping[str, ArrayLike]) -> None:
        """What one tier read at one step: statistic -> number, or one number per column so far."""

    def write_profile(self, subject: str, step: int, statistic: str, layer: str, values: ArrayLike) -> None:
        """One number per call of a layer."""

    def write_event(self, subject: str, event: Event) -> None:
        """Something that happened."""

    def set_unmeasured(self, subject: str, statistic: str, why: str) -> None:
        """A statistic that cannot be read, and why, in words."""


class Shield(Protocol):
    """The single guard: runs our code inside the user's, times it, and swallows what goes wrong in it."""

    seconds: float

    def call(self, function: Callable[..., T], *args: Any) -> T | None:
        """`function(*args)`, or None when it failed, now or before."""


WATCHED: Mapping[str, str] = {"torch": "torch", "keras": "keras", "isograd.frameworks.jax": "jax"}
"""The module whose import says that a program uses a framework -> what is here for it. A program of JAX is one that
has asked for a monitor."""


def load(framework: str) -> Any:
    """What isograd has for a framework: `Observer`, `describe_run`, `sort`, and more where it can do more."""
    return import_module(f"isograd.frameworks.{framework}")


def check_guard(framework: str, guard: Guard | None) -> None:
    """Raises ValueError, a sentence, for a guard that may do more than can be done in programs of this framework."""
    check = getattr(load(framework), "check_guard", None)
    if check is not None:
        check(guard)


def imported() -> list[str]:
    """The frameworks that this process has imported, all that `with_companions` adds; PyTorch where there are none."""
    found = [name for module, name in WATCHED.items() if module in sys.modules]
    return [name for framework in found or ["torch"] for name in with_companions(framework)]


def with_companions(framework: str) -> list[str]:
    """A framework that has been imported, and what trains with parts of it: TensorFlow with the optimizers of Keras."""
    if framework == "keras" and sys.modules["keras"].backend.backend() == "tensorflow":
        return ["keras", "tensorflow"]
    return [framework]


def framework_of(things: Iterable[object]) -> str:
    """The framework whose objects `things` are, PyTorch where nobody knows them. Raises ValueError for a mixture.

    A model of Keras on the torch backend is a module of PyTorch, too: Keras trains it.
    """
    found = {_framework_of(thing) for thing in things}
    if len(found) > 1:
        raise ValueError(f"watch() takes objects of one framework at a time, not of {' and '.join(sorted(found))}")
    return found.pop() if found else "torch"


def _framework_of(thing: object) -> str:
    for cls in type(thing).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "keras" or cls.__module__.startswith("isograd.frameworks.keras"):
            return "keras"
        if package in ("optax", "flax") or cls.__module__.startswith("isograd.frameworks.jax"):
            return "jax"
        if package in ("torch", "tensorflow"):
            return package
    return "torch"


def is_installed(framework: str) -> bool:
    """Whether a framework could be imported; it is not."""
    return framework in sys.modules or find_spec(framework) is not None


def set_threads(threads: int) -> None:
    """Let this process compute on so many threads, whatever framework it is about to import."""
    for variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = str(threads)
    if is_installed("torch"):
        load("torch").set_threads(threads)
