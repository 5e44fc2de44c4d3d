"""The run file: round trips, crashes, bad disks, merging of old steps, and reading whatever is there."""

import gc
import math
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isograd import _record
from isograd._errors import RunNotFound, RunUnreadable
from isograd._history import Event, Layer, Parameter
from isograd._layout import Rows, decode, encode, merge
from isograd._record import RunFile, find_run, list_runs, read_envelopes, read_run
from isograd._statistics import STATISTICS

NAN, INF = math.nan, math.inf
SOURCE = str(Path(_record.__file__).parents[1])


@pytest.fixture
def complaints():
    return []


@pytest.fixture
def create(tmp_path, complaints):
    """Makes run files in `tmp_path` and closes them."""
    made = []

    def create(root=tmp_path, **options):
        made.append(
            RunFile.create(root, **{"meta": {"script": "train.py"}, "on_failure": complaints.append, **options})
        )
        return made[-1]

    yield create
    for file in made:
        file.close()


def python(script, *arguments, **options):
    """Start an interpreter on a script that writes runs."""
    head = "import os, sys, time, signal, threading\nfrom pathlib import Path\nfrom isograd._record import *\n"
    command = [sys.executable, "-c", head + textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def output(process, *, status=0):
    out, err = process.communicate(timeout=60)
    assert (status, "") == (process.returncode, err)
    return out


def losses(folder):
    """step -> loss of the one subject."""
    (history,) = read_run(folder).histories
    return dict(zip(history["loss"].steps.tolist(), history["loss"].values.tolist(), strict=True))


def integrity(folder):
    with closing(sqlite3.connect(folder / "run.db")) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall()


def the_only_run(root):
    (folder,) = root.iterdir()
    return folder


# ---- what goes in comes out ---------------------------------------------------------------------------------------

numbers = st.floats(width=64) | st.floats(width=32) | st.sampled_from([0.0, NAN, INF, -INF, 1e300, 5e-324, 2.0**53])
NAMES = ["loss", "skipped", "learning_rate", "grad_norm", "grad_nonfinite", "output_rms", "output_size", "calls"]


@st.composite
def rows(draw):
    """Steps in any order; at each, some statistics and how many columns exist by then."""
    written = []
    for step in draw(st.lists(st.integers(0, 4) | st.integers(0, 2**40), max_size=12)):
        width = {"step": 1, "group": 2, "parameter": draw(st.integers(0, 5)), "layer": draw(st.integers(0, 5))}
        row = {}
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
            values = draw(
                st.lists(numbers, min_size=width[STATISTICS[name].axis], max_size=width[STATISTICS[name].axis])
            )
            with np.errstate(over="ignore"):
                as_given = draw(st.sampled_from([list, tuple, np.float64, np.float32]))(values)
            row[name] = as_given
        written.append((step, row))
    return written


def is_within(expected, actual, statistic):
    """Equal, or for readings per parameter and layer within half a unit in the last place of float32."""
    exact = statistic in {"loss", "skipped", "learning_rate", "grad_nonfinite", "output_size", "calls"}
    if math.isnan(expected) or not math.isfinite(expected) or exact:
        return np.array_equal(expected, actual, equal_nan=True)
    return abs(actual - expected) <= 2.0**-24 * abs(expected)


@given(rows())
@settings(max_examples=40)
def test_rows_round_trip(written):
    """Whatever numbers are written at whatever steps come back, missing columns as NaN; the last word counts."""
    expected = {}
    for step, row in written:
        for name, values in row.items():
            width = {"step": 1, "group": 2, "parameter": 5, "layer": 5}[STATISTICS[name].axis]
            expected.setdefault(name, {})[step] = [float(v) for v in values] + [NAN] * (width - len(values))

    with tempfile.TemporaryDirectory() as folder:
        file = RunFile.create(Path(folder), meta={})
        file.add_layers("model", [Layer(name=f"l{i}") for i in range(5)])
        file.add_parameters("model", [Parameter(name=f"p{i}") for i in range(5)])
        for step, row in written:
            file.write_row("model", step, "cheap", row)
        file.close()
        (history,) = read_run(file.path).histories

    assert set(expected) == set(history.series)
    for name, by_step in expected.items():
        series = history[name]
        assert sorted(by_step) == series.steps.tolist()
        for step, values in zip(series.steps.tolist(), series.values, strict=True):
            for before, after in zip(by_step[step], np.atleast_1d(values).tolist(), strict=False):
                assert is_within(before, after, name), (name, step)


@given(st.lists(st.tuples(st.text(max_size=8), st.floats(), st.lists(st.integers(0, 2**40), max_size=4)), max_size=6))
@settings(max_examples=30)
def test_layers_round_trip_in_order_of_position(facts):
    """Layers come back as they were described, sorted by first use, those never used last and otherwise as added."""
    layers = [
        Layer(
            name=f"{i}{name}",
            kind="conv",
            type="Conv",
            position=INF if math.isnan(p) else p,
            units=3,
            shape=tuple(shape),
            dtype="float16" if i % 2 else "",
        )
        for i, (name, p, shape) in enumerate(facts)
    ]
    file = RunFile.create(Path("unused"), meta={}, in_memory=True)
    file.add_layers("model", layers)
    file.write_row("model", 0, "deep", {"output_rms": [float(i) for i in range(len(layers))]})
    (history,) = file.read().histories
    file.close()

    order = sorted(range(len(layers)), key=lambda i: (layers[i].position, i))
    assert tuple(layers[i] for i in order) == history.layers
    assert [order] == history["output_rms"].values.tolist()


def test_everything_else_round_trips(create):
    """Parameters, groups, events, words about what is missing, run-wide facts and profiles come back as written."""
    file = create(meta={"script": "a b/träin.py", "seed": 7, "command": ["x", "y"]})
    weight = Parameter(
        name="fc.weight", layer="fc", shape=(3, 4), dtype="float16", trainable=False, optimized=False, group=-1
    )
    event = Event(
        step=4, kind="exception", layer="fc", data={"type": "ValueError", "loss": NAN, "where": [1, {"a": None}]}
    )
    file.add_parameters("generator", [weight, Parameter(name="bias")])
    file.set_groups("generator", [{"optimizer": "SGD", "lr": 0.1}])
    file.set_groups("generator", [{"optimizer": "Adam", "betas": [0.9, 0.999]}, {"optimizer": "Adam"}])
    file.write_event("generator", event)
    file.write_event("critic", Event(step=5, kind="interrupted", data={"object": Path("x")}))
    file.set_unmeasured("critic", "saturation", "no activation layer")
    file.set_unmeasured("critic", "saturation", "compiled")
    file.write_profile("generator", 0, "call_signal_norm", "cell", [1.0, 0.5])
    file.write_profile("generator", 10, "call_signal_norm", "cell", np.float32([1.0, 0.25, 0.125]))
    file.set_meta(state="finished", seed=8)
    file.close()
    run = read_run(file.path)
    generator, critic = run.histories

    assert (file.id, file.path) == (run.id, run.path)
    assert ("finished", 8, ["x", "y"], 1) == (
        run.meta["state"],
        run.meta["seed"],
        run.meta["command"],
        run.meta["schema"],
    )
    assert "-tr-in-" in run.id
    assert ("generator", "critic") == (generator.subject, critic.subject)
    assert (weight, Parameter(name="bias")) == generator.parameters
    assert ({"optimizer": "Adam", "betas": [0.9, 0.999]}, {"optimizer": "Adam"}) == generator.groups
    assert repr((event,)) == repr(generator.events)
    assert {"object": "x"} == critic.events[0].data
    assert {"saturation": "compiled"} == critic.unmeasured
    profile = generator.profiles["call_signal_norm"]["cell"]
    assert [0, 10] == profile.steps.tolist()
    assert np.array_equal([[1.0, 0.5, NAN], [1.0, 0.25, 0.125]], profile.values, equal_nan=True)


def test_columns_may_come_and_change_later(create):
    """A layer added during the run is NaN before, and columns follow positions that become known only later."""
    file = create()
    file.add_layers("model", [Layer(name="second"), Layer(name="first")])
    file.add_parameters("model", [Parameter(name="w")])
    file.write_row("model", 0, "deep", {"output_rms": [2.0, 1.0], "output_nonfinite": [0.0, 0.0]})
    file.add_layers("model", [Layer(name="third", position=3.0)])
    file.update_layer("model", 0, Layer(name="second", position=2.0))
    file.update_layer("model", 1, Layer(name="first", position=1.0))
    file.update_parameter("model", 0, Parameter(name="w", group=5))
    file.write_row("model", 1, "deep", {"output_rms": [20.0, 10.0, 30.0], "output_nonfinite": [0, 0, 7]})
    (history,) = file.read().histories

    assert ["first", "second", "third"] == [layer.name for layer in history.layers]
    assert np.array_equal([[1, 2, NAN], [10, 20, 30]], history["output_rms"].values, equal_nan=True)
    assert np.array_equal([[0, 0, NAN], [0, 0, 7]], history["output_nonfinite"].values, equal_nan=True)
    assert 5 == history.parameters[0].group


def test_the_last_word_on_a_step_counts(create):
    """Of several rows for one step, written at once with different statistics, the last that has a statistic counts."""
    file = create()
    file.write_row("model", 3, "cheap", {"loss": 1.0})
    file.write_row("model", 3, "cheap", {"loss": 2.0, "skipped": 0})
    file.write_row("model", 3, "cheap", {"loss": 3.0})
    file.write_row("model", 2, "deep", {"loss": 4.0})
    (history,) = file.read().histories

    assert [(2, 4.0), (3, 3.0)] == list(zip(history["loss"].steps, history["loss"].values, strict=True))
    assert [0.0] == history["skipped"].values.tolist()


def test_arrays_are_copied(create):
    """What the caller does to an array after handing it over changes nothing."""
    file = create()
    file.add_parameters("model", [Parameter(name="a"), Parameter(name="b")])
    array, numbers = np.float32([1, 2]), [1.0, 2.0]
    file.write_row("model", 0, "cheap", {"grad_norm": array, "grad_max": numbers})
    array[:], numbers[:] = 9, [9.0, 9.0]
    (history,) = file.read().histories

    assert [[1, 2]] == history["grad_norm"].values.tolist() == history["grad_max"].values.tolist()


def test_a_reading_that_is_no_number_costs_only_itself(create, complaints):
    """Readings that are not numbers are left out, said once, and everything beside them is kept."""
    file = create()
    file.add_parameters("model", [Parameter(name="a")])
    for step, values in enumerate([[1.0], ["x"], [[1.0, 2.0]], [3.0]]):
        file.write_row("model", step, "cheap", {"grad_norm": values})
    file.write_row("model", 5, "cheap", {"loss": object()})
    file.write_row("model", 6, "cheap", None)
    file.write_event("model", None)
    file.add_layers("model", [Layer(name="l", shape=("a",))])
    file.add_layers("model", [Layer(name="ok\ud800", units=np.int64(3))])
    (history,) = file.read().histories

    assert [0, 3] == history["grad_norm"].steps.tolist()
    assert [("ok\\ud800", 3)] == [(layer.name, layer.units) for layer in history.layers]
    assert 1 == len(complaints)
    assert "not recorded" in complaints[0]


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(0, 6)), elements=st.floats()))
def test_packing_never_changes_what_is_zero_or_finite(matrix):
    """A finite number stays finite, an infinite one infinite, NaN NaN, and only 0 becomes 0."""
    layout, packed = encode({("grad_max", "value"): matrix})
    rows = Rows.of([(i, 1, i, i, 1, blob) for i, blob in enumerate(packed)])
    ((_, unpacked),) = decode(rows, {1: layout})[1, "grad_max", "value"]

    for test in (np.isnan, np.isfinite, np.isposinf, lambda x: x == 0, lambda x: x > 0):
        assert np.array_equal(test(matrix), test(unpacked.astype(np.float64)))


