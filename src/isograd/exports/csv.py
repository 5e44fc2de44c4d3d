"""CSV: one file per table, as pandas, R and spreadsheets read it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isograd._export import Format, tables
from isograd._runs import Run


@dataclass(frozen=True, kw_only=True)
class Csv(Format):
    """UTF-8 and RFC 4180, with a header; numbers round-trip, with `NaN`, `Inf` and `-Inf` as R writes them."""

    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        for table in tables(run):
            with (folder / f"{table.name}.csv").open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)  # with CR LF, as RFC 4180 has it: only then a lone CR is quoted
                rows.writerow(table.columns)
                for block in table.blocks():
                    rows.writerows(zip(*(_cells(block[column]) for column in table.columns), strict=True))

    def reading(self, place: Path) -> str:
        return f"pandas.read_csv({str(place / 'steps.csv')!r})"


def _cells(column: Any) -> Iterable[Any]:
    if isinstance(column, list):
        return column
    values, missing = np.ma.getdata(column), np.ma.getmaskarray(column)
    if np.isfinite(values).all():
        return values.tolist()  # type: ignore[no-any-return]
    cells = values.astype(object)
    for name, where in (("NaN", np.isnan(values)), ("Inf", values == np.inf), ("-Inf", values == -np.inf)):
        cells[where] = name
    cells[missing] = None
    return cells.tolist()  # type: ignore[no-any-return]
