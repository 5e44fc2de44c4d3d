"""Writing to a terminal, a pipe or a file: the one place that decides between styled and plain."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

_ASCII = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "·": "|", "×": "x", "…": "...", "→": "->", "←": "<-", "≥": ">=", "≤": "<=", "≈": "~"}
    | {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "²": "^2",
        "σ": "sigma",
        "χ": "chi",
        "∂": "d",
        "√": "sqrt",
        "\u00a0": " ",
    }
)


def is_plain(console: Console, options: ConsoleOptions) -> bool:
    """Whether to keep to ASCII: no terminal, or one that cannot show more."""
    return not console.is_terminal or options.ascii_only


def show(renderable: RenderableType, file: TextIO) -> None:
    """Write `renderable` to `file` in one piece: styled on a terminal, plain elsewhere and with NO_COLOR or TERM=dumb.

    A character that the file's encoding lacks is written as an escape.
    """
    encoding = getattr(file, "encoding", None) or "utf-8"
    write(render(renderable, terminal=_is_styled(file), width=_width(file), encoding=encoding), file)


def write(text: str, file: TextIO) -> None:
    """Write `text` and flush. A reader that has gone away, as in `| head`, is not an error."""
    try:
        file.write(text)
        file.flush()
    except BrokenPipeError:
        # What is left in the buffer would raise again, with a traceback, when the interpreter closes the file.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


def render(renderable: RenderableType, *, terminal: bool = False, width: int = 80, encoding: str = "utf-8") -> str:
    """`renderable` as text of at most `width` columns, with colors only for a terminal."""
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")
    console = Console(
        file=buffer,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        width=width,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(renderable, overflow="fold")
    buffer.seek(0)
    # Padding to the full width would only be trailing blanks in a file.
    return "\n".join(line.rstrip(" ") for line in buffer.read().split("\n"))


def _is_styled(file: TextIO) -> bool:
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _width(file: TextIO) -> int:
    if not file.isatty():
        return 80
    try:
        return max(40, os.get_terminal_size(file.fileno()).columns)
    except (OSError, ValueError):
        return 80


def said(text: str, *, plain: bool) -> Text:
    """A sentence; in plain output the typographic characters that rules and docstrings use become ASCII."""
    return Text(text.translate(_ASCII) if plain else text)
