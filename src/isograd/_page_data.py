"""What the report page shows of a run, as JSON values: the verdict in words, lines and maps over time, layers, events.

`page_data` documents the form. It decides nothing: what it says stands in a `Diagnosis`, a `History` or `fix.json`.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isograd._bins import Bins, Readings, even_in_number, even_in_steps, fold_line, fold_map
from isograd._depth import WEIGHTED, columns_of
from isograd._diagnose import Cause, Diagnosis
from isograd._explain import explain
from isograd._fix_file import read_fix
from isograd._history import Floats, History, Series
from isograd._predicted_signal import predicted_signal
from isograd._recorded import diagnose_run
from isograd._rule import Evidence, Options
from isograd._runs import Envelope, Run, read_all
from isograd._statistics import STATISTICS
from isograd._terminal import render
from isograd._treat import treat
from isograd._wording import happenings, headline, occurrence, stage_of

SCHEMA = 1

LINES = tuple(
    name for name, one in STATISTICS.items() if one.axis in ("step", "group") and not name.endswith("_nonfinite")
)
"""Statistics that are shown as lines."""

MAPS = (
    "signal_norm",
    "output_rms",
    "saturation",
    "dead_fraction",
    "activation_slope",
    "row_similarity",
    "attention_entropy",
    "attention_logit_max",
    "grad_norm",
    "update_ratio",
    "weight_norm",
)
"""Statistics that are shown as maps, layers or parameters over time."""

_COUNTS = {
    "loss": "loss_nonfinite",
    "signal_norm": "signal_nonfinite",
    "output_rms": "output_nonfinite",
    "grad_norm": "grad_nonfinite",
    "global_grad_norm": "grad_nonfinite",
    "global_grad_norm_unclipped": "grad_nonfinite",
    "weight_norm": "weight_nonfinite",
}
"""The count that tells a reading that was not finite from one that is missing: both are NaN."""

CELLS = 1_500_000
"""Entries of all maps together: 8 MB in base64, so that a page of a thousand layers stays under 15 MB."""

MOST = 64_000_000
"""Bytes of a run file from which on not every reading of every layer is looked at: a page has to open in seconds.

