"""Writing a run while it happens: what was measured goes to the run file on a thread of its own.

It raises nothing into the program that is watched. `_runs.py` documents the file and reads it back.
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
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isograd._history import Event, Layer, Parameter
from isograd._layout import MERGED, Layout, Rows, encode, merge
from isograd._runs import (
    APPLICATION,
    ROOT,
    SCHEMA,
    SELECT_ROWS,
    TABLES,
    Envelope,
    Run,
    RunSummary,
    Stream,
    find_run,
    layouts_of,
    list_runs,
    process_start,
    read_connection,
    read_envelopes,
    read_run,
)

__all__ = [
    "ROOT",
    "SCHEMA",
    "Envelope",
    "Run",
    "RunFile",
    "RunSummary",
    "find_run",
    "list_runs",
    "read_envelopes",
    "read_run",
]

_INTERVAL = 0.5  # seconds between flushes: what a killed process loses, with the time that one flush takes
_BACKLOG = 256_000_000  # bytes that may wait for a slow disk before readings are dropped
_LARGEST_IN_MEMORY = 128_000_000  # bytes of a run that cannot be written to disk
_TOGETHER = 64  # rows packed at once: few calls for each, and arrays that fit into the cache
_PIECE = 20 * MERGED  # rows merged in one transaction: some milliseconds

_ADD_SUBJECT = "INSERT OR IGNORE INTO subjects VALUES (?)"
_ADD_LAYER = """
INSERT INTO layers SELECT :subject, count(*), :name, :kind, :type, :role, :position, :units, :fan_in, :fan_out, :shape,
    :dtype FROM layers WHERE subject = :subject"""
_UPDATE_LAYER = """
UPDATE layers SET name = :name, kind = :kind, type = :type, role = :role, position = :position, units = :units,
    fan_in = :fan_in, fan_out = :fan_out, shape = :shape, dtype = :dtype
    WHERE subject = :subject AND ordinal = :ordinal"""
_ADD_PARAMETER = """
INSERT INTO parameters SELECT :subject, count(*), :name, :layer, :shape, :dtype, :trainable, :optimized, :group
FROM parameters WHERE subject = :subject"""
_UPDATE_PARAMETER = """
UPDATE parameters SET name = :name, layer = :layer, shape = :shape, dtype = :dtype, trainable = :trainable,
    optimized = :optimized, "group" = :group WHERE subject = :subject AND ordinal = :ordinal"""
_ADD_ROW = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)"


class _Reading(NamedTuple):
    """A row on its way to the file."""

    stream: Stream
    step: int
    arrays: Mapping[str, Any]


class _Entry(NamedTuple):
    """A statement on its way to the file, with the rows to run it on."""

    sql: str
    rows: Sequence[Any]


# ---- what the caller's thread does: copy and append ---------------------------------------------------------------


class RunFile:
    """The writer of one run.

    Methods may be called from any thread and raise nothing. What is handed over is copied, and written by a background
    thread at least once a second, so that a killed process loses no more than that; the rest is written when the
    interpreter exits. In a forked child every method does nothing.

    When the folder cannot be made or written any more, the run goes on in memory, rolled up to 128 MB, for as long as
    this object lives (`is_in_memory`), and `read` gives all of it; of a run that is larger, what was written so far.
    Each kind of failure (writing; a disk so slow that 256 MB wait for it; a reading that is no number) is told to
    `on_failure` once, in one sentence, from whichever thread notices.
    """

    def __init__(
        self, folder: Path, *, on_failure: Callable[[str], None] | None, in_memory: bool, kept: int, largest: int
    ) -> None:
        self.is_in_memory = in_memory
        self._folder = folder
        self._has_folder = False
        self._on_failure = on_failure
        self._kept = kept
        self._largest = largest
        self._told: set[str] = set()
        self._is_writable = True
        self._is_closed = False
        self._process = os.getpid()
        self._subjects: set[str] = set()
        self._pending: deque[_Entry | _Reading] = deque()
        self._pending_bytes = 0
        # Reentrant: a signal handler may flush while the code that it interrupted is doing the same.
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        arguments = (weakref.ref(self), self._requests)
        self._forget_exit = _at_exit(self.close)
        self._thread = threading.Thread(target=_write_until_closed, args=arguments, name="isograd-record", daemon=True)

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        meta: Mapping[str, Any],
        on_failure: Callable[[str], None] | None = None,
        in_memory: bool = False,
        kept: int = 10_000,
        largest: int = 900_000_000,
    ) -> RunFile:
        """Make a folder in `root` that no other process shares, and start to write there.

        `meta` holds JSON values; `schema`, `isograd`, `python` (versions), `started`, `host`, `pid` and `state`
        ("running") are added where missing.
        `in_memory`: make no folder. `kept`: rows of each tier that stay as they were written; older ones are merged.
        `largest`: bytes of the file beyond which the fullest tier is merged earlier, so that a week fits into 1 GB.
        """
        folder = Path(root).absolute() / _new_id(meta)
        file = cls(folder, on_failure=on_failure, in_memory=in_memory, kept=kept, largest=largest)
        if not in_memory:
            file._make_folder(meta)
        now = datetime.now(timezone.utc).isoformat()
        pid = os.getpid()
        version = sys.modules[
            "isograd"
        ].__version__  # importing the package by name would import all of it, for a linter
        facts = {"schema": SCHEMA, "isograd": version, "python": platform.python_version(), "started": now}
        facts |= {"host": platform.node(), "pid": pid, "state": "running"}
        file.set_meta(**{**facts, "pid_started": process_start(pid), **meta})
        file._start()
        return file

    @property
    def id(self) -> str:
        """UTC time of creation, the script's name and four random digits, as in `20261121-093012-train-5f3a`."""
        return self._folder.name

    @property
    def path(self) -> Path | None:
        """The run's folder; None where there is none and the run is kept in memory only."""
        return self._folder if self._has_folder else None

    def add_layers(self, subject: str, layers: Sequence[Layer]) -> None:
        """Append columns of layer statistics: a layer's ordinal is the number of those before it."""
        self._enter(subject, _ADD_LAYER, lambda: [_facts(subject, layer) for layer in layers])

    def update_layer(self, subject: str, index: int, layer: Layer) -> None:
        """Replace what is known of the layer with ordinal `index`."""
        self._enter(subject, _UPDATE_LAYER, lambda: [{**_facts(subject, layer), "ordinal": int(index)}])

    def add_parameters(self, subject: str, parameters: Sequence[Parameter]) -> None:
        """Append columns of parameter statistics."""
        self._enter(subject, _ADD_PARAMETER, lambda: [_facts(subject, parameter) for parameter in parameters])

    def update_parameter(self, subject: str, index: int, parameter: Parameter) -> None:
        """Replace what is known of the parameter with ordinal `index`."""
        self._enter(subject, _UPDATE_PARAMETER, lambda: [{**_facts(subject, parameter), "ordinal": int(index)}])

    def set_groups(self, subject: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Replace all parameter groups of the subject."""
        self._enter(subject, "DELETE FROM groups WHERE subject = ?", lambda: [(_text(subject),)])
        sql = "INSERT INTO groups VALUES (?, ?, ?)"
        self._enter(subject, sql, lambda: [(_text(subject), i, _json(dict(group))) for i, group in enumerate(groups)])

    def write_row(self, subject: str, step: int, tier: str, arrays: Mapping[str, ArrayLike]) -> None:
        """Statistics read at one step: a number, or one per layer, parameter or group known so far.

        Where a step is written again, the later reading of a statistic replaces the earlier one.
        """
        self._read(Stream(subject, tier), step, arrays)

    def write_profile(self, subject: str, step: int, statistic: str, layer: str, values: ArrayLike) -> None:
        """A statistic with one number per call of `layer`."""
        self._read(Stream(subject, "deep", statistic, layer), step, {statistic: values})

    def write_event(self, subject: str, event: Event) -> None:
        """Something that happened. Values of its data that are not JSON are written as text."""
        self._enter(subject, "INSERT INTO events VALUES (?, ?, ?, ?, ?)", lambda: [_event(subject, event)])

    def set_unmeasured(self, subject: str, statistic: str, why: str) -> None:
        """Say in words why a statistic could not be read."""
        row = (subject, statistic, why)
        self._enter(subject, "INSERT OR REPLACE INTO unmeasured VALUES (?, ?, ?)", lambda: [tuple(map(_text, row))])

    def set_meta(self, **facts: Any) -> None:
        """Add to the run-wide facts, or replace some of them."""
        sql = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
        self._enter(None, sql, lambda: [(_text(key), _json(value)) for key, value in facts.items()])

    def flush(self) -> None:
        """Return when everything handed over so far is in the file (after 30 s at the latest)."""
        if self._accepts():
            self._ask(_nothing)

    def close(self) -> None:
        """Write what is left and stop. May be called again."""
        if self._is_closed or os.getpid() != self._process:
            return
        self._is_closed = True
        self._forget_exit()
        self._ask(_nothing)
        if not self.is_in_memory and threading.current_thread() is not self._thread:
            self._thread.join(timeout=30)

    def read(self) -> Run:
        """The run up to now, wherever it is kept. Raises RunNotFound or RunUnreadable."""
        if os.getpid() == self._process:
            folder = self._folder  # a question that held `self` would keep a run in memory alive
            run = self._ask(lambda store: read_connection(store.connection, folder))
            if isinstance(run, Run):
                return run
        return read_run(self._folder)

    def _make_folder(self, meta: Mapping[str, Any]) -> None:
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            while not _made(self._folder):  # the same script, second and random digits
                self._folder = self._folder.parent / _new_id(meta)
            self._has_folder = True
        except OSError as error:
            self._lose_disk(error)

    def _start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter is about to exit
            self._is_writable = False
            self._tell("disk", f"{self._folder} cannot be written ({error}): nothing is recorded")
        self.flush()

    def _accepts(self) -> bool:
        return self._is_writable and not self._is_closed and os.getpid() == self._process

    def _enter(self, subject: str | None, sql: str, rows: Callable[[], Sequence[Any]]) -> None:
        if not self._accepts():
            return
        try:
            if subject is not None and subject not in self._subjects:
                self._subjects.add(subject)
                self._pending.append(_Entry(_ADD_SUBJECT, [(_text(subject),)]))
            self._pending.append(_Entry(sql, rows()))
        except Exception as error:
            self._refuse(error)

    def _read(self, stream: Stream, step: int, arrays: Mapping[str, ArrayLike]) -> None:
        if not self._accepts():
            return
        if self._pending_bytes > _BACKLOG:
            self._tell("backlog", f"{self._folder} is on a disk slower than the training: some steps are not recorded")
            return
        try:
            owned = {name: _owned(values) for name, values in arrays.items()}
            self._pending.append(_Reading(stream, int(step), owned))
            # Several threads may add at once: an estimate, set back to 0 at each flush.
            self._pending_bytes += 200 + sum([8 * _length(values) for values in owned.values()])
        except Exception as error:
            self._refuse(error)

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
                if self._thread.is_alive():
                    continue
                return None
            if error is not None:
                raise error
            return answer
        return None

    # ---- what the background thread does --------------------------------------------------------------------------

    def _open(self) -> _Store:
        if not self.is_in_memory:
            try:
                return _Store.create(self._folder / "run.db", kept=self._kept, largest=self._largest)
            except (sqlite3.Error, OSError) as error:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._has_folder = False
                self._lose_disk(error)
        return _Store.create(None, kept=self._kept, largest=min(self._largest, _LARGEST_IN_MEMORY))

    def _drain(self, store: _Store) -> _Store:
        """Write what is pending, and give the store to go on with."""
        batch = [self._pending.popleft() for _ in range(len(self._pending))]
        self._pending_bytes = 0
        if not self._is_writable:
            return store
        try:
            store.require_file()
            if batch:
                store.write(batch)
                batch = []
            while store.roll_up():
                pass
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error) and not self._is_closed:  # another program is writing: next time
                self._pending.extendleft(reversed(batch))
                return store
            return self._retreat(store, batch, error)
        except Exception as error:
            self._refuse(error)
        if store.refused is not None:
            self._refuse(store.refused)
        return store

    def _retreat(self, store: _Store, batch: Sequence[_Entry | _Reading], error: Exception) -> _Store:
        """Go on in memory, with `batch`, or stop writing."""
        with contextlib.suppress(Exception):
            memory = None if self.is_in_memory else store.to_memory()
            if memory is not None:
                memory.write(batch)
                self._lose_disk(error)
                store.close()
                return memory
        self._is_writable = False
        self._tell("disk", f"{self._folder} cannot be written ({_reason(error)}): from now on nothing is recorded")
        return store

    def _lose_disk(self, error: Exception) -> None:
        self.is_in_memory = True
        self._tell("disk", f"{self._folder} cannot be written ({_reason(error)}): this run is kept in memory only")

    def _refuse(self, error: Exception) -> None:
        self._tell("value", f"some readings are not recorded: {error}")

    def _tell(self, kind: str, sentence: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        if self._on_failure is not None:
            with contextlib.suppress(Exception):
                self._on_failure(sentence)


def _write_until_closed(ref: weakref.ref[RunFile], requests: queue.SimpleQueue[_Request]) -> None:
    """The background thread: drain every half second, and before each request.

    The connection is a local variable of it on purpose. A forked child has no such thread, so nothing there can use the
    connection, or close it and take the journal along.
    """
    file = ref()
    assert file is not None
    store = file._open()
    while True:
        del file  # while waiting: a run in memory is of no more use once nobody else holds it
        request = _next(requests)
        file = ref()
        if file is None:
            break
        store = file._drain(store)
        if request is not None:
            request.answer(store)
        if file._is_closed and not file.is_in_memory and requests.empty():
            break
    store.close()


def _next(requests: queue.SimpleQueue[_Request]) -> _Request | None:
    try:
        return requests.get(timeout=_INTERVAL)
    except queue.Empty:
        return None


class _Request(NamedTuple):
    work: Callable[[_Store], Any]
    reply: queue.SimpleQueue[tuple[Any, Exception | None]]

    def answer(self, store: _Store) -> None:
        try:
            self.reply.put((self.work(store), None))
        except Exception as error:
            self.reply.put((None, error))


def _nothing(_: _Store) -> None:
    """What to ask for when only the answer counts."""


def _at_exit(close: Callable[[], None]) -> Callable[[], None]:
    """Call `close` when this process ends; what is returned takes that back."""
    atexit.register(close)
    # Children of multiprocessing end without atexit, but run its finalizers.
    util = sys.modules.get("multiprocessing.util")
    finalizer = util.Finalize(None, close, exitpriority=0) if util is not None else None

    def take_back() -> None:
        atexit.unregister(close)
        if finalizer is not None:
            finalizer.cancel()

    return take_back


# ---- the file -----------------------------------------------------------------------------------------------------


class _Store:
    """A connection that writes, and what it knows of the file. Lives on the thread that made it."""

    def __init__(self, connection: sqlite3.Connection, *, database: Path | None, kept: int, largest: int) -> None:
        self.connection = connection
        self.refused: Exception | None = None
        self._database = database
        self._inode = None if database is None else database.stat().st_ino
        self._kept = kept
        self._largest = largest
        self._look()

    @classmethod
    def create(cls, database: Path | None, *, kept: int, largest: int) -> _Store:
        """A new file, or with None a new database in memory. Raises sqlite3.Error or OSError."""
        connection = sqlite3.connect(":memory:" if database is None else database, timeout=2, isolation_level=None)
        try:
            # A filesystem that cannot do WAL keeps a rollback journal: slower, as safe.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA journal_size_limit = 64000000")
            head = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
            connection.executescript(f"BEGIN IMMEDIATE; {head} {TABLES} COMMIT")
            return cls(connection, database=database, kept=kept, largest=largest)
        except BaseException:
            connection.close()
            raise

    def _look(self) -> None:
        execute = self.connection.execute
        self._streams: dict[Stream, int] = {Stream(*row[1:]): row[0] for row in execute("SELECT * FROM streams")}
        self._layouts = layouts_of(execute("SELECT * FROM layouts ORDER BY layout, field"))
        self._numbers = {layout: number for number, layout in self._layouts.items()}
        tallies = execute("SELECT stream, level, count(*), sum(length(readings)) FROM rows GROUP BY stream, level")
        self._tallies = {(stream, level): (count, size) for stream, level, count, size in tallies}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            self._look()
            raise

    def require_file(self) -> None:
        """Raise FileNotFoundError if the file was deleted: writing would succeed, and nobody could read it."""
        if self._database is not None and self._database.stat().st_ino != self._inode:
            raise FileNotFoundError("another file stands in its place")

    def write(self, batch: Sequence[_Entry | _Reading]) -> None:
        """All of `batch` or, when this raises, nothing of it. What is no number is left out and noted in `refused`."""
        with self._transaction():
            for entry in batch:
                if isinstance(entry, _Entry):
                    self.connection.executemany(entry.sql, entry.rows)
            readings = [reading for reading in batch if isinstance(reading, _Reading)]
            for start in range(0, len(readings), _TOGETHER):
                self._insert(readings[start : start + _TOGETHER])

    def _insert(self, readings: Sequence[_Reading]) -> None:
        alike: dict[tuple[Stream, tuple[tuple[str, int], ...]], list[int]] = {}
        for i, reading in enumerate(readings):
            lengths = tuple([(name, _length(values)) for name, values in reading.arrays.items()])
            alike.setdefault((reading.stream, lengths), []).append(i)
        rows: dict[int, tuple[Any, ...]] = {}
        for (stream, lengths), members in alike.items():
            arrays = [readings[i].arrays for i in members]
            try:
                stacks = {(name, "value"): _stacked([a[name] for a in arrays], length) for name, length in lengths}
            except (TypeError, ValueError) as error:
                if len(members) == 1:
                    self.refused = error
                else:
                    for i in members:
                        self._insert([readings[i]])
                continue
            layout, packed = encode(stacks)
            where, number = (self._stream(stream), 0), self._layout(layout)
            steps = [readings[i].step for i in members]
            rows.update({i: (*where, s, s, number, p) for i, s, p in zip(members, steps, packed, strict=bool(lengths))})
            self._tally(where, len(packed), sum(map(len, packed)))
        self.connection.executemany(_ADD_ROW, [rows[i] for i in sorted(rows)])

    def _stream(self, stream: Stream) -> int:
        if stream not in self._streams:
            texts = [name if name is None else _text(name) for name in stream]
            self._streams[stream] = len(self._streams) + 1
            self.connection.execute(_ADD_SUBJECT, texts[:1])
            self.connection.execute("INSERT INTO streams VALUES (?, ?, ?, ?, ?)", (self._streams[stream], *texts))
        return self._streams[stream]

    def _layout(self, layout: Layout) -> int:
        if layout not in self._numbers:
            number = len(self._layouts) + 1
            entries = [(number, i, *entry) for i, entry in enumerate(layout)]
            self.connection.executemany("INSERT INTO layouts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entries)
            self._layouts[number] = layout
            self._numbers[layout] = number
        return self._numbers[layout]

    def _tally(self, where: tuple[int, int], rows: int, size: int) -> None:
        count, total = self._tallies.get(where, (0, 0))
        self._tallies[where] = (count + rows, total + size)

    def roll_up(self) -> bool:
        """Merge the oldest rows of a level that holds too many; whether there was one."""
        where = self._crowded()
        if where is None:
            return False
        query = f"{SELECT_ROWS} WHERE stream = ? AND level = ? ORDER BY step, rowid LIMIT ?"
        rows = Rows.of(self.connection.execute(query, (*where, _PIECE)).fetchall())
        above = (where[0], where[1] + 1)
        with self._transaction():
            merged = merge(rows, self._layouts)
            added = [(*above, first, last, self._layout(layout), packed) for first, last, layout, packed in merged]
            self.connection.executemany("DELETE FROM rows WHERE rowid = ?", [(rowid,) for rowid in rows.rowid])
            self.connection.executemany(_ADD_ROW, added)
            self._tally(where, -len(rows.rowid), -sum(map(len, rows.readings)))
            self._tally(above, len(merged), sum(len(packed) for *_, packed in merged))
        return True

    def _crowded(self) -> tuple[int, int] | None:
        """(stream, level) of which a piece is to be merged."""
        for where, (count, _) in self._tallies.items():
            if count >= self._kept + _PIECE:
                return where
        if self._bytes_used() <= self._largest:
            return None
        mergeable = [where for where, (count, _) in self._tallies.items() if count >= 2 * _PIECE]
        return max(mergeable, key=lambda where: self._tallies[where][1], default=None)

    def _bytes_used(self) -> int:
        pragmas = ("page_count", "freelist_count", "page_size")
        count, free, size = (int(self.connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in pragmas)
        return (count - free) * size

    def to_memory(self) -> _Store | None:
        """A copy in memory, to go on with when the disk fails; None when it is too large for that."""
        if self._bytes_used() > _LARGEST_IN_MEMORY:
            return None
        memory = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.backup(memory)
        return _Store(memory, database=None, kept=self._kept, largest=min(self._largest, _LARGEST_IN_MEMORY))

    def close(self) -> None:
        """Close the connection, and leave one plain file if nobody is reading it just now."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("PRAGMA busy_timeout = 100")
            self.connection.execute("PRAGMA journal_mode = DELETE")
        self.connection.close()


def _new_id(meta: Mapping[str, Any]) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(str(meta.get("script") or "run")).stem).strip("-.")[:40] or "run"
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{stem}-{os.urandom(2).hex()}"


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _owned(values: Any) -> Any:
    """A float, a tuple or a floating-point array that nobody else holds. Raises TypeError or ValueError."""
    if isinstance(values, (float, int)):
        return float(values)
    if isinstance(values, (list, tuple)):
        return tuple(values)
    array = np.array(values).ravel()
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _length(values: float | Sequence[Any] | NDArray[Any]) -> int:
    return 1 if isinstance(values, float) else len(values)


def _stacked(values: Sequence[Any], length: int) -> NDArray[Any]:
    """[rows, length]; float32 if every row is."""
    if all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in values):
        return np.stack(values)
    return np.array(values, dtype=np.float64).reshape(len(values), length)


def _facts(subject: str, entry: Layer | Parameter) -> dict[str, Any]:
    return {"subject": _text(subject), **{f.name: _plain(getattr(entry, f.name)) for f in fields(entry)}}


def _plain(value: Any) -> Any:
    """What SQLite can hold."""
    if isinstance(value, (tuple, list)):
        return json.dumps([int(v) for v in value])
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (int, float)) else _text(str(value))


def _event(subject: str, event: Event) -> tuple[Any, ...]:
    layer = None if event.layer is None else _text(event.layer)
    return (_text(subject), int(event.step), _text(event.kind), layer, _json(dict(event.data)))


def _text(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        return json.dumps(repr(value))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
