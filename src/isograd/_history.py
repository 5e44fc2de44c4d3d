"""What was measured in one subject of a run, as read-only arrays: the only thing that a rule sees.

Plain NumPy. A `History` is built by `_record.py` from a run file, or by hand in a test:

    History(subject="model", layers=(Layer(name="fc1", kind="linear"), …),
            series={"loss": Series(steps=[0, 1, 2], values=[2.3, 2.2, float("nan")]), …})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isograd._statistics import STATISTICS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Role = Literal["module", "operation", "input", "prediction", "target", "term"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A place where values were read.

    `role`: a `module` of the user's model, an `operation` seen in the autograd graph (a functional activation or
    attention; named `<layer before it>.<operation>`), or a boundary of the program: an `input` (data entering a
    module), a `prediction` or `target` (what entered the loss), a `term` (one summand of the loss; its `signal_norm` is
    the gradient that this term alone sends into what the terms share).

    `kind` is framework-neutral: linear, conv, embedding, batch-norm, layer-norm, group-norm, rms-norm, dropout,
    relu, leaky-relu, elu, selu, gelu, silu, sigmoid, tanh, hardtanh, softplus, softsign, softmax, log-softmax, pool,
    rnn, lstm, gru, rnn-cell, lstm-cell, gru-cell, attention, flatten, identity, other; for the boundaries: input,
    prediction, target, loss-term. `type` is the class or operation name as the user's program has it.

    `position` orders layers by first use (an operation stands behind the layer it follows); infinite if never used.
    `units` is the size of the feature axis; `fan_in` and `fan_out` count the connections of one unit as in Glorot &
    Bengio (2010), 0 where the notion does not apply. `shape` is the output's shape when first seen, `dtype` its type
    ("float16"), "" where unknown.
    """

    name: str
    kind: str = "other"
    type: str = ""
    role: Role = "module"
    position: float = float("inf")
    units: int = 0
    fan_in: int = 0
    fan_out: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A trainable or frozen tensor. `layer` is the name of the module that owns it, "" for a loose tensor.

    `optimized`: some optimizer holds it; `group` is its parameter group (-1 when none does).
    """

    name: str
    layer: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    trainable: bool = True
    optimized: bool = True
    group: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at a step: an exception, a skipped step, a change of hyperparameters …"""

    step: int
    kind: str
    layer: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, init=False)
class Series:
    """One statistic over time. `steps`: int [S], increasing. `values`: float64 [S] for step statistics, else [S, N]."""

    steps: Integers
    values: Floats

    def __init__(self, steps: ArrayLike, values: ArrayLike) -> None:
        stamps = np.asarray(steps, dtype=np.int64)
        readings = np.asarray(values, dtype=np.float64)
        if stamps.ndim != 1 or readings.shape[:1] != stamps.shape:
            raise ValueError(f"steps {stamps.shape} and values {readings.shape} must agree in their first axis")
        stamps.setflags(write=False)
        readings.setflags(write=False)
        object.__setattr__(self, "steps", stamps)
        object.__setattr__(self, "values", readings)

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, step: int) -> Floats | None:
        """The row that was read at exactly `step`, or None."""
        index = int(np.searchsorted(self.steps, step))
        return self.values[index] if index < len(self.steps) and self.steps[index] == step else None


@dataclass(frozen=True, kw_only=True)
class History:
    """Facts about one subject (a model with its optimizer).

    `series[name]`: columns of layer statistics follow `layers` (in order of first use), of parameter statistics
    `parameters`, of group statistics the optimizer's parameter groups. `profiles[name][layer]`: Series with one
    column per call. `groups`: per parameter group the optimizer's class and hyperparameters as last seen.
    `unmeasured`: statistic -> why it could not be read, in words. `meta`: run-wide facts (seed, versions, device …).
    `companions`: the other subjects of the same run, by name (the discriminator beside the generator).
    """

    subject: str = "model"
    run: str = ""
    layers: tuple[Layer, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    groups: tuple[Mapping[str, Any], ...] = ()
    series: Mapping[str, Series] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    companions: Mapping[str, History] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        width = {"layer": len(self.layers), "parameter": len(self.parameters)}
        for name, series in self.series.items():
            axis = STATISTICS[name].axis if name in STATISTICS else None
            if axis is None:
                raise ValueError(f"{name!r} is not a statistic; isograd._statistics lists them")
            if axis in width and series.values.shape[1:] != (width[axis],):
                raise ValueError(f"{name} has shape {series.values.shape}, but there are {width[axis]} {axis}s")

    def __contains__(self, statistic: str) -> bool:
        """Whether `statistic` has at least one reading that is not NaN."""
        series = self.series.get(statistic)
        return series is not None and bool(np.any(~np.isnan(series.values)))

    def __getitem__(self, statistic: str) -> Series:
        """The series of `statistic`. Raises KeyError when it was never recorded: declare it in `Rule.needs`."""
        return self.series[statistic]

    @property
    def num_steps(self) -> int:
        """Optimizer steps seen: one more than the last recorded step number."""
        return 1 + max((int(s.steps[-1]) for s in self.series.values() if len(s)), default=-1)

    def units_of(self, parameter: Parameter) -> int:
        """How many units a weight has: those of its layer, where one of its axes has as many, else its first axis.

        Frameworks differ in which axis of a weight its units are: PyTorch has the first, Keras the last one.
        """
        units = next((layer.units for layer in self.layers if layer.name == parameter.layer), 0)
        return units if units in parameter.shape else (*parameter.shape, 1)[0]

    def events_of(self, kind: str) -> tuple[Event, ...]:
        """Events of one kind, in order."""
        return tuple(event for event in self.events if event.kind == kind)
