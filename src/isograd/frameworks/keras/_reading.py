"""What is read while one step of a model is traced or run: tensors with their places, and the numbers they become.

A step leaves one float32 vector: first the number of its layout, then every piece behind the other. The same layout is
met again and again; a compiled step has a layout for each of its traces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isograd.frameworks.keras import _kernels as kernels

Tier = Literal["cheap", "deep"]
Role = Literal["input", "prediction", "target"]


class Place(NamedTuple):
    """Where a piece of the vector belongs: `of` the step, a parameter, a call or a boundary, the `number`-th one."""

    of: str
    number: int
    name: str


@dataclass(kw_only=True)
class Call:
    """One call of a layer, or of the activation inside it, as far as it is known before the step runs.

    `axis`: where its features are. `times`: the number of time steps of a recurrent layer, 0 for others.
    """

    name: str
    kind: str
    type: str
    role: Literal["module", "operation"] = "module"
    layer: Any = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    axis: int = -1
    times: int = 0
    backwards: bool = False


@dataclass(kw_only=True)
class Boundary:
    """Data that enters the model, what it returned, or what it should have returned."""

    name: str
    role: Role
    type: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What the vector of a step holds. `pieces`: (place, its shape)."""

    tier: Tier
    pieces: tuple[tuple[Place, tuple[int, ...]], ...]
    calls: tuple[Call, ...] = field(compare=False)
    boundaries: tuple[Boundary, ...] = field(compare=False)
    facts: Mapping[str, Any] | None = field(compare=False, default=None)
    optimizers: tuple[tuple[Any, ...], ...] = field(compare=False, default=())
    variables: tuple[tuple[str, str, Any], ...] = field(compare=False, default=())
    unread: tuple[str, ...] = field(compare=False, default=())

    @property
    def width(self) -> int:
        """Entries of the vector, without the number of the layout."""
        return sum(math.prod(shape) for _, shape in self.pieces)

    def taken_apart(self, vector: NDArray[np.float32]) -> dict[Place, NDArray[np.float64]]:
        """The vector of a step, without the number of the layout, piece by piece."""
        found, start = {}, 0
        for place, shape in self.pieces:
            end = start + math.prod(shape)
            found[place] = vector[start:end].astype(np.float64).reshape(shape)
            start = end
        return found


class Reading:
    """Collects the tensors of one step. `forward`: read up to the loss; `later`: behind the backward pass.

    `signals`: what the backward pass brought to each call, by its index; `times` likewise by time step. `unread`: names
    of layers that stand where nothing can be taken out (inside a loop of the backend).
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.calls: list[Call] = []
        self.boundaries: list[Boundary] = []
        self.forward: dict[Place, Any] = {}
        self.signals: dict[int, Any] = {}
        self.times: dict[int, Any] = {}
        self.later: dict[Place, Any] = {}
        self.good: list[Any] = []  # per update that may be left out: whether it is made
        self.facts: dict[str, Any] | None = None
        self.optimizers: list[tuple[Any, ...]] = []  # per optimizer that stepped: itself, then its variables
        self.variables: tuple[tuple[str, str, Any], ...] = ()  # (name, its layer, the variable) of the model
        self.unread: list[str] = []
        self.opaque = 0
        self.where: Any = None  # the graph or trace in which tensors may be kept
        self.bad_inputs: dict[int, tuple[Any, Any]] = {}
        self.apart: dict[int, Any] = {}  # id of a value that is better not touched -> the same, computed beside it
        self.num_losses = 0
        self.channels: Any = None

    @property
    def is_deep(self) -> bool:
        """Whether layers and weights are read, too."""
        return self.tier == "deep"

    def put_loss(self, loss: Any) -> None:
        """A loss of this step, as the user's program has it."""
        self.forward[Place("step", self.num_losses, "loss")] = kernels.wide(loss)
        self.num_losses += 1

    def put_call(self, call: Call, found: Mapping[str, Any]) -> int:
        """What was read of a call; its index."""
        index = len(self.calls)
        self.calls.append(call)
        self.forward |= {Place("call", index, name): tensor for name, tensor in found.items()}
        return index

    def put_boundary(self, boundary: Boundary, found: Mapping[str, Any]) -> None:
        """What was read of inputs, predictions or targets."""
        index = len(self.boundaries)
        self.boundaries.append(boundary)
        self.forward |= {Place("boundary", index, name): tensor for name, tensor in found.items()}

    def behind(self) -> dict[Place, Any]:
        """Everything that the backward pass and the optimizer left."""
        signals = {Place("call", index, "signal"): tensor for index, tensor in sorted(self.signals.items())}
        times = {Place("call", index, "times"): tensor for index, tensor in sorted(self.times.items())}
        return {**signals, **times, **self.later}

    def layout(self, pieces: Mapping[Place, Any]) -> Layout:
        """The layout of these pieces."""
        return Layout(
            self.tier,
            tuple((place, tuple(int(n) for n in tensor.shape)) for place, tensor in pieces.items()),
            tuple(self.calls),
            tuple(self.boundaries),
            self.facts,
            tuple(self.optimizers),
            self.variables,
            tuple(dict.fromkeys(self.unread)),
        )


