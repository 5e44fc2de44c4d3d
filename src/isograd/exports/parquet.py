"""Parquet: one file per table, with the unit and meaning of each column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from isograd._export import Format, Table, statistic_of, tables
from isograd._runs import Run


@dataclass(frozen=True, kw_only=True)
class Parquet(Format):
    """Strings, int64 and float64; null where there is no reading, NaN and infinities as they are."""

    needs: ClassVar[str] = "pyarrow"

    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
        for table in tables(run):
            fields = [pa.field(n, types[kind], metadata=_meaning(table, n)) for n, kind in table.columns.items()]
            schema = pa.schema(fields, metadata={"isograd_run": run.id})
            with parquet.ParquetWriter(folder / f"{table.name}.parquet", schema) as writer:
                for block in table.blocks():
                    arrays = [_array(pa, block[field.name], field.type) for field in schema]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def reading(self, place: Path) -> str:
        return f"pandas.read_parquet({str(place / 'steps.parquet')!r})"


def _array(pa: Any, column: Any, kind: Any) -> Any:
    if isinstance(column, list):
        return pa.array(column, kind)
    return pa.array(np.ma.getdata(column), kind, mask=np.ma.getmaskarray(column), from_pandas=False)


def _meaning(table: Table, column: str) -> dict[str, str] | None:
    statistic = statistic_of(table.name, column)
    return None if statistic is None else {"unit": statistic.unit, "meaning": statistic.meaning}
