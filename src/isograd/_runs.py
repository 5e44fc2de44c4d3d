"""Reading runs back: from a run file to `History`, and from a folder to a list of runs. It writes nothing.

A run is a folder `<root>/<id>` with one SQLite file, `run.db`, that any SQLite tool can read, also while it is written
(`application_id` 0x69736F67, `user_version` is the number of the schema):

    meta        key, value                                  run-wide facts; the value is JSON
    subjects    subject                                     in order of first appearance
    layers      subject, ordinal, name, kind, type, role, position, units, fan_in, fan_out, shape (JSON), dtype
    parameters  subject, ordinal, name, layer, shape (JSON), dtype, trainable, optimized, group
    groups      subject, ordinal, facts                     parameter groups of the optimizers; JSON
    events      subject, step, kind, layer, data            what happened; `data` is JSON
    unmeasured  subject, statistic, why
    streams     stream, subject, tier, statistic, layer     a tier of a subject; with the last two, a layer's profile
    layouts     layout, field, statistic, fold, dtype, offset, length, constant
    rows        stream, level, first, step, layout, readings

`readings` holds arrays side by side, as `layouts` describes them (see `_layout.py`); entry i belongs to the layer,
parameter or group with ordinal i. JSON is Python's: it has NaN and Infinity.

Level 0 has one row per step. When there are too many, the oldest are merged ten to one into level 1, those in turn into
level 2, and so on; `first` and `step` bound the steps that a row covers. A merged row has one array per `fold` of a
statistic: minimum, median and maximum; of what is counted (`*_nonfinite`, `skipped`) minimum, maximum and total. NaN
(missing) takes no part. The median of an even number is the lower one; on higher levels it is the median of medians.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sqlite3
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from isograd._errors import RunNotFound, RunUnreadable
from isograd._history import Event, Floats, History, Integers, Layer, Parameter, Series
from isograd._layout import Field, Fold, Heap, Layout, Pieces, placed, shown_fold
from isograd._statistics import STATISTICS, Axis

ROOT = Path("isograd-runs")
"""Where runs are kept unless told otherwise."""

APPLICATION = 0x69736F67  # "isog"
SCHEMA = 1
"""Number of the schema; a reader understands this one and all before it."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE subjects (subject TEXT PRIMARY KEY);
CREATE TABLE layers (subject TEXT, ordinal INTEGER, name TEXT, kind TEXT, type TEXT, role TEXT, position REAL,
    units INTEGER, fan_in INTEGER, fan_out INTEGER, shape TEXT, dtype TEXT, PRIMARY KEY (subject, ordinal));
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

_ENDS = 24  # rows at both ends that are always read in full: what is told is most often what was first

