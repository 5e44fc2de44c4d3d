"""How a run, its diagnosis and a running watch show themselves in a notebook: a card of HTML that needs nothing else.

The card takes text color and background from the notebook around it, so that it suits light and dark ones alike; its
lines have colors of Okabe and Ito (2008), which hold against both. Everything that a program named is escaped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import import_module
from typing import Any

import numpy as np

from isograd._chart import DepthProfile, depth_profile, number
from isograd._diagnose import Cause, Diagnosis
from isograd._history import Floats, History
from isograd._recorded import diagnose_run
from isograd._runs import Run
from isograd._settings import load_settings
from isograd._wording import happenings, headline, listed, measured, stage_of, steps_of

_COLORS = {"error": "#d55e00", "warning": "#e69f00", "info": "#56b4e9", "healthy": "#009e73"}
_LINE, _FIRST = "#0072b2", "#999999"
_WIDTH, _HEIGHT = 360, 56  # of a chart, in CSS pixels
_POINTS = 180  # of a chart: two pixels each
_IN_FULL = 3  # causes told in full, as in the terminal

_INTERVAL = 2.0  # seconds between two states of a live card: as fast as one reads
_SHARE = 0.005  # of wall time that a live card may take, half of the watcher's budget, after …
_FREE = 1.0  # … seconds that it may take once, half of the watcher's allowance
_LARGEST_LIVE = 32_000_000  # bytes of a run file that is read again and again while the program trains


def run_card(run: Run) -> str:
    """A run: how it stands, and its verdict as `isograd diagnose` gives it."""
    return _card(diagnose_run(run, load_settings().rules), run.histories, f"{run.id}, {run.state}", run.damage)


def diagnosis_card(diagnosis: Diagnosis) -> str:
    """A diagnosis: the verdict in words, the loss over time and the gradient signal over depth."""
    return _card(diagnosis, diagnosis.histories, diagnosis.run)


def _card(diagnosis: Diagnosis, histories: Sequence[History], *captions: str) -> str:
    parts = [_emphasized(said, stands_for) for said, stands_for in headline(diagnosis, histories)]
    body = [f"<div>isograd: {''.join(parts)}</div>"]
    body += [_small(caption) for caption in captions if caption]
    if diagnosis.preflight is not None:
        body += [_small(sentence) for sentence in diagnosis.preflight.sentences()]
    for history in histories:
        body += _pictures(history, alone=len(histories) == 1)
        body += [_small(line) for line in happenings(history)]
    told = [cause for cause in diagnosis.causes if cause.finding.level != "info"]
    body += [_cause(cause, diagnosis) for cause in told[:_IN_FULL]]
    left = [f"{cause.finding.name} ({cause.finding.level})" for cause in told[_IN_FULL:]]
    body += [_small(f"Then: {', '.join(left)}.")] if left else []
    blind = list(dict.fromkeys(unmeasured.rule for unmeasured in diagnosis.unmeasured))
    body += [_small(f"Could not look: {listed(blind, 3)}.")] if blind else []
    return f'<div class="isograd" style="max-width:{2 * _WIDTH + 40}px;line-height:1.45">{"".join(body)}</div>'


def _emphasized(said: str, stands_for: str) -> str:
    style = f"border-bottom:2px solid {_COLORS[stands_for]};font-weight:600" if stands_for else ""
    return f'<span style="{style}">{escape(said)}</span>' if style else escape(said)


def _cause(cause: Cause, diagnosis: Diagnosis) -> str:
    finding = cause.finding
    where = f" of {finding.subject}" if len(diagnosis.subjects) > 1 else ""
    where += f" in {listed(finding.layers, 1)}" if finding.layers else ""
    lines = [finding.message]
    lines += [measured(evidence) for evidence in finding.evidence[:1] if "limit" not in finding.message]
    if cause.symptoms:
        lines.append(f"Explains: {', '.join(f'{s.name} (step {s.first_step})' for s in cause.symptoms)}.")
    elif stage_of(finding.name) == "symptom":
        lines.append("No rule names a cause for this symptom.")
    lines += [f"Remedies: {', '.join(cause.remedies)}."] if cause.remedies else []
    told = "<br/>".join(map(escape, lines))
    return (
        f'<div style="border-left:3px solid {_COLORS[finding.level]};margin:8px 0;padding-left:10px">'
        f"<b>{escape(finding.name)}</b> {escape(finding.level)}, {escape(steps_of(finding) + where)}<br/>{told}</div>"
    )


def _small(sentence: str) -> str:
    return f'<div style="opacity:.75;font-size:90%">{escape(sentence)}</div>'


# ---- pictures -----------------------------------------------------------------------------------------------------


def _pictures(history: History, *, alone: bool) -> list[str]:
    """The charts of a subject that has readings, side by side where there is room."""
    whose = "" if alone else f" of {history.subject}"
    charts = [_loss(history, whose), _depth(depth_profile(history, rows=60), whose)]
    shown = "".join(chart for chart in charts if chart)
    return [f'<div style="display:flex;flex-wrap:wrap;gap:4px 32px;margin:6px 0">{shown}</div>'] if shown else []


def _loss(history: History, whose: str) -> str:
    values = history["loss"].values if "loss" in history else np.empty(0)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    broken = len(values) - len(finite)
    lost = f", {broken} {'reading' if broken == 1 else 'readings'} not finite" if broken else ""
    caption = f"loss{whose}: {number(finite[0])} to {number(finite[-1])} in {history.num_steps} steps{lost}"
    scaled, is_log = _scaled(_medians(values))
    return _chart([(scaled, _LINE, "")], caption + (", log scale" if is_log else ""))


def _depth(profile: DepthProfile | None, whose: str) -> str:
    if profile is None:
        return ""
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.log10(profile.values)
    styles = [(_FIRST, "4 3"), (_LINE, "")][-len(rows) :]
    steps = " and ".join(f"{step}{note}" for step, note in zip(profile.steps, (" (dashed)", ""), strict=False))
    steps = steps if len(rows) > 1 else str(profile.steps[0])
    ends = f"{profile.names[0]} to {profile.names[-1]}"
    caption = f"{profile.quantity.lower()}{whose}, log scale, {ends}, step {steps}. {profile.summary()}"
    return _chart([(row, *style) for row, style in zip(rows, styles, strict=True)], caption)


def _medians(values: Floats) -> Floats:
    """At most as many values as a chart has points: medians of equal shares, NaN where nothing was finite."""
    shares = [share[np.isfinite(share)] for share in np.array_split(values, min(_POINTS, len(values)))]
    return np.array([np.median(share) if len(share) else np.nan for share in shares])


def _scaled(values: Floats) -> tuple[Floats, bool]:
    """Logarithms of positive values that span more than a factor of 1000, and whether they are."""
    finite = values[np.isfinite(values)]
    is_log = bool(len(finite)) and finite.min() > 0 and finite.max() / 1000 > finite.min()
    return (np.log10(values) if is_log else values), is_log


def _chart(lines: Sequence[tuple[Floats, str, str]], caption: str) -> str:
    """Lines of values in one range, each with its color and dashes; where a value is not finite, a red tick."""
    finite = np.concatenate([values[np.isfinite(values)] for values, _, _ in lines])
    low, spread = (float(finite.min()), float(np.ptp(finite)) or 1.0) if len(finite) else (0.0, 1.0)
    drawn = []
    for values, color, dashes in lines:
        x = np.linspace(2, _WIDTH - 2, len(values)) if len(values) > 1 else np.array([_WIDTH / 2])
        y = (_HEIGHT - 4) - (values - low) / spread * (_HEIGHT - 8)
        style = f'fill="none" stroke="{color}" stroke-width="1.8" stroke-linecap="round" stroke-dasharray="{dashes}"'
        drawn += [f'<polyline points="{run}" {style}/>' for run in _runs(x, y)]
        red, top = _COLORS["error"], _HEIGHT - 6
        ticks = "".join(f"M{at:.1f} {top}v6" for at in x[~np.isfinite(y)].tolist())
        drawn += [f'<path d="{ticks}" stroke="{red}" stroke-width="1.5"/>'] if ticks else []
    return (
        f'<figure style="margin:0;width:{_WIDTH}px;max-width:100%"><svg role="img" aria-label="{escape(caption)}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="width:100%;height:auto;display:block">{"".join(drawn)}</svg>'
        f'<figcaption style="opacity:.75;font-size:90%">{escape(caption)}</figcaption></figure>'
    )


def _runs(x: Floats, y: Floats) -> Iterator[str]:
    """Points of each stretch without a gap; a point by itself is a line of no length, which round caps show."""
    points: list[str] = []
    for across, down in [*zip(x.tolist(), y.tolist(), strict=True), (0.0, math.nan)]:
        if math.isfinite(down):
            points.append(f"{across:.1f},{down:.1f}")
        elif points:
            yield " ".join(points if len(points) > 1 else points * 2)
            points = []


# ---- a card that lives --------------------------------------------------------------------------------------------


class LiveCard:
    """A card below a notebook's cell that is replaced in place while the program trains.

    `make` gives its HTML. It is drawn in the thread that calls `refresh`, at most every 2 s, and less often when that
    would take more than 0.5 % of the time after a first second. A failure ends the card and nothing else.
    """

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._begun = time.monotonic()
        self._spent = self._next = 0.0
        self._handle: Any = None

    @staticmethod
    def is_possible() -> bool:
        """Whether this program runs in a notebook, whose output can be replaced."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        # A terminal's shell has no kernel: there, each state would be a line of its own.
        return getattr(shell, "kernel", None) is not None

    def show(self) -> None:
        """Draw it for the first time."""
        notebook: Any = import_module("IPython.display")
        self._handle = notebook.display(notebook.HTML(self._drawn()), display_id=True)

    def refresh(self, *, now: bool = False) -> None:
        """Draw it anew if it is time, or `now`."""
        if self._handle is None or not (now or time.monotonic() >= self._next):
            return
        try:
            notebook: Any = import_module("IPython.display")
            self._handle.update(notebook.HTML(self._drawn()))
        except Exception:
            self._handle = None

    def _drawn(self) -> str:
        start = time.monotonic()
        html = self._make()
        now = time.monotonic()
        self._spent += now - start
        self._next = max(now + _INTERVAL, self._begun + max(0.0, self._spent - _FREE) / _SHARE)
        return html


def live_card(run: Run, diagnosis: Diagnosis) -> str:
    """A run that is being watched, with the diagnosis of what was recorded so far."""
    if not diagnosis.steps:
        return f'<div class="isograd">isograd: no step yet{_small(f"{run.id}, {run.state}")}</div>'
    return _card(diagnosis, run.histories, f"{run.id}, {run.state}", run.damage)


def is_too_large(size: int) -> bool:
    """Whether a run file of `size` bytes takes too long and too much memory to be read while its program trains."""
    return size > _LARGEST_LIVE


def large_card(caption: str) -> str:
    """What is shown of a run that is not read while it trains."""
    later = "Its record is too large to be judged again and again: `run.diagnose()` does it once."
    return f'<div class="isograd">isograd: {escape(caption)}{_small(later)}</div>'
