"""What the page is told of a run: every number against a naive one, JSON that any parser reads, odd runs."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isograd
from isograd._bins import Readings, even_in_number, even_in_steps, fold_line, fold_map
from isograd._diagnose import diagnose
from isograd._fix_file import read_fix, write_fix
from isograd._history import Event, History, Layer, Parameter, Series
from isograd._page_data import LINES, MAPS, page_data, read_page
from isograd._predicted_signal import predicted_signal
from isograd._record import RunFile
from isograd._report import verdict
from isograd._runs import Run, read_all, read_envelopes, read_run
from isograd._statistics import STATISTICS
from isograd._terminal import render
from isograd._wording import occurrence


def page_of(*histories, columns=400, meta=None, **more):
    run = Run(path="runs/x", id="x", meta=meta or {"script": "train.py"}, histories=histories)
    return page_data(run, diagnose(histories, run="x"), columns=columns, **more)


def unpacked(array):
    """A plain list or a typed array as float64."""
    if isinstance(array, list):
        return np.array([[math.nan if v is None else v for v in row] if isinstance(row, list) else
                         math.nan if row is None else row for row in array], dtype=float)  # fmt: skip
    values = np.frombuffer(base64.b64decode(array["bdata"]), f"<{array['dtype']}").astype(float)
    return values.reshape([int(n) for n in array["shape"].split(",")]) if "shape" in array else values


def strict(value):
    """What a browser's JSON.parse gives: there, NaN is an error."""
    return json.loads(json.dumps(value, allow_nan=False))


def lines_of(line):
    return {name: unpacked(values) for name, values in line.items()}


def losses(values, steps=None, **series):
    steps = np.arange(len(values)) if steps is None else np.asarray(steps)
    broken = np.isnan(values).astype(float)
    return History(series={"loss": Series(steps, values), "loss_nonfinite": Series(steps, broken), **series})


def wide(values, steps=None, *, statistic="signal_norm", counts=None, **more):
    """`values`: [steps, layers]."""
    values = np.asarray(values, dtype=float)
    steps = np.arange(len(values)) if steps is None else steps
    layers = tuple(Layer(name=f"net.{i}", kind="linear", position=i) for i in range(values.shape[1]))
    series = {statistic: Series(steps, values)}
    if counts is not None:
        series["signal_nonfinite"] = Series(steps, counts)
    return History(layers=layers, series=series, **more)


def middle(values):
    finite = values[np.isfinite(values)]
    return np.median(finite) if len(finite) else math.nan


# ---- bins -----------------------------------------------------------------------------------------------------------


