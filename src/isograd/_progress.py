"""The status line of a run on a terminal: step, loss, gradient norm, speed, overhead; gone when the script speaks.

It shows and never measures. The script's own output passes through unchanged: the line is erased before any of it,
and drawn again only when the cursor stands at the beginning of a line.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

_INTERVAL = 0.25  # seconds between two drawings: 4 a second can be read and cost nothing
_ERASE = "\r\x1b[2K"
_ERASE_REST = "\x1b[K"


class Progress:
    """One line on stderr, redrawn at most 4 times a second, and only where stderr is a terminal.

    `total`: the number of steps after which the run will be ended, None when only the script knows. Between `start`
    and `stop`, `sys.stdout` and `sys.stderr` are stand-ins that pass everything on. Nothing here raises: when the
    terminal goes away, the line does.
    """

    def __init__(self, *, total: int | None = None) -> None:
        self._total = total
        self._terminal: Any = None  # the real stderr while the line is in use
        self._stand_ins: dict[str, _StandIn] = {}
        # Signal handlers run inside the thread that may hold the lock, hence reentrant.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._drawn = False
        self._at_line_start = True
        self._last_time = 0.0
        self._last_step: int | None = None
        self._speed = 0.0

    def start(self) -> None:
        """Begin to show the line; does nothing where stderr is no terminal that understands erasing."""
        if self._terminal is not None or not _is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
            return
        self._terminal, self._pid = sys.stderr, os.getpid()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _is_terminal(stream):
                self._stand_ins[name] = _StandIn(stream, self)
                setattr(sys, name, self._stand_ins[name])

    def stop(self) -> None:
        """Erase the line and give `sys.stdout` and `sys.stderr` back, unless the script has replaced them itself."""
        self.erase()
        for name, stand_in in self._stand_ins.items():
            if getattr(sys, name) is stand_in:
                setattr(sys, name, stand_in.isograd_stream)
        self._stand_ins, self._terminal = {}, None

    def update(
        self,
        step: int,
        loss: float | None = None,
        grad_norm: float | None = None,
        overhead: float | None = None,
        *,
        deep: int | None = None,
    ) -> None:
        """Show the state after `step`; `overhead` is a fraction, `deep` the step of the last deep reading."""
        now = time.monotonic()
        if self._terminal is None or now - self._last_time < _INTERVAL or os.getpid() != self._pid:
            return
        if self._last_step is not None and step > self._last_step:
            self._speed = (step - self._last_step) / (now - self._last_time)
        self._last_time, self._last_step = now, step
        self._draw(self._line(step, loss, grad_norm, overhead, deep))

    def erase(self) -> None:
        """Take the line off the terminal, before something else is written there."""
        if self._drawn and os.getpid() == self._pid:
            with self._lock:
                self._drawn = False
                self._write(_ERASE)

    def pass_on(self, stream: Any, text: Any) -> Any:
        """Write the script's `text` to its own `stream`, with the line out of the way, and note where it ends."""
        if os.getpid() != self._pid:
            return _write_from_child(stream, text)
        if self._terminal is None:
            return stream.write(text)
        with self._lock:
            self.erase()
            written = stream.write(text)
            self._at_line_start = _ends_line(text, otherwise=self._at_line_start)
        return written

    def _line(
        self, step: int, loss: float | None, grad_norm: float | None, overhead: float | None, deep: int | None
    ) -> str:
        parts = [f"step {step}" if self._total is None else f"step {step}/{self._total}"]
        parts += [f"loss {loss:.4g}"] if loss is not None else []
        parts += [f"grad norm {grad_norm:.3g}"] if grad_norm is not None else []
        parts += [f"{self._speed:.3g} steps/s"] if self._speed else []
        parts += [f"overhead {100 * overhead:.1f} %"] if overhead is not None else []
        parts += [f"deep tier at {deep}"] if deep is not None else []
        return "isograd  " + "  ".join(parts)

    def _draw(self, line: str) -> None:
        with self._lock:
            if self._at_line_start:
                # The cursor goes back to the beginning: what a subprocess or C code prints past us then starts there.
                self._write(f"{_ERASE}{self._fitted(line)}\r")
                self._drawn = True

    def _fitted(self, line: str) -> str:
        try:
            columns = os.get_terminal_size(self._terminal.fileno()).columns
        except (OSError, ValueError):
            columns = 80
        # A line as wide as the terminal would wrap, and only its second half could be erased.
        return line[: max(1, (columns or 80) - 1)]

    def _write(self, text: str) -> None:
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except (OSError, ValueError, AttributeError):
            # Closed, or a terminal that hung up: training goes on without the line.
            self._terminal = None


class _StandIn:
    """Passes every call on to the stream it stands for; erases the status line before anything is written."""

    def __init__(self, stream: Any, progress: Progress) -> None:
        self.isograd_stream = stream
        self._progress = progress

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # So that isinstance(sys.stdout, io.TextIOWrapper) stays true.
        return type(self.isograd_stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.isograd_stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.isograd_stream)

    def __enter__(self) -> Any:
        return self.isograd_stream.__enter__()

    def __exit__(self, *exception: object) -> Any:
        return self.isograd_stream.__exit__(*exception)

    @property
    def buffer(self) -> Any:
        return _StandIn(self.isograd_stream.buffer, self._progress)

    def write(self, text: Any) -> Any:
        return self._progress.pass_on(self.isograd_stream, text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        # `input()` flushes before it prints its prompt past this object.
        self._progress.erase()
        self.isograd_stream.flush()


def _write_from_child(stream: Any, text: Any) -> Any:
    """Write from a forked process, which shares the terminal, but not the lock: nobody there would ever release it.

    Where the parent's line stands, the cursor is at its beginning and all of it is erased; behind anything else
    that was printed there is nothing to erase.
    """
    if text and _is_terminal(stream):
        stream.write(_ERASE_REST if isinstance(text, str) else _ERASE_REST.encode())
    return stream.write(text)


def _ends_line(text: Any, *, otherwise: bool) -> bool:
    """Whether text, or bytes in any buffer, ends a line; `otherwise` when it is empty."""
    if isinstance(text, str):
        return text.endswith("\n") if text else otherwise
    view = memoryview(text)
    return bytes(view.cast("B")[-1:]) == b"\n" if view.nbytes else otherwise


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
