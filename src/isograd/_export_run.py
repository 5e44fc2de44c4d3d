"""Write a run in another format: choose it, refuse what must not be overwritten, and leave all of it or nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isograd._errors import CannotExport
from isograd._export import Format, is_empty
from isograd._runs import Run
from isograd._settings import nearest
from isograd.exports import FORMATS

_LABEL = "isograd-export.json"
"""What marks a folder as an export of ours, which may be replaced."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the folder `path`, and `reading`, a command or a line of code that reads it."""

    path: Path
    reading: str


def export_run(run: Run, *, to: str, path: Path | None = None, force: bool = False) -> Exported:
    """Write all that `run` recorded to the folder `path`, `<id>-<format>` in the current one by default.

    `to`: a name of `FORMATS`. An earlier export is replaced only with `force`, anything else that exists never. Raises
    CannotExport, with nothing changed, for an unknown format, a package that is missing, a run without readings, a path
    that exists, and a disk that cannot take it.
    """
    form = _format(to)
    if is_empty(run):
        raise CannotExport(f"{run.id} holds no optimizer step: there is nothing to export.")
    place = Path(f"{run.id}-{to}" if path is None else path).absolute()
    _check_free(place, force=force)
    try:
        with _replacing(place, force=force) as folder:
            form.write(run, folder, place=place)
            label = {"schema": 1, "run": run.id, "format": to, "damage": run.damage}
            (folder / _LABEL).write_text(json.dumps(label, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotExport(f"{place} cannot be written: {error.strerror or error}.") from error
    return Exported(path=place, reading=form.reading(place))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise CannotExport(f"{name!r} is no export format{nearest(name, FORMATS)} Formats are {', '.join(FORMATS)}.")
    needs = FORMATS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        raise CannotExport(f"--to {name} needs {needs}, which is not installed: pip install 'isograd[{name}]'.")
    return FORMATS[name]()


def _check_free(place: Path, *, force: bool) -> None:
    if not os.path.lexists(place):
        return
    if not (place / _LABEL).is_file():
        raise CannotExport(f"{place} exists and is no export of isograd: name another place with -o.")
    if not force:
        raise CannotExport(f"{place} exists: --force replaces it, -o names another place.")


@contextmanager
def _replacing(place: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder beside `place` that takes its place at the end, or is removed if anything fails."""
    place.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{place.name[:100]}-", dir=place.parent))
    try:
        # Made anew inside: the folder of mkdtemp can be read by nobody else.
        (folder := around / "new").mkdir()
        yield folder
        _check_free(place, force=force)  # once more: writing may have taken minutes
        if place.exists():
            place.rename(around / "old")
        try:
            folder.rename(place)
        except OSError:
            if (around / "old").exists():
                (around / "old").rename(place)
            raise
    finally:
        shutil.rmtree(around, ignore_errors=True)