@st.composite
def spans(draw):
    """(first, last) of readings: steps or merged spans, with holes between them."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 0, 0, 1, 7])), max_size=80))
    firsts, lasts, step = [], [], draw(st.integers(0, 5))
    for length, hole in lengths:
        firsts.append(step)
        lasts.append(step + length - 1)
        step += length + hole
    return np.array(firsts, dtype=np.int64), np.array(lasts, dtype=np.int64)


@given(spans(), st.integers(2, 40))
def test_bins_cover_all_steps_once(between, most):
    first, last = between
    for spread in (even_in_steps, even_in_number):
        bins = spread(first, last, most)

        assert len(bins.first) <= most
        assert bins.start[0] == 0
        assert bins.start[-1] == len(first)
        assert np.all(np.diff(bins.start) >= 0)
        assert np.all(bins.first[1:] > bins.last[:-1])
        for i in range(len(bins.first)):
            inside = slice(bins.start[i], bins.start[i + 1])
            assert bins.first[i] <= bins.last[i]
            assert np.all(first[inside] >= bins.first[i])
            assert np.all(last[inside] <= bins.last[i])
    steps = even_in_steps(first, last, most)
    if len(first):
        assert (steps.first[0], steps.last[-1]) == (first[0], last[-1])
        assert np.all(steps.first[1:] == steps.last[:-1] + 1)


@given(spans(), st.integers(2, 40))
def test_where_nothing_is_recorded_bins_are_empty_and_nowhere_else(between, most):
    first, last = between
    bins = even_in_steps(first, last, most)
    for i in range(len(bins.first)):
        touched = np.any((first <= bins.last[i]) & (last >= bins.first[i]))
        assert touched == (bins.start[i + 1] > bins.start[i])


def test_the_first_and_the_last_deep_reading_stand_alone():
    steps = np.unique(np.geomspace(1, 1e6, 5000).astype(np.int64))
    bins = even_in_number(steps, steps, 400)

    assert len(bins.first) == 400
    assert bins.first[0] == bins.last[0] == steps[0]
    assert bins.first[-1] == bins.last[-1] == steps[-1]


numbers = st.one_of(st.floats(-1e300, 1e300), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 70))
def test_lines_against_a_naive_one(values, most):
    values, steps = np.array(values), np.arange(len(values))
    readings = Readings(first=steps, last=steps, values=values, low=None, high=None, broken=~np.isfinite(values))
    bins = even_in_steps(steps, steps, most)
    line = fold_line(readings, bins)
    for i, (a, b) in enumerate(zip(bins.first, bins.last, strict=True)):
        part = values[a : b + 1]
        finite = part[np.isfinite(part)]
        assert np.allclose(line.middle[i], middle(part / 2) * 2, rtol=1e-12, equal_nan=True)
        assert line.broken[i] == len(part) - len(finite)
        if len(finite):
            assert (line.low[i], line.high[i]) == (finite.min(), finite.max())
            assert line.low[i] <= line.middle[i] <= line.high[i]
        else:
            assert math.isnan(line.low[i])
    assert line.broken.sum() == np.count_nonzero(~np.isfinite(values))


@given(st.integers(1, 50), st.integers(1, 5), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_maps_against_a_naive_one(rows, columns, most, seed):
    draw = np.random.default_rng(seed)
    values = draw.choice([1.0, 2.0, 5.0, -3.0, 1e-40, math.nan, math.inf], (rows, columns))
    steps = np.arange(rows)
    readings = Readings(first=steps, last=steps, values=values, low=None, high=None, broken=np.isinf(values))
    bins = even_in_number(steps, steps, most)
    middles, broken = fold_map(readings, bins)
    for i, (a, b) in enumerate(zip(bins.first, bins.last, strict=True)):
        for j in range(columns):
            assert np.allclose(middles[i, j], middle(values[a : b + 1, j]), equal_nan=True, atol=0)
    assert broken.sum() == np.isinf(values).sum()


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_a_short_line_is_told_as_it_was():
    line = page_of(losses([2.0, 1.5, math.nan, 1.0]))["subjects"][0]["lines"]["loss"]

    assert line == {
        "first": [0, 1, 2, 3],
        "last": [0, 1, 2, 3],
        "mid": [2.0, 1.5, None, 1.0],
        "nonfinite": [0, 0, 1, 0],
    }


def test_steps_that_were_not_recorded_break_the_line():
    line = page_of(losses([2.0, 1.5, 1.0], steps=[0, 1, 10]))["subjects"][0]["lines"]["loss"]

    assert line["first"] == [0, 1, 2, 10]
    assert line["last"] == [0, 1, 9, 10]
    assert line["mid"] == [2.0, 1.5, None, 1.0]
    assert line["nonfinite"] == [0, 0, 0, 0]


def test_a_long_line_is_rolled_up_to_what_a_naive_one_gives():
    values = np.random.default_rng(0).lognormal(size=5000)
    values[[0, 17, 4999]] = math.nan
    line = lines_of(page_of(losses(values))["subjects"][0]["lines"]["loss"])

    assert len(line["mid"]) == 400
    for first, last, mid, low, high, broken in zip(
        *(line[name] for name in ("first", "last", "mid", "low", "high", "nonfinite")), strict=True
    ):
        part = values[int(first) : int(last) + 1]
        assert mid == middle(part)
        assert (low, high) == (np.nanmin(part), np.nanmax(part))
        assert broken == np.isnan(part).sum()
    assert line["nonfinite"].sum() == 3


def test_a_range_of_steps_is_told_in_full():
    values = np.arange(5000.0)
    line = lines_of(page_of(losses(values), first=1000, last=1099)["subjects"][0]["lines"]["loss"])

    assert line["mid"].tolist() == list(range(1000, 1100))
    assert "low" not in line


def test_of_merged_steps_the_range_is_told(tmp_path):
    file = RunFile.create(tmp_path, meta={"script": "train.py"}, kept=100)
    values = np.random.default_rng(0).normal(size=3000)
    values[777] = 1e6
    for step, value in enumerate(values):
        file.write_row("model", step, "cheap", {"loss": value, "loss_nonfinite": 0.0})
    file.close()
    run, _ = read_all(file.path)
    assert len(run.histories[0]["loss"]) < 3000
    line = lines_of(read_page(file.path, {})["subjects"][0]["lines"]["loss"])

    assert line["high"].max() == 1e6
    assert line["low"].min() == values.min()
    assert line["first"][0] == 0
    assert line["last"][-1] == 2999
    assert np.all(line["low"] <= line["mid"])
    assert np.all(line["mid"] <= line["high"])
    detail = lines_of(read_page(file.path, {}, first=770, last=780)["subjects"][0]["lines"]["loss"])
    assert detail["first"][0] <= 770
    assert detail["last"][-1] >= 780
    assert detail["high"].max() == 1e6


def test_each_parameter_group_has_a_line_of_its_own():
    rates = Series([0, 1], [[0.1, 0.01], [0.2, 0.02]])
    lines = page_of(losses([1.0, 1.0], learning_rate=rates))["subjects"][0]["lines"]

    assert (lines["learning_rate[0]"]["mid"], lines["learning_rate[1]"]["mid"]) == ([0.1, 0.2], [0.01, 0.02])


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_a_map_says_which_layers_it_shows_and_where_values_were_not_finite():
    values = [[1.0, math.nan, math.nan], [2.0, math.nan, math.inf], [3.0, math.nan, math.nan]]
    counts = [[0.0, math.nan, 0.0], [0.0, math.nan, 0.0], [0.0, math.nan, 5.0]]
    shown = page_of(wide(values, counts=counts))["subjects"][0]["maps"]["signal_norm"]

    assert shown["rows"] == [0, 2]
    assert shown["values"] == [[1.0, 2.0, 3.0], [None, None, None]]
    assert shown["nonfinite"] == [[1, 1, 1], [1, 2, 1]]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(2, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_any_map_is_json_and_counts_what_was_not_finite(steps, layers, columns, seed):
    draw = np.random.default_rng(seed)
    values = draw.choice([1e-50, 1e-9, 1.0, 1e45, 0.0, math.nan, math.inf], (steps, layers))
    counts = np.where(np.isnan(values), draw.integers(0, 2, values.shape) * 7.0, 0.0)
    told = strict(page_of(wide(values, counts=counts), columns=columns))
    shown = told["subjects"][0]["maps"].get("signal_norm")
    broken = np.isinf(values) | (counts > 0)
    if shown is None:
        assert np.isnan(values).all()
        assert not broken.any()
        return

    cells = unpacked(shown["values"])
    assert cells.shape[1] == len(unpacked(shown["first"])) if len(shown["rows"]) else True
    assert sum(count for *_, count in shown["nonfinite"]) == broken.sum()
    assert set(np.flatnonzero((np.isfinite(values) | broken).any(axis=0))) == set(shown["rows"])
    for column, (first, last) in enumerate(zip(unpacked(shown["first"]), unpacked(shown["last"]), strict=True)):
        naive = [middle(values[int(first) : int(last) + 1, row]) for row in shown["rows"]]
        assert np.allclose(cells[:, column], naive, rtol=1e-6, atol=0, equal_nan=True)


def test_readings_beyond_single_precision_stay_what_they_are():
    values = np.full((10, 10), 1e-60)
    shown = page_of(wide(values))["subjects"][0]["maps"]["signal_norm"]

    assert shown["values"]["dtype"] == "f8"
    assert (unpacked(shown["values"]) == 1e-60).all()
    assert page_of(wide(np.ones((10, 10))))["subjects"][0]["maps"]["signal_norm"]["values"]["dtype"] == "f4"


def test_a_thousand_layers_have_fewer_columns_and_no_fewer_rows():
    signal = Series(np.arange(3000), np.ones((3000, 1000)))
    layers = tuple(Layer(name=f"net.{i}", kind="linear", position=i) for i in range(1000))
    series = dict.fromkeys(("signal_norm", "output_rms", "saturation", "dead_fraction", "activation_slope"), signal)
    told = page_of(History(layers=layers, series=series))

    maps = told["subjects"][0]["maps"].values()
    assert all(len(shown["rows"]) == 1000 for shown in maps)
    assert all(unpacked(shown["values"]).shape == (1000, len(unpacked(shown["first"]))) for shown in maps)
    assert len(json.dumps(told)) < 15e6
    assert told["subjects"][0]["depth"]["layers"] == list(range(1000))


def test_gradients_are_told_by_parameter():
    parameters = (Parameter(name="a.weight", layer="a", shape=(2, 2)), Parameter(name="a.bias", layer="a", shape=(2,)))
    history = History(
        layers=(Layer(name="a", kind="linear", position=0),),
        parameters=parameters,
        series={"grad_norm": Series([0], [[1.0, 2.0]])},
    )
    subject = page_of(history)["subjects"][0]

    assert subject["maps"]["grad_norm"]["axis"] == "parameter"
    assert subject["layers"][0]["parameters"] == ["a.weight", "a.bias"]
    assert [parameter["layer"] for parameter in subject["parameters"]] == ["a", "a"]


# ---- events, and what is missing ------------------------------------------------------------------------------------


def test_events_are_sentences_and_many_of_a_kind_are_one():
    events = [Event(step=i, kind="bad-step-skipped", data={"why": "gradients hold NaN"}) for i in range(1000)]
    events += [Event(step=5, kind="never-heard-of", layer="<script>", data={"a": math.nan, "b": object()})]
    told = strict(page_of(History(events=tuple(events), series={"loss": Series([0], [1.0])})))["subjects"][0]["events"]

    assert len(told) == 102
    assert [event["step"] for event in told] == sorted(event["step"] for event in told)
    assert told[-1]["text"].startswith("900 more of the same kind until step 999.")
    assert {event["level"] for event in told} == {"info", "warning"}
    assert any(event["layer"] == "<script>" for event in told)


@pytest.mark.parametrize(
    "memory, told",
    [
        (None, "Each of the guard's snapshots takes "),
        (64, "Not guarded: A snapshot takes "),
    ],
)
def test_what_a_guard_says_of_its_snapshots(tmp_path, memory, told):
    """Bytes are told as megabytes, and a sentence that a sentence ends with has one full stop."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with isograd.watch(model, optimizer, out=tmp_path, guard=isograd.Guard(rewind=True, memory=memory)) as run:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    (history,) = read_run(run.path).histories
    (text,) = [occurrence(e)[1] for e in history.events if e.kind in ("snapshots", "guard-refused")]

    assert text.startswith(told)
    assert text.endswith(".")
    assert not text.endswith("..")
    sizes = [float(size) for size in re.findall(r"([\d.]+) MB", text)]
    assert memory or sizes[0] < 1 < sizes[1] < 1e6


