"""Which step is bad, and what is to be done: the ranges that a run keeps to, and the decision. No framework.

A step is bad when its loss or a gradient is not finite, or when the loss, the norm of all gradients, of one tensor's,
or the update that the optimizer is about to make stands far above what the run's own last steps were. How far is
calibrated on healthy programs (`zoo/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from isograd._guard import Guard
from isograd._robust import MAD_TO_SIGMA

Floats = NDArray[np.float64]
Channel = Literal["loss", "global_grad_norm", "grad_norm", "update_norm", "state"]
Action = Literal["none", "observe", "skip", "clip", "rewind", "stop", "give-up", "relearn"]

WIDTH = 128
"""Steps in a window, as in the skip-step optimizer of OLMo-core (Allen Institute for AI, 2025)."""

DELAY = 8
"""Steps that the newest entry of a window lies back: a cluster of outliers cannot raise its own range (as Composer's
`OutlierDetector`). Ranges are computed anew as often."""

LEAST = 32
"""Readings before a range judges anything: the median of fewer says little of the tail, and the first steps of a run
are its steepest."""

SIGMA = 6.0
"""Robust standard deviations above the median, as in OLMo-core."""

GRADIENT_FACTOR = 10.0
"""Times the upper end of its range that a gradient or an update is bad: of values with a Pareto tail of index 2, the
heaviest with a finite mean of squares, one in 128 * 10^2 = 12,800 stands so far above the largest of the 128 before.
Of N tensors the largest is looked at: their factor is sqrt(N) times this one, for the same rate. In 627 healthy runs
(294,277 steps) that factor flagged none, half of it four."""

LOSS_FACTOR = 3.0
"""Likewise for a loss, whose tail is lighter: 2 flagged two of 627 healthy runs, 3 none."""

LOSS_SHARE = 0.01
"""A loss below this share of where the run began is no spike: the run has 99 % of what it gained (full-batch
programs that have converged to 1e-10 step up to 1e-3 and fall back)."""

STALE = WIDTH // 4
"""Flagged of the last `WIDTH` steps from which a range is out of date, not the steps: it is learned anew."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One reading that made a step bad. `limit`: what it should have stayed below; infinite where it is not finite."""

    channel: Channel
    observed: float
    limit: float
    layer: str | None = None

    def __str__(self) -> str:
        where = f" of {self.layer}" if self.layer else ""
        name = self.channel.replace("_", " ").replace("grad ", "gradient ")
        if self.channel == "state":
            return "weights, buffers or optimizer state are not finite"
        if not math.isfinite(self.observed):
            return f"the {name}{where} is not finite"
        return f"the {name}{where} is {self.observed:.3g}, above {self.limit:.3g}, the limit by the run's own range"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"channel": self.channel, "layer": self.layer, "observed": self.observed, "limit": self.limit}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done at a step and why. `clip_to`: the norm that all gradients together are scaled down to.

    `lower`: the learning rate is lowered from now on. `before`: the state to go back to was taken at this step or
    earlier. "give-up": the step is taken although it is bad; "relearn": the ranges are out of date, not the step.
    `damaged`: weights or optimizer state are not finite already. `again`: it was so decided at the step before, too.
    """

    action: Action = "none"
    reasons: tuple[Reason, ...] = ()
    clip_to: float = math.inf
    lower: bool = False
    before: int = 0
    damaged: bool = False
    again: bool = False

    @property
    def is_bad(self) -> bool:
        """Whether the step is."""
        return bool(self.reasons)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a step is judged by, before the optimizer makes it.

    `loss`: of the step's batches together, NaN where none was seen. `norms`: gradient L2 norm of each tensor [N], NaN
    where it has none, infinite where it is too large to be told. `nonfinite`: entries that are not finite [N].
    `update`: L2 norm of the update that the optimizer is about to make, NaN where it cannot be told, infinite where
    it is not finite although the gradients are. `sized`: whether the size of a gradient matters to the optimizer
    (Rprop looks at signs alone).
    """

    loss: float = math.nan
    loss_is_finite: bool = True
    norms: Floats = field(default_factory=lambda: np.empty(0))
    nonfinite: Floats = field(default_factory=lambda: np.empty(0))
    update: float = math.nan
    sized: bool = True

    @property
    def norm(self) -> float:
        """L2 norm of all gradients together; NaN where there are none."""
        present = self.norms[~np.isnan(self.norms)]
        if not present.size:
            return math.nan
        scale = present.max()
        if not 0 < scale < math.inf:
            return float(scale)
        return float(scale) * math.sqrt(float(np.sum((present / scale) ** 2)))  # Python's floats overflow to infinity

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return self.loss_is_finite and not np.any(self.nonfinite > 0)


