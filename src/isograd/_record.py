"""The run file: what a watched program wrote down, and how to read it back. It holds facts and draws no conclusion.

A run is a folder `<root>/<id>` with one SQLite file, `run.db`, that any SQLite tool can read, also while it is written
(`application_id` 0x69736F67, `user_version` = the schema's number):

    meta        key, value                        run-wide facts; the value is JSON
    subjects    subject                           in order of first appearance
    layers      subject, ordinal, name, kind, type, role, position, units, fan_in, fan_out, shape
    parameters  subject, ordinal, name, layer, shape, dtype, trainable, optimized, group
    groups      subject, ordinal, facts           parameter groups of the optimizers; JSON
    events      subject, step, kind, layer, data  what happened; `data` is JSON
    unmeasured  subject, statistic, why
    streams     stream, subject, tier, statistic, layer     a tier of a subject; with the last two, a layer's profile
    layouts     layout, field, statistic, fold, dtype, offset, length, constant
    rows        stream, level, first, step, layout, readings

`readings` are little-endian arrays side by side; the row's layout says which statistic stands at which offset (in bytes).
Entry i of an array belongs to the layer, parameter or group with ordinal i. A `constant` array is stored as one entry that
stands for `length` equal ones (counts are nearly always all zero). Numbers of a step or a group are float64. Others are
float32 where that is exact (counts) or within half a unit of its last place (readings), otherwise float64.

Roll-up. Level 0 holds one row per step. When it holds more than `kept` rows, the oldest are merged ten to one into level 1,
those in turn into level 2, and so on; `first` and `step` bound the steps that a row covers. A merged row holds one array
per `fold` of a statistic: minimum, median and maximum of readings; minimum, maximum and total of what is counted
(`*_nonfinite`, `skipped`), so that an old NaN is never lost. NaN (missing) takes no part. The median of an even number
is the lower one, an actual reading; on higher levels it is the median of medians.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import queue
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isograd._errors import RunNotFound, RunUnreadable
from isograd._history import Event, Floats, History, Integers, Layer, Parameter, Series
from isograd._statistics import STATISTICS

ROOT = Path("isograd-runs")
"""Where runs are kept unless told otherwise."""

SCHEMA = 1
"""Number of the tables' layout; a reader understands this one and all before it."""

_APPLICATION = 0x69736F67  # "isog"

_INTERVAL = 0.5  # seconds between flushes: a killed process loses this, and what one flush takes
_BACKLOG = 256_000_000  # bytes that may wait for a slow disk before rows are dropped
_LARGEST_IN_MEMORY = 128_000_000  # bytes of a run that cannot be written to disk

_MERGED = 10  # rows that become one
_PIECE = 20  # merged rows made in one transaction: some milliseconds

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE subjects (subject TEXT PRIMARY KEY);
CREATE TABLE layers (subject TEXT, ordinal INTEGER, name TEXT, kind TEXT, type TEXT, role TEXT, position REAL,
    units INTEGER, fan_in INTEGER, fan_out INTEGER, shape TEXT, PRIMARY KEY (subject, ordinal));
CREATE TABLE parameters (subject TEXT, ordinal INTEGER, name TEXT, layer TEXT, shape TEXT, dtype TEXT,
    trainable INTEGER, optimized INTEGER, "group" INTEGER, PRIMARY KEY (subject, ordinal));
CREATE TABLE groups (subject TEXT, ordinal INTEGER, facts TEXT, PRIMARY KEY (subject, ordinal));
CREATE TABLE events (subject TEXT, step INTEGER, kind TEXT, layer TEXT, data TEXT);
CREATE TABLE unmeasured (subject TEXT, statistic TEXT, why TEXT, PRIMARY KEY (subject, statistic));
CREATE TABLE streams (stream INTEGER PRIMARY KEY, subject TEXT, tier TEXT, statistic TEXT, layer TEXT);
CREATE TABLE layouts (layout INTEGER, field INTEGER, statistic TEXT, fold TEXT, dtype TEXT, "offset" INTEGER,
    length INTEGER, constant INTEGER, PRIMARY KEY (layout, field));