KINDS = (
    "bad-step", "bad-step-clipped", "bad-step-skipped", "bad-step-stopped", "clip-after-step", "exception",
    "freeze-attribute", "guard-detached", "guard-gave-up", "guard-refused", "guard-relearned", "interrupted",
    "loss-graph", "nonfinite", "requires-grad", "rewound", "snapshots", "step-skipped", "treatment-applied",
    "treatment-refused", "treatment-undone", "unfinished-step", "watch-detached", "something-new",
)  # fmt: skip
FACTS = (
    "bytes", "change", "code", "count", "detail", "file", "left", "limit", "line", "loss_scale", "message", "module",
    "num_rows", "operation", "operations", "parameter", "place", "reason", "rows", "steps", "type", "value", "why",
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FACTS), anything, max_size=6))
@settings(max_examples=300)
def test_whatever_an_event_says_it_is_a_sentence(kind, facts):
    level, text = occurrence(Event(step=3, kind=kind, data=facts))

    assert level in ("info", "warning", "error")
    assert text


def test_what_was_not_recorded_is_said():
    history = History(series={"loss": Series([0], [1.0])}, unmeasured={"signal_norm": "compiled modules hide it."})
    missing = {one["statistic"]: one["why"] for one in page_of(history)["subjects"][0]["missing"]}

    assert missing["signal_norm"] == "compiled modules hide it."
    assert missing["saturation"] == "No deep step was read in this run."
    assert "loss" not in missing


