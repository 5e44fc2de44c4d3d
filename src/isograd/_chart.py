"""Charts for the terminal: the gradient signal over depth and the loss over time. It draws readings and judges nothing.

On a terminal the charts use block characters; anywhere else they are ASCII.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.text import Text

from isograd._history import Floats, History
from isograd._terminal import is_plain

WEIGHTED = frozenset(
    {"linear", "conv", "embedding", "rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell", "attention"}
)
"""Kinds of layers that carry weights: what a deep network is counted in."""

_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = {False: "▁▂▃▄▅▆▇█", True: "_.-:=+*#"}


def number(value: float) -> str:
    """Three significant digits, as short as they go: `0.15`, `1.2e-09`, `nan`."""
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Sparkline:
    """A series in one line of `width` characters, each the median of its share; `x` where nothing was finite."""

    values: Floats
    width: int = 32

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.draw(plain=is_plain(console, options)))

    def draw(self, *, plain: bool) -> str:
        """The line itself; empty without readings. Above a range of 1000 the scale is logarithmic."""
        shares = [share[np.isfinite(share)] for share in np.array_split(self.values, self._num_shares())]
        medians = np.array([np.median(share) if len(share) else np.nan for share in shares])
        finite = medians[np.isfinite(medians)]
        if len(finite) and finite.min() > 0 and finite.max() / 1000 > finite.min():
            medians, finite = np.log(medians), np.log(finite)
        spread = float(np.ptp(finite)) if len(finite) else 0.0
        return "".join(self._character(m, finite, spread, plain) for m in medians)

    def _num_shares(self) -> int:
        return max(1, min(self.width, len(self.values)))

    def _character(self, median: float, finite: Floats, spread: float, plain: bool) -> str:
        if not math.isfinite(median):
            return "x" if len(self.values) else ""
        height = (median - float(finite.min())) / spread if spread > 0 else 0.0
        return _LEVELS[plain][round(7 * height)]


@dataclass(frozen=True, kw_only=True)
class DepthProfile:
    """Bars of the gradient signal, layer by layer from the input to the loss, at the first and the last deep step.

    `values`: [2, N] readings, or [1, N] when there was one deep step; `steps`: their steps; `total`: layers of which
    `names` are shown.
    """

    quantity: str
    names: tuple[str, ...]
    steps: tuple[int, ...]
    values: Floats
    total: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        plain = is_plain(console, options)
        label = min(max(map(len, self.names)), max(12, options.max_width // 3))
        width = min(40, (options.max_width - label - 2) // len(self.steps) - 11)
        low, high = self._decades()
        yield Text(
            f"{self.quantity}, input side first, log scale 1e{low:+03d} to 1e{high:+03d}{self._share()}", style="bold"
        )
        yield Text(
            " " * (label + 2) + "  ".join(f"step {step}".ljust(width + 9) for step in self.steps).rstrip(), style="dim"
        )
        for column, name in enumerate(self.names):
            line = Text(f"{_shortened(name, label, plain):<{label}}  ")
            for row in range(len(self.steps)):
                line.append_text(self._bar(row, column, width, plain)).append("  ")
            line.rstrip()
            yield line
        if self.summary():
            yield Text(self.summary())

    def summary(self) -> str:
        """How many decades lie between the loss side and the input side, in one sentence; empty if not readable."""
        changes = {step: change for row, step in enumerate(self.steps) if (change := self._change(row))}
        told = " and ".join(f"{change} at step {step}" for step, change in changes.items())
        return f"From layer {self.names[-1]} back to {self.names[0]} it {told}." if told else ""

    def _change(self, row: int) -> str:
        near, far = float(self.values[row, -1]), float(self.values[row, 0])
        if not (0 < near < math.inf and far >= 0 and math.isfinite(far)):
            return ""
        if far == 0:
            return "falls to exactly 0"
        decades = math.log10(far / near)
        return f"{'grows' if decades > 0 else 'falls'} by {abs(decades):.1f} decades"

    def _decades(self) -> tuple[int, int]:
        readable = self.values[np.isfinite(self.values) & (self.values > 0)]
        if not len(readable):
            return 0, 1
        low = math.floor(math.log10(readable.min()))
        return low, max(low + 1, math.ceil(math.log10(readable.max())))

    def _share(self) -> str:
        return "" if self.total == len(self.names) else f", {len(self.names)} of {self.total} layers"

    def _bar(self, row: int, column: int, width: int, plain: bool) -> Text:
        value = float(self.values[row, column])
        low, high = self._decades()
        share = 1.0 if value == math.inf else (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        reading = "-" if math.isnan(value) else f"{value:.1e}" if 0 < value < math.inf else number(value)
        bar = Text(_blocks(share, width, plain), style=self._style(row, value))
        return bar.append(f" {reading:<8}", style="default")

    def _style(self, row: int, value: float) -> str:
        near = float(self.values[row, -1])
        if not (0 < near < math.inf and 0 < value < math.inf):
            return "red"
        # float32 resolves 7 decades (epsilon 1.2e-7): beyond that a layer and the loss side share no digit. Half of it
        # is the range of float16's normal numbers below 1 (6.1e-5).
        distance = abs(math.log10(value / near))
        return "red" if distance > 7 else "yellow" if distance > 3.5 else "green"


def depth_profile(history: History, *, rows: int = 20) -> DepthProfile | None:
    """The gradient signal over depth in at most `rows` lines; None when fewer than two layers have a reading.

    Reads `signal_norm` of every layer, or `grad_norm` of the weight matrices where that was not measured. A network
    of more layers is reduced to those with weights, then to evenly spaced ones; first and last are always shown.
    """
    signal = _signal_columns(history, rows)
    return _profile(history, "signal_norm", "Gradient signal", signal, rows) or _profile(
        history, "grad_norm", "Gradient norm", _matrix_columns(history), rows
    )


def _profile(
    history: History, statistic: str, quantity: str, columns: Sequence[tuple[int, str]], rows: int
) -> DepthProfile | None:
    if statistic not in history or len(columns) < 2:
        return None
    series = history[statistic]
    read = np.flatnonzero(~np.isnan(series.values[:, [index for index, _ in columns]]).all(axis=1))
    if not len(read):
        return None
    ends = sorted({int(read[0]), int(read[-1])})
    shown = [columns[i] for i in np.unique(np.linspace(0, len(columns) - 1, rows).round().astype(int))]
    return DepthProfile(
        quantity=quantity,
        names=tuple(name for _, name in shown),
        steps=tuple(int(series.steps[end]) for end in ends),
        values=series.values[np.ix_(ends, [index for index, _ in shown])],
        total=len(columns),
    )


def _signal_columns(history: History, rows: int) -> list[tuple[int, str]]:
    if "signal_norm" not in history:
        return []
    read: list[bool] = np.any(~np.isnan(history["signal_norm"].values), axis=0).tolist()
    layers = [(i, layer) for i, layer in enumerate(history.layers) if read[i] and layer.role in ("module", "operation")]
    weighted = [(i, layer) for i, layer in layers if layer.kind in WEIGHTED]
    # A row per weighted layer tells the story; activations in between only where there is room for them.
    chosen = weighted if len(layers) > rows and len(weighted) > 1 else layers
    return [(i, layer.name) for i, layer in chosen]


def _matrix_columns(history: History) -> list[tuple[int, str]]:
    return [(i, p.name) for i, p in enumerate(history.parameters) if len(p.shape) > 1 and p.trainable]


def _blocks(share: float, width: int, plain: bool) -> str:
    """A bar of `share` of `width`, padded to it."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    if plain:
        return ("#" * round(eighths / 8)).ljust(width)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def _shortened(name: str, width: int, plain: bool) -> str:
    """The end of a dotted name tells more than its beginning."""
    return name if len(name) <= width else ("~" if plain else "…") + name[-(width - 1) :]
