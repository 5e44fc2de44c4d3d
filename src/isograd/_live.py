"""Following run files while others write them: the newest readings as they come, and the page's data now and then.

The training comes first. A run is looked at only while somebody watches its page; a look asks for the files' sizes and
times and, where they changed, for the rows that are new. What takes longer (all readings, the diagnosis) happens on one
thread, a twenty-first of the time at most and far less where it has to share a core, and is kept for as long as the
file stays as it is. Nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import queue
import sqlite3
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from isograd._diagnose import Diagnosis
from isograd._errors import IsogradError, RunNotFound, RunUnreadable
from isograd._fix_file import read_fix
from isograd._layout import Layout, Rows, decode, joined
from isograd._page_data import LINES, MOST, page_data
from isograd._recorded import diagnose_run
from isograd._rule import Options
from isograd._runs import (
    SELECT_ROWS,
    Envelope,
    Run,
    RunSummary,
    _opened,
    _snapshot,
    _state,
    _summary,
    layouts_of,
    read_all,
)
from isograd._statistics import STATISTICS

LOOK = 1.0
"""Seconds between looks at a run that is watched: with its writer's half second, news comes within 1.5 of a step."""

HEARTBEAT = 15.0
"""Seconds without news after which a stream says that it lives."""

_DUTY = 20  # seconds of rest for each second that computing took, on a core that was free
_SHARED = 600  # seconds of rest for each second of a core that something else wanted too
_HELD_UP = 1.5  # times its own time, from which on computing has waited for a core
_REST = 2.0  # seconds of rest at least: a browser on the same machine draws anew for each data set
_NEWEST = 1000  # rows read in one look; what is older comes with the next data set
_PATIENCE = 2.0  # seconds that a page which could have old data waits for new
_POINTS = 200  # readings of a statistic in one look; of more, evenly spaced ones
_LOOKS = 240  # looks kept for a page that joins late or reads slowly
_KEPT = 8  # runs whose data is kept
_RACY = 50_000_000  # ns: a file changed so recently may change once more within the clock's tick

_OVER = ("finished", "interrupted", "failed", "stopped")  # what nobody can slow any more

_FILES = ("run.db", "run.db-wal", "fix.json")

FileState = tuple[tuple[int, int, int], ...]
Lines = dict[str, dict[str, list[Any]]]  # statistic -> {"steps", "values"}
Answer = TypeVar("Answer")


def file_state(folder: Path) -> FileState | None:
    """What differs when anything was written to the run in `folder`; None when there is no run (any more)."""
    first, *others = (_stamp(folder / name) for name in _FILES)
    return None if first is None else (first, *(stamp or (0, 0, 0) for stamp in others))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# ---- the list -----------------------------------------------------------------------------------------------------