CREATE TABLE rows (stream INTEGER, level INTEGER, first INTEGER, step INTEGER, layout INTEGER, readings BLOB);
CREATE INDEX rows_by_step ON rows (stream, level, step);
"""

_ADD_SUBJECT = "INSERT OR IGNORE INTO subjects VALUES (?)"
_ADD_LAYER = """
INSERT INTO layers SELECT :subject, count(*), :name, :kind, :type, :role, :position, :units, :fan_in, :fan_out, :shape
FROM layers WHERE subject = :subject"""
_UPDATE_LAYER = """
UPDATE layers SET name = :name, kind = :kind, type = :type, role = :role, position = :position, units = :units,
    fan_in = :fan_in, fan_out = :fan_out, shape = :shape WHERE subject = :subject AND ordinal = :ordinal"""
_ADD_PARAMETER = """
INSERT INTO parameters SELECT :subject, count(*), :name, :layer, :shape, :dtype, :trainable, :optimized, :group
FROM parameters WHERE subject = :subject"""
_UPDATE_PARAMETER = """
UPDATE parameters SET name = :name, layer = :layer, shape = :shape, dtype = :dtype, trainable = :trainable,
    optimized = :optimized, "group" = :group WHERE subject = :subject AND ordinal = :ordinal"""
_ADD_ROW = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)"

# ---- arrays <-> bytes ---------------------------------------------------------------------------------------------

Fold = str  # "value" in a row of one step, otherwise how several steps became one number
_Key = tuple[str, Fold]

_FOLDS: dict[Fold, Callable[[Floats], Floats]] = {
    "minimum": lambda cube: np.fmin.reduce(cube, axis=1),
    "median": lambda cube: _lower_median(cube),
    "maximum": lambda cube: np.fmax.reduce(cube, axis=1),
    "total": lambda cube: _total(cube),
}


class _Field(NamedTuple):
    statistic: str
    fold: Fold
    dtype: str
    offset: int
    length: int
    constant: bool


_Layout = tuple[_Field, ...]


def _record_dtype(layout: _Layout) -> np.dtype[Any]:
    return np.dtype([(str(i), f.dtype, (1 if f.constant else f.length,)) for i, f in enumerate(layout)])


def _encode(matrices: Mapping[_Key, NDArray[Any]]) -> tuple[_Layout, list[bytes]]:
    """Bytes of each row of [rows, length] matrices that stand side by side."""
    layout: list[_Field] = []
    stored: list[NDArray[Any]] = []
    offset = 0
    for (statistic, fold), matrix in matrices.items():
        packed = _narrow(statistic, matrix)
        constant = _is_count(statistic) and _is_constant(packed)
        stored.append(packed[:, :1] if constant else packed)
        layout.append(_Field(statistic, fold, packed.dtype.str, offset, packed.shape[1], constant))
        offset += stored[-1].shape[1] * packed.itemsize
    records = np.empty(len(stored[0]) if stored else 0, _record_dtype(tuple(layout)))
    for i, values in enumerate(stored):
        records[str(i)] = values
    packed_rows = records.tobytes()
    return tuple(layout), [packed_rows[i * offset : (i + 1) * offset] for i in range(len(records))]


def _narrow(statistic: str, matrix: NDArray[Any]) -> NDArray[Any]:
    """Little-endian float32 if that is as good (see the module's docstring), otherwise float64."""
    if matrix.dtype == np.float32:
        return matrix.astype("<f4", copy=False)
    if statistic in STATISTICS and STATISTICS[statistic].axis in {"step", "group"}:
        return matrix.astype("<f8", copy=False)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = matrix.astype("<f4")
        # 2**-24 is half a unit in the last place; what overflows, underflows or becomes subnormal is further off.
        allowed = 0.0 if _is_count(statistic) else 2.0**-24 * np.abs(matrix)
        is_close = (narrow == matrix) | (np.abs(narrow - matrix) <= allowed) | np.isnan(matrix)
        is_close &= np.isfinite(narrow) | ~np.isfinite(matrix)
    return narrow if is_close.all() else matrix.astype("<f8", copy=False)


def _is_count(statistic: str) -> bool:
    return statistic in STATISTICS and STATISTICS[statistic].unit == "count"


def _is_constant(packed: NDArray[Any]) -> bool:
    if packed.shape[1] < 2:
        return False
    bits = np.ascontiguousarray(packed).view(f"u{packed.itemsize}")  # NaN equals NaN
    return bool((bits == bits[:, :1]).all())


class _Rows(NamedTuple):
    """Rows of the file in order of their rowid, column by column."""

    rowid: tuple[int, ...]
    stream: Integers
    first: Integers
    step: Integers
    layout: Integers
    readings: tuple[bytes, ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[Any, ...]]) -> _Rows:
        rowid, stream, first, step, layout, readings = zip(*rows, strict=True) if rows else ((),) * 6
        numbers = [np.array(column, dtype=np.int64) for column in (stream, first, step, layout)]
        return cls(rowid, *numbers, readings)


_Pieces = list[tuple[Integers, NDArray[Any]]]  # (indices of rows, their values [rows, length])


def _decode(rows: _Rows, layouts: Mapping[int, _Layout]) -> dict[tuple[int, str, Fold], _Pieces]:
    """(stream, statistic, fold) -> where it was read and what; one piece per layout, with no loop over values."""
    found: dict[tuple[int, str, Fold], _Pieces] = {}
    pairs = np.stack([rows.stream, rows.layout], axis=1)
    for stream, number in np.unique(pairs, axis=0).tolist():
        if number not in layouts:
            continue
        dtype = _record_dtype(layouts[number])
        indices = np.flatnonzero((rows.stream == stream) & (rows.layout == number))
        whole = np.array([len(rows.readings[i]) == dtype.itemsize for i in indices], dtype=bool)
        indices = indices[whole]
        records = np.ndarray((len(indices),), dtype, b"".join([rows.readings[i] for i in indices]))
        for i, entry in enumerate(layouts[number]):
            values = np.broadcast_to(records[str(i)], (len(indices), entry.length))
            found.setdefault((stream, entry.statistic, entry.fold), []).append((indices, values))
    return found


def _padded(values: NDArray[Any], width: int) -> Floats:
    """float64 [rows, width]; columns that did not exist yet are NaN."""
    if values.shape[1] == width:
        return values.astype(np.float64)
    wide = np.full((len(values), width), np.nan)
    wide[:, : values.shape[1]] = values[:, :width]
    return wide


def _joined(pieces: _Pieces, width: int) -> tuple[Integers, Floats]:
    if len(pieces) == 1:
        return pieces[0][0], _padded(pieces[0][1], width)
    return np.concatenate([p[0] for p in pieces]), np.concatenate([_padded(p[1], width) for p in pieces])


# ---- roll-up ------------------------------------------------------------------------------------------------------


def _folds_of(statistic: str) -> tuple[Fold, ...]:
    if statistic.endswith("_nonfinite") or statistic == "skipped":
        return ("minimum", "maximum", "total")
    return ("minimum", "median", "maximum")


def _shown_fold(statistic: str) -> Fold:
    """The fold that stands for a merged row in a series."""
    if statistic == "skipped":
        return "total"
    return "maximum" if "maximum" in _folds_of(statistic) and "median" not in _folds_of(statistic) else "median"