class Ranges:
    """Upper ends of what several series [N] keep to, each by its own past, and the limits above which they are left.

    Of the logarithms in a window of `WIDTH` readings that ends `DELAY` steps back, the upper end is the larger of the
    median + `SIGMA` robust standard deviations (1.4826 MAD) and the largest; the limit is `factor` times that. Series
    that are not positive (a log-likelihood) are judged on their own scale, by the distance from the median. No limit
    is below `floor` times the median of the first window. Values that are not finite or were flagged never enter.
    """

    def __init__(self, factor: float, *, floor: float = 0.0) -> None:
        self._factor, self._floor = factor, floor
        self._begin(0)

    def _begin(self, width: int) -> None:
        self._window = np.full((WIDTH + DELAY, width), np.nan)
        self._first = np.full(width, np.nan)
        self.upper, self.limits = np.full(width, np.inf), np.full(width, np.inf)
        self._count = 0

    def fit(self, width: int) -> None:
        """Judge so many series: anew, where they are not as many as before."""
        if self._window.shape[1] != width:
            self._begin(width)

    def add(self, values: Floats) -> None:
        """The next readings, NaN for those that are not to count."""
        self.fit(len(values))
        self._window[self._count % len(self._window)] = np.where(np.isfinite(values), values, np.nan)
        self._count += 1
        if self._count >= LEAST + DELAY and (self._count - LEAST) % DELAY == 0:
            self._renew()

    def forget(self) -> None:
        """Learn anew."""
        self._begin(self._window.shape[1])

    def _renew(self) -> None:
        order = np.arange(max(0, self._count - len(self._window)), self._count - DELAY)
        rows = self._window[order % len(self._window)]
        if np.isnan(self._first).all():
            self._first = _median(np.abs(rows[:LEAST]))
        enough = np.sum(~np.isnan(rows), axis=0) >= LEAST
        upper, limits = _ends(rows, self._factor)
        self.upper = np.where(enough, upper, np.inf)
        self.limits = np.where(enough, np.fmax(limits, self._floor * self._first), np.inf)

    def state_dict(self) -> dict[str, Any]:
        """Everything that it knows, always under the same names."""
        return {
            "window": self._window.tolist(),
            "first": self._first.tolist(),
            "upper": self.upper.tolist(),
            "limits": self.limits.tolist(),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._window, self._first = np.array(state["window"], float), np.array(state["first"], float)
        self.upper, self.limits = np.array(state["upper"], float), np.array(state["limits"], float)
        self._count = int(state["count"])


def _median(rows: Floats) -> Floats:
    """Of each column, NaN left out; NaN where there is nothing."""
    ordered = np.sort(rows, axis=0)  # NaN sorts last
    count = np.sum(~np.isnan(rows), axis=0)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, np.maximum(len(rows) - 1, 0))
    columns = np.arange(rows.shape[1])
    return np.where(count > 0, (ordered[low, columns] + ordered[high, columns]) / 2, np.nan)


def _ends(rows: Floats, factor: float) -> tuple[Floats, Floats]:
    """(upper end, limit) of each column."""
    logs = np.log(np.where(rows > 0, rows, np.nan))  # an exact zero is the reading of no size
    _, log_end = _center_and_end(logs)
    center, end = _center_and_end(rows)
    positive = ~np.any(rows < 0, axis=0)
    with np.errstate(over="ignore"):
        upper = np.where(positive, np.exp(log_end), end)
        return upper, np.where(positive, upper * factor, center + factor * (end - center))


