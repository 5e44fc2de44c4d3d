"""One folder or file per framework: the only places where a deep-learning framework is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import ArrayLike

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
