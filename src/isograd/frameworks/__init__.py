"""One folder or file per framework: the only places where a deep-learning framework is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import ArrayLike

from isograd._history import Event, Layer, Parameter

T = TypeVar("T")


class Recorder(Protocol):
    """Where a framework puts what it saw; `isograd._record.RunFile` is one."""

    def add_layers(self, subject: str, layers: Sequence[Layer]) -> None: ...
    def update_layer(self, subject: str, index: int, layer: Layer) -> None: ...
    def add_parameters(self, subject: str, parameters: Sequence[Parameter]) -> None: ...
    def update_parameter(self, subject: str, index: int, parameter: Parameter) -> None: ...
    def set_groups(self, subject: str, groups: Sequence[Mapping[str, Any]]) -> None: ...
    def write_row(self, subject: str, step: int, tier: str, arrays: Mapping[str, ArrayLike]) -> None: ...
    def write_profile(self, subject: str, step: int, statistic: str, layer: str, values: ArrayLike) -> None: ...
    def write_event(self, subject: str, event: Event) -> None: ...
    def set_unmeasured(self, subject: str, statistic: str, why: str) -> None: ...


class Shield(Protocol):
    """The single guard: runs our code inside the user's, times it, and swallows what goes wrong in it."""

    seconds: float

    def call(self, function: Callable[..., T], *args: Any) -> T | None: ...