def test_counts_that_are_all_equal_take_no_room():
    """A thousand zero counts take the bytes of one; a single NaN among them is kept."""
    zeros, mixed = np.zeros((2, 1000)), np.zeros((2, 1000))
    mixed[1, 500] = NAN

    assert 4 == len(encode({("grad_nonfinite", "value"): zeros})[1][0])
    assert 4000 == len(encode({("grad_nonfinite", "value"): mixed})[1][0])
    assert 4000 == len(encode({("grad_norm", "value"): zeros})[1][0])


# ---- crashes ------------------------------------------------------------------------------------------------------

ENDLESS = """
file = RunFile.create(Path(sys.argv[1]), meta={}, kept=300)
for step in range(10**9):
    file.write_row("model", step, "cheap", {"loss": time.time(), "skipped": step % 2})
    if step == 0:
        print("ready", flush=True)
    time.sleep(0.0005)
"""


@pytest.mark.parametrize("seconds", [0.3, 1.3, 2.2])
def test_killed_at_any_moment(tmp_path, seconds):
    """After kill -9 the file is whole, and what is lost was written less than 2 s before."""
    process = python(ENDLESS, tmp_path)
    assert "ready\n" == process.stdout.readline()
    time.sleep(seconds)
    killed = time.time()
    process.kill()
    process.communicate()
    folder = the_only_run(tmp_path)

    assert [("ok",)] == integrity(folder)
    assert "stopped" == read_run(folder).state == list_runs(tmp_path)[0].state
    if seconds > 1:
        assert killed - max(losses(folder).values()) < 2.0


