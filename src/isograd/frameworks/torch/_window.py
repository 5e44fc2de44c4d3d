"""What has been read since the last step ended, and the steps that have ended and are not written yet."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from isograd.frameworks.torch._calls import Call
from isograd.frameworks.torch._parameters import ParameterReading


@dataclass
class Boundary:
    """Readings of something that is no module: an operation, an input, a prediction or a target."""

    owner: nn.Module | None
    name: str
    kind: str
    role: str
    type: str
    shape: tuple[int, ...]
    call: Call
    source: Call | None = None
    """The call that an input entered."""


@dataclass
class Window:
    """What was read since the previous step ended. Holds scalars only, no batch and no activation."""

    losses: list[Tensor] = field(default_factory=list)
    returned_losses: list[Tensor] = field(default_factory=list)
    """Those whose gradients `torch.autograd.grad` returned, where no parameter holds them."""
    clips: list[tuple[Tensor, float]] = field(default_factory=list)
    modules: weakref.WeakKeyDictionary[nn.Module, list[Call]] = field(default_factory=weakref.WeakKeyDictionary)
    boundaries: list[Boundary] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    loss_scale: Tensor | None = None
    compiled: bool = False
    graph_read: bool = False
    constant_outputs: set[int] = field(default_factory=set)
    forwarded: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    handles: list[RemovableHandle] = field(default_factory=list)
    last_kind: str = ""
    graph_nodes: int = 0
    carried: dict[int, list[Tensor]] = field(default_factory=dict)
    """Per optimizer (by id) the norm of the gradients that stood there when each of the first passes began."""

    def choose_losses(self) -> None:
        """Losses whose gradients were returned count only where no pass left its own in the parameters."""
        self.losses = self.losses or self.returned_losses
        self.returned_losses = []

    def absorb(self, later: Window) -> None:
        """Add what was read in a window that belongs to the same step."""
        self.losses += later.losses
        self.clips += later.clips
        self.boundaries += later.boundaries
        self.events += later.events
        self.carried |= {key: norms for key, norms in later.carried.items() if key not in self.carried}
        for module, found in later.modules.items():
            self.modules.setdefault(module, []).extend(found)
        self.loss_scale = later.loss_scale if self.loss_scale is None else self.loss_scale
        self.compiled |= later.compiled
        self.graph_nodes = max(self.graph_nodes, later.graph_nodes)

    def release(self) -> None:
        """Take hooks off tensors that outlive the step."""
        for handle in self.handles:
            handle.remove()


@dataclass
class Pending:
    """One optimizer's finished step that has not been written yet."""

    optimizer: Optimizer
    reading: ParameterReading
    window: Window
    deep: bool
    skipped: bool
    seconds: float
    watch_seconds: float