class Runs:
    """The runs in a folder, as it stands now. Links, which may lead out of it, are none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[FileState | None, RunSummary]] = {}

    def folder(self, name: str) -> Path:
        """The folder of the run with exactly this id. Raises RunNotFound.

        The id is compared with those that there are, and never becomes part of a path.
        """
        for known in self._names():
            if known == name and _is_run(self.root / known):
                return self.root / known
        raise RunNotFound("there is no such run, or it was deleted")

    def summaries(self) -> list[RunSummary]:
        """One line about each, oldest first. A run that has ended is read again only when its file changes."""
        known = {}
        for folder in filter(_is_run, (self.root / name for name in self._names())):
            state = file_state(folder)
            before = self._known.get(folder.name)
            if before is None or before[0] != state or before[1].state == "running":
                before = (state, _summary(folder))
            known[folder.name] = before
        self._known = known
        return sorted((summary for _, summary in known.values()), key=lambda run: (run.started, run.id))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.root)  # noqa: PTH208 - names are compared, thousands of them, at each request
        except OSError:
            return []


def _is_run(folder: Path) -> bool:
    try:
        folder.name.encode()  # what is no text has no address
        return not folder.is_symlink() and stat.S_ISREG((folder / "run.db").lstat().st_mode)
    except (OSError, ValueError):
        return False


# ---- the newest readings ------------------------------------------------------------------------------------------


class News(NamedTuple):
    """What one look found. `lines`: subject -> statistic -> steps and values that are new."""

    state: str
    steps: int
    file: FileState | None
    lines: dict[str, Lines]


class Tail:
    """The newest readings of one run's step statistics, read row by row as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forget()

    def _forget(self) -> None:
        self._file: FileState | None = None
        self._is_settled = False
        self._rowid = 0
        self._steps = 0
        self._meta: dict[str, Any] | None = None
        self._layouts: dict[int, Layout] = {}

    def look(self) -> News:
        """What came since the last look. Of a file that cannot be read (yet), nothing; of a deleted one neither."""
        file = file_state(self._folder)
        if file is None:
            self._forget()
            return News("deleted", 0, None, {})
        lines: dict[str, Lines] = {}
        if file != self._file or not self._is_settled:
            if self._file is not None and file[0][0] != self._file[0][0]:  # another file stands in its place
                self._forget()
            self._is_settled = time.time_ns() - max(entry[2] for entry in file) > _RACY
            self._file = file
            lines = self._read()
        state = "unreadable" if self._meta is None else _state(self._meta)
        return News(state, self._steps, file, lines)

    def _read(self) -> dict[str, Lines]:
        try:
            # A connection for each look: one that stays open would keep the journal from being cleared away.
            with _opened(self._folder / "run.db") as connection, _snapshot(connection):
                self._meta = {key: json.loads(text) for key, text in connection.execute("SELECT key, value FROM meta")}
                return self._new(connection)
        except Exception:  # a damaged file's numbers can be anything
            return {}

    def _new(self, connection: sqlite3.Connection) -> dict[str, Lines]:
        query = "SELECT stream, subject FROM streams WHERE tier = 'cheap' AND statistic IS NULL"
        subjects: dict[int, str] = dict(connection.execute(query).fetchall())
        marks = ", ".join("?" * len(subjects))
        query = f"{SELECT_ROWS} WHERE rowid > ? AND level = 0 AND stream IN ({marks}) ORDER BY rowid DESC LIMIT ?"
        found = [r for r in connection.execute(query, (self._rowid, *subjects, _NEWEST)) if None not in r][::-1]
        if not found:
            return {}
        if not {row[4] for row in found} <= set(self._layouts):
            self._layouts = layouts_of(connection.execute("SELECT * FROM layouts ORDER BY rowid"))
        rows = Rows.of(found)
        self._rowid = max(rows.rowid)
        self._steps = max(self._steps, 1 + int(rows.step.max()))
        return _lines(rows, self._layouts, subjects)


def _lines(rows: Rows, layouts: Mapping[int, Layout], subjects: Mapping[int, str]) -> dict[str, Lines]:
    lines: dict[str, Lines] = {}
    for (stream, statistic, _), pieces in decode(rows, layouts).items():
        if statistic not in LINES:
            continue
        width = max(values.shape[1] for _, values in pieces)
        indices, values = joined(pieces, width)
        order = indices.argsort(kind="stable")
        order = order[_spaced(len(order))]
        steps = rows.step[indices[order]].tolist()
        for column in range(width):
            name = f"{statistic}[{column}]" if STATISTICS[statistic].axis == "group" else statistic
            readings = [value if math.isfinite(value) else None for value in values[order, column].tolist()]
            lines.setdefault(subjects[stream], {})[name] = {"steps": steps, "values": readings}
    return lines


