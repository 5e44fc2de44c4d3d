"""How readings are packed into the rows of a run file, and how old rows become one. It knows arrays, and no database.

A row's bytes are little-endian arrays side by side; its layout says which statistic stands at which offset. Numbers of
a step or a group are float64. Others are float32 where that is exact (counts) or within half a unit of its last place
(readings), otherwise float64. A `constant` array is stored as one entry that stands for `length` equal ones: counts are
nearly always all zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isograd._history import Floats, Integers
from isograd._statistics import STATISTICS

MERGED = 10
"""Rows that become one."""

Fold = str  # "value" in a row of one step, otherwise how the readings of several steps became one
Key = tuple[str, Fold]


class Field(NamedTuple):
    """One array of a row; `offset` in bytes, `length` in entries."""

    statistic: str
    fold: Fold
    dtype: str
    offset: int
    length: int
    constant: bool


Layout = tuple[Field, ...]
Pieces = list[tuple[Integers, NDArray[Any]]]  # (indices of rows, what they hold [rows, length])


class Rows(NamedTuple):
    """Rows of a run file, column by column."""

    rowid: tuple[int, ...]
    stream: Integers
    first: Integers
    step: Integers
    layout: Integers
    readings: tuple[bytes, ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[Any, ...]]) -> Rows:
        """From (rowid, stream, first, step, layout, readings) of each row."""
        rowid, stream, first, step, layout, readings = zip(*rows, strict=True) if rows else ((),) * 6
        return cls(rowid, _integers(stream), _integers(first), _integers(step), _integers(layout), readings)


def _integers(numbers: Sequence[int]) -> Integers:
    return np.array(numbers, dtype=np.int64)


# ---- arrays <-> bytes ---------------------------------------------------------------------------------------------


def encode(matrices: Mapping[Key, NDArray[Any]]) -> tuple[Layout, list[bytes]]:
    """The layout and each row's bytes of [rows, length] matrices that stand side by side."""
    layout: list[Field] = []
    stored: list[NDArray[Any]] = []
    offset = 0
    for (statistic, fold), matrix in matrices.items():
        packed = _narrow(statistic, matrix)
        constant = is_count(statistic) and _is_constant(packed)
        stored.append(packed[:, :1] if constant else packed)
        layout.append(Field(statistic, fold, packed.dtype.str, offset, packed.shape[1], constant))
        offset += stored[-1].shape[1] * packed.itemsize
    records = np.empty(len(stored[0]) if stored else 0, _record_dtype(layout))
    for i, values in enumerate(stored):
        records[str(i)] = values
    whole = records.tobytes()
    return tuple(layout), [whole[i * offset : (i + 1) * offset] for i in range(len(records))]


def decode(rows: Rows, layouts: Mapping[int, Layout]) -> dict[tuple[int, str, Fold], Pieces]:
    """(stream, statistic, fold) -> what was read and in which rows, one piece per layout. No loop over single values.

    Rows of a layout that is not known, or of another length than theirs, are left out.
    """
    found: dict[tuple[int, str, Fold], Pieces] = {}
    for stream, number in np.unique(np.stack([rows.stream, rows.layout], axis=1), axis=0).tolist():
        if number not in layouts:
            continue
        dtype = _record_dtype(layouts[number])
        members = np.flatnonzero((rows.stream == stream) & (rows.layout == number)).tolist()
        members = [i for i in members if len(rows.readings[i]) == dtype.itemsize]
        records = np.ndarray((len(members),), dtype, b"".join([rows.readings[i] for i in members]))
        _take_apart(stream, layouts[number], _integers(members), records, found)
    return found


def _take_apart(
    stream: int,
    layout: Layout,
    indices: Integers,
    records: NDArray[Any],
    found: dict[tuple[int, str, Fold], Pieces],
) -> None:
    for i, entry in enumerate(layout):
        values = np.broadcast_to(records[str(i)], (len(indices), entry.length))
        found.setdefault((stream, entry.statistic, entry.fold), []).append((indices, values))


_HEAP = 8_000_000  # bytes of one array of rows at most: what a reader may allocate in vain