def _center_and_end(rows: Floats) -> tuple[Floats, Floats]:
    center = _median(rows)
    spread = MAD_TO_SIGMA * _median(np.abs(rows - center))
    largest = np.max(np.where(np.isnan(rows), -np.inf, rows), axis=0)
    return center, np.fmax(center + SIGMA * spread, largest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """What the next step has to stay below: loss, norm of all gradients, update, and norm of each tensor [N]; and the
    upper ends that norms are clipped to.
    """

    loss: float
    norm: float
    update: float
    norms: Floats
    norm_end: float
    norm_ends: Floats


class Judge:
    """Judges the steps of one optimizer, one after the other.

    `names(i)`: the name of tensor i. Deterministic: ranks that are given the same readings decide alike.
    """

    def __init__(self, guard: Guard, names: Callable[[int], str] = str) -> None:
        self._guard, self._names = guard, names
        self._ranges = {
            "loss": Ranges(LOSS_FACTOR, floor=LOSS_SHARE),
            "global_grad_norm": Ranges(GRADIENT_FACTOR),
            "grad_norm": Ranges(GRADIENT_FACTOR),
            "update_norm": Ranges(GRADIENT_FACTOR),
        }
        self._flags = np.zeros(WIDTH, dtype=bool)
        self.step = 0
        self.in_a_row = 0
        self._first_bad = 0
        self._rewinds = 0
        self._past = 0
        self._before = -1
        self._gave_up = False

    # ---- the decision ---------------------------------------------------------------------------------------------

    def judge(
        self,
        reading: Reading,
        step: int,
        *,
        bounds: Bounds | None = None,
        state_is_bad: Callable[[], bool] = bool,
        can_rewind: bool = True,
    ) -> Decision:
        """What to do at a step. `bounds`: those that it was held to, where that was earlier. `state_is_bad()`: whether
        weights or optimizer state are not finite already, asked only where the loss or the update is not. `can_rewind`:
        whether there is a state to go back to.
        """
        self.step = step
        bounds = bounds or self.bounds(len(reading.norms))
        reasons = self._reasons(reading, bounds)
        if not reasons:
            return self._good(reading)
        return self._decide(reading, reasons, bounds, state_is_bad, can_rewind)

    def damaged(self, *, can_rewind: bool) -> Decision:
        """What to do after a step when weights, buffers or optimizer state turn out not to be finite: entries that no
        loss, no gradient and no sample of the update have shown (an infinite second moment stops its weight for ever).
        """
        if not self.in_a_row:
            self._first_bad = self.step
        self.in_a_row += 1
        reason = Reason(channel="state", observed=math.nan, limit=math.inf)
        return replace(self._end_trouble(Reading(update=math.inf), (reason,), can_rewind), damaged=True)

    def bounds(self, width: int) -> Bounds:
        """Those of the next step, of so many tensors."""
        for channel, ranges in self._ranges.items():
            ranges.fit(width if channel == "grad_norm" else 1)
        loss, norm, update = (self._ranges[name] for name in ("loss", "global_grad_norm", "update_norm"))
        layers = self._ranges["grad_norm"]
        return Bounds(
            loss=float(loss.limits[0]),
            norm=float(norm.limits[0]),
            update=float(update.limits[0]),
            norms=layers.limits * math.sqrt(max(1, width)),
            norm_end=float(norm.upper[0]),
            norm_ends=layers.upper,
        )

    def _good(self, reading: Reading) -> Decision:
        self._learn(reading)
        self._flag(False)
        self.in_a_row, self._gave_up = 0, False
        if self.step > self._past:
            self._rewinds, self._before = 0, -1  # the run has come past the trouble: the next one is another
        return Decision()

    def _reasons(self, reading: Reading, bounds: Bounds) -> tuple[Reason, ...]:
        if not reading.is_finite:
            return self._nonfinite(reading)
        limits = {"loss": bounds.loss, "global_grad_norm": bounds.norm, "update_norm": bounds.update}
        # A norm that overflows is larger than any range, also before there is one.
        found = [
            Reason(channel=channel, observed=value, limit=limits[channel])
            for channel, value in self._single(reading)
            if value > limits[channel] or value == math.inf
        ]
        return (*found, *(self._above_in_layers(reading.norms, bounds.norms) if reading.sized else ()))

    def _nonfinite(self, reading: Reading) -> tuple[Reason, ...]:
        found = [] if reading.loss_is_finite else [Reason(channel="loss", observed=reading.loss, limit=math.inf)]
        bad = np.flatnonzero(reading.nonfinite > 0)
        if len(bad):
            layer = self._names(int(bad[0]))
            found.append(Reason(channel="grad_norm", layer=layer, observed=math.nan, limit=math.inf))
        return tuple(found)

    def _single(self, reading: Reading) -> list[tuple[Channel, float]]:
        channels: list[tuple[Channel, float]] = [("loss", reading.loss)]
        if reading.sized:
            channels += [("global_grad_norm", reading.norm), ("update_norm", reading.update)]
        return channels

    def _above_in_layers(self, norms: Floats, limits: Floats) -> tuple[Reason, ...]:
        """The tensor that is furthest above its limit."""
        above = np.flatnonzero(norms > limits)
        if not len(above):
            return ()
        worst = int(above[np.argmax(norms[above] / limits[above])])
        observed, limit = float(norms[worst]), float(limits[worst])
        return (Reason(channel="grad_norm", layer=self._names(worst), observed=observed, limit=limit),)

    def _decide(
        self,
        reading: Reading,
        reasons: tuple[Reason, ...],
        bounds: Bounds,
        state_is_bad: Callable[[], bool],
        can_rewind: bool,
    ) -> Decision:
        self._flag(reading.is_finite)
        if not self.in_a_row:
            self._first_bad = self.step
        self.in_a_row += 1
        if reading.is_finite and int(self._flags.sum()) > STALE:
            return self._relearn(reading, reasons)
        lasts = self.in_a_row > self._guard.patience
        damaged = (not reading.loss_is_finite or reading.update == math.inf) and state_is_bad()
        if lasts or damaged:
            return replace(self._end_trouble(reading, reasons, can_rewind), damaged=damaged)
        return self._act(reading, reasons, bounds, can_rewind)

    def _act(self, reading: Reading, reasons: tuple[Reason, ...], bounds: Bounds, can_rewind: bool) -> Decision:
        """At a single bad step: the mildest of what is allowed that helps."""
        guard = self._guard
        end = _clip_end(reading, bounds)
        if guard.clip and end < math.inf:
            return Decision(action="clip", reasons=reasons, clip_to=end)
        if guard.skip:
            return Decision(action="skip", reasons=reasons)
        if guard.rewind and can_rewind and self._rewinds < guard.rewinds:
            return self._rewind(reasons)
        return Decision(action="stop" if guard.stop else "observe", reasons=reasons)

    def _end_trouble(self, reading: Reading, reasons: tuple[Reason, ...], can_rewind: bool) -> Decision:
        """Skipping more batches would not end it: the state is what is bad, or the range."""
        guard = self._guard
        if guard.rewind and can_rewind and self._rewinds < guard.rewinds:
            return self._rewind(reasons)
        if guard.stop:
            return Decision(action="stop", reasons=reasons)
        again, self._gave_up = self._gave_up, True
        lower = guard.factor < 1 and not again
        if reading.is_finite and reading.update != math.inf:
            return self._relearn(reading, reasons, lower=lower)
        return Decision(action="give-up", reasons=reasons, lower=lower, again=again)

    def _rewind(self, reasons: tuple[Reason, ...]) -> Decision:
        # The first time to a state that is older than the trouble; each further time to one before that.
        self._before = self._first_bad - self._guard.patience if self._before < 0 else self._before - 1
        self._rewinds += 1
        self.in_a_row = 0
        return Decision(action="rewind", reasons=reasons, before=max(0, self._before), lower=self._guard.factor < 1)

    def went_back(self, step: int) -> None:
        """The state is now the one that was taken at this step of its own count."""
        self._before = step
        self._past = self.step + (self.step - step) + self._guard.patience

    def _relearn(self, reading: Reading, reasons: tuple[Reason, ...], *, lower: bool = False) -> Decision:
        """What is flagged so often is how the run is now."""
        for ranges in self._ranges.values():
            ranges.forget()
        self._flags[:] = False
        self.in_a_row = 0
        self._learn(reading)
        return Decision(action="relearn", reasons=reasons, lower=lower)

    # ---- learning -------------------------------------------------------------------------------------------------

    def _learn(self, reading: Reading) -> None:
        for channel, value in self._single(reading):
            self._ranges[channel].add(np.array([value]))
        if reading.sized:
            self._ranges["grad_norm"].add(reading.norms)

    def _flag(self, flagged: bool) -> None:
        self._flags[self.step % WIDTH] = flagged

    # ---- between runs ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Ranges and counters, always under the same names: lists and numbers, which any checkpoint can hold."""
        return {
            "ranges": {channel: ranges.state_dict() for channel, ranges in self._ranges.items()},
            "flags": self._flags.tolist(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for channel, ranges in self._ranges.items():
            ranges.load_state_dict(state["ranges"][channel])
        self._flags = np.array(state["flags"], dtype=bool)
        for name in _COUNTERS:
            setattr(self, name, state[name])


def _clip_end(reading: Reading, bounds: Bounds) -> float:
    """The norm at which the gradients are in their ranges; infinite where clipping does not bring them there."""
    norm = reading.norm
    if not reading.is_finite or not reading.sized or not 0 < norm < math.inf or reading.update == math.inf:
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(reading.norms > 0, bounds.norm_ends / reading.norms, math.inf)
    end = min(bounds.norm_end, norm * float(np.min(shares, initial=math.inf)))
    return end if end < norm else math.inf


_COUNTERS = ("step", "in_a_row", "_first_bad", "_rewinds", "_past", "_before", "_gave_up")