Of 496 recorded runs, most of them faulty, that were read by a tenth in this way, all kept their first cause, and 495
all causes in their order.
"""

_MARKS = 400_000
"""Non-finite cells of all maps together: 5 MB as JSON."""

_PLAIN = 64  # entries from which an array is packed
_ALIKE = 100  # events of one kind that are told one by one


def page_data(
    run: Run,
    diagnosis: Diagnosis,
    *,
    histories: Sequence[History] | None = None,
    envelopes: Mapping[str, Mapping[str, Envelope]] | None = None,
    fix: Mapping[str, Any] | None = None,
    columns: int = 400,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, Any]:
    """All that the page needs of a run; JSON values without NaN and infinities: what is missing is null.

    `histories`: those of the run by default. `envelopes`: what `read_envelopes` gives for it; without them, the range
    of merged steps is not known. `fix`: what `isograd fix` left beside the run. `columns`: points of a line and columns
    of a map at most; maps of many layers have fewer (`CELLS`). `first`, `last`: only steps between them, both included.

    An array of 64 entries or more is {"dtype", "bdata": base64 of little-endian bytes, "shape": "rows, columns" of a
    matrix}, which Plotly draws as it is; NaN in it is missing.
    """
    subjects = run.histories if histories is None else tuple(histories)
    frames = [
        _Frame(history=history, envelopes=(envelopes or {}).get(history.subject, {}), first=first, last=last)
        for history in subjects
    ]
    most = _columns_of_maps(frames, columns)
    told = [_subject(frame, columns=columns, map_columns=most) for frame in frames]
    shown = {name.partition("[")[0] for one in told for name in (*one["lines"], *one["maps"])}
    shown.update(one.statistic for cause in diagnosis.causes for one in cause.finding.evidence)
    shown.update(one["statistic"] for subject in told for one in subject["missing"])
    return {
        "schema": SCHEMA,
        "generated": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "run": _run(run, subjects),
        "verdict": _verdict(run, diagnosis, subjects),
        "treatments": [
            {"name": str(t), "cause": t.cause, "code": t.code, "applicability": t.applicability}
            for t in treat(diagnosis)
        ],
        "fix": None if fix is None else _finite(fix),
        "explain": {
            name: {"unit": one.unit, "meaning": one.meaning, "error": one.error}
            for name, one in STATISTICS.items()
            if name in shown
        },
        "subjects": told,
    }


def read_page(
    path: Path, options: Options, *, columns: int = 400, first: int | None = None, last: int | None = None
) -> dict[str, Any]:
    """`page_data` of a recorded run and of what lies beside it; `path` and errors as for `read_run`.

    `options`: of rules, as `diagnose` takes them.
    """
    run, envelopes = read_all(path, most=MOST)
    return page_data(
        run,
        diagnose_run(run, options),
        envelopes=envelopes,
        fix=read_fix(run.path),
        columns=columns,
        first=first,
        last=last,
    )


# ---- the run and the verdict ------------------------------------------------------------------------------------


_VERSIONS = ("isograd", "python", "torch", "numpy", "jax", "keras", "tensorflow")
_TOLD = frozenset({"schema", "script", "state", "started", "steps", "overhead", *_VERSIONS})


def _run(run: Run, histories: Sequence[History]) -> dict[str, Any]:
    meta = run.meta
    return {
        "id": run.id,
        "script": str(meta.get("script") or ""),
        "state": run.state,
        "started": str(meta.get("started", "")),
        "steps": max((history.num_steps for history in histories), default=0),
        "damage": run.damage,
        "overhead": _overhead(meta, histories),
        "seconds": _seconds(meta, histories),
        "versions": {name: str(meta[name]) for name in _VERSIONS if meta.get(name)},
        "meta": {str(key): _text(value) for key, value in meta.items() if key not in _TOLD and value is not None},
    }


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _overhead(meta: Mapping[str, Any], histories: Sequence[History]) -> float | None:
    """What the run says of itself at its end; before that, what its steps say."""
    share = meta.get("overhead")
    if isinstance(share, (int, float)):
        return _number(share)
    watch, whole = (_sum(histories, name) for name in ("watch_seconds", "step_seconds"))
    return watch / whole if whole > 0 else None


def _seconds(meta: Mapping[str, Any], histories: Sequence[History]) -> float | None:
    try:
        began, ended = (datetime.fromisoformat(str(meta[key]).replace("Z", "+00:00")) for key in ("started", "ended"))
        return max(0.0, (ended - began).total_seconds())
    except (KeyError, ValueError, TypeError):
        return _sum(histories[:1], "step_seconds") or None


def _sum(histories: Sequence[History], statistic: str) -> float:
    found = [history[statistic].values for history in histories if statistic in history]
    return float(sum(values[np.isfinite(values)].sum() for values in found))


_NOTHING = "This run holds no optimizer step: there is nothing to diagnose."


def _verdict(run: Run, diagnosis: Diagnosis, histories: Sequence[History]) -> dict[str, Any]:
    words = "".join(part for part, _ in headline(diagnosis, histories))
    missed = diagnosis.unmeasured
    thinned = (
        f"This run is long: of what was read in layers and parameters, one reading in {run.thinned} is looked at here. "
        f"isograd diagnose {run.id} looks at all of them."
    )
    return {
        "healthy": diagnosis.healthy if diagnosis.steps else None,
        "headline": words[0].upper() + words[1:] if diagnosis.steps else _NOTHING,
        "facts": [
            *dict.fromkeys(fact for history in histories for fact in happenings(history)),
            *([thinned] if run.thinned > 1 else []),
        ],
        "causes": [_cause(cause) for cause in diagnosis.causes],
        "unmeasured": [
            {
                "rules": list(dict.fromkeys(u.rule for u in missed if (u.missing, u.why) == (missing, why))),
                "missing": missing,
                "why": why,
            }
            for missing, why in dict.fromkeys((u.missing, u.why) for u in missed)
        ],
    }


def _cause(cause: Cause) -> dict[str, Any]:
    finding = cause.finding
    told = cause.to_dict()
    return {
        "name": finding.name,
        "subject": finding.subject,
        "stage": stage_of(finding.name),
        "last_step": finding.last_step,
        "symptoms": [{"name": s.name, "first_step": s.first_step} for s in cause.symptoms],
        "evidence": [_evidence(evidence) for evidence in finding.evidence],
        "why": render(explain(finding.name), width=88),
        **{key: told[key] for key in ("level", "layers", "first_step", "confidence", "message", "remedies")},
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "statistic": evidence.statistic,
        "observed": _number(evidence.observed),
        "limit": _number(evidence.limit),
        "step": evidence.step,
        "layer": evidence.layer,
    }


# ---- one subject ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """One subject and the steps of it that are shown."""

    history: History
    envelopes: Mapping[str, Envelope]
    first: int | None
    last: int | None

    def shows(self, statistic: str) -> bool:
        """Whether there is a reading of it, in the whole run, or one that was not finite."""
        if statistic in self.history:
            return True
        count = _COUNTS.get(statistic, "")
        return len(self.history.series.get(statistic, ())) > 0 and bool(np.any(self._counts(count) > 0))

    def readings(self, statistic: str) -> Readings:
        """Its readings among the steps that are shown."""
        series = self.history[statistic]
        first, low, high = self._spans(statistic, series)
        broken = np.isinf(series.values) | (np.isnan(series.values) & self._counted(statistic, series))
        whole = Readings(first=first, last=series.steps, values=series.values, low=low, high=high, broken=broken)
        return whole.within(self.first, self.last)

    def _spans(self, statistic: str, series: Series) -> tuple[NDArray[np.int64], Floats | None, Floats | None]:
        """Where each reading begins, and the range of what was merged; None where nothing was."""
        envelope = self.envelopes.get(statistic)
        if envelope is None or not len(envelope.last):
            return series.steps, None, None
        first, low, high = series.steps.copy(), series.values.copy(), series.values.copy()
        at = np.searchsorted(series.steps, envelope.last)
        first[at], low[at], high[at] = envelope.first, envelope.minimum, envelope.maximum
        return first, low, high

    def _counted(self, statistic: str, series: Series) -> NDArray[np.bool_]:
        """Where its companion counted entries that were not finite; a bool of the shape of its values."""
        nothing = np.zeros(series.values.shape, np.bool_)
        name = _COUNTS.get(statistic, "")
        counts = self.history.series.get(name)
        if counts is None or not len(counts):
            return nothing
        values = (
            counts.values
            if counts.values.ndim == series.values.ndim
            else np.fmax.reduce(counts.values, axis=1, initial=np.nan)
        )
        if np.array_equal(counts.steps, series.steps):
            return np.asarray(values > 0)
        at = np.minimum(np.searchsorted(counts.steps, series.steps), len(counts) - 1)
        same = counts.steps[at] == series.steps
        nothing[same] = values[at[same]] > 0
        return nothing

    def _counts(self, name: str) -> Floats:
        return self.history[name].values if name in self.history else np.zeros(1)


def _subject(frame: _Frame, *, columns: int, map_columns: int) -> dict[str, Any]:
    history = frame.history
    lines = dict(_lines(frame, columns))
    maps = {name: _map(frame, name, map_columns) for name in MAPS if frame.shows(name)}
    return {
        "name": history.subject,
        "layers": _layers(history),
        "parameters": [
            {
                "name": parameter.name,
                "layer": parameter.layer,
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "trainable": parameter.trainable,
            }
            for parameter in history.parameters
        ],
        "groups": [{str(key): _text(value) for key, value in group.items()} for group in history.groups],
        "lines": lines,
        "maps": maps,
        "depth": _depth(history),
        "events": list(_events(frame)),
        "missing": list(_missing(history, {*maps, *(name.partition("[")[0] for name in lines)})),
    }


def _layers(history: History) -> list[dict[str, Any]]:
    owned: dict[str, list[str]] = {}
    for parameter in history.parameters:
        owned.setdefault(parameter.layer, []).append(parameter.name)
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "type": layer.type,
            "role": layer.role,
            "units": layer.units,
            "fan_in": layer.fan_in,
            "fan_out": layer.fan_out,
            "shape": list(layer.shape),
            "dtype": layer.dtype,
            "parameters": owned.get(layer.name, []) if layer.role == "module" else [],
        }
        for layer in history.layers
    ]


def _depth(history: History) -> dict[str, Any]:
    layers = _depth_layers(history)
    found = predicted_signal(history, np.array(layers, dtype=np.int64)) if layers else None
    if found is None:
        return {"layers": layers, "prediction": None}
    step, values = found
    source = (
        f"Mean-field theory (Schoenholz et al. 2017) for the weights as they were at step {step}, at the level of the "
        "last layer's reading."
    )
    told = {"statistic": "signal_norm", "step": step, "values": [_number(v) for v in values], "source": source}
    return {"layers": layers, "prediction": told}


def _depth_layers(history: History) -> list[int]:
    """The layers of the depth profile: those with weights; all modules and operations where there are none of two."""
    if "signal_norm" not in history:
        return []
    read = np.any(~np.isnan(history["signal_norm"].values), axis=0)
    weighted = [int(i) for i in columns_of(history, WEIGHTED) if read[i]]
    if len(weighted) > 1:
        return weighted
    return [i for i, layer in enumerate(history.layers) if read[i] and layer.role in ("module", "operation")]


def _lines(frame: _Frame, columns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in LINES:
        if not frame.shows(name):
            continue
        readings = frame.readings(name)
        bins = _bins(name, readings, columns)
        if readings.values.ndim == 1:
            yield name, _line(readings, bins)
        else:
            for group in range(readings.values.shape[1]):
                yield f"{name}[{group}]", _line(_column(readings, group), bins)


def _column(readings: Readings, index: int) -> Readings:
    def of(values: Any) -> Any:
        return None if values is None else values[:, index]

    return Readings(
        first=readings.first,
        last=readings.last,
        values=of(readings.values),
        low=of(readings.low),
        high=of(readings.high),
        broken=of(readings.broken),
    )


def _bins(statistic: str, readings: Readings, most: int) -> Bins:
    spread = even_in_steps if STATISTICS[statistic].tier == "cheap" else even_in_number
    return spread(readings.first, readings.last, most)


def _line(readings: Readings, bins: Bins) -> dict[str, Any]:
    folded = fold_line(readings, bins)
    line = {
        "first": _packed(bins.first),
        "last": _packed(bins.last),
        "mid": _packed(folded.middle),
        "nonfinite": _packed(folded.broken),
    }
    if readings.low is None and bins.are_single:
        return line
    return {**line, "low": _packed(folded.low), "high": _packed(folded.high)}


def _columns_of_maps(frames: Sequence[_Frame], columns: int) -> int:
    """How many columns all maps together can have: at least the first and the last."""
    rows = sum(frame.history[name].values.shape[1] for frame in frames for name in MAPS if frame.shows(name))
    return int(min(columns, max(2, CELLS // max(rows, 1))))


def _map(frame: _Frame, statistic: str, columns: int) -> dict[str, Any]:
    readings = frame.readings(statistic)
    bins = _bins(statistic, readings, columns)
    middles, broken = fold_map(readings, bins)
    rows = np.flatnonzero(np.any(~np.isnan(middles), axis=0) | np.any(broken > 0, axis=0))
    marks = broken[:, rows].T
    return {
        "axis": STATISTICS[statistic].axis,
        "rows": rows.tolist(),
        "first": _packed(bins.first),
        "last": _packed(bins.last),
        "values": _packed(middles[:, rows].T, narrow=True),
        "nonfinite": [[r, c, int(marks[r, c])] for r, c in np.argwhere(marks).tolist()],
    }


# ---- events and what is missing ---------------------------------------------------------------------------------


def _events(frame: _Frame) -> Iterator[dict[str, Any]]:
    """What happened, in order of the steps. Of one kind, the first hundred one by one and the others in a sentence; the
    same loss once.
    """
    first, last = frame.first or 0, math.inf if frame.last is None else frame.last
    within = [event for event in frame.history.events if first <= event.step <= last]
    events = sorted(within, key=lambda event: event.step)
    counts = Counter(event.kind for event in events)
    told = Counter[str]()
    seen: set[str] = set()
    for event in events:
        level, text = occurrence(event)
        told[event.kind] += 1
        if event.kind == "loss-graph" and text in seen:
            continue
        seen.add(text)
        if told[event.kind] > _ALIKE:
            if told[event.kind] < counts[event.kind]:
                continue
            text = f"{counts[event.kind] - _ALIKE} more of the same kind until step {event.step}. {text}"
        yield {"step": event.step, "kind": event.kind, "layer": event.layer, "text": text, "level": level}


_WHY_MISSING = {
    "saturation": "No layer with a bounded activation (sigmoid, tanh, hardtanh, softsign) was read.",
    "dead_fraction": "No activation whose units can die (ReLU and its kin) was read.",
    "activation_slope": "No activation layer was read.",
    "loss": "No loss was read: no step began with a call of `backward`.",
}
_ASKED = ("loss", "global_grad_norm", "clip_factor", "learning_rate", "watch_seconds", *MAPS[:5], *MAPS[-3:])
"""What the page has a place for in every run."""


def _missing(history: History, shown: set[str]) -> Iterator[dict[str, str]]:
    deep = any(len(series) for name, series in history.series.items() if STATISTICS[name].tier == "deep")
    for name in _ASKED:
        if name in shown:
            continue
        told = history.unmeasured.get(name)
        if told is None and STATISTICS[name].tier == "deep" and not deep:
            told = "No deep step was read in this run."
        yield {"statistic": name, "why": told or _WHY_MISSING.get(name) or "There is no reading of it in this run."}


# ---- numbers ----------------------------------------------------------------------------------------------------


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """JSON values with null in the place of NaN and infinities."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _packed(array: NDArray[Any], *, narrow: bool = False) -> Any:
    """A plain list of few numbers, else Plotly's typed array; `narrow`: in single precision where its range allows."""
    if array.size < _PLAIN:
        return _finite(array.tolist())
    if array.dtype.kind == "i":
        kind = "i4" if np.abs(array).max() < 2**31 else "f8"
    else:
        kind = "f4" if narrow and _fits_single(array) else "f8"
    packed = {"dtype": kind, "bdata": base64.b64encode(array.astype(f"<{kind}").tobytes()).decode("ascii")}
    return packed | ({"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {})


def _fits_single(array: Floats) -> bool:
    """Whether no entry would overflow or lose digits to underflow."""
    sizes = np.abs(array[np.isfinite(array) & (array != 0)])
    limits = np.finfo(np.float32)
    return not len(sizes) or bool(sizes.min() >= limits.tiny and sizes.max() <= limits.max)