def test_exit_without_close(tmp_path):
    """A program that ends, by itself or by an exception, without closing anything loses nothing."""
    script = """
    file = RunFile.create(Path(sys.argv[1]), meta={})
    for step in range(100):
        file.write_row("model", step, "cheap", {"loss": float(step)})
    raise SystemExit(3)
    """
    output(python(script, tmp_path), status=3)

    assert {step: float(step) for step in range(100)} == losses(the_only_run(tmp_path))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_exit_of_a_child_of_multiprocessing(tmp_path, method):
    """A run made in a process that multiprocessing started is complete when that process is done."""
    script = """
    import multiprocessing
    def train(root):
        file = RunFile.create(root, meta={})
        for step in range(100):
            file.write_row("model", step, "cheap", {"loss": float(step)})
    if __name__ == "__main__":
        child = multiprocessing.get_context(sys.argv[2]).Process(target=train, args=(Path(sys.argv[1]),))
        child.start()
        child.join()
    """
    program = tmp_path / "program.py"
    head = "import sys\nfrom pathlib import Path\nfrom isograd._record import RunFile\n"
    program.write_text(head + textwrap.dedent(script), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    subprocess.run([sys.executable, program, tmp_path / "runs", method], check=True, env=environment, timeout=60)

    assert {step: float(step) for step in range(100)} == losses(the_only_run(tmp_path / "runs"))


def test_a_forked_child_leaves_the_file_alone(tmp_path):
    """Children forked in the middle may write, flush, close and exit: the file holds the parent's steps only."""
    script = """
    import gc, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    file = RunFile.create(Path(sys.argv[1]), meta={})
    for step in range(300):
        file.write_row("model", step, "cheap", {"loss": float(step)})
        if step % 60 == 30:
            child = os.fork()
            if child == 0:
                inherited = len(file._pending)
                for i in range(1000, 1100):
                    file.write_row("model", i, "cheap", {"loss": -1.0})
                assert len(file._pending) == inherited
                file.set_meta(state="failed")
                file.flush()
                file.close()
                del file
                gc.collect()
                if step % 120 == 30:
                    os._exit(0)
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.002)
    """
    output(python(script, tmp_path))
    folder = the_only_run(tmp_path)

    assert {step: float(step) for step in range(300)} == losses(folder)
    assert "running" == read_run(folder).meta["state"]
    assert [("ok",)] == integrity(folder)


def test_many_threads_write(create):
    """Rows written by several threads at once all arrive."""
    file = create()
    steps = [range(i * 500, (i + 1) * 500) for i in range(4)]

    def write(steps):
        for step in steps:
            file.write_row("model", step, "cheap", {"loss": float(step)})

    threads = [threading.Thread(target=write, args=(part,)) for part in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()

    assert {step: float(step) for step in range(2000)} == losses(file.path)


def test_a_signal_handler_may_flush(tmp_path):
    """A handler that writes and flushes while the code that it interrupts does the same never blocks."""
    script = """
    file = RunFile.create(Path(sys.argv[1]), meta={})
    handled = []
    def handle(*_):
        file.write_row("model", 10**6 + len(handled), "cheap", {"loss": 0.0})
        file.flush()
        handled.append(1)
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    end = time.time() + 1
    while time.time() < end:
        file.write_row("model", 0, "cheap", {"loss": 0.0})
        file.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)
    file.close()
    print(len(handled) > 10)
    """
    assert "True\n" == output(python(script, tmp_path))


def test_closing_twice_and_writing_after(create, complaints):
    """After `close` nothing is written, nothing is raised, and the run can still be read."""
    file = create()
    file.write_row("model", 0, "cheap", {"loss": 1.0})
    file.close()
    file.close()
    file.flush()
    file.write_row("model", 1, "cheap", {"loss": 2.0})
    file.write_event("model", Event(step=1, kind="late"))

    assert [0] == file.read().histories[0]["loss"].steps.tolist()
    assert [] == complaints
    assert ["run.db"] == [path.name for path in file.path.iterdir()]


# ---- several programs at once -------------------------------------------------------------------------------------


def test_a_reader_reads_while_a_writer_writes(tmp_path):
    """Readers in another process see every step from the first to some moment, later ones more, and never an error."""
    process = python(ENDLESS, tmp_path)
    assert "ready\n" == process.stdout.readline()
    folder = the_only_run(tmp_path)
    seen = []
    end = time.time() + 2.5
    while time.time() < end:
        spans = read_envelopes(folder).get("model", {})
        (history,) = read_run(folder).histories or (None,)
        if history is not None:
            steps = history["loss"].steps
            assert (np.diff(steps[-200:]) == 1).all()
            seen.append(history.num_steps)
    state = list_runs(tmp_path)[0].state
    process.kill()
    process.communicate()

    assert "running" == state
    assert sorted(seen) == seen
    assert len(set(seen)) > 2
    assert "loss" in spans


def test_a_reader_in_the_writers_process_keeps_its_locks(create):
    """Reading its own run neither disturbs a writer nor lets others take its journal away."""
    file = create()
    for step in range(5):
        file.write_row("model", step, "cheap", {"loss": float(step)})
        file.flush()
        read_run(file.path)
        list_runs(file.path.parent)
        command = [sys.executable, "-c", f"import sqlite3; sqlite3.connect({str(file.path / 'run.db')!r}).close()"]
        subprocess.run(command, check=True)
        other = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM meta'); c.close()"
        subprocess.run([sys.executable, "-c", other, file.path / "run.db"], check=True)
        assert (file.path / "run.db-wal").exists()
    file.close()

    assert {step: float(step) for step in range(5)} == losses(file.path)


def test_processes_never_share_a_file(tmp_path):
    """Programs started in the same second in the same folder each get a run of their own."""
    script = """
    while time.time() < float(sys.argv[3]):
        pass
    file = RunFile.create(Path(sys.argv[1]), meta={"script": "train.py"})
    for step in range(50):
        file.write_row("model", step, "cheap", {"loss": float(sys.argv[2])})
    """
    start = time.time() + 1.5
    for process in [python(script, tmp_path / "runs", i, start) for i in range(3)]:
        output(process)
    folders = sorted((tmp_path / "runs").iterdir())

    assert 3 == len(folders)
    assert [{0.0}, {1.0}, {2.0}] == sorted(({*losses(folder).values()} for folder in folders), key=min)


def test_a_writer_waits_for_another_program(create, complaints):
    """While another program holds the file for writing, steps wait in memory, and arrive when it is done."""
    file = create()
    with closing(sqlite3.connect(file.path / "run.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        file.write_row("model", 0, "cheap", {"loss": 1.0})
        file.flush()
        other.execute("ROLLBACK")
    file.close()

    assert {0: 1.0} == losses(file.path)
    assert [] == complaints


def test_what_waits_for_the_disk_is_bounded(create, complaints, monkeypatch):
    """When the disk takes nothing for long, readings are dropped beyond a limit, and that is said once."""
    monkeypatch.setattr(_record, "_BACKLOG", 100_000)
    file = create()
    with closing(sqlite3.connect(file.path / "run.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(0.6)  # the writer now waits for the lock, and empties nothing
        for step in range(3000):
            file.write_row("model", step, "cheap", {"loss": 1.0})
        other.execute("ROLLBACK")
    file.close()

    assert 100_000 / 300 < len(losses(file.path)) < 3000
    assert ["slower than the training" in sentence for sentence in complaints] == [True]


# ---- disks that fail ----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(create, complaints, tmp_path):
    """Where no folder can be made, that is said once and the run lives in memory, also after it was closed."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    file = create(tmp_path / "file" / "runs", kept=300)
    for step in range(2000):
        file.write_row("model", step, "cheap", {"loss": float(step)})
    before = file.read()
    file.close()
    after = file.read()

    assert file.path is None
    assert file.is_in_memory
    assert 2000 == before.histories[0].num_steps == after.histories[0].num_steps
    assert 1 == len(complaints)
    assert "kept in memory" in complaints[0]


def test_a_run_in_memory_on_purpose(create, complaints, tmp_path):
    """`in_memory` makes no folder and no complaint, and its thread ends when nobody holds it any more."""
    file = RunFile.create(tmp_path / "runs", meta={}, in_memory=True)
    file.write_row("model", 0, "cheap", {"loss": 1.0})
    file.close()
    thread = file._thread

    assert [1.0] == file.read().histories[0]["loss"].values.tolist()
    assert not (tmp_path / "runs").exists()
    del file
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_read_only_folder(tmp_path):
    """Where the folder may not be written, that is said once and the program goes on with its run in memory."""
    script = """
    told = []
    file = RunFile.create(Path(sys.argv[1]) / "runs", meta={}, on_failure=told.append)
    file.write_row("model", 0, "cheap", {"loss": 1.0})
    print(file.path, file.read().histories[0].num_steps, *told)
    """
    with world_readable_folder() as folder:
        folder.chmod(0o555)
        out = output(python(UNPRIVILEGED + textwrap.dedent(script), folder))

    assert out.startswith("None 1 ")
    assert 1 == out.count("kept in memory")


@contextmanager
def world_readable_folder():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# No file mode stops root, who therefore becomes nobody once everything is imported.
UNPRIVILEGED = """
if os.geteuid() == 0:
    os.setuid(65534)
"""


FULL = """
import resource
told = []
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
file = RunFile.create(Path(sys.argv[1]), meta={}, on_failure=told.append)
for step in range(3000):
    file.write_row("model", step, "cheap", {name: float(step) for name in ("loss", "loss_scale", "clip_factor")})
    if step % 100 == 0:
        file.flush()
(history,) = file.read().histories
file.close()
(history,) = file.read().histories
print(len(history["loss"]), history["loss"].values.sum() == sum(range(3000)), len(told), told)
"""


@pytest.mark.parametrize("size", [0, 10_000, 100_000, 150_000], ids=lambda size: f"{size}-bytes-left")
def test_a_full_disk(tmp_path, size):
    """A disk that is or becomes full is told once; training goes on, and the run is complete in memory."""
    out = output(python(FULL, tmp_path, size))

    assert out.startswith("3000 True 1 ")
    assert "kept in memory" in out


def test_a_deleted_folder(create, complaints):
    """When somebody deletes the folder of a run, that is told once, and the run goes on in memory."""
    file = create()
    file.write_row("model", 0, "cheap", {"loss": 1.0})
    file.flush()
    shutil.rmtree(file.path)
    for step in range(1, 10):
        file.write_row("model", step, "cheap", {"loss": 1.0})
        file.flush()

    assert 10 == file.read().histories[0].num_steps
    assert 1 == len(complaints)
    assert "kept in memory" in complaints[0]


def test_a_failing_disk_under_a_run_too_large_for_memory(create, complaints, monkeypatch):
    """A run too large to go on in memory stops there: said once, nothing piles up, and what was written can be read."""
    monkeypatch.setattr(_record, "_LARGEST_IN_MEMORY", 1000)
    file = create()
    file.write_row("model", 0, "cheap", {"loss": 1.0})
    file.flush()
    shutil.rmtree(file.path)
    file.write_row("model", 1, "cheap", {"loss": 1.0})
    file.flush()
    file.write_row("model", 2, "cheap", {"loss": 1.0})

    assert 0 == len(file._pending)
    assert [0] == file.read().histories[0]["loss"].steps.tolist()
    assert 1 == len(complaints)
    assert "nothing is recorded" in complaints[0]


def test_complaining_may_fail(create, tmp_path):
    """An `on_failure` that raises disturbs nobody."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    file = create(tmp_path / "file", on_failure=lambda sentence: 1 / 0)
    file.write_row("model", 0, "cheap", {"loss": 1.0})

    assert 1 == file.read().histories[0].num_steps


# ---- old steps become fewer ---------------------------------------------------------------------------------------


def naive_merge(values, statistic):
    """What ten readings of one column become."""
    known = sorted(v for v in values if not math.isnan(v))
    if statistic in {"loss_nonfinite", "grad_nonfinite", "skipped"}:
        total = sum(known) if known else NAN
        return {"minimum": min(known, default=NAN), "maximum": max(known, default=NAN), "total": total}
    middle = known[(len(known) - 1) // 2] if known else NAN
    return {"minimum": min(known, default=NAN), "median": middle, "maximum": max(known, default=NAN)}


readings = st.floats(-1e6, 1e6, width=32) | st.sampled_from([NAN, INF, -INF, 0.0])
counts = st.integers(0, 1000).map(float) | st.just(NAN)


@given(
    arrays(np.float64, (20, 3), elements=readings),
    arrays(np.float64, (20, 3), elements=counts),
    st.lists(st.integers(0, 3), min_size=20, max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_merging_agrees_with_a_naive_one(norms, nonfinite, widths, has_count):
    """Ten rows become minimum, median and maximum, counts minimum, maximum and total, column by column without NaN.

    Rows may have fewer columns than later ones, and may lack a statistic; a span in which none has it lacks it, too.
    """
    layouts, packed = {}, []
    for i in range(20):
        row = {("grad_norm", "value"): norms[i : i + 1, : widths[i]]}
        if has_count[i]:
            row["grad_nonfinite", "value"] = nonfinite[i : i + 1]
        layout, (blob,) = encode(row)
        number = next((n for n, known in layouts.items() if known == layout), len(layouts))
        layouts[number] = layout
        packed.append((i, 1, 2 * i, 2 * i + 1, number, blob))
    merged = merge(Rows.of(packed), layouts)

    assert [(0, 19), (20, 39)] == [(first, last) for first, last, _, _ in merged]
    for span, (first, last, layout, blob) in enumerate(merged):
        found = decode(Rows.of([(0, 1, first, last, 0, blob)]), {0: layout})
        part = range(10 * span, 10 * span + 10)
        expected = {}
        for column in range(max(widths)):
            values = [norms[i, column] if column < widths[i] else NAN for i in part]
            for fold, value in naive_merge(values, "grad_norm").items():
                expected.setdefault(("grad_norm", fold), []).append(value)
        for column in range(3):
            values = [nonfinite[i, column] for i in part if has_count[i]]
            for fold, value in naive_merge(values, "grad_nonfinite").items() if values else ():
                expected.setdefault(("grad_nonfinite", fold), []).append(value)
        expected = (
            expected
            if max(widths)
            else {**expected, **{("grad_norm", f): [] for f in ("minimum", "median", "maximum")}}
        )
        actual = {(name, fold): pieces[0][1][0].tolist() for (_, name, fold), pieces in found.items()}
        assert set(expected) == set(actual)
        for key, values in expected.items():
            assert np.array_equal(values, actual[key], equal_nan=True), key


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """(raw arrays, run, envelopes) of 6000 steps of which 100 are kept as they are."""
    rng = np.random.default_rng(0)
    raw = {
        "loss": rng.normal(size=6000),
        "skipped": (rng.random(6000) < 0.01).astype(float),
        "loss_nonfinite": np.zeros(6000),
        "grad_norm": rng.lognormal(size=(6000, 3)).astype(np.float32).astype(float),
        "grad_nonfinite": np.zeros((6000, 3)),
    }
    raw["loss"][17], raw["loss_nonfinite"][17], raw["grad_norm"][17, 1], raw["grad_nonfinite"][17, 1] = NAN, 1, NAN, 5
    raw["grad_norm"][200:400, 2] = NAN
    file = RunFile.create(tmp_path_factory.mktemp("runs"), meta={}, kept=100)
    file.add_parameters("model", [Parameter(name=name) for name in "abc"])
    for step in range(6000):
        file.write_row("model", step, "cheap", {name: values[step] for name, values in raw.items()})
        file.write_profile("model", step, "call_signal_norm", "cell", raw["grad_norm"][step])
        if step % 1000 == 0:
            file.flush()
    file.close()
    return raw, read_run(file.path).histories[0], read_envelopes(file.path)["model"], file.path


def test_the_last_steps_stay_as_they_are(long_run):
    """However long the run, each of the last `kept` steps is there, unmerged."""
    raw, history, envelopes, _ = long_run
    for name, values in raw.items():
        assert list(range(5900, 6000)) == history[name].steps[-100:].tolist()
        assert np.array_equal(values[-100:], history[name].values[-100:], equal_nan=True)
        assert envelopes[name].last[-1] < 5900


def test_spans_are_powers_of_ten_without_gaps(long_run):
    """Merged steps follow each other without gap or overlap, ten, a hundred, a thousand at a time, longest first."""
    _, history, envelopes, _ = long_run
    for name, envelope in envelopes.items():
        lengths = envelope.last - envelope.first + 1
        assert 0 == envelope.first[0]
        assert (envelope.first[1:] == envelope.last[:-1] + 1).all()
        assert {10, 100} <= set(lengths.tolist()) <= {10, 100, 1000, 10_000}
        assert (np.diff(lengths) <= 0).all()
        assert envelope.last.tolist() == history[name].steps[: len(envelope.last)].tolist()


def test_envelopes_bound_what_was_merged(long_run):
    """Minimum, maximum and total of a span are those of its steps, on every level."""
    raw, _, envelopes, _ = long_run
    for name, envelope in envelopes.items():
        for i, (first, last) in enumerate(zip(envelope.first, envelope.last, strict=True)):
            columns = np.atleast_2d(raw[name][first : last + 1].T)
            expected = [naive_merge(column.tolist(), name) for column in columns]
            for fold in ("minimum", "maximum", "total"):
                bound = getattr(envelope, fold)
                if bound is not None or fold in expected[0]:
                    found = np.atleast_1d(bound[i])
                    assert np.array_equal([e[fold] for e in expected], found, equal_nan=True), (name, fold, first)


def test_series_show_medians_of_merged_steps(long_run):
    """In a series a span stands as the lower median of its steps, and a hundred as the median of ten medians."""
    raw, history, envelopes, _ = long_run

    def median(first, last):
        if last - first == 9:
            parts = raw["loss"][first : last + 1].tolist()
        else:
            size = (last - first + 1) // 10
            parts = [median(start, start + size - 1) for start in range(first, last + 1, size)]
        return naive_merge(parts, "loss")["median"]

    spans = list(zip(envelopes["loss"].first.tolist(), envelopes["loss"].last.tolist(), strict=True))
    assert [median(first, last) for first, last in spans] == history["loss"].values[: len(spans)].tolist()


def test_an_old_fault_is_never_lost(long_run):
    """One non-finite reading in step 17 is still seen after thousands of steps, and skipped steps still add up."""
    raw, history, _, _ = long_run

    assert 1 == history["loss_nonfinite"].values.max() == history["loss_nonfinite"].values[0]
    assert [0, 5, 0] == history["grad_nonfinite"].values.max(axis=0).tolist()
    assert raw["skipped"].sum() == history["skipped"].values.sum()


def test_profiles_are_merged_too(long_run):
    """A layer's profile over calls keeps its last steps and medians of the rest, like any other reading."""
    _, history, _, _ = long_run
    profile = history.profiles["call_signal_norm"]["cell"]

    assert len(profile) < 600
    assert np.array_equal(history["grad_norm"].values, profile.values, equal_nan=True)


def test_merging_keeps_the_file_whole(long_run):
    """A file whose rows were merged many times passes SQLite's own check."""
    assert [("ok",)] == integrity(long_run[-1])


def test_a_run_file_stays_below_its_limit(create):
    """With wide rows the limit in bytes holds before the limit in rows is reached."""
    file = create(largest=2_500_000)
    file.add_parameters("model", [Parameter(name=str(i)) for i in range(200)])
    rng = np.random.default_rng(0)
    for step in range(10_000):  # 8 MB of readings
        file.write_row("model", step, "cheap", {"grad_norm": rng.random(200, dtype=np.float32)})
        if step % 200 == 0:
            file.flush()
    file.close()
    (history,) = read_run(file.path).histories

    assert (file.path / "run.db").stat().st_size < 3_000_000
    assert 10_000 == history.num_steps
    assert (np.diff(history["grad_norm"].steps[-300:]) == 1).all()


# ---- reading what is there ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good run file of 400 kB."""
    file = RunFile.create(tmp_path_factory.mktemp("whole"), meta={})
    file.add_parameters("model", [Parameter(name=str(i)) for i in range(50)])
    for step in range(1000):
        file.write_row("model", step, "cheap", {"loss": float(step), "grad_norm": np.full(50, step, np.float32)})
        if step == 500:
            file.flush()
    file.close()
    return (file.path / "run.db").read_bytes()


@pytest.fixture
def folder(tmp_path):
    """A run folder with whatever bytes."""

    def folder(content):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.db").write_bytes(content)
        return tmp_path / "run"

    return folder


def other_sqlite(statements):
    with tempfile.TemporaryDirectory() as place:
        with closing(sqlite3.connect(Path(place) / "x.db")) as connection:
            connection.executescript(statements)
        return (Path(place) / "x.db").read_bytes()


def newer(whole):
    """`user_version` is the big-endian number at byte 60 of an SQLite file."""
    return whole[:60] + (99).to_bytes(4, "big") + whole[64:]


UNREADABLE = {
    "empty": (lambda whole: b"", "is empty"),
    "text": (lambda whole: b"this is no database\n" * 1000, "not a database"),
    "another database": (lambda whole: other_sqlite("CREATE TABLE t (x)"), "not written by isograd"),
    "a newer schema": (newer, "newer isograd .schema 99"),
    "the first page": (lambda whole: whole[:4096], "cannot be read|damaged"),
    "half a header": (lambda whole: whole[:50], "not a database|not written by isograd"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_in_a_sentence(folder, whole, kind):
    """A file that holds no run raises RunUnreadable with one line that names the file and says what is wrong."""
    make, words = UNREADABLE[kind]
    path = folder(make(whole))

    with pytest.raises(RunUnreadable, match=words) as raised:
        read_run(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "unreadable" == list_runs(path.parent)[0].state


def test_where_there_is_no_run(tmp_path):
    """A path that does not exist and a folder without a run file raise RunNotFound."""
    with pytest.raises(RunNotFound, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunNotFound, match=r"has no run\.db"):
        read_run(tmp_path)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_truncated_file_gives_what_is_left(folder, whole, share):
    """Of a file cut short, the steps before the cut are read, right to the last number, and the damage is named."""
    run = read_run(folder(whole[: int(len(whole) * share)]))
    (history,) = run.histories
    rescued = len(history["loss"])

    assert "damaged" in run.damage
    assert share * 1000 - 200 < rescued < 1000
    assert (
        history["loss"].steps.tolist() == history["loss"].values.tolist() == history["grad_norm"].values[:, 7].tolist()
    )


@given(
    edits=st.lists(
        st.tuples(st.integers(0, 20_000) | st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=20
    )
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_escapes(whole, folder, edits):
    """Whatever bytes are overwritten, reading gives a run or raises RunUnreadable."""
    content = bytearray(whole)
    for place, byte in edits:
        content[place % len(content)] = byte
    path = folder(bytes(content))
    try:
        read_run(path)
    except RunUnreadable as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
    assert 1 == len(list_runs(path.parent))


@pytest.mark.parametrize("name", ["tier", "key"])
def test_a_column_that_damage_has_renamed(whole, folder, name):
    """One wrong letter in the file's own description of its tables is one sentence."""
    path = folder(whole.replace(f"{name} ".encode(), f"{name[:-1]}_ ".encode(), 1))
    with pytest.raises(RunUnreadable, match="cannot be read") as raised:
        read_run(path)
    assert "\n" not in str(raised.value)


END = {
    "closed": "file.close()",
    "without-its-journal": """
file.flush()
import sqlite3
sqlite3.connect(file.path / "run.db").execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
os.kill(os.getpid(), signal.SIGKILL)""",
    "with-a-journal": "file.flush(); os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("end", END)
def test_a_read_only_copy(tmp_path, end):
    """A run folder that may not be written, with or without the journal of a killed writer, gives all of its steps."""
    script = ENDLESS.replace("10**9", "400").replace("0.0005", "0") + END[end]
    process = python(script, tmp_path)
    process.communicate(timeout=60)
    read = "print(len(read_run(Path(sys.argv[1])).histories[0]['loss']), len(list_runs(Path(sys.argv[1]).parent)))"
    with world_readable_folder() as folder:
        copy = folder / "copy"
        copy.mkdir()
        for name in ("run.db", "run.db-wal"):
            if (the_only_run(tmp_path) / name).exists():
                shutil.copy(the_only_run(tmp_path) / name, copy)
        for path in copy.iterdir():
            path.chmod(0o444)
        copy.chmod(0o555)
        journal = copy / "run.db-wal"
        assert (end == "with-a-journal") == (journal.exists() and journal.stat().st_size > 0)
        out = output(python(UNPRIVILEGED + read, copy))
        copy.chmod(stat.S_IRWXU)

    assert "400 1\n" == out


def test_statistics_of_another_version_are_left_out(create):
    """A statistic that this version does not know is kept in the file and left out of the history."""
    file = create()
    file.write_row("model", 0, "cheap", {"loss": 1.0, "curvature": 2.0})

    assert {"loss"} == set(file.read().histories[0].series)
    with closing(sqlite3.connect(file.path / "run.db")) as connection:
        assert [("curvature",), ("loss",)] == connection.execute(
            "SELECT statistic FROM layouts ORDER BY statistic"
        ).fetchall()


def test_the_file_can_be_read_with_sqlite_alone(create):
    """The tables are those that the documentation names: names, events and the bytes of a reading need no isograd."""
    file = create(meta={"script": "train.py", "seed": 3})
    file.add_layers("model", [Layer(name="fc", kind="linear", shape=(8, 2))])
    file.write_row("model", 7, "cheap", {"loss": 0.5, "clip_factor": 2.0})
    file.write_event("model", Event(step=7, kind="loss-spike", data={"by": 3}))
    file.close()
    with closing(sqlite3.connect(file.path / "run.db")) as connection:
        run = connection.execute
        assert [("fc", "linear", "[8, 2]")] == run("SELECT name, kind, shape FROM layers").fetchall()
        assert [(3,)] == run("SELECT json_extract(data, '$.by') FROM events WHERE kind = 'loss-spike'").fetchall()
        assert [("3",)] == run("SELECT value FROM meta WHERE key = 'seed'").fetchall()
        ((blob,),) = run(
            'SELECT substr(readings, 1 + "offset", 8) FROM rows JOIN layouts USING (layout) '
            "WHERE step = 7 AND statistic = 'clip_factor'"
        ).fetchall()
        assert [2.0] == np.frombuffer(blob, "<f8").tolist()


def test_a_run_written_before_layers_had_a_type(create):
    """A file whose table of layers has no type of the output is read, the type left open."""
    file = create()
    file.add_layers("model", [Layer(name="fc", kind="linear", shape=(8, 2), dtype="float16")])
    file.write_row("model", 0, "deep", {"output_rms": [0.5]})
    file.close()
    with closing(sqlite3.connect(file.path / "run.db")) as connection:
        connection.execute("ALTER TABLE layers DROP COLUMN dtype")
    (history,) = read_run(file.path).histories

    assert (Layer(name="fc", kind="linear", shape=(8, 2)),) == history.layers
    assert [[0.5]] == history["output_rms"].values.tolist()


# ---- finding runs -------------------------------------------------------------------------------------------------


def test_runs_are_listed_oldest_first(create, tmp_path):
    """A list of runs tells of each when it started, how far it came, of what, and how it ended."""
    first = create(meta={"script": "/x/b.py"})
    first.write_row("generator", 41, "cheap", {"loss": 1.0})
    first.write_row("critic", 7, "deep", {"output_rms": []})
    first.set_meta(state="finished")
    first.close()
    second = create(meta={"script": "a.py"})
    second.flush()
    third = create(meta={"script": "c.py", "state": "failed"})
    (tmp_path / "no run").mkdir()
    runs = list_runs(tmp_path)

    assert [first.id, second.id, third.id] == [run.id for run in runs]
    assert [42, 0, 0] == [run.steps for run in runs]
    assert ["finished", "running", "failed"] == [run.state for run in runs]
    assert (("generator", "critic"), "/x/b.py", first.path) == (runs[0].subjects, runs[0].script, runs[0].path)
    assert runs[0].started < runs[1].started < runs[2].started
    assert [] == list_runs(tmp_path / "nowhere")


def test_a_run_is_found_by_path_id_beginning_or_as_the_latest(create, tmp_path, monkeypatch):
    """A run is found by its folder, its file, its id, a beginning that no other shares; without a name, the latest."""
    first, second = create(meta={"script": "a.py"}), create(meta={"script": "b.py"})
    monkeypatch.chdir(tmp_path)

    for name in (str(first.path), str(first.path / "run.db"), first.id, first.id[:-2], first.path.name):
        assert first.path == find_run(name, tmp_path).absolute()
    assert second.path == find_run(None, tmp_path)
    with pytest.raises(RunNotFound, match="several"):
        find_run(first.id[:3], tmp_path)
    with pytest.raises(RunNotFound, match="'nothing'"):
        find_run("nothing", tmp_path)
    with pytest.raises(RunNotFound, match="no run has been recorded"):
        find_run(None, tmp_path / "empty")


def test_a_later_process_with_the_same_number_is_not_the_writer(create, tmp_path):
    """A run whose process number now belongs to another process has stopped; one of another machine is believed."""
    create(meta={"script": "a.py", "pid": os.getppid(), "pid_started": 1})
    create(meta={"script": "b.py", "pid": 2**22 + 1})
    create(meta={"script": "c.py", "pid": 2**22 + 1, "host": "elsewhere"})
    create(meta={"script": "d.py"})

    assert ["stopped", "stopped", "running", "running"] == [run.state for run in list_runs(tmp_path)]


def test_a_process_that_ended_and_was_not_reaped_has_stopped(tmp_path):
    """A killed process that its parent has not waited for yet does not count as running."""
    process = python(ENDLESS, tmp_path)
    assert "ready\n" == process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    end = time.time() + 5
    while list_runs(tmp_path)[0].state == "running" and time.time() < end:
        time.sleep(0.01)
    state = list_runs(tmp_path)[0].state
    process.communicate()

    assert "stopped" == state