def test_every_statistic_that_is_shown_is_explained():
    nothing = Series([0], np.empty((1, 0)))
    history = losses([1.0], global_grad_norm=Series([0], [math.nan]), grad_norm=nothing, grad_nonfinite=nothing)
    told = page_of(history)
    missing = {one["statistic"] for one in told["subjects"][0]["missing"]}

    assert set(told["explain"]) == {"loss"} | missing
    assert "global_grad_norm" in missing
    assert told["explain"]["loss"]["meaning"] == STATISTICS["loss"].meaning
    assert {STATISTICS[name].axis for name in LINES} == {"step", "group"}
    assert {STATISTICS[name].axis for name in MAPS} == {"layer", "parameter"}


# ---- odd runs -------------------------------------------------------------------------------------------------------


def test_a_run_without_a_step_says_so():
    told = strict(page_of(meta={"state": "failed"}))

    assert told["run"]["steps"] == 0
    assert told["verdict"]["headline"] == "This run holds no optimizer step: there is nothing to diagnose."
    assert told["verdict"]["healthy"] is None
    assert told["subjects"] == []


def test_one_step_of_one_layer():
    told = strict(page_of(wide([[1.0]])))["subjects"][0]

    assert told["maps"]["signal_norm"] == {
        "axis": "layer", "rows": [0], "first": [0], "last": [0], "values": [[1.0]], "nonfinite": [],
    }  # fmt: skip
    assert told["depth"] == {"layers": [0], "prediction": None}


