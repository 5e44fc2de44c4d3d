"""Exports: what other tools read is what the run file holds, by each format's own reader; mistakes are one sentence."""

import csv
import importlib.util
import json
import math
import re
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isograd._cli import main
from isograd._errors import CannotExport
from isograd._export import is_empty, points, tables
from isograd._export_run import export_run
from isograd._history import Event, History, Layer, Parameter, Series
from isograd._record import RunFile
from isograd._runs import Run, read_run
from isograd.exports import FORMATS

NAN, INF = math.nan, math.inf
ODD = ["net.0", 'a/b, "c"', "<script>alert(1)</script>\n", "Schicht ü 層", " ", "..", "=1+1"]


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


# What MLflow uses of other libraries is deprecated there from time to time.
others_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WRITABLE = [pytest.param(n, marks=[needs(f.needs), others_deprecations]) if f.needs else n for n, f in FORMATS.items()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, far from any pyproject.toml of others."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(root, *, subjects=("model",), steps=12, names=ODD, kept=10_000):
    """A run with NaN in step 0, infinite and missing readings, two parameter groups, calls and an event."""
    file = RunFile.create(root, meta={"script": "train.py", "state": "finished"}, kept=kept)
    for subject in subjects:
        file.add_layers(subject, [Layer(name=name, kind="tanh", position=i) for i, name in enumerate(names)])
        file.add_parameters(subject, [Parameter(name=f"{name}.weight", layer=name, shape=(3, 2)) for name in names])
        for step in range(steps):
            bad = step == 0
            norms = np.linspace(0.1, 0.2, len(names)) / (step + 1)
            cheap = {
                "loss": NAN if bad else 1 / step,
                "loss_nonfinite": int(bad),
                "global_grad_norm": NAN if bad else np.linalg.norm(norms),
                "learning_rate": [0.1, 0.01],
                "step_seconds": 0.5,
                "grad_norm": np.where(np.arange(len(names)) == bad - 1, NAN, norms),
                "grad_nonfinite": np.where(np.arange(len(names)) == bad - 1, 6, 0),
            }
            file.write_row(subject, step, "cheap", cheap)
            if step % 5 == 0:
                signal = np.r_[INF, NAN, np.ones(len(names) - 2)]
                deep = {
                    "saturation": np.full(len(names), 0.25),
                    "signal_norm": signal,
                    "signal_nonfinite": np.zeros(len(names)),
                }
                file.write_row(subject, step, "deep", deep)
        file.write_profile(subject, 5, "call_signal_norm", names[0], [1.0, 0.5, 0.25])
        file.write_event(subject, Event(step=3, kind="exception", layer=names[2], data={"message": "a,\n<b>"}))
    file.close()
    return read_run(file.path)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(cell):
    """What a cell says: None where it is empty."""
    return None if cell == "" else float(cell)


def same(expected, actual):
    """Equal as numbers, where NaN is NaN and None is None."""
    if expected is None or actual is None:
        return expected is actual
    return expected == actual or (math.isnan(expected) and math.isnan(actual))


def expected_points(run):
    """(key, step) -> value by naive loops over every reading of the run."""
    found = {}
    for history in run.histories:
        prefix = "" if len(run.histories) == 1 else f"{history.subject}/"
        names = {"layer": [layer.name for layer in history.layers], "parameter": [p.name for p in history.parameters]}
        for statistic, series in history.series.items():
            key = {"global_grad_norm": "grad_norm"}.get(statistic, statistic)
            for step, row in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                if not isinstance(row, list):
                    # Of the runs above, whatever step 0 lacks as a whole was not finite.
                    if not math.isnan(row) or step == 0:
                        found[f"{prefix}{key}", step] = row
                    continue
                for i, value in enumerate(row):
                    name = (
                        i
                        if statistic == "learning_rate"
                        else names[
                            "layer" if statistic in {"saturation", "signal_norm", "signal_nonfinite"} else "parameter"
                        ][i]
                    )
                    if not math.isnan(value) or (statistic == "grad_norm" and step == 0 and i == 0):
                        found[f"{prefix}{key}/{name}", step] = value
        for layer, series in history.profiles.get("call_signal_norm", {}).items():
            for call, value in enumerate(series.values[0].tolist()):
                found[f"{prefix}call_signal_norm/{layer}/{call}", int(series.steps[0])] = value
    return found


# ---- names and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subjects", [("model",), ("generator", "discriminator")])
def test_every_reading_is_a_point_under_its_key(folder, subjects):
    """Every reading stands under its key at its step, once, and nothing else does; several subjects are prefixes."""
    run = record(folder, subjects=subjects)

    found = [(key, point.step, value) for point in points(run) for key, value in point.values.items()]

    expected = expected_points(run)
    assert len(found) == len({(key, step) for key, step, _ in found}) == len(expected)
    assert [] == [(key, step) for key, step, value in found if not same(expected[key, step], value)]
    prefix = "" if len(subjects) == 1 else "generator/"
    assert {
        f"{prefix}{key}"
        for key in ("loss", "grad_norm", "grad_norm/net.0.weight", "learning_rate/1", "saturation/net.0")
    } <= {key for key, _, _ in found}


def test_points_come_in_order_at_the_time_of_their_steps(folder):
    """Steps increase, and time grows by what each step took."""
    found = list(points(record(folder, subjects=("a", "b"))))

    assert list(range(12)) == [point.step for point in found]
    assert np.allclose(0.5, np.diff([point.time for point in found]))


def test_rolled_up_steps_are_medians_at_the_end_of_their_span(folder):
    """Of ten merged steps there is one row, at the last of them, with the median and the largest count."""
    run = record(folder, steps=600, kept=20)
    steps = rows_of(export_run(run, to="csv").path / "steps.csv")

    assert len(steps) < 600
    assert ["9", "19", "29"] == [row["step"] for row in steps[:3]]
    assert 1 / 15 <= float(steps[1]["loss"]) <= 1 / 14
    assert 1 == float(steps[0]["loss_nonfinite"])
    times = {point.step: point.time for point in points(run)}
    assert np.allclose([2.0, 5.0, 5.0], np.diff([times[5], times[9], times[19], times[29]]))


@st.composite
def histories(draw):
    """A subject with odd names and readings at odd steps."""
    text = st.text(min_size=1, max_size=8) | st.sampled_from(ODD)
    names = draw(st.lists(text.filter(lambda name: "\0" not in name), min_size=1, max_size=4, unique=True))
    series = {}
    for statistic, width in (("loss", None), ("saturation", len(names)), ("output_rms", len(names))):
        steps = sorted(draw(st.sets(st.integers(0, 2**40), max_size=4)))
        row = st.floats() if width is None else st.lists(st.floats(), min_size=width, max_size=width)
        values = [draw(row) for _ in steps]
        if steps:
            series[statistic] = Series(steps, values)
    return History(subject=draw(text), layers=tuple(Layer(name=name) for name in names), series=series)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@given(histories())
@example(History(layers=(Layer(name="\r\n"),), series={"saturation": Series([0], [[5e-324]])}))
def test_csv_gives_back_what_went_in(place, history):
    """Any name and any number comes back from CSV as it was; NaN that nothing counts is an empty cell."""
    run = Run(path=place, id="run", meta={}, histories=(history,))
    if is_empty(run):
        return
    made = export_run(run, to="csv", path=place / "csv", force=True).path

    expected = expected_cells(history)
    cells = {}
    for name in ("steps", "layers"):
        for row in rows_of(made / f"{name}.csv") if (made / f"{name}.csv").exists() else ():
            assert history.subject == row.pop("subject")
            step, layer = int(row.pop("step")), row.pop("layer", None)
            cells.update({(column, step, layer): number(cell) for column, cell in row.items() if cell})
    assert expected == cells


def expected_cells(history):
    """(statistic, step, layer) -> value of whatever is not NaN."""
    cells = {}
    for statistic, series in history.series.items():
        names = [None] if statistic == "loss" else [layer.name for layer in history.layers]
        for step, row in zip(series.steps.tolist(), series.values.reshape(len(series), -1).tolist(), strict=True):
            cells |= {(statistic, step, n): v for n, v in zip(names, row, strict=True) if not math.isnan(v)}
    return cells


# ---- each format by its own reader ----------------------------------------------------------------------------------


def test_csv_tables(folder):
    """One row per observation: NaN where a value was not finite, nothing where there was no reading."""
    made = export_run(record(folder, subjects=("a", "b")), to="csv").path

    steps = rows_of(made / "steps.csv")
    assert [
        "subject",
        "step",
        "loss",
        "loss_nonfinite",
        "grad_norm",
        "step_seconds",
        "learning_rate/0",
        "learning_rate/1",
    ] == list(steps[0])
    assert ("a", "0", "NaN", "NaN") == tuple(steps[0][c] for c in ("subject", "step", "loss", "grad_norm"))
    assert [(s, str(k)) for s in "ab" for k in range(12)] == [(row["subject"], row["step"]) for row in steps]
    layers = [row for row in rows_of(made / "layers.csv") if row["subject"] == "b" and row["step"] == "5"]
    assert ODD == [row["layer"] for row in layers]
    assert ["Inf", "", "1.0"] == [row["signal_norm"] for row in layers[:3]]
    parameters = rows_of(made / "parameters.csv")
    assert ("NaN", "6.0") == (parameters[0]["grad_norm"], parameters[0]["grad_nonfinite"])
    calls = [(row["layer"], row["call"], row["call_signal_norm"]) for row in rows_of(made / "calls.csv")[:3]]
    assert [("net.0", "0", "1.0"), ("net.0", "1", "0.5"), ("net.0", "2", "0.25")] == calls
    (event, _) = rows_of(made / "events.csv")
    assert ("3", "exception", ODD[2]) == (event["step"], event["kind"], event["layer"])
    assert {"message": "a,\n<b>"} == json.loads(event["data"])


@needs("pyarrow")
def test_parquet_tables_hold_the_same_as_csv(folder):
    """Parquet has the same tables, columns, rows, missing cells and non-finite numbers, with units and meanings."""
    from pyarrow import parquet

    run = record(folder, subjects=("a", "b"))
    made, texts = export_run(run, to="parquet").path, export_run(run, to="csv").path

    assert (
        {p.stem for p in texts.glob("*.csv")}
        == {p.stem for p in made.glob("*.parquet")}
        == {t.name for t in tables(run)}
    )
    for path in made.glob("*.parquet"):
        table = parquet.read_table(path)
        expected = rows_of(texts / f"{path.stem}.csv")
        assert list(expected[0]) == table.column_names
        for row, other in zip(table.to_pylist(), expected, strict=True):
            for column, cell in row.items():
                assert (
                    same(number(other[column]), cell)
                    if isinstance(cell, (float, int))
                    else (cell or "") == other[column]
                )
    described = parquet.read_schema(made / "steps.parquet").field("grad_norm").metadata
    assert b"L2 norm of all gradients together" in described[b"meaning"]


@needs("tensorboard")
def test_tensorboard_reads_every_point(folder):
    """TensorBoard's own accumulator has each key, step, float32 value and time, and the events as text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = record(folder, subjects=("a", "b"))
    made = export_run(run, to="tensorboard").path
    reader = EventAccumulator(str(made), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()

    found = {(tag, event.step): event.value for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)}
    expected = expected_points(run)
    assert set(expected) == set(found)
    assert [] == [place for place in found if not same(float(np.float32(expected[place])), found[place])]
    assert np.allclose(0.5, np.diff([event.wall_time for event in reader.Scalars("a/loss")]))
    (told,) = reader.Tensors("b/events")
    assert (3, b'exception in <script>alert(1)</script>\n {"message": "a,\\n<b>"}') == (
        told.step,
        told.tensor_proto.string_val[0],
    )
    assert "text" == reader.SummaryMetadata("b/events").plugin_data.plugin_name


@needs("wandb")
def test_wandb_reads_every_point(folder):
    """The offline run's transaction log, by wandb's own protocol, has each key, step and value."""
    run = record(folder)
    made = export_run(run, to="wandb").path

    (log,) = made.glob("wandb/offline-run-*/run-*.wandb")
    assert {place: str(value) for place, value in expected_points(run).items()} == {
        place: str(value) for place, value in logged_by_wandb(log.read_bytes()).items()
    }


def logged_by_wandb(log):
    """(key, step) -> value. The log is LevelDB's: blocks of 32 KiB, of fragments with checksum, length and type."""
    from wandb.proto import wandb_internal_pb2

    found, record, at = {}, b"", 7
    while at + 7 <= len(log):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        record, at = record + log[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in parsed.history.item}
                step = items.pop("_step", parsed.history.step.num)
                found |= {(key, step): v for key, v in items.items() if not key.startswith("_")}
    return {place: float(value) for place, value in found.items()}


@others_deprecations
@needs("mlflow")
def test_mlflow_reads_every_point(folder, monkeypatch):
    """MLflow's own client has each key, step and value; keys that it does not accept are in keys.json."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    run = record(folder)
    made = export_run(run, to="mlflow").path
    client = MlflowClient(tracking_uri=f"sqlite:///{made / 'mlflow.db'}")
    (logged,) = client.search_runs([client.get_experiment_by_name("isograd").experiment_id])

    names = json.loads((made / "keys.json").read_text(encoding="utf-8"))
    found = {
        (names.get(key, key), metric.step): metric.value
        for key in logged.data.metrics
        for metric in client.get_metric_history(logged.info.run_id, key)
    }
    expected = {place: sys.float_info.max if value == INF else value for place, value in expected_points(run).items()}
    assert set(expected) == set(found)
    assert [] == [place for place in found if not same(expected[place], found[place])]
    assert (run.id, "FINISHED") == (logged.info.run_name, logged.info.status)


# ---- mistakes, and what must not be lost ----------------------------------------------------------------------------


def said(capsys, *arguments):
    """(status, stdout, stderr) of a command."""
    status = main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def test_the_command_exports_the_latest_run(folder, capsys):
    """`isograd export --to csv` makes <run>-csv in the current folder and says where it is and how to read it."""
    run = record(folder / "isograd-runs")

    status, out, err = said(capsys, "export", "--to", "csv")

    made = folder / f"{run.id}-csv"
    assert (0, "") == (status, err)
    assert f"{made}\nTo read it: pandas.read_csv({str(made / 'steps.csv')!r})\n" == out
    assert {"steps.csv", "parameters.csv", "layers.csv", "calls.csv", "events.csv", "isograd-export.json"} == names_in(
        made
    )
    assert [] == [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "to, sentence",
    [
        (
            "parqet",
            "'parqet' is no export format; did you mean parquet? Formats are csv, mlflow, parquet, tensorboard, wandb.",
        ),
        ("", "'' is no export format. Formats are csv, mlflow, parquet, tensorboard, wandb."),
    ],
)
def test_an_unknown_format_is_told_the_nearest(folder, capsys, to, sentence):
    """A format that there is not: one sentence with the nearest name and all that there are, status 2."""
    record(folder / "isograd-runs")

    assert (2, "", f"isograd: {sentence}\n") == said(capsys, "export", "--to", to)


def test_a_missing_package_is_told_with_its_extra(folder, tmp_path):
    """Where pyarrow is not installed, the sentence says what to install; nothing is written."""
    record(folder / "isograd-runs")
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'pyarrow' else find(name, *rest)\n"
        "from isograd._cli import main\n"
        "sys.exit(main(['export', '--to', 'parquet']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, timeout=60)

    told = "isograd: --to parquet needs pyarrow, which is not installed: pip install 'isograd[parquet]'.\n"
    assert (2, "", told) == (done.returncode, done.stdout, done.stderr)
    assert {"isograd-runs"} == names_in(folder)


@pytest.mark.parametrize("to", WRITABLE)
def test_an_export_is_replaced_only_by_force(folder, capsys, to):
    """An earlier export stays until --force replaces all of it; what is read then is of the new run."""
    export_run(record(folder / "a"), to=to, path=folder / "out")
    (folder / "out" / "old").touch()
    run = record(folder / "b", steps=3)

    status, out, err = said(capsys, "export", run.path, "--to", to, "-o", "out")
    assert (2, "", f"isograd: {folder / 'out'} exists: --force replaces it, -o names another place.\n") == (
        status,
        out,
        err,
    )
    assert (folder / "out" / "old").exists()

    assert 0 == said(capsys, "export", run.path, "--to", to, "-o", "out", "--force")[0]
    assert not (folder / "out" / "old").exists()
    assert run.id == json.loads((folder / "out" / "isograd-export.json").read_text())["run"]
    assert {"a", "b", "out"} == names_in(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_what_is_not_ours_is_never_replaced(folder, kind):
    """A file, a folder or a link that is no export of ours is refused, with force too, and stays as it is."""
    run, place = record(folder / "runs"), folder / "out"
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("nothing")
    before = place.lstat()

    for force in (False, True):
        with pytest.raises(CannotExport, match=rf"^{re.escape(str(place))} exists and is no export of isograd: "):
            export_run(run, to="csv", path=place, force=force)
    assert before == place.lstat()


def test_a_place_where_nothing_can_be_written_is_one_sentence(folder):
    """The sentence says so; /proc takes no folder from anybody, root included."""
    run = record(folder / "runs")

    with pytest.raises(CannotExport, match=r"^/proc/out cannot be written: .*\.$"):
        export_run(run, to="csv", path=Path("/proc/out"))


def test_a_place_below_a_file_is_one_sentence(folder):
    """A folder cannot be made below a file."""
    run = record(folder / "runs")
    (folder / "file").touch()

    with pytest.raises(CannotExport, match=r"file/out cannot be written: \w.*\.$"):
        export_run(run, to="csv", path=folder / "file" / "out")


def test_a_failure_leaves_the_earlier_export(folder):
    """When writing fails in the middle, the earlier export stands as it was and nothing else is left."""
    run = record(folder / "runs")
    export_run(run, to="csv", path=folder / "out")
    before = (folder / "out" / "steps.csv").read_bytes()
    broken = History(subject="model", series={"loss": Series([0], [1.0])}, events=(Event(step=0, kind="\ud800"),))

    with pytest.raises(UnicodeEncodeError):
        export_run(Run(path=folder, id="x", meta={}, histories=(broken,)), to="csv", path=folder / "out", force=True)
    assert before == (folder / "out" / "steps.csv").read_bytes()
    assert {"runs", "out"} == names_in(folder)


def test_a_damaged_run_is_exported_as_far_as_it_can_be_read(folder, capsys):
    """Of a file that was cut off, the steps that are left are exported, and a sentence says that it is damaged."""
    run = record(folder / "runs", steps=400)
    with closing(sqlite3.connect(run.path / "run.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = (run.path / "run.db").read_bytes()
    (run.path / "run.db").write_bytes(whole[: len(whole) * 3 // 4 // 4096 * 4096])

    status, _, err = said(capsys, "export", run.path, "--to", "csv", "-o", "out")

    assert 0 == status
    assert err.endswith("; what could be read of it was exported.\n")
    assert 0 < len(rows_of(folder / "out" / "steps.csv")) < 400
    assert "damaged" in json.loads((folder / "out" / "isograd-export.json").read_text())["damage"]


def test_nothing_to_export_is_one_sentence(folder, capsys):
    """No run, no readable run, and a run without steps end with status 2 and one sentence."""
    assert (2, "") == said(capsys, "export", "--to", "csv")[:2]
    RunFile.create(folder / "isograd-runs", meta={}).close()
    status, out, err = said(capsys, "export", "--to", "csv")
    assert (2, "") == (status, out)
    assert err.endswith("holds no optimizer step: there is nothing to export.\n")


@pytest.mark.parametrize("to", ["csv", pytest.param("parquet", marks=needs("pyarrow"))])
def test_memory_stays_bounded(folder, to):
    """However many the readings, no more than a block of them is in memory beside the run."""
    readings = np.random.default_rng(0).random((40, 1000))
    parameters = tuple(Parameter(name=f"p{i}") for i in range(1000))
    series = {name: Series(np.arange(40) * 100, readings) for name in ("grad_norm", "weight_norm", "update_norm")}
    history = History(parameters=parameters, series=series)
    run = Run(path=folder, id="big", meta={}, histories=(history,))
    export_run(run, to=to, path=folder / "first")
    tracemalloc.start()
    try:
        export_run(run, to=to, path=folder / "second")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A block of 65536 rows: its cells as Python numbers, and the arrays that they come from.
    assert peak < 60e6
