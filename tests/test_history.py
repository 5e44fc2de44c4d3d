"""History and Series: shapes that must agree, what counts as measured, and that nobody changes what was read."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._history import Event, History, Layer, Parameter, Series

NAN = math.nan
LAYERS = (Layer(name="a"), Layer(name="b"))


def test_a_series_takes_anything_like_an_array():
    """Steps become integers and values float64, whatever they were given as."""
    series = Series([0, 5], np.float32([[1, 2], [3, NAN]]))

    assert (np.int64, np.float64) == (series.steps.dtype, series.values.dtype)
    assert (2, (2, 2)) == (len(series), series.values.shape)


@pytest.mark.parametrize(("steps", "values"), [([0, 1], [1.0]), ([0], 1.0), ([[0], [1]], [[1.0], [2.0]]), ([], [1.0])])
def test_steps_and_values_must_agree(steps, values):
    """A series with another number of steps than of rows is refused with both shapes in the message."""
    with pytest.raises(ValueError, match=r"steps \(.*\) and values \(.*\) must agree"):
        Series(steps, values)


def test_readings_cannot_be_changed():
    """Rules share arrays, so writing to one raises."""
    series = Series([0], [1.0])
    for array in (series.steps, series.values):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9


@given(st.lists(st.integers(0, 50), unique=True).map(sorted), st.integers(-1, 51))
def test_a_row_is_found_by_its_step(steps, step):
    """`at` gives the row that was read at exactly that step, and None where none was."""
    row = Series(steps, [float(s) for s in steps]).at(step)

    assert (float(step) if step in steps else None) == row


@pytest.mark.parametrize(
    ("statistic", "values"),
    [("output_rms", [[1.0]]), ("output_rms", [1.0]), ("grad_norm", [[1.0, 2.0]]), ("signal_norm", [[1.0, 2.0, 3.0]])],
)
def test_columns_must_match_layers_and_parameters(statistic, values):
    """A statistic of layers or parameters has one column for each of them; anything else is refused by name."""
    with pytest.raises(ValueError, match=statistic):
        History(layers=LAYERS, parameters=(Parameter(name="w"),), series={statistic: Series([0], values)})


def test_a_name_that_is_no_statistic_is_refused():
    """A series under a name that nobody defined is refused."""
    with pytest.raises(ValueError, match="'curvature' is not a statistic"):
        History(series={"curvature": Series([0], [1.0])})


@pytest.mark.parametrize(
    ("values", "is_measured"),
    [([], False), ([NAN, NAN], False), ([NAN, 0.0], True), ([math.inf], True)],
    ids=["empty", "only-nan", "one-reading", "infinite"],
)
def test_a_statistic_is_there_when_it_has_a_reading(values, is_measured):
    """A statistic counts as measured when one reading is not NaN; one that was never recorded does not."""
    history = History(series={"loss": Series(range(len(values)), values)})

    assert is_measured == ("loss" in history)
    assert "skipped" not in history


def test_a_statistic_that_was_never_recorded_raises():
    """Asking for a series that is not there raises KeyError."""
    with pytest.raises(KeyError):
        History()["loss"]


def test_num_steps_counts_to_the_last_step_of_any_series():
    """The number of steps is one more than the last step in any series, and 0 in an empty history."""
    loss, output = Series([0, 3], [1.0, 2.0]), Series([7], [[1.0, 2.0]])

    assert 8 == History(layers=LAYERS, series={"loss": loss, "output_rms": output}).num_steps
    assert 4 == History(series={"loss": loss, "skipped": Series([], [])}).num_steps
    assert 0 == History().num_steps


def test_events_of_a_kind_keep_their_order():
    """Events are told apart by kind, in the order in which they were recorded."""
    events = (Event(step=2, kind="exception"), Event(step=1, kind="step-skipped"), Event(step=0, kind="exception"))

    assert (events[0], events[2]) == History(events=events).events_of("exception")
    assert () == History(events=events).events_of("nothing")


@pytest.mark.parametrize(("shape", "size"), [((), 1), ((3, 4), 12), ((0, 5), 0), ((2**20, 2**20), 2**40)])
def test_the_size_of_a_parameter(shape, size):
    """A parameter's size is the product of its shape: 1 for a scalar, exact beyond 32 bits."""
    assert size == Parameter(name="w", shape=shape).size