SELECT_ROWS = "SELECT rowid, stream, first, step, layout, readings FROM rows"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it stands in the file.

    `histories`: one per subject, layers in order of first use. In a span of merged steps a series has one reading, at
    the span's last step: the median, or the largest value of a `*_nonfinite` count, or the sum of `skipped`.
    `damage`: what could not be read of a truncated file, in one sentence; empty when all is well. `thinned`: of what
    was read in layers and parameters, one row of so many is here; 1 is all.
    """

    path: Path
    id: str
    meta: dict[str, Any]
    histories: tuple[History, ...] = field(repr=False)
    damage: str = ""
    thinned: int = 1

    @property
    def state(self) -> str:
        """As in `RunSummary`."""
        return _state(self.meta)

    def _repr_html_(self) -> str:
        from isograd._notebook import run_card  # how it shows itself is known above

        return run_card(self)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line about a run.

    `state`: "running", "finished", "interrupted", "failed"; "stopped" when it says that it runs and its process is
    gone; "unreadable". `started`: ISO 8601, UTC. `steps`: one more than the last step recorded.
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


class Stream(NamedTuple):
    """Rows that belong together: one tier of a subject, or the profile of one statistic in one layer."""

    subject: str
    tier: str
    statistic: str | None = None
    layer: str | None = None


def read_run(path: Path) -> Run:
    """Read a run from its folder or its `run.db`, also while it is written.

    Raises RunNotFound where there is none, RunUnreadable where it is not SQLite, of a newer schema, or damaged so that
    no step can be rescued.
    """
    database = _database(Path(path))
    with _opened(database) as connection:
        return read_connection(connection, database.parent)


def read_connection(connection: sqlite3.Connection, folder: Path) -> Run:
    """The run that an open connection leads to, at one moment in time."""
    with _snapshot(connection):
        return _run_of(_Tables(connection), folder)


def _run_of(tables: _Tables, folder: Path) -> Run:
    histories = tuple(tables.history(subject, folder.name) for subject in tables.subjects())
    damage = f"{folder / 'run.db'} is damaged ({tables.damage[0]})" if tables.damage else ""
    if damage and not any(history.series for history in histories):
        raise RunUnreadable(f"{damage}, and no step of it can be read")
    return Run(
        path=folder, id=folder.name, meta=tables.meta, histories=histories, damage=damage, thinned=tables.thinned
    )


def read_envelopes(path: Path) -> dict[str, dict[str, Envelope]]:
    """subject -> statistic -> what is known of merged steps; empty for a run of few steps. Raises as `read_run`."""
    with _opened(_database(Path(path))) as connection, _snapshot(connection):
        tables = _Tables(connection)
        return {subject: tables.envelopes(subject) for subject in tables.subjects()}


def read_all(path: Path, *, most: int | None = None) -> tuple[Run, dict[str, dict[str, Envelope]]]:
    """`read_run` of one moment, and `read_envelopes` of what is one number per step or group, in one pass.

    `most`: of a file of more bytes, whatever is one number per layer or parameter is read in one row of several only,
    so that about so many bytes are left: early and late rows always, and the first that count NaN or Inf.
    """
    database = _database(Path(path))
    with _opened(database) as connection, _snapshot(connection):
        tables = _Tables(connection, most=most)
        return _run_of(tables, database.parent), {
            subject: tables.envelopes(subject, {"step", "group"}) for subject in tables.subjects()
        }


def list_runs(root: Path = ROOT) -> list[RunSummary]:
    """All runs in `root`, oldest first; empty when there is no such folder."""
    return sorted((_summary(folder) for folder in _folders(root)), key=lambda run: (run.started, run.id))


def find_run(name: str | None, root: Path = ROOT) -> Path:
    """The folder of a run given by its path, its id or the unique beginning of one; None is the latest.

    Raises RunNotFound.
    """
    if name is None:
        return _latest(root)
    path = Path(name)
    if os.path.isfile(path / "run.db"):  # noqa: PTH113 - unlike Path.is_file, False for names that no file can have
        return path
    if os.path.isfile(path):  # noqa: PTH113 - likewise
        return path.parent if path.name == "run.db" else path
    matches = [folder for folder in _folders(root) if folder.name.startswith(name)]
    matches = [folder for folder in matches if folder.name == name] or matches
    if not matches:
        raise RunNotFound(f"no run in {root} is called {name!r}: `isograd ls` lists them")
    if len(matches) > 1:
        ids = ", ".join(folder.name for folder in matches)
        raise RunNotFound(f"{name!r} is the beginning of several runs, give more of it: {ids}")
    return matches[0]


def _latest(root: Path) -> Path:
    runs = list_runs(root)
    if not runs:
        raise RunNotFound(f"no run has been recorded in {root}: `isograd run SCRIPT` records one")
    return runs[-1].path


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in Path(root).glob("*") if (path / "run.db").is_file())


# ---- opening ------------------------------------------------------------------------------------------------------


def _database(path: Path) -> Path:
    if path.is_dir():
        if not (path / "run.db").is_file():
            raise RunNotFound(f"{path} is not a run folder: it has no run.db")
        return path / "run.db"
    if not path.is_file():
        raise RunNotFound(f"{path} does not exist")
    return path


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
        # A damaged page has no checksum: its numbers can be anything, and so can the names of tables and columns.
        except LookupError as error:
            raise RunUnreadable(f"{database} cannot be read: it has no {error}") from error
        except (sqlite3.Error, OSError, ValueError, TypeError, OverflowError) as error:
            raise RunUnreadable(f"{database} cannot be read: {error}") from error


def _connected(database: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    if database.stat().st_size == 0:
        raise RunUnreadable(f"{database} is empty: the program that made it ended before it could write")
    connection = _connection(database, "mode=ro", stack)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise
        # A folder in which SQLite cannot make its shared-memory index: a read-only copy, or somebody else's.
        connection = _connection(_settled(database, stack), "immutable=1", stack)
    except sqlite3.DatabaseError:
        # A file shorter than its own header says. This switch, meant for repairs, makes SQLite read what is there.
        connection.execute("PRAGMA writable_schema = ON")
    return connection


def _connection(database: Path, option: str, stack: contextlib.ExitStack) -> sqlite3.Connection:
    uri = f"{database.resolve().as_uri()}?{option}"
    return stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)))


def _settled(database: Path, stack: contextlib.ExitStack) -> Path:
    """`database` itself or, when part of it is still in its journal, a copy into which that part was taken."""
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
    if application != APPLICATION:
        raise RunUnreadable(f"{database} was not written by isograd")
    if schema > SCHEMA:
        raise RunUnreadable(f"{database} was written by a newer isograd (schema {schema}, this one reads {SCHEMA})")


@contextlib.contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


# ---- tables -> History --------------------------------------------------------------------------------------------


class _Tables:
    """What the tables of one file hold, as far as they can be read; `damage` has SQLite's words for what cannot."""

    def __init__(self, connection: sqlite3.Connection, *, most: int | None = None) -> None:
        self._connection = connection
        self._described: dict[tuple[str, str], list[Any]] = {}
        self.damage: list[str] = []
        self.meta = {row["key"]: _parsed(row["value"]) for row in self._dicts("meta")}
        self._streams = {
            row["stream"]: Stream(row["subject"], row["tier"], row["statistic"], row["layer"])
            for row in self._dicts("streams")
        }
        layouts = layouts_of(self._tuples("SELECT * FROM layouts ORDER BY rowid"))
        heap, self.thinned = Heap(layouts), self._thinning(most)
        left_out = self._left_out()
        for row in self._tuples(f"{SELECT_ROWS} ORDER BY rowid"):
            # A page cut in the middle ends in zeros, which SQLite takes for rows of NULLs.
            if None not in row:
                heap.add(*row, whole=row[0] not in left_out)
        self._rows, self._found = heap.rows(), heap.found()

    def _thinning(self, most: int | None) -> int:
        """One row of how many leaves about `most` bytes."""
        count, size = (int(self._connection.execute(f"PRAGMA {p}").fetchone()[0]) for p in ("page_count", "page_size"))
        return 1 if most is None else max(1, -(-count * size // most))

    def _left_out(self) -> set[int]:
        """Row ids of the rows that are not read in full: of each stream and layout all but one in `thinned`."""
        alike: dict[tuple[int, int], list[int]] = {}
        query = "SELECT stream, layout, rowid FROM rows ORDER BY stream, layout, step, rowid"
        for stream, layout, rowid in self._connection.execute(query) if self.thinned > 1 else ():
            alike.setdefault((stream, layout), []).append(rowid)
        inner = (rows[_ENDS:-_ENDS] for rows in alike.values())
        return {rowid for rows in inner for i, rowid in enumerate(rows) if i % self.thinned}

    def _tuples(self, query: str) -> Iterator[tuple[Any, ...]]:
        """All rows of a query that ends with its order; of a damaged table those before the damage and behind it."""
        behind: list[tuple[Any, ...]] = []
        try:
            yield from self._connection.execute(query)
        except sqlite3.DatabaseError as error:
            self.damage.append(str(error))
            with contextlib.suppress(sqlite3.DatabaseError):
                behind.extend(self._connection.execute(f"{query} DESC"))
        yield from reversed(behind)

    def _dicts(self, table: str, subject: str | None = None) -> list[dict[str, Any]]:
        query = f"SELECT * FROM {table} ORDER BY rowid"  # noqa: S608 - `table` is always one of ours
        names = [column[0] for column in self._connection.execute(f"{query} LIMIT 0").description]
        rows = [dict(zip(names, row, strict=True)) for row in self._tuples(query)]
        return rows if subject is None else [row for row in rows if row["subject"] == subject]

    def subjects(self) -> list[str]:
        named = [row["subject"] for row in self._dicts("subjects")]
        return list(dict.fromkeys([*named, *(stream.subject for stream in self._streams.values())]))

    def _layers(self, subject: str) -> list[Layer]:
        return self._entries("layers", Layer, subject)

    def _parameters(self, subject: str) -> list[Parameter]:
        return self._entries("parameters", Parameter, subject)

    def _entries(self, table: str, kind: type[Any], subject: str) -> list[Any]:
        if (table, subject) not in self._described:
            self._described[table, subject] = [_entry(kind, row) for row in self._dicts(table, subject)]
        return self._described[table, subject]

    def history(self, subject: str, run: str) -> History:
        layers = self._layers(subject)
        return History(
            subject=subject,
            run=run,
            layers=tuple(layers[i] for i in _order(layers)),
            parameters=tuple(self._parameters(subject)),
            groups=tuple(_mapping(row["facts"]) for row in self._dicts("groups", subject)),
            series=self._series(subject),
            profiles=self._profiles(subject),
            events=tuple(
                Event(step=row["step"], kind=row["kind"], layer=row["layer"], data=_mapping(row["data"]))
                for row in self._dicts("events", subject)
            ),
            unmeasured={row["statistic"]: row["why"] for row in self._dicts("unmeasured", subject)},
            meta=self.meta,
        )

    def _pieces(self, subject: str) -> dict[str, dict[Fold, Pieces]]:
        """statistic -> fold -> pieces, of all tiers; statistics that this version does not know are left out."""
        pieces: dict[str, dict[Fold, Pieces]] = {}
        for (number, statistic, fold), found in self._found.items():
            stream = self._streams.get(number)
            if stream is not None and stream[:1] == (subject,) and not stream.statistic and statistic in STATISTICS:
                pieces.setdefault(statistic, {}).setdefault(fold, []).extend(found)
        return pieces

    def _series(self, subject: str) -> dict[str, Series]:
        columns = self._columns(subject)
        series = {}
        for statistic, folds in self._pieces(subject).items():
            shown = [*folds.get("value", ()), *folds.get(shown_fold(statistic), ())]
            indices, values = self._readings(statistic, shown, columns)
            series[statistic] = Series(self._rows.step[indices], values)
        return series

    def _profiles(self, subject: str) -> dict[str, dict[str, Series]]:
        profiles: dict[str, dict[str, Series]] = {}
        for number, (owner, _, statistic, layer) in self._streams.items():
            if owner != subject or statistic not in STATISTICS or layer is None:
                continue
            found = (self._found.get((number, statistic, fold), ()) for fold in ("value", shown_fold(statistic)))
            indices, values = self._readings(statistic, [piece for pieces in found for piece in pieces], {})
            profiles.setdefault(statistic, {})[layer] = Series(self._rows.step[indices], values)
        return profiles

    def envelopes(self, subject: str, axes: Container[str] = get_args(Axis)) -> dict[str, Envelope]:
        columns = self._columns(subject)
        envelopes = {}
        for statistic, folds in self._pieces(subject).items():
            if STATISTICS[statistic].axis not in axes:
                continue
            kept = {fold: folds[fold] for fold in ("minimum", "maximum", "total") if fold in folds}
            if kept:
                read = {fold: self._readings(statistic, pieces, columns) for fold, pieces in kept.items()}
                indices = read["minimum"][0]
                bounds = {fold: values for fold, (_, values) in read.items()}
                first, last = self._rows.first[indices], self._rows.step[indices]
                envelopes[statistic] = Envelope(first=first, last=last, **bounds)
        return envelopes

    def _columns(self, subject: str) -> dict[str, list[int]]:
        """axis -> ordinals in the order in which a series has them."""
        num_parameters = len(self._parameters(subject))
        return {"layer": _order(self._layers(subject)), "parameter": list(range(num_parameters)), "step": [0]}

    def _readings(
        self, statistic: str, pieces: Pieces, columns: Mapping[str, Sequence[int]]
    ) -> tuple[Integers, Floats]:
        """Indices of the rows in order of their steps, the last one only where a step was written twice; readings."""
        axis = STATISTICS[statistic].axis
        widest = max((values.shape[1] for _, values in pieces), default=0)
        order = columns.get(axis, range(widest))
        indices = np.concatenate([found for found, _ in pieces]) if pieces else np.empty(0, np.int64)
        steps = self._rows.step[indices]
        sort = np.lexsort((indices, steps))
        chosen = sort[np.diff(steps[sort], append=np.iinfo(np.int64).max) != 0] if len(sort) else sort
        places = np.full(len(indices), -1)
        places[chosen] = np.arange(len(chosen))
        values = placed(pieces, len(order), places, len(chosen))
        if list(order) != list(range(len(order))):
            values = values[:, order]
        return indices[chosen], values[:, 0] if axis == "step" else values


def layouts_of(rows: Iterable[tuple[Any, ...]]) -> dict[int, Layout]:
    """layout -> its fields, from rows of the table `layouts` in order."""
    layouts: dict[int, Layout] = {}
    for layout, _, statistic, fold, dtype, offset, length, constant in rows:
        entry = Field(statistic, fold, dtype, offset, length, bool(constant))
        layouts[layout] = (*layouts.get(layout, ()), entry)
    return layouts


def _order(layers: Sequence[Layer]) -> list[int]:
    return sorted(range(len(layers)), key=lambda i: layers[i].position)


def _entry(kind: type[Any], row: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    facts: dict[str, Any] = {name: value for name, value in row.items() if name in known and value is not None}
    facts["shape"] = tuple(json.loads(facts["shape"]))
    flags: dict[str, Any] = {name: bool(facts[name]) for name in ("trainable", "optimized") if name in facts}
    return kind(**{**facts, **flags})


def _parsed(text: str) -> Any:
    return json.loads(text)


def _mapping(text: str) -> dict[str, Any]:
    value = _parsed(text)
    return value if isinstance(value, dict) else {"value": value}


# ---- one line about a run -----------------------------------------------------------------------------------------


def _summary(folder: Path) -> RunSummary:
    try:
        with _opened(folder / "run.db") as connection:
            meta = {key: _parsed(value) for key, value in connection.execute("SELECT key, value FROM meta")}
            subjects = tuple(row[0] for row in connection.execute("SELECT subject FROM subjects ORDER BY rowid"))
            # The index answers each inner query with one look.
            last = connection.execute(
                "SELECT max((SELECT max(step) FROM rows WHERE stream = s.stream AND level = 0)) FROM streams AS s"
            ).fetchone()[0]
    except (RunUnreadable, RunNotFound):
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
    if not isinstance(pid, int) or pid <= 0 or os.name != "posix":  # elsewhere, signal 0 is no question but an end
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return meta.get("pid_started") in {None, process_start(pid)}


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (Linux).

    None where that is not known, and for a process that has ended and waits to be reaped.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if stat[0] == "Z" else int(stat[19])
    except (OSError, ValueError, IndexError):
        return None