class Heap:
    """Rows as they are read from a long file: their bytes go into a few large arrays, and no row stays by itself.

    `decode` of the same rows finds the same, in other pieces; of a file of gigabytes it takes a third of the memory.
    """

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self._layouts = layouts
        self._dtypes = {number: _record_dtype(layout) for number, layout in layouts.items()}
        self._faults = {number: tuple(filter(_is_fault, layout)) for number, layout in layouts.items()}
        self._facts: list[tuple[int, int, int, int, int]] = []
        self._piles: dict[tuple[int, int, bool], list[_Pile]] = {}
        self._narrow: dict[tuple[int, str, Fold], Pieces] = {}
        self._odd = Counter[int]()

    def add(
        self, rowid: int, stream: int, first: int, step: int, layout: int, readings: bytes, *, whole: bool = True
    ) -> None:
        """Take in one row; where it is not `whole`, only what is one number (of a step, or the same everywhere) and
        what counts NaN and Inf. Up to `_ODD` rows of a stream that count any are whole all the same.
        """
        index = len(self._facts)
        self._facts.append((rowid, stream, first, step, layout))
        dtype = self._dtypes.get(layout)
        if dtype is None or len(readings) != dtype.itemsize:
            return
        if not whole and self._odd[stream] < _ODD and _counts_any(self._faults[layout], readings):
            self._odd[stream] += 1
            whole = True
        piles = self._piles.setdefault((stream, layout, whole), [])
        if not piles or len(piles[-1].members) == len(piles[-1].bytes):
            if piles and not whole:
                self._skim(stream, layout, piles[-1])
            else:
                rows = 4 * len(piles[-1].bytes) if piles else 64
                size = max(dtype.itemsize, 1)
                piles.append(_Pile(np.empty((max(1, min(rows, _HEAP // size)), dtype.itemsize), np.uint8), []))
        piles[-1].bytes[len(piles[-1].members)] = np.frombuffer(readings, np.uint8)
        piles[-1].members.append(index)

    def _skim(self, stream: int, layout: int, pile: _Pile) -> None:
        """Take what is one number out of a pile, and empty it."""
        records = np.ndarray((len(pile.members),), self._dtypes[layout], pile.bytes)
        indices = _integers(pile.members)
        for i, entry in enumerate(self._layouts[layout]):
            if entry.constant or entry.length == 1 or (_is_fault(entry) and entry.fold in ("value", "maximum")):
                values = np.broadcast_to(records[str(i)].copy(), (len(indices), entry.length))
                self._narrow.setdefault((stream, entry.statistic, entry.fold), []).append((indices, values))
        pile.members.clear()

    def rows(self) -> Rows:
        """The rows in the order in which they came, without their readings."""
        return Rows.of([(*facts, b"") for facts in self._facts])

    def found(self) -> dict[tuple[int, str, Fold], Pieces]:
        """As `decode`."""
        found: dict[tuple[int, str, Fold], Pieces] = {}
        for stream, number, whole in sorted(self._piles):
            for pile in self._piles[stream, number, whole]:
                if whole:
                    records = np.ndarray((len(pile.members),), self._dtypes[number], pile.bytes)
                    _take_apart(stream, self._layouts[number], _integers(pile.members), records, found)
                else:
                    self._skim(stream, number, pile)
        for key, pieces in self._narrow.items():
            found.setdefault(key, []).extend(pieces)
        return found


_ODD = 200  # rows of a stream: a run that stays broken is no longer odd


def _is_fault(entry: Field) -> bool:
    return entry.statistic.endswith("_nonfinite")


def _counts_any(faults: Sequence[Field], readings: bytes) -> bool:
    """Whether a row counts NaN or Inf anywhere."""
    for entry in faults:
        values = np.frombuffer(readings, entry.dtype, 1 if entry.constant else entry.length, entry.offset)
        if len(values) and (values[0] > 0 or (len(values) > 1 and (values > 0).any())):
            return True
    return False


class _Pile(NamedTuple):
    """The bytes of rows [rows, bytes of one], and the indices of those that are there."""

    bytes: NDArray[np.uint8]
    members: list[int]


def joined(pieces: Pieces, width: int) -> tuple[Integers, Floats]:
    """(indices of rows, float64 [rows, width]) of all pieces; columns that did not exist yet are NaN."""
    if len(pieces) == 1:
        return pieces[0][0], _padded(pieces[0][1], width)
    if not pieces:
        return _integers(()), np.empty((0, width))
    indices = np.concatenate([p[0] for p in pieces])
    return indices, placed(pieces, width, np.arange(len(indices)), len(indices))


def placed(pieces: Pieces, width: int, places: Integers, count: int) -> Floats:
    """float64 [count, width]: each row of the pieces at its place, those below 0 left out; as few copies as can be."""
    parts = [(values, where) for (_, values), where in zip(pieces, _divided(places, pieces), strict=True)]
    if all(values.shape[1] == width and values.strides[1] == 0 for values, _ in parts):  # constant
        column = np.empty((count, 1))
        for values, where in parts:
            column[where[where >= 0]] = values[where >= 0, :1]
        return np.broadcast_to(column, (count, width))
    wide = np.empty((count, width))
    for values, where in parts:
        known, kept = min(width, values.shape[1]), where >= 0
        rows = values if kept.all() else values[kept]
        at = _as_slice(where[kept])
        wide[at, :known] = rows[:, :known]
        wide[at, known:] = np.nan
    return wide


def _as_slice(places: Integers) -> slice | Integers:
    """The same places; a slice where they follow on each other, which is written to twice as fast."""
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return slice(int(places[0]), int(places[0]) + len(places))
    return places


def _divided(places: Integers, pieces: Pieces) -> list[Integers]:
    return np.split(places, np.cumsum([len(indices) for indices, _ in pieces])[:-1]) if pieces else []


def is_count(statistic: str) -> bool:
    """Whether readings of `statistic` are whole numbers."""
    return statistic in STATISTICS and STATISTICS[statistic].unit == "count"


def _record_dtype(layout: Sequence[Field]) -> np.dtype[Any]:
    return np.dtype([(str(i), f.dtype, (1 if f.constant else f.length,)) for i, f in enumerate(layout)])


def _narrow(statistic: str, matrix: NDArray[Any]) -> NDArray[Any]:
    """Little-endian float32 if that is as good (see the module's docstring), otherwise float64."""
    if matrix.dtype == np.float32:
        return matrix.astype("<f4", copy=False)
    wide = matrix.astype("<f8", copy=False)
    if statistic in STATISTICS and STATISTICS[statistic].axis in {"step", "group"}:
        return wide
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = wide.astype("<f4")
        # 2**-24 is half a unit in the last place; what overflows, underflows or becomes subnormal is further off.
        allowed = 0.0 if is_count(statistic) else 2.0**-24 * np.abs(wide)
        is_near = (np.abs(narrow - wide) <= allowed) | (narrow == wide) | np.isnan(wide)
    return narrow if is_near.all() else wide


def _is_constant(packed: NDArray[Any]) -> bool:
    if packed.shape[1] < 2:
        return False
    bits = np.ascontiguousarray(packed).view(f"u{packed.itemsize}")  # where NaN equals NaN
    return bool((bits == bits[:, :1]).all())


def _padded(values: NDArray[Any], width: int) -> Floats:
    if values.shape[1] == width and values.strides[1] == 0:  # constant: as few bytes in memory as in the file
        return np.broadcast_to(values[:, :1].astype(np.float64), values.shape)
    if values.shape[1] == width:
        return values.astype(np.float64)
    wide = np.full((len(values), width), np.nan)
    wide[:, : values.shape[1]] = values[:, :width]
    return wide


# ---- many rows -> one ---------------------------------------------------------------------------------------------


def folds_of(statistic: str) -> tuple[Fold, ...]:
    """What is kept of merged readings."""
    if statistic.endswith("_nonfinite") or statistic == "skipped":
        return ("minimum", "maximum", "total")
    return ("minimum", "median", "maximum")


def shown_fold(statistic: str) -> Fold:
    """The one of them that stands for all in a series: a fault that was counted once must not vanish in a median."""
    if statistic == "skipped":
        return "total"
    return "median" if "median" in folds_of(statistic) else "maximum"


def merge(rows: Rows, layouts: Mapping[int, Layout]) -> list[tuple[int, int, Layout, bytes]]:
    """(first step, last step, layout, readings) of every ten rows.

    `rows`: of one stream, in order of their steps, a multiple of ten.
    """
    num_spans = len(rows.step) // MERGED
    folded: dict[Key, Floats] = {}
    present: dict[Key, NDArray[np.bool_]] = {}
    for (_, statistic, fold), pieces in decode(rows, layouts).items():
        width = max(values.shape[1] for _, values in pieces)
        indices, values = joined(pieces, width)
        flat = np.full((len(rows.step), width), np.nan)
        flat[indices] = values
        for to in folds_of(statistic) if fold == "value" else (fold,):
            folded[statistic, to] = _FOLDS[to](flat.reshape(num_spans, MERGED, width))
            present[statistic, to] = np.bincount(indices // MERGED, minlength=num_spans) > 0
    firsts = rows.first.reshape(num_spans, MERGED).min(axis=1).tolist()
    lasts = rows.step.reshape(num_spans, MERGED).max(axis=1).tolist()
    merged: dict[int, tuple[int, int, Layout, bytes]] = {}
    for keys, spans in _alike(present, num_spans).items():
        layout, readings = encode({key: folded[key][spans] for key in keys})
        merged.update({s: (firsts[s], lasts[s], layout, r) for s, r in zip(spans, readings, strict=True)})
    return [merged[span] for span in sorted(merged)]


def _alike(present: Mapping[Key, NDArray[np.bool_]], num_spans: int) -> dict[tuple[Key, ...], list[int]]:
    """Spans that hold the same statistics; those that hold none are left out."""
    groups: dict[tuple[Key, ...], list[int]] = {}
    for span in range(num_spans):
        groups.setdefault(tuple(key for key, where in present.items() if where[span]), []).append(span)
    groups.pop((), None)
    return groups


def _minimum(cube: Floats) -> Floats:
    return np.asarray(np.fmin.reduce(cube, axis=1))


def _maximum(cube: Floats) -> Floats:
    return np.asarray(np.fmax.reduce(cube, axis=1))


def _median(cube: Floats) -> Floats:
    """The lower median, which is an actual reading (the mean of two would be NaN for -inf and inf)."""
    num_readings = (~np.isnan(cube)).sum(axis=1, keepdims=True)
    middle = np.maximum(num_readings - 1, 0) // 2
    return np.take_along_axis(np.sort(cube, axis=1), middle, axis=1)[:, 0]


def _total(cube: Floats) -> Floats:
    return np.where(np.isnan(cube).all(axis=1), np.nan, np.nansum(cube, axis=1))


_FOLDS: dict[Fold, Callable[[Floats], Floats]] = {
    "minimum": _minimum,
    "median": _median,
    "maximum": _maximum,
    "total": _total,
}