def _lower_median(cube: Floats) -> Floats:
    counts = (~np.isnan(cube)).sum(axis=1, keepdims=True)
    return np.take_along_axis(np.sort(cube, axis=1), np.maximum(counts - 1, 0) // 2, axis=1)[:, 0]


def _total(cube: Floats) -> Floats:
    return np.where(np.isnan(cube).all(axis=1), np.nan, np.nansum(cube, axis=1))


def _merge(rows: _Rows, layouts: Mapping[int, _Layout]) -> list[tuple[int, int, _Layout, bytes]]:
    """(first step, last step, layout, readings) of each run of ten rows; all of one stream, in order of their steps."""
    num_spans = len(rows.step) // _MERGED
    folded: dict[_Key, Floats] = {}
    present: dict[_Key, NDArray[np.bool_]] = {}
    for (_, statistic, fold), pieces in _decode(rows, layouts).items():
        indices, values = _joined(pieces, max(p[1].shape[1] for p in pieces))
        cube = np.full((len(rows.step), values.shape[1]), np.nan)
        cube[indices] = values
        cube = cube.reshape(num_spans, _MERGED, -1) if cube.size else np.empty((num_spans, _MERGED, 0))
        for to in _folds_of(statistic) if fold == "value" else (fold,):
            with np.errstate(invalid="ignore", over="ignore"):
                folded[statistic, to] = _FOLDS[to](cube)
            present[statistic, to] = np.bincount(indices // _MERGED, minlength=num_spans) > 0
    firsts = rows.first.reshape(num_spans, _MERGED).min(axis=1)
    lasts = rows.step.reshape(num_spans, _MERGED).max(axis=1)
    merged = {}
    for keys, spans in _alike(present, num_spans).items():
        layout, readings = _encode({key: folded[key][spans] for key in keys})
        merged.update({s: (int(firsts[s]), int(lasts[s]), layout, r) for s, r in zip(spans, readings, strict=True)})
    return [merged[span] for span in sorted(merged)]


def _alike(present: Mapping[_Key, NDArray[np.bool_]], num_spans: int) -> dict[tuple[_Key, ...], list[int]]:
    """Spans that hold the same statistics."""
    groups: dict[tuple[_Key, ...], list[int]] = {}
    for span in range(num_spans):
        groups.setdefault(tuple(key for key, where in present.items() if where[span]), []).append(span)
    return groups


# ---- the file, as the writer sees it ------------------------------------------------------------------------------


class _Stream(NamedTuple):
    subject: str
    tier: str
    statistic: str | None = None
    layer: str | None = None


class _Reading(NamedTuple):
    """One row on its way to the file."""

    stream: _Stream
    step: int
    arrays: Mapping[str, Any]


class _Entry(NamedTuple):
    """A statement on its way to the file, with the rows to run it on."""

    sql: str
    rows: Sequence[Any]


class _Store:
    """A connection and what is known of its contents. Lives on the thread that made it."""

    def __init__(self, connection: sqlite3.Connection, *, kept: int, largest: int, database: Path | None) -> None:
        self.connection = connection
        self.database = database
        self.kept = kept
        self.largest = largest
        self._inode = None if database is None else database.stat().st_ino
        self._load()

    @classmethod
    def create(cls, database: Path | None, *, kept: int, largest: int) -> _Store:
        """A new file, or with None a new database in memory. Raises sqlite3.Error or OSError."""
        connection = sqlite3.connect(":memory:" if database is None else database, timeout=5, isolation_level=None)
        try:
            # A filesystem that cannot do WAL keeps its own journal: slower, as safe.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA journal_size_limit = 64000000")
            head = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA};"
            connection.executescript(f"BEGIN IMMEDIATE; {head} {_TABLES} COMMIT")
            return cls(connection, kept=kept, largest=largest, database=database)
        except BaseException:
            connection.close()
            raise

    def _load(self) -> None:
        execute = self.connection.execute
        self._streams = {_Stream(*row[1:]): row[0] for row in execute("SELECT * FROM streams")}
        self._layouts = _layouts_of(execute("SELECT * FROM layouts ORDER BY layout, field"))
        self._layout_numbers = {layout: number for number, layout in self._layouts.items()}
        tallies = execute("SELECT stream, level, count(*), sum(length(readings)) FROM rows GROUP BY stream, level")
        self._tallies = {(stream, level): [count, size] for stream, level, count, size in tallies}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            self._load()
            raise

    def is_gone(self) -> bool:
        """Whether somebody deleted the file: writing to it succeeds, and no one will ever read it."""
        if self.database is None:
            return False
        try:
            return self.database.stat().st_ino != self._inode
        except OSError:
            return True

    def write(self, batch: Iterable[_Entry | _Reading]) -> None:
        """All of `batch` or, when this raises, nothing of it."""
        items = list(batch)
        with self._transaction():
            for item in items:
                if isinstance(item, _Entry):
                    self.connection.executemany(item.sql, item.rows)
            self._insert([item for item in items if isinstance(item, _Reading)])

    def _insert(self, readings: Sequence[_Reading]) -> None:
        groups: dict[Any, list[int]] = {}
        for i, reading in enumerate(readings):
            lengths = tuple([(name, _length(values)) for name, values in reading.arrays.items()])
            groups.setdefault((reading.stream, lengths), []).append(i)
        rows: dict[int, tuple[Any, ...]] = {}
        for (stream, lengths), members in groups.items():
            arrays = [readings[i].arrays for i in members]
            layout, packed = _encode({(n, "value"): _stacked([a[n] for a in arrays], size) for n, size in lengths})
            where = (self._stream(stream), 0)
            number = self._layout(layout)
            for i, blob in zip(members, packed, strict=False):
                rows[i] = (*where, readings[i].step, readings[i].step, number, blob)
            self._count(where, len(members), sum(map(len, packed)))
        self.connection.executemany(_ADD_ROW, [rows[i] for i in sorted(rows)])

    def _stream(self, stream: _Stream) -> int:
        if stream not in self._streams:
            self._streams[stream] = len(self._streams) + 1
            self.connection.execute(_ADD_SUBJECT, (stream.subject,))
            self.connection.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", (self._streams[stream], *stream))
        return self._streams[stream]

    def _layout(self, layout: _Layout) -> int:
        if layout not in self._layout_numbers:
            number = len(self._layouts) + 1
            entries = [(number, i, *entry) for i, entry in enumerate(layout)]
            self.connection.executemany("INSERT INTO layouts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entries)
            self._layouts[number] = layout
            self._layout_numbers[layout] = number
        return self._layout_numbers[layout]

    def _count(self, where: tuple[int, int], rows: int, size: int) -> None:
        tally = self._tallies.setdefault(where, [0, 0])
        tally[0] += rows
        tally[1] += size

    def roll_up(self) -> bool:
        """Merge one piece of the fullest level, if any holds too much; whether one did."""
        where = self._crowded()
        if where is None:
            return False
        stream, level = where
        query = """SELECT rowid, stream, first, step, layout, readings FROM rows
            WHERE stream = ? AND level = ? ORDER BY step, rowid LIMIT ?"""
        rows = _Rows.of(self.connection.execute(query, (*where, _PIECE * _MERGED)).fetchall())
        with self._transaction():
            merged = [
                (stream, level + 1, first, last, self._layout(layout), readings)
                for first, last, layout, readings in _merge(rows, self._layouts)
            ]
            self.connection.executemany("DELETE FROM rows WHERE rowid = ?", [(rowid,) for rowid in rows.rowid])
            self.connection.executemany(_ADD_ROW, merged)
            self._count(where, -len(rows.rowid), -sum(map(len, rows.readings)))
            self._count((stream, level + 1), len(merged), sum(len(row[-1]) for row in merged))
        return True

    def _crowded(self) -> tuple[int, int] | None:
        piece = _PIECE * _MERGED
        for where, (rows, _) in self._tallies.items():
            if rows >= self.kept + piece:
                return where
        if sum(size for _, size in self._tallies.values()) <= self.largest:
            return None
        mergeable = [where for where, (rows, _) in self._tallies.items() if rows >= 2 * piece]
        return max(mergeable, key=lambda where: self._tallies[where][1], default=None)

    def to_memory(self) -> _Store | None:
        """A copy in memory, to go on with when the disk fails; None when it is too large for that."""
        (pages,), (size,) = (
            self.connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        if pages * size > _LARGEST_IN_MEMORY:
            return None
        memory = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.backup(memory)
        return _Store(memory, kept=self.kept, largest=min(self.largest, _LARGEST_IN_MEMORY), database=None)

    def close(self) -> None:
        self.connection.close()


def _layouts_of(rows: Iterable[tuple[Any, ...]]) -> dict[int, _Layout]:
    layouts: dict[int, _Layout] = {}
    for layout, _, statistic, fold, dtype, offset, length, constant in rows:
        entry = _Field(statistic, fold, dtype, offset, length, bool(constant))
        layouts[layout] = (*layouts.get(layout, ()), entry)
    return layouts


def _length(values: Any) -> int:
    return 1 if isinstance(values, float) else len(values)


def _stacked(values: Sequence[Any], length: int) -> NDArray[Any]:
    """[rows, length]; float32 if every row is."""
    if all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in values):
        return np.stack(values)
    return np.array(values, dtype=np.float64).reshape(len(values), length)


# ---- writing ------------------------------------------------------------------------------------------------------


class RunFile:
    """The writer of one run.

    Methods may be called from any thread, cost microseconds, and raise nothing: what is handed over is written by a
    background thread at least once a second, so that a killed process loses no more than that; what is left is written
    when the interpreter exits. Arrays and lists are copied at the call. In a forked child every method does nothing.

    When the folder cannot be made or written, the run is kept in memory, rolled up to at most 128 MB, for as long as
    the process lives (`is_in_memory`), and `read` goes on to give all of it; a larger run is read as far as it was
    written. Each kind of failure (writing; a disk so slow that more than 256 MB wait for it; a reading that is no
    number) is told to `on_failure` once, in one sentence, from whichever thread notices.
    """

    path: Path
    """The run's folder, `<root>/<id>`, also when it could not be made."""
    id: str
    """UTC time of creation, the script's name, and four random digits, as in `20261121-093012-train-5f3a`."""

    def __init__(self, path: Path, *, kept: int, largest: int, on_failure: Callable[[str], None] | None) -> None:
        self.path = path
        self.id = path.name
        self.is_in_memory = False
        self._kept = kept
        self._largest = largest
        self._on_failure = on_failure
        self._told: set[str] = set()
        self._is_writable = True
        self._is_closed = False
        self._process = os.getpid()
        self._pending: deque[_Entry | _Reading] = deque()
        self._pending_bytes = 0
        # SimpleQueue is reentrant: a signal handler may flush while the interrupted code is doing the same.
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._subjects: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="isograd-record", daemon=True)

    @classmethod
    def create(
        cls,
        root: Path | None,
        *,
        meta: Mapping[str, Any],
        on_failure: Callable[[str], None] | None = None,
        kept: int = 10_000,
        largest: int = 900_000_000,
    ) -> RunFile:
        """Make a folder in `root` that no other process shares, and start to write there; None keeps the run in memory.

        `meta` holds JSON values; `schema`, `started`, `host`, `pid` and `state` ("running") are added where missing.
        `kept`: rows of each tier that stay as they were written; older ones are merged. `largest`: bytes of readings
        beyond which the fullest tier is merged earlier than that, so that a run of weeks stays under 1 GB.
        """
        stem = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(str(meta.get("script") or "run")).stem).strip("-.")[:40] or "run"
        name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{stem}-{os.urandom(2).hex()}"
        folder = Path(root or ROOT).absolute() / name
        file = cls(folder, kept=kept, largest=largest, on_failure=on_failure)
        file.is_in_memory = root is None
        try:
            if root is not None:
                file.path.mkdir(parents=True)
        except FileExistsError as error:
            if file.path.parent.is_dir():  # the same second, script and random digits
                return cls.create(root, meta=meta, on_failure=on_failure, kept=kept, largest=largest)
            file._lose_disk(error)
        except OSError as error:
            file._lose_disk(error)
        facts = {
            "schema": SCHEMA,
            "started": datetime.now(timezone.utc).isoformat(),
            "host": platform.node(),
            "pid": os.getpid(),
            "pid_started": _process_start(os.getpid()),
            "state": "running",
        }
        file.set_meta(**{**facts, **meta})
        file._thread.start()
        _at_exit(file.close)
        file.flush()
        return file

    # What the caller's thread does: copy and append.

    def add_layers(self, subject: str, layers: Sequence[Layer]) -> None:
        """Append columns of layer statistics: a layer's ordinal is the number of those before it."""
        self._enter(subject, _ADD_LAYER, [_columns(subject, layer) for layer in layers])

    def update_layer(self, subject: str, index: int, layer: Layer) -> None:
        """Replace what is known of the layer with ordinal `index`."""
        self._enter(subject, _UPDATE_LAYER, [{**_columns(subject, layer), "ordinal": index}])

    def add_parameters(self, subject: str, parameters: Sequence[Parameter]) -> None:
        """Append columns of parameter statistics."""
        self._enter(subject, _ADD_PARAMETER, [_columns(subject, parameter) for parameter in parameters])

    def update_parameter(self, subject: str, index: int, parameter: Parameter) -> None:
        """Replace what is known of the parameter with ordinal `index`."""
        self._enter(subject, _UPDATE_PARAMETER, [{**_columns(subject, parameter), "ordinal": index}])

    def set_groups(self, subject: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Replace all parameter groups of the subject."""
        self._enter(subject, "DELETE FROM groups WHERE subject = ?", [(_text(subject),)])
        rows = [(_text(subject), i, _json(dict(group))) for i, group in enumerate(groups)]
        self._enter(subject, "INSERT INTO groups VALUES (?, ?, ?)", rows)

    def write_row(self, subject: str, step: int, tier: str, arrays: Mapping[str, ArrayLike]) -> None:
        """Statistics read at one step: a number, or one per layer, parameter or group known so far.

        Where a step is written again, the later reading of a statistic replaces the earlier one.
        """
        self._read(_Stream(subject, tier), step, arrays)

    def write_profile(self, subject: str, step: int, statistic: str, layer: str, values: ArrayLike) -> None:
        """A statistic with one number per call of `layer`."""
        self._read(_Stream(subject, "deep", statistic, layer), step, {statistic: values})

    def write_event(self, subject: str, event: Event) -> None:
        """Something that happened; values of its data that are not JSON are written as text."""
        row = (_text(subject), int(event.step), _text(event.kind), event.layer and _text(event.layer))
        self._enter(subject, "INSERT INTO events VALUES (?, ?, ?, ?, ?)", [(*row, _json(dict(event.data)))])

    def set_unmeasured(self, subject: str, statistic: str, why: str) -> None:
        """Say in words why a statistic could not be read."""
        row = (_text(subject), _text(statistic), _text(why))
        self._enter(subject, "INSERT OR REPLACE INTO unmeasured VALUES (?, ?, ?)", [row])

    def set_meta(self, **facts: Any) -> None:
        """Add to the run-wide facts, or replace some of them."""
        rows = [(_text(key), _json(value)) for key, value in facts.items()]
        self._enter(None, "INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def _enter(self, subject: str | None, sql: str, rows: Sequence[Any]) -> None:
        if not self._accepts():
            return
        if subject is not None and subject not in self._subjects:
            self._subjects.add(subject)
            self._pending.append(_Entry(_ADD_SUBJECT, [(_text(subject),)]))
        self._pending.append(_Entry(sql, rows))

    def _read(self, stream: _Stream, step: int, arrays: Mapping[str, ArrayLike]) -> None:
        if not self._accepts():
            return
        if self._pending_bytes > _BACKLOG:
            self._tell("backlog", f"{self.path} is on a disk slower than the training: some steps are not recorded")
            return
        try:
            owned = {name: _owned(values) for name, values in arrays.items()}
            self._pending.append(_Reading(stream, int(step), owned))
        except (TypeError, ValueError) as error:
            self._tell("value", f"a reading at step {step} is not recorded: {error}")
            return
        # Unsynchronized: an estimate, set back to 0 at each flush.
        self._pending_bytes += 200 + sum([8 * _length(values) for values in owned.values()])

    def _accepts(self) -> bool:
        return self._is_writable and not self._is_closed and os.getpid() == self._process

    def flush(self) -> None:
        """Return when everything handed over so far is in the file (after 30 s at the latest)."""
        if self._accepts():
            self._ask(lambda store: None)

    def close(self) -> None:
        """Write what is left and stop. May be called again."""
        if self._is_closed or os.getpid() != self._process:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self._ask(lambda store: None)
        if not self.is_in_memory:
            self._thread.join(timeout=30)

    def read(self) -> Run:
        """The run up to now, wherever it is kept. Raises RunNotFound or RunUnreadable."""
        if os.getpid() == self._process and self._thread.is_alive():
            answer = self._ask(lambda store: _read(store.connection, self.path))
            if isinstance(answer, Run):
                return answer
        return read_run(self.path)

    def _ask(self, work: Callable[[_Store], Any], *, seconds: float = 30.0) -> Any:
        """What `work` returns on the background thread, after all that is pending; None if that takes too long."""
        if threading.current_thread() is self._thread:
            return None
        request = _Request(work, queue.SimpleQueue())
        self._requests.put(request)
        for _ in range(int(seconds / 0.1)):
            try:
                answer, error = request.reply.get(timeout=0.1)
            except queue.Empty:
                if not self._thread.is_alive():
                    return None
                continue
            if error is not None:
                raise error
            return answer
        return None

    # What the background thread does. The connection is a local variable of it on purpose: in a forked child this
    # thread does not exist, so nothing there can ever use the connection, or close it and take the journal along.

    def _work(self) -> None:
        store = self._opened()
        while True:
            try:
                request = self._requests.get(timeout=None if self._is_closed else _INTERVAL)
            except queue.Empty:
                request = None
            store = self._drained(store)
            if request is not None:
                request.answer(store)
            if self._is_closed and not self.is_in_memory and self._requests.empty():
                store.close()
                return

    def _opened(self) -> _Store:
        if not self.is_in_memory:
            try:
                return _Store.create(self.path / "run.db", kept=self._kept, largest=self._largest)
            except (sqlite3.Error, OSError) as error:
                shutil.rmtree(self.path, ignore_errors=True)
                self._lose_disk(error)
        return _Store.create(None, kept=self._kept, largest=min(self._largest, _LARGEST_IN_MEMORY))

    def _drained(self, store: _Store) -> _Store:
        """Write what is pending; the store to go on with."""
        batch = [self._pending.popleft() for _ in range(len(self._pending))]
        self._pending_bytes = 0
        if not self._is_writable:
            return store
        try:
            if store.is_gone():
                raise FileNotFoundError("it was deleted")
            if batch:
                store.write(batch)
            while store.roll_up():
                pass
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error) and not self._is_closed:  # another program is writing: next time
                self._pending.extendleft(reversed(batch))
                return store
            return self._retreated(store, batch, error)
        except Exception as error:
            self._tell("value", f"some readings are not recorded: {error}")
        return store

    def _retreated(self, store: _Store, batch: Sequence[_Entry | _Reading], error: Exception) -> _Store:
        """Go on in memory, with `batch`, or not at all."""
        try:
            memory = None if self.is_in_memory else store.to_memory()
            if memory is not None:
                self._lose_disk(error)
                memory.write(batch)
                return memory
        except (sqlite3.Error, OSError, MemoryError):
            pass
        self._is_writable = False
        self._tell("disk", f"{self.path} cannot be written any more ({_reason(error)}): nothing further is recorded")
        return store

    def _lose_disk(self, error: Exception) -> None:
        self.is_in_memory = True
        self._tell("disk", f"{self.path} cannot be written ({_reason(error)}): this run is kept in memory only")

    def _tell(self, kind: str, sentence: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        if self._on_failure is not None:
            with contextlib.suppress(Exception):
                self._on_failure(sentence)


class _Request(NamedTuple):
    work: Callable[[_Store], Any]
    reply: queue.SimpleQueue[tuple[Any, Exception | None]]

    def answer(self, store: _Store) -> None:
        try:
            self.reply.put((self.work(store), None))
        except Exception as error:
            self.reply.put((None, error))


def _at_exit(close: Callable[[], None]) -> None:
    atexit.register(close)
    # Children of multiprocessing end without atexit, but run its finalizers.
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, close, exitpriority=0)


def _owned(values: ArrayLike) -> Any:
    """A float, a tuple or a floating-point array that nobody else holds. Raises TypeError or ValueError."""
    if isinstance(values, (float, int)):
        return float(values)
    if isinstance(values, (list, tuple)):
        return tuple(values)
    array = np.array(values).ravel()
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _columns(subject: str, entry: Layer | Parameter) -> dict[str, Any]:
    plain = {f.name: _plain(getattr(entry, f.name)) for f in fields(entry)}
    return {"subject": _text(subject), **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return _json([int(v) for v in value])
    if isinstance(value, (bool, int, float)):
        return value
    return value.item() if isinstance(value, np.generic) else _text(str(value))


def _text(text: str) -> str:
    """`text` without lone surrogates, which have no UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        return json.dumps(repr(value))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it stands in the file.

    `histories`: one per subject, layers in order of first use. In a span of merged steps, a series has one reading at the
    span's last step: the median, or the largest value of a `*_nonfinite` count, or the sum of `skipped`.
    `damage`: what could not be read of a truncated file, in one sentence; empty when all is well.
    """

    path: Path
    id: str
    meta: dict[str, Any]
    histories: tuple[History, ...]
    damage: str = ""

    @property
    def state(self) -> str:
        """As in `RunSummary`."""
        return _state(self.meta)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line about a run.

    `state`: "running", "finished", "interrupted", "failed"; "stopped" when it says that it runs and its process is gone;
    "unreadable" when the file cannot be read. `started`: ISO 8601, UTC. `steps`: one more than the last step recorded.
    """

    id: str
    path: Path
    started: str = ""
    steps: int = 0
    subjects: tuple[str, ...] = ()
    state: str = "unreadable"
    script: str = ""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What merging left of one statistic's old steps.

    `first`, `last`: int [S], the steps that each span covers. `minimum`, `maximum` and, for what is counted, `total`:
    float64 [S], or [S, N] with columns as in the series.
    """

    first: Integers
    last: Integers
    minimum: Floats
    maximum: Floats
    total: Floats | None = None


def read_run(path: Path) -> Run:
    """Read a run from its folder or its `run.db`, also while it is written.

    Raises RunNotFound where there is none, RunUnreadable where it is not SQLite, of a newer schema, or damaged beyond use.
    """
    database = _database(path)
    with _opened(database) as connection:
        return _read(connection, database.parent)


def read_envelopes(path: Path) -> dict[str, dict[str, Envelope]]:
    """subject -> statistic -> what is known of steps that were merged; empty for a run of few steps. Raises as `read_run`."""
    with _opened(_database(path)) as connection:
        tables = _Tables(connection)
        return {subject: tables.envelopes(subject) for subject in tables.subjects()}


def list_runs(root: Path = ROOT) -> list[RunSummary]:
    """All runs in `root`, oldest first; empty when there is no such folder."""
    folders = [path for path in Path(root).glob("*") if (path / "run.db").is_file()]
    return sorted((_summary(folder) for folder in folders), key=lambda run: (run.started, run.id))


def find_run(name: str | None, root: Path = ROOT) -> Path:
    """The folder of a run given by its path, its id or the unique beginning of one; None is the latest.

    Raises RunNotFound.
    """
    if name is None:
        runs = list_runs(root)
        if not runs:
            raise RunNotFound(f"no run has been recorded in {root}: `isograd run SCRIPT` records one")
        return runs[-1].path
    if (Path(name) / "run.db").is_file() or Path(name).is_file():
        return _database(Path(name)).parent
    matches = sorted(
        path for path in Path(root).glob("*") if path.name.startswith(name) and (path / "run.db").is_file()
    )
    exact = [path for path in matches if path.name == name]
    if len(exact or matches) != 1:
        ids = ", ".join(path.name for path in matches)
        raise RunNotFound(
            f"{name!r} is the beginning of several runs: {ids}"
            if matches
            else f"no run in {root} is called {name!r}: `isograd ls` lists them"
        )
    return (exact or matches)[0]


def _database(path: Path) -> Path:
    path = Path(path)
    database = path / "run.db" if path.is_dir() else path
    if not database.is_file():
        raise RunNotFound(
            f"{path} is not a run folder: it has no run.db" if path.is_dir() else f"{path} does not exist"
        )
    return database


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection to a file that has proved to be a run.

    Nothing but SQLite may open the file: closing any other descriptor of it would release the locks that a writer in
    this same process holds (POSIX), and another process could then take the journal away from under it.
    """
    with contextlib.ExitStack() as stack:
        try:
            connection = _connected(database, stack)
            _check_schema(connection, database)
            yield connection
        except sqlite3.Error as error:
            raise RunUnreadable(f"{database} cannot be read: {error}") from error


def _connected(database: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    if database.stat().st_size == 0:
        raise RunUnreadable(f"{database} is empty: the program that made it was stopped before it could write")
    connection = _connection(database, "mode=ro", stack)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        # A folder in which SQLite cannot make its shared-memory index: a read-only copy, or somebody else's.
        connection = _connection(_copied(database, stack), "immutable=1", stack)
    except sqlite3.DatabaseError:
        # A file shorter than its own header says. This switch, meant for repairs, makes SQLite read what is there.
        connection.execute("PRAGMA writable_schema = ON")
    return connection


def _connection(database: Path, option: str, stack: contextlib.ExitStack) -> sqlite3.Connection:
    uri = f"{database.resolve().as_uri()}?{option}"
    return stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)))