class Layouts:
    """The layouts of one model by number."""

    def __init__(self) -> None:
        self._known: list[Layout] = []

    def number(self, layout: Layout) -> int:
        """The number of a layout, a new one where it is new."""
        for number, known in enumerate(self._known):
            if known == layout and _ids(known.optimizers) == _ids(layout.optimizers) and known.calls == layout.calls:
                return number
        self._known.append(layout)
        return len(self._known) - 1

    def __getitem__(self, number: int) -> Layout:
        return self._known[number]


def _ids(several: tuple[tuple[Any, ...], ...]) -> list[list[int]]:
    """By identity: variables compare their values."""
    return [[id(thing) for thing in things] for things in several]


# ---- numbers --------------------------------------------------------------------------------------------------------


def layer_statistics(found: Mapping[Place, NDArray[np.float64]], members: list[int]) -> dict[str, float]:
    """The layer statistics of a step from its calls `members`, as `_statistics.py` defines them."""

    def of(name: str) -> Iterator[float]:
        for index in members:
            piece = found.get(Place("call", index, name))
            if piece is not None:
                yield float(piece)

    size = sum(of("size"))
    bad, inputs = sum(of("nonfinite")), [*of("inputs")]
    dead, gaps = [*of("dead")], [*of("batch_gap")]
    statistics = {
        "calls": float(len(members)),
        "output_size": size,
        "output_nonfinite": bad,
        "output_zero_fraction": _share(sum(of("zeros")), size),
        "input_nonfinite": sum(inputs) if inputs else math.nan,
        "dead_fraction": min(dead, default=math.nan),
        "saturation": _share(_sum_or_nan(of("saturated")), size),
        "activation_slope": math.sqrt(_share(_sum_or_nan(of("slope_squares")), size)),
        "batch_statistics_gap": gaps[-1] if gaps and math.isfinite(gaps[-1]) else math.nan,
        "row_similarity": _mean_cosine([*of("rows_squared")], [*of("rows")]),
    }
    if not bad and size:
        statistics |= {
            "output_rms": math.sqrt(_share(sum(of("squares")), size)),
            "output_mean": _share(sum(of("sum")), size),
            "output_min": min(of("low"), default=math.nan),
            "output_max": max(of("high"), default=math.nan),
        }
    return statistics | _signal_statistics(found, members)


def _signal_statistics(found: Mapping[Place, NDArray[np.float64]], members: list[int]) -> dict[str, float]:
    places = [(index, Place("call", index, "signal")) for index in members]
    pieces = [(float(found[Place("call", index, "size")]), found[place]) for index, place in places if place in found]
    # One that has arrived has entries: they are zeros, or have squares. On JAX one that has not is all 0.
    pieces = [(size, piece) for size, piece in pieces if piece.any()]
    if not pieces:
        return {}
    squares, peaks, zeros, bad = np.array([piece for _, piece in pieces]).T
    lost = float(np.sum(bad))
    return {
        "signal_nonfinite": lost,
        "signal_norm": math.nan if lost else math.sqrt(float(np.sum(squares))),
        "signal_max": math.nan if lost else float(np.max(peaks)),
        "signal_zero_fraction": _share(float(np.sum(zeros)), sum(size for size, _ in pieces)),
    }


def boundary_statistics(found: Mapping[Place, NDArray[np.float64]], index: int, role: str) -> dict[str, float]:
    """The statistics of data: those of a value, and what its rows say."""
    pieces = {place.name: piece for place, piece in found.items() if place[:2] == ("boundary", index)}
    size, bad = float(pieces["size"]), float(pieces["nonfinite"])
    statistics = {"calls": 1.0, "output_size": size, "output_nonfinite": bad}
    if size and "zeros" in pieces:
        statistics["output_zero_fraction"] = _share(float(pieces["zeros"]), size)
    if not bad and size:
        mean, squares = float(pieces["sum"]) / size, float(pieces["squares"]) / size
        statistics |= {"output_rms": math.sqrt(squares), "output_mean": mean}
        if "std" in pieces:
            statistics["output_std"] = float(pieces["std"])
        statistics |= {"output_min": float(pieces["low"]), "output_max": float(pieces["high"])}
    rows = pieces.get("rows_themselves")
    if rows is None or not rows.size:
        return statistics
    if role != "prediction":
        statistics["distinct_values"] = float(len(np.unique(rows, axis=0)))
    if rows.shape[1] > 1 and "is_table" in pieces:
        statistics["column_scale_ratio"] = column_scale_ratio(rows)
    if role == "prediction" and rows.shape[1] > 1:
        sums = rows.sum(axis=1)
        statistics |= {"row_sum_min": float(sums.min()), "row_sum_max": float(sums.max())}
    return statistics


def column_scale_ratio(rows: NDArray[np.float64]) -> float:
    """Largest over smallest root mean square among the columns, zeros left out; 1 for fewer than two with others."""
    counts = (rows != 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.sqrt((rows**2).sum(axis=0) / counts)
    present = scales[counts > 0]
    return float(present.max() / present.min()) if len(present) else 1.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _sum_or_nan(values: Iterator[float]) -> float:
    several = [*values]
    return sum(several) if several else math.nan


def _mean_cosine(squared: list[float], rows: list[float]) -> float:
    if not rows or rows[-1] <= 1:
        return math.nan
    return (squared[-1] - rows[-1]) / (rows[-1] * (rows[-1] - 1))
