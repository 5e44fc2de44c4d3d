"""Progress of a search for a treatment on stderr: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StageProgress:
    """One bar per stage, drawn by rich; a context manager."""

    def __init__(self, file: TextIO) -> None:
        console = Console(file=file)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[tuple[str, int], TaskID] = {}
        self._stage = 0

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """So many runs of a stage are done; 0 begins it."""
        if not done:
            self._stage += 1
            self._tasks[stage, self._stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage, self._stage], completed=done)