def _spaced(count: int) -> list[int]:
    """Indices of at most `_POINTS` of `count` entries, the last one among them."""
    if count <= _POINTS:
        return list(range(count))
    return [(i + 1) * count // _POINTS - 1 for i in range(_POINTS)]


# ---- threads ------------------------------------------------------------------------------------------------------


class Worker:
    """A thread that does one thing after another. It is a daemon: at the end of the program nobody waits for it."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def do(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns, or raises, on the thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(answer: Answer | None, error: BaseException | None) -> None:
            if future.done():  # nobody waits for it any more
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer)  # type: ignore[arg-type]

        def task() -> None:
            try:
                outcome: tuple[Answer | None, BaseException | None] = (work(), None)
            except Exception as error:
                outcome = (None, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, *outcome)

        self._tasks.put(task)
        return await future

    def _work(self) -> None:
        while True:
            self._tasks.get()()


# ---- data ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Data:
    """A run's data set as it is sent; `error` in its place when the run could not be read."""

    body: bytes = b""
    etag: str = ""
    error: IsogradError | None = None


@dataclass(kw_only=True)
class _Kept:
    """A run's data set, and what it was computed from.

    `file`, `state`: how the run stood. `rested`: the time from which on it may be computed anew. `task`: does that now.
    """

    data: Data | None = None
    file: FileState | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    rested: float = 0.0
    task: asyncio.Task[None] | None = None

    def is_due(self, file: FileState | None, state: str) -> bool:
        """Whether the data of a run that stands like this is out of date, and may be computed anew."""
        if self.data is None:
            return True
        is_same = file == self.file and (not self.meta or _state(self.meta) == self.state)
        return not is_same and (time.monotonic() >= self.rested or state in _OVER)

    def is_busy(self) -> bool:
        """Whether it is being computed."""
        return self.task is not None and not self.task.done()


class Live:
    """Everything that a server of the runs in `root` knows; made and used on one event loop."""

    def __init__(self, root: Path, options: Options) -> None:
        self.runs = Runs(root)
        self.is_closed = False
        self._options = options
        self._reader = Worker("isograd-look")
        self._computer = Worker("isograd-compute")
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._followers: dict[str, Follower] = {}
        self._opened: _Opened | None = None  # belongs to the computing thread

    def close(self) -> None:
        """End all streams."""
        self.is_closed = True
        for follower in self._followers.values():
            follower.wake()

    async def read(self, work: Callable[[], Answer]) -> Answer:
        """What `work`, a short look at files, returns on the thread for such."""
        return await self._reader.do(work)

    async def folder(self, run: str) -> Path:
        """As `Runs.folder`."""
        return await self.read(lambda: self.runs.folder(run))

    async def data(self, run: str) -> Data:
        """The run's data set, as new as the file or as the share of time allows.

        Raises RunNotFound, and RunUnreadable for what is found and cannot be shown.
        """
        folder = await self.folder(run)
        file, state = await self.read(lambda: (file_state(folder), _summary(folder).state))
        kept = self.refresh(run, folder, file, state)
        if kept.task is not None:
            # Waiting for it, unlike awaiting it, leaves it alone when the page that asked has gone.
            await asyncio.wait([kept.task], timeout=None if kept.data is None else _PATIENCE)
        if kept.data is None or kept.data.error is not None:
            raise RunUnreadable(str(kept.data.error if kept.data is not None else "the server is ending"))
        return kept.data

    def refresh(self, run: str, folder: Path, file: FileState | None, state: str) -> _Kept:
        """What is known of a run that stands like this; begins to compute it anew if that is due."""
        kept = self._kept.setdefault(run, _Kept())
        self._kept.move_to_end(run)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        if kept.is_due(file, state) and not kept.is_busy():
            kept.task = asyncio.create_task(self._compute(kept, folder))
        return kept

    def etag(self, run: str) -> str:
        """Of the data set that there is; empty when there is none."""
        kept = self._kept.get(run)
        return kept.data.etag if kept is not None and kept.data is not None else ""

    async def _compute(self, kept: _Kept, folder: Path) -> None:
        found, rest = await self._computer.do(lambda: _timed(lambda: self._computed(folder)))
        kept.data, kept.file, kept.meta, kept.state = found
        kept.rested = time.monotonic() + rest * max(1, len(self._followers))

    async def detail(self, run: str, *, first: int, last: int, columns: int) -> bytes:
        """The lines and maps of a range of steps, as JSON. Raises RunNotFound or RunUnreadable."""
        folder = await self.folder(run)
        return await self._computer.do(lambda: self._detail(folder, first, last, columns))

    @contextlib.asynccontextmanager
    async def follow(self, run: str) -> AsyncIterator[Follower]:
        """The follower of a run, which all its pages share and which ends with the last of them. Raises RunNotFound."""
        folder = await self.folder(run)
        follower = self._followers.get(run)
        if follower is None:
            follower = self._followers[run] = Follower(self, run, folder)
        follower.pages += 1
        try:
            yield follower
        finally:
            follower.pages -= 1
            if not follower.pages:
                follower.end()
                self._followers.pop(run, None)
            if not self._followers:
                self._opened = None  # a big run's memory

    # ---- on the computing thread ----------------------------------------------------------------------------------

    def _computed(self, folder: Path) -> tuple[Data, FileState | None, Mapping[str, Any], str]:
        file = file_state(folder)
        try:
            opened = self._open(folder)
            whole = page_data(opened.run, opened.diagnosis, envelopes=opened.envelopes, fix=read_fix(folder))
            now = {"generated": whole.pop("generated")}  # the only thing that differs each time
            etag = f'"{hashlib.sha256(_json(whole)).hexdigest()[:32]}"'
            data = Data(body=_json(now | whole), etag=etag)
        except IsogradError as error:
            return Data(error=error), file, {}, ""
        except Exception as error:  # a damaged file's numbers can be anything
            return Data(error=RunUnreadable(f"{folder.name} cannot be shown: {error!r}")), file, {}, ""
        return data, file, opened.run.meta, opened.state

    def _detail(self, folder: Path, first: int, last: int, columns: int) -> bytes:
        opened = self._opened
        if opened is None or opened.run.path != folder:
            opened = self._open(folder)
        which: dict[str, Any] = {"first": first, "last": last, "columns": columns}
        whole = page_data(opened.run, opened.diagnosis, envelopes=opened.envelopes, **which)
        parts = [{key: subject[key] for key in ("name", "lines", "maps")} for subject in whole["subjects"]]
        return _json({"schema": whole["schema"], "subjects": parts})

    def _open(self, folder: Path) -> _Opened:
        """The run as it stands, kept until another one is opened: pages ask for details of what they show."""
        self._opened = None  # two at once would take twice the memory
        run, envelopes = read_all(folder, most=MOST)
        state = run.state
        opened = self._opened = _Opened(run, diagnose_run(run, self._options), envelopes, state)
        return opened


def _timed(compute: Callable[[], Answer]) -> tuple[Answer, float]:
    """What `compute` returns, and for how many seconds to rest from it."""
    wall, own = time.monotonic(), time.thread_time()
    answer = compute()
    wall, own = time.monotonic() - wall, time.thread_time() - own
    # The threads of a training wait for each other: what is taken from one core is lost on all.
    return answer, max(_REST, _DUTY * wall, _SHARED * own if wall > _HELD_UP * own else 0.0)


class _Opened(NamedTuple):
    run: Run
    diagnosis: Diagnosis
    envelopes: Mapping[str, Mapping[str, Envelope]]
    state: str


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


# ---- following ----------------------------------------------------------------------------------------------------


class Follower:
    """Looks at one run for as long as a page shows it, and wakes the pages' streams when there is news.

    `state` and `etag` are as they are now; `since` gives readings. A stream keeps what it has told, and asks for the
    rest whenever `changed` is set: one that reads slowly is told less often, and nothing piles up for it.
    """

    def __init__(self, live: Live, run: str, folder: Path) -> None:
        self.pages = 0
        self.state = ""
        self.steps = 0
        self.etag = ""
        self.changed = asyncio.Event()
        self._live = live
        self._run = run
        self._folder = folder
        self._tail = Tail(folder)
        self._count = 0
        self._looks: deque[tuple[int, dict[str, Lines]]] = deque(maxlen=_LOOKS)
        self._looking = asyncio.create_task(self._look_until_ended())

    def end(self) -> None:
        """Stop looking."""
        self._looking.cancel()

    def wake(self) -> None:
        """Have all streams look at what there is."""
        self.changed.set()
        self.changed = asyncio.Event()

    def since(self, count: int) -> tuple[int, dict[str, Lines]]:
        """(a number to ask with next time, what came since): subject -> statistic -> steps and values."""
        joined_: dict[str, Lines] = {}
        for number, subjects in self._looks:
            for subject, lines in subjects.items() if number > count else ():
                of = joined_.setdefault(subject, {})
                for statistic, line in lines.items():
                    whole = of.setdefault(statistic, {"steps": [], "values": []})
                    whole["steps"] += line["steps"]
                    whole["values"] += line["values"]
        return self._count, joined_

    async def _look_until_ended(self) -> None:
        while True:
            news = await self._live.read(self._tail.look)
            if news.lines:
                self._count += 1
                self._looks.append((self._count, news.lines))
            etag = self._live.etag(self._run)
            if news.lines or (news.state, etag) != (self.state, self.etag):
                self.state, self.steps, self.etag = news.state, news.steps, etag
                self.wake()
            if news.file is not None:
                self._live.refresh(self._run, self._folder, news.file, news.state)
            await asyncio.sleep(LOOK)
