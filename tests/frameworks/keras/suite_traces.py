"""A watched model is traced once for each kind of step, and never again."""

import keras
import numpy as np
import pytest
from keras import layers
from watching import watched

BACKEND = keras.backend.backend()
TABLE = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
VALUES = TABLE[:, :1]


class Counting(layers.Layer):
    """Counts how often its Python code runs: at every trace."""

    def __init__(self):
        super().__init__()
        self.traces = 0

    def call(self, x):
        self.traces += 1
        return x * 1.0


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled there")
@pytest.mark.parametrize("in_one_call", [1, 2])
def test_each_tier_is_compiled_once(tmp_path, in_one_call):
    """After the first cheap and the first deep step nothing is traced again, in this fit or in another."""
    counting = Counting()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), counting, layers.Dense(1)])
    model.compile("adam", "mse", steps_per_execution=in_one_call)
    with watched(tmp_path) as watch:
        model.fit(TABLE, VALUES, batch_size=4, epochs=1, verbose=0)
        first = counting.traces
        model.fit(TABLE, VALUES, batch_size=4, epochs=2, verbose=0)
        model.optimizer.learning_rate = 0.5
        model.fit(TABLE, VALUES, batch_size=4, epochs=1, verbose=0)
        tiers = [event.data["tier"] for event in watch.history.events_of("compiled")]
    assert counting.traces == first
    assert sorted(tiers) == ["cheap", "deep"]


def test_the_model_is_not_changed_by_a_watch_that_is_over(tmp_path):
    """Fits before, during and after a watch go on from each other, and the last ones are not instrumented."""
    counting = Counting()
    model = keras.Sequential([keras.Input((3,)), counting, layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(TABLE, VALUES, batch_size=8, verbose=0)
    before = counting.traces
    with watched(tmp_path, attached=[model]) as watch:
        model.fit(TABLE, VALUES, batch_size=8, verbose=0)
    assert counting.traces > before
    during, steps = counting.traces, watch.history.num_steps
    model.fit(TABLE, VALUES, batch_size=8, verbose=0)
    assert steps == watch.history.num_steps == 3
    if BACKEND != "torch":  # Keras's own step is compiled again at most once
        assert counting.traces <= during + 1