def _copied(database: Path, stack: contextlib.ExitStack) -> Path:
    """`database` itself or, when part of it is still in the journal, a copy in which that part has been taken in."""
    journal = Path(f"{database}-wal")
    if not journal.is_file() or journal.stat().st_size == 0:
        return database
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isograd-")))
    for file in (database, journal):
        shutil.copyfile(file, folder / file.name)
    with contextlib.closing(sqlite3.connect(folder / database.name, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / database.name


def _check_schema(connection: sqlite3.Connection, database: Path) -> None:
    application, schema = (connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version"))
    if application != _APPLICATION:
        raise RunUnreadable(f"{database} was not written by isograd")
    if schema > SCHEMA:
        raise RunUnreadable(f"{database} was written by a newer isograd (schema {schema}, this one reads {SCHEMA})")


class _Tables:
    """Rows of the tables of one file, as far as they can be read."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.damaged: list[str] = []
        self.meta = {row["key"]: _parsed(row["value"]) for row in self._dicts("SELECT * FROM meta ORDER BY rowid")}
        self._streams = {
            row["stream"]: _Stream(row["subject"], row["tier"], row["statistic"], row["layer"])
            for row in self._dicts("SELECT * FROM streams ORDER BY stream")
        }
        layouts = _layouts_of(self._tuples("SELECT * FROM layouts ORDER BY rowid"))
        self._rows = _Rows.of(
            self._tuples("SELECT rowid, stream, first, step, layout, readings FROM rows ORDER BY rowid")
        )
        self._found = _decode(self._rows, layouts)

    def _tuples(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query that ends in its order; of a damaged table those before the damage and those behind it."""
        rows: list[tuple[Any, ...]] = []
        try:
            rows.extend(self._connection.execute(query))
        except sqlite3.DatabaseError as error:
            self.damaged.append(str(error))
            behind: list[tuple[Any, ...]] = []
            with contextlib.suppress(sqlite3.DatabaseError):
                behind.extend(self._connection.execute(f"{query} DESC"))
            rows.extend(reversed(behind))
        return rows

    def _dicts(self, query: str) -> list[dict[str, Any]]:
        names = [column[0] for column in self._connection.execute(f"{query} LIMIT 0").description]
        return [dict(zip(names, row, strict=True)) for row in self._tuples(query)]

    def subjects(self) -> list[str]:
        named = [row["subject"] for row in self._dicts("SELECT * FROM subjects ORDER BY rowid")]
        return list(dict.fromkeys([*named, *(stream.subject for stream in self._streams.values())]))

    def _of(self, subject: str, query: str) -> list[dict[str, Any]]:
        return [row for row in self._dicts(query) if row["subject"] == subject]

    def _layers(self, subject: str) -> list[Layer]:
        return [_entry(Layer, row) for row in self._of(subject, "SELECT * FROM layers ORDER BY rowid")]

    def _parameters(self, subject: str) -> list[Parameter]:
        return [_entry(Parameter, row) for row in self._of(subject, "SELECT * FROM parameters ORDER BY rowid")]

    def history(self, subject: str, run: str) -> History:
        layers = self._layers(subject)
        order = _order(layers)
        return History(
            subject=subject,
            run=run,
            layers=tuple(layers[i] for i in order),
            parameters=tuple(self._parameters(subject)),
            groups=tuple(_mapping(row["facts"]) for row in self._of(subject, "SELECT * FROM groups ORDER BY rowid")),
            series=self._all_series(subject),
            profiles=self._profiles(subject),
            events=tuple(
                Event(step=row["step"], kind=row["kind"], layer=row["layer"], data=_mapping(row["data"]))
                for row in self._of(subject, "SELECT * FROM events ORDER BY rowid")
            ),
            unmeasured={
                row["statistic"]: row["why"] for row in self._of(subject, "SELECT * FROM unmeasured ORDER BY rowid")
            },
            meta=self.meta,
        )

    def _pieces(self, subject: str) -> dict[str, dict[Fold, _Pieces]]:
        """statistic -> fold -> pieces, of all tiers; statistics that this version does not know are left out."""
        pieces: dict[str, dict[Fold, _Pieces]] = {}
        for (stream, statistic, fold), found in self._found.items():
            at = self._streams.get(stream)
            if at is not None and at.subject == subject and at.statistic is None and statistic in STATISTICS:
                pieces.setdefault(statistic, {}).setdefault(fold, []).extend(found)
        return pieces

    def _widths(self, subject: str) -> dict[str, int]:
        return {"layer": len(self._layers(subject)), "parameter": len(self._parameters(subject)), "step": 1}

    def _all_series(self, subject: str) -> dict[str, Series]:
        widths, order = self._widths(subject), _order(self._layers(subject))
        series = {}
        for statistic, folds in self._pieces(subject).items():
            shown = [*folds.get("value", ()), *folds.get(_shown_fold(statistic), ())]
            indices, values = self._readings(statistic, shown, widths, order)
            series[statistic] = Series(self._rows.step[indices], values)
        return series

    def _readings(
        self, statistic: str, pieces: _Pieces, widths: Mapping[str, int], order: Sequence[int]
    ) -> tuple[Integers, Floats]:
        """Indices of rows in order of their steps, the last row of each step only, and the readings there."""
        axis = STATISTICS[statistic].axis
        width = widths.get(axis, max((p[1].shape[1] for p in pieces), default=0))
        indices, values = _joined(pieces, width) if pieces else (np.empty(0, np.int64), np.empty((0, width)))
        steps = self._rows.step[indices]
        sort = np.lexsort((indices, steps))
        last = np.append(np.diff(steps[sort]) != 0, [True] * bool(len(sort)))
        chosen = sort[last]
        if not np.array_equal(chosen, np.arange(len(indices))):
            indices, values = indices[chosen], values[chosen]
        if axis == "layer" and list(order) != list(range(width)):
            values = values[:, order]
        return indices, values[:, 0] if axis == "step" else values

    def _profiles(self, subject: str) -> dict[str, dict[str, Series]]:
        profiles: dict[str, dict[str, Series]] = {}
        for number, stream in self._streams.items():
            if stream.subject != subject or stream.statistic not in STATISTICS or stream.layer is None:
                continue
            folds = ("value", _shown_fold(stream.statistic))
            pieces = [p for fold in folds for p in self._found.get((number, stream.statistic, fold), ())]
            indices, values = self._readings(stream.statistic, pieces, {}, ())
            profiles.setdefault(stream.statistic, {})[stream.layer] = Series(self._rows.step[indices], values)
        return profiles

    def envelopes(self, subject: str) -> dict[str, Envelope]:
        widths, order = self._widths(subject), _order(self._layers(subject))
        envelopes = {}
        for statistic, folds in self._pieces(subject).items():
            if "minimum" not in folds:
                continue
            read = {
                fold: self._readings(statistic, pieces, widths, order)
                for fold, pieces in folds.items()
                if fold in {"minimum", "maximum", "total"}
            }
            indices = read["minimum"][0]
            envelopes[statistic] = Envelope(
                first=self._rows.first[indices],
                last=self._rows.step[indices],
                **{fold: values for fold, (_, values) in read.items()},
            )
        return envelopes


def _read(connection: sqlite3.Connection, path: Path) -> Run:
    connection.execute("BEGIN")  # one moment in time, whatever is written meanwhile
    try:
        tables = _Tables(connection)
        subjects = tables.subjects()
        histories = tuple(tables.history(subject, path.name) for subject in subjects)
    finally:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
    if tables.damaged and not any(history.series for history in histories):
        raise RunUnreadable(f"{path / 'run.db'} cannot be read: {tables.damaged[0]}")
    damage = f"{path / 'run.db'} is damaged ({tables.damaged[0]}): some steps are missing" if tables.damaged else ""
    return Run(path=path, id=path.name, meta=tables.meta, histories=histories, damage=damage)


def _entry(kind: type[Any], row: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    facts = {name: value for name, value in row.items() if name in known and value is not None}
    if "shape" in facts:
        facts["shape"] = tuple(_parsed(facts["shape"]))
    return kind(**{name: bool(v) if name in {"trainable", "optimized"} else v for name, v in facts.items()})


def _order(layers: Sequence[Layer]) -> list[int]:
    return sorted(range(len(layers)), key=lambda i: layers[i].position)


def _parsed(text: str) -> Any:
    return json.loads(text)


def _mapping(text: str) -> dict[str, Any]:
    value = _parsed(text)
    return value if isinstance(value, dict) else {"value": value}


def _summary(folder: Path) -> RunSummary:
    try:
        with _opened(folder / "run.db") as connection:
            meta = {key: _parsed(value) for key, value in connection.execute("SELECT key, value FROM meta")}
            subjects = tuple(row[0] for row in connection.execute("SELECT subject FROM subjects ORDER BY rowid"))
            last = connection.execute(
                "SELECT max((SELECT max(step) FROM rows WHERE stream = s.stream AND level = 0)) FROM streams AS s"
            ).fetchone()[0]
    except (RunUnreadable, OSError, ValueError):
        return RunSummary(id=folder.name, path=folder)
    return RunSummary(
        id=folder.name,
        path=folder,
        started=str(meta.get("started", "")),
        steps=0 if last is None else int(last) + 1,
        subjects=subjects,
        state=_state(meta),
        script=str(meta.get("script") or ""),
    )


def _state(meta: Mapping[str, Any]) -> str:
    state = str(meta.get("state", "running"))
    if state == "running" and meta.get("host") == platform.node() and not _is_alive(meta):
        return "stopped"
    return state


def _is_alive(meta: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a run on this machine still exists, and is not a later one with its number."""
    pid = meta.get("pid")
    if not isinstance(pid, int) or pid <= 0 or os.name != "posix":  # elsewhere, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return meta.get("pid_started") in {None, _process_start(pid)}


def _process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`); None where that is not known."""
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, IndexError):
        return None