@given(st.text(max_size=20), st.text(max_size=20))
def test_names_come_through_as_they_are(name, subject):
    history = wide([[1.0]], subject=subject)
    history = History(
        subject=subject, layers=(Layer(name=name, kind="<script>", position=0),), series=dict(history.series)
    )
    told = strict(page_of(history, meta={"script": name, "odd": {"nested": [math.inf]}}))

    assert told["subjects"][0]["layers"][0]["name"] == name
    assert told["subjects"][0]["name"] == subject
    assert told["run"]["script"] == name


def test_two_subjects_are_told_apart():
    told = page_of(*(wide([[1.0, 2.0]], subject=name) for name in ("D", "G")))

    assert [subject["name"] for subject in told["subjects"]] == ["D", "G"]


def test_a_damaged_file_shows_the_rest(tmp_path):
    file = RunFile.create(tmp_path, meta={"script": "train.py"})
    for step in range(4000):
        file.write_row("model", step, "cheap", {"loss": 1.0, "loss_nonfinite": 0.0})
    file.close()
    database = file.path / "run.db"
    whole = database.read_bytes()
    database.write_bytes(whole[: len(whole) // 2])
    told = strict(read_page(file.path, {}))

    assert "is damaged" in told["run"]["damage"]
    assert len(unpacked(told["subjects"][0]["lines"]["loss"]["mid"]))


def test_a_long_file_is_thinned_and_says_so(tmp_path):
    """Step statistics in full, layers in one row of several; the rows at both ends and odd ones always."""
    file = RunFile.create(tmp_path, meta={"script": "train.py"})
    file.add_parameters("model", [Parameter(name=f"p.{i}", shape=(2, 2)) for i in range(200)])
    norms = np.random.default_rng(0).lognormal(size=(1000, 200)).astype(np.float32)
    for step in range(1000):
        counts = np.zeros(200)
        counts[3] = step == 500
        row = {"loss": step, "loss_nonfinite": 0.0, "grad_norm": norms[step], "grad_nonfinite": counts}
        file.write_row("model", step, "cheap", row)
    file.close()
    run, _ = read_all(file.path, most=200_000)
    (history,), (whole,) = run.histories, read_run(file.path).histories

    assert run.thinned > 3
    assert history["loss"].values.tolist() == list(range(1000))
    assert history["grad_nonfinite"].steps.tolist() == list(range(1000))
    assert history["grad_nonfinite"].values.sum() == 1
    steps = history["grad_norm"].steps
    assert len(steps) < 1000 // 3 + 60
    assert {*range(24), *range(976, 1000), 500} <= {*steps.tolist()}
    assert np.array_equal(history["grad_norm"].values, whole["grad_norm"].values[steps])
    facts = page_data(run, diagnose(run.histories, run=run.id))["verdict"]["facts"]
    assert facts[-1].startswith(
        f"This run is long: of what was read in layers and parameters, one reading in {run.thinned}"
    )
    assert read_all(file.path)[0].thinned == 1


def test_reading_everything_at_once_reads_the_same(tmp_path):
    file = RunFile.create(tmp_path, meta={"script": "train.py"}, kept=100)
    file.add_parameters("model", [Parameter(name="p", shape=(2,))])
    for step in range(1500):
        row = {"loss": step / 3, "learning_rate": [0.1, step], "grad_norm": [1.0 / (1 + step)], "grad_nonfinite": [0.0]}
        file.write_row("model", step, "cheap", row)
    file.close()
    (run, envelopes), again, spans_ = read_all(file.path), read_run(file.path), read_envelopes(file.path)
    for name, series in again.histories[0].series.items():
        assert np.array_equal(run.histories[0][name].steps, series.steps)
        assert np.array_equal(run.histories[0][name].values, series.values, equal_nan=True)
    assert set(envelopes["model"]) == {"loss", "learning_rate"}
    assert np.array_equal(envelopes["model"]["loss"].maximum, spans_["model"]["loss"].maximum)


# ---- real runs ------------------------------------------------------------------------------------------------------


def chain(activation, *, depth=10, width=32):
    torch.manual_seed(0)
    layers = [nn.Linear(16, width), activation()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def train(root, model, *, steps=40, spoil=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(1)
    with isograd.watch(model, optimizer, out=root) as watch:
        for step in range(steps):
            inputs = torch.randn(64, 16, generator=draw)
            if step == spoil:
                inputs[0, 0] = math.nan
            loss = nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watch.path


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    return train(tmp_path_factory.mktemp("sick"), chain(nn.Sigmoid))


def test_the_page_says_what_the_terminal_says(sick):
    run = read_run(sick)
    found = diagnose(run.histories, run=run.id, overhead=run.meta["overhead"])
    told = strict(read_page(sick, {}))
    said = " ".join(render(verdict(found, run.histories), width=2000).split())

    assert f"isograd: {told['verdict']['headline'][:1].lower()}{told['verdict']['headline'][1:]}" in said
    assert not told["verdict"]["healthy"]
    first = told["verdict"]["causes"][0]
    assert first["name"] in told["verdict"]["headline"]
    assert first["message"] == found.causes[0].finding.message
    assert first["why"].startswith(first["name"])
    assert {"name", "first_step"} == set(first["symptoms"][0])
    assert told["treatments"][0]["code"]
    assert told["run"]["versions"]["torch"] == str(torch.__version__)
    assert [one["statistic"] for one in told["subjects"][0]["missing"]] == ["dead_fraction"]


def test_theory_predicts_the_signal_of_a_plain_chain(sick):
    """Ten sigmoid layers lose eight decades, of which theory may miss a tenth of a decade for each layer."""
    subject = read_page(sick, {})["subjects"][0]
    prediction, shown = subject["depth"]["prediction"], subject["maps"]["signal_norm"]
    measured = [unpacked(shown["values"])[shown["rows"].index(i), 0] for i in subject["depth"]["layers"]]

    assert prediction["step"] == 0
    assert measured[-1] / measured[0] > 1e6
    assert np.abs(np.log10(prediction["values"]) - np.log10(measured)).max() < 0.5


@pytest.mark.parametrize("kind", ["shortcut", "dropout", "leaky", "norm", "trained"])
def test_theory_says_nothing_where_the_run_does_not_tell_enough(tmp_path, kind):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    inner = {
        "shortcut": Shortcut(),
        "dropout": nn.Dropout(0.1),
        "leaky": nn.LeakyReLU(0.3),
        "norm": nn.LayerNorm(32),
        "trained": nn.Tanh(),
    }[kind]
    model = nn.Sequential(nn.Linear(16, 32), inner, nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    (history,) = read_run(train(tmp_path, model, steps=2)).histories
    columns = np.flatnonzero([layer.kind == "linear" for layer in history.layers])
    if kind == "trained":
        assert predicted_signal(history, columns) is not None
        later = {name: Series(series.steps + 5, series.values) for name, series in history.series.items()}
        history = History(layers=history.layers, parameters=history.parameters, series=later, events=history.events)

    assert predicted_signal(history, columns) is None


def test_nan_at_the_first_step(tmp_path):
    told = strict(read_page(train(tmp_path, chain(nn.Tanh, depth=2), steps=5, spoil=0), {}))
    subject = told["subjects"][0]

    assert told["verdict"]["causes"][0]["name"] == "nonfinite-inputs"
    assert subject["lines"]["loss"]["mid"] == [None] * 5
    assert subject["lines"]["loss"]["nonfinite"] == [1] * 5
    assert subject["lines"]["global_grad_norm"]["nonfinite"] == [1] * 5
    assert subject["maps"]["signal_norm"]["nonfinite"]
    assert "NaN or Inf at step 0, in the input" in " ".join(event["text"] for event in subject["events"])
    assert subject["depth"]["prediction"] is None


# ---- fix.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 99, "trials": []}', '{"schema": 1}', "\x00"])
def test_what_is_no_record_of_a_fix_is_none(tmp_path, text):
    (tmp_path / "fix.json").write_text(text)

    assert read_fix(tmp_path) is None
    assert read_fix(tmp_path / "nowhere") is None


def test_a_record_of_a_fix_comes_back_and_is_shown(tmp_path):
    write_fix(tmp_path, {"trials": [{"effect": {"value": 0.5}}], "best": 0})
    told = read_fix(tmp_path)

    assert told == {"schema": 1, "trials": [{"effect": {"value": 0.5}}], "best": 0}
    assert page_of(losses([1.0]), fix=told)["fix"] == told
    assert [path.name for path in tmp_path.iterdir()] == ["fix.json"]
