"""What is recorded of Keras models against float64 formulas in NumPy, and against what training itself says."""

import math

import keras
import numpy as np
import pytest
from keras import layers
from watching import every_step, watched

BACKEND = keras.backend.backend()
GENERATOR = np.random.default_rng(1)
TABLE = GENERATOR.normal(size=(12, 4)).astype("float32")
VALUES = GENERATOR.normal(size=(12, 2)).astype("float32")


@pytest.fixture(autouse=True)
def same_start():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)


def column(history, parameter):
    return [p.name for p in history.parameters].index(parameter)


def of_layer(history, statistic, layer, step=0):
    row = history.series[statistic].at(step)
    return row[[l.name for l in history.layers].index(layer)]


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_plain_descent_moves_each_weight_by_rate_times_gradient(tmp_path, accumulated):
    """With SGD update_norm / grad_norm is the learning rate, and nothing where gradients are only added up."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh"), layers.Dense(2)])
    steps = None if accumulated == 1 else accumulated
    model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=steps), "mse")
    first = [np.linalg.norm(w) for w in model.get_weights()]
    with watched(tmp_path, every_step) as watch:
        model.fit(TABLE, VALUES, batch_size=3, epochs=1, shuffle=False, verbose=0)
    history = watch.history
    updates, norms = history["update_norm"], history["grad_norm"]
    np.testing.assert_allclose(history["weight_norm"].values[0], first, rtol=1e-6)
    assert history["learning_rate"].values[0] == pytest.approx(0.05)
    if accumulated == 1:
        # A difference of weights has the rounding of the weights.
        np.testing.assert_allclose(updates.values, 0.05 * norms.values, rtol=1e-4)
        ratio = updates.values[:, [0, 2]] / history["weight_norm"].values[:, [0, 2]]
        np.testing.assert_allclose(history["update_ratio"].values[:, [0, 2]], ratio, rtol=1e-6)
    else:
        assert [bool(np.isfinite(row).all()) for row in updates.values] == [False, True, False, True]


def test_clipping_is_told_from_gradients(tmp_path):
    """Norms are those that the update sees; what they were before is told beside them."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, global_clipnorm=0.01), "mse")
    error = 2 * (TABLE @ np.asarray(model.get_weights()[0], dtype=np.float64) - VALUES) / VALUES.size
    gradients = TABLE.T @ error, error.sum(0)
    with watched(tmp_path, every_step) as watch:
        model.fit(TABLE, VALUES, batch_size=12, epochs=1, verbose=0)
    history = watch.history
    raw = np.linalg.norm(np.concatenate([gradient.ravel() for gradient in gradients]))
    expected = {"global_grad_norm_unclipped": raw, "global_grad_norm": 0.01, "clip_factor": 0.01 / raw}
    found = {name: float(np.squeeze(history[name].values[0])) for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(np.linalg.norm(history["grad_norm"].values[0])) == pytest.approx(0.01, rel=1e-4)
    assert float(np.linalg.norm(history["update_norm"].values[0])) == pytest.approx(0.001, rel=1e-3)


def test_sparse_gradients_add_up_what_shares_a_row(tmp_path):
    """The norm of an embedding's gradient counts a word that occurs twice once, with both of its gradients."""
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 2, name="words")])
    model.add(layers.Flatten())
    model.add(layers.Dense(1, use_bias=False, name="out"))
    words = np.array([[1, 1, 2], [1, 4, 2]], dtype="int32")
    targets = np.array([[1.0], [-2.0]], dtype="float32")
    model.compile("sgd", "mse")
    table, kernel = (np.asarray(w, dtype=np.float64) for w in model.get_weights())
    out = table[words].reshape(2, 6) @ kernel
    upstream = ((out - targets) @ kernel.T).reshape(2, 3, 2)  # the mean over two rows cancels the two of the square
    gradient = np.zeros_like(table)
    np.add.at(gradient, words, upstream)
    with watched(tmp_path, every_step) as watch:
        model.fit(words, targets, batch_size=2, verbose=0)
    history = watch.history
    place = column(history, "words/embeddings")
    assert history["grad_norm"].values[0][place] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert history["grad_max"].values[0][place] == pytest.approx(np.abs(gradient).max(), rel=1e-5)
    zeros = np.mean(gradient == 0)
    assert history["grad_zero_fraction"].values[0][place] == pytest.approx(zeros)


# ---- layers ---------------------------------------------------------------------------------------------------------


def three_layers():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, activation="relu", name="a")])
    model.add(layers.Dense(5, name="b"))
    model.add(layers.Activation("tanh", name="bend"))
    model.add(layers.Dense(2, name="c"))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    weights = [w.copy() for w in model.get_weights()]
    weights[0][:, 2], weights[1][2] = 0.0, -1.0  # one unit is dead
    weights[2] *= 3  # and many entries of tanh are saturated
    model.set_weights(weights)
    return model, [w.astype(np.float64) for w in weights]


def forward_and_backward(weights):
    """name of a layer -> (output, gradient of the loss with respect to it), and the gradients of the weights."""
    w1, b1, w2, b2, w3, b3 = weights
    x, y = TABLE.astype(np.float64), VALUES.astype(np.float64)
    a = x @ w1 + b1
    ra = np.maximum(a, 0)
    b = ra @ w2 + b2
    tb = np.tanh(b)
    c = tb @ w3 + b3
    dc = 2 * (c - y) / c.size
    dtb = dc @ w3.T
    db = dtb * (1 - tb**2)
    dra = db @ w2.T
    da = dra * (a > 0)
    gradients = [x.T @ da, da.sum(0), ra.T @ db, db.sum(0), tb.T @ dc, dc.sum(0)]
    return {"a": (a, da), "a.relu": (ra, dra), "b": (b, db), "bend": (tb, dtb), "c": (c, dc)}, gradients


def test_layers_and_gradients_are_those_of_float64_formulas(tmp_path):
    """A forward and a backward pass by hand give every statistic of layers, weights and gradients."""
    model, weights = three_layers()
    values, gradients = forward_and_backward(weights)
    with watched(tmp_path, every_step) as watch:
        model.fit(TABLE, VALUES, batch_size=12, epochs=1, verbose=0)
    history = watch.history
    assert [l.name for l in history.layers if l.role in ("module", "operation")] == list(values)
    for name, (out, signal) in values.items():
        expected = {
            "output_rms": math.sqrt(np.mean(out**2)),
            "output_mean": out.mean(),
            "output_min": out.min(),
            "output_max": out.max(),
            "output_zero_fraction": np.mean(out == 0),
            "output_nonfinite": 0,
            "output_size": out.size,
            "calls": 1,
            "signal_norm": np.linalg.norm(signal),
            "signal_max": np.abs(signal).max(),
            "signal_zero_fraction": np.mean(signal == 0),
            "signal_nonfinite": 0,
        }
        found = {statistic: of_layer(history, statistic, name) for statistic in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    relu, tanh = values["a.relu"][0], values["bend"][0]
    assert of_layer(history, "dead_fraction", "a.relu") == pytest.approx(np.mean((relu == 0).all(0)))
    assert of_layer(history, "activation_slope", "a.relu") == pytest.approx(math.sqrt(np.mean(relu > 0)), rel=1e-5)
    assert of_layer(history, "saturation", "bend") == pytest.approx(np.mean(1 - tanh**2 < 0.05))
    assert of_layer(history, "activation_slope", "bend") == pytest.approx(
        math.sqrt(np.mean((1 - tanh**2) ** 2)), rel=1e-4
    )
    np.testing.assert_allclose(history["grad_norm"].values[0], [np.linalg.norm(g) for g in gradients], rtol=1e-4)
    np.testing.assert_allclose(history["grad_max"].values[0], [np.abs(g).max() for g in gradients], rtol=1e-4)
    zeros = [np.mean(g == 0) for g in gradients]
    np.testing.assert_allclose(history["grad_zero_fraction"].values[0], zeros, atol=1e-6)
    kernels = weights[::2]
    spread = [np.sqrt(np.mean((w - w.mean(1, keepdims=True)) ** 2) / np.mean(w**2)) for w in kernels]
    np.testing.assert_allclose(history["unit_spread"].values[0][::2], spread, rtol=1e-5)
    loss = np.mean((values["c"][0] - VALUES) ** 2)
    assert float(np.squeeze(history["loss"].values[0])) == pytest.approx(loss, rel=1e-5)
    total = math.sqrt(sum(np.sum(g**2) for g in gradients))
    assert float(np.squeeze(history["global_grad_norm"].values[0])) == pytest.approx(total, rel=1e-5)


def test_rows_that_point_alike_are_told(tmp_path):
    """row_similarity is the mean cosine between the rows of a value."""
    model, weights = three_layers()
    c = forward_and_backward(weights)[0]["c"][0]
    with watched(tmp_path, every_step) as watch:
        model.fit(TABLE, VALUES, batch_size=12, epochs=1, verbose=0)
    c = c[c.any(axis=1)]  # rows of zeros have no direction
    unit = c / np.linalg.norm(c, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(c), dtype=bool)]
    assert of_layer(watch.history, "row_similarity", "c") == pytest.approx(cosines.mean(), rel=1e-4)


def test_batch_statistics_stand_against_running_ones(tmp_path):
    """batch_statistics_gap is the distance of a batch's mean from the running one, in running deviations."""
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="norm"), layers.Dense(2)])
    model.compile("sgd", "mse")
    x = TABLE + 3
    with watched(tmp_path, every_step) as watch:
        model.fit(x, VALUES, batch_size=12, epochs=1, verbose=0)
    expected = math.sqrt(np.mean(x.astype(np.float64).mean(0) ** 2 / (1 + 1e-3)))
    assert of_layer(watch.history, "batch_statistics_gap", "norm") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_signal_through_time_is_that_of_the_inputs(tmp_path, backwards):
    """call_signal_norm of a linear recurrence is the gradient at each time step in the order of their calls."""
    series = GENERATOR.normal(size=(3, 4, 2)).astype("float32")
    targets = np.zeros((3, 2), dtype="float32")
    model = keras.Sequential([keras.Input((4, 2))])
    model.add(layers.SimpleRNN(2, activation=None, use_bias=False, go_backwards=backwards, name="rnn"))
    model.compile("sgd", "mse")
    kernel, recurrent = (np.asarray(w, dtype=np.float64) for w in model.get_weights())
    ordered = series[:, ::-1] if backwards else series
    state = np.zeros((3, 2))
    for t in range(4):
        state = ordered[:, t] @ kernel + state @ recurrent
    signal, norms = 2 * state / state.size, []
    for _ in range(4):
        norms.append(np.linalg.norm(signal @ kernel.T))
        signal = signal @ recurrent.T
    with watched(tmp_path, every_step) as watch:
        model.fit(series, targets, batch_size=3, epochs=1, verbose=0)
    (rows,) = watch.history.profiles["call_signal_norm"].values()
    np.testing.assert_allclose(np.asarray(rows.values)[0], norms[::-1], rtol=1e-4)


# ---- numbers that are none ------------------------------------------------------------------------------------------


def test_a_batch_with_nan_is_counted(tmp_path):
    """Entries that are NaN are counted where they are; norms say nothing then."""
    x = TABLE.copy()
    x[5, 1] = math.nan
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(2, name="b")])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    with watched(tmp_path, every_step) as watch:
        model.fit(x, VALUES, batch_size=4, epochs=1, shuffle=False, verbose=0)
    history = watch.history
    bad = history["grad_nonfinite"].values
    assert not bad[0].any()
    np.testing.assert_array_equal(bad[1], [12, 3, 6, 2])
    assert np.isnan(history["grad_norm"].values[1]).all()
    assert math.isnan(float(np.squeeze(history["global_grad_norm"].values[1])))
    np.testing.assert_array_equal(np.squeeze(history["loss_nonfinite"].values), [0, 1, 1])
    assert of_layer(history, "output_nonfinite", "a", 1) == 3
    assert of_layer(history, "input_nonfinite", "a", 1) == 1
    assert math.isnan(of_layer(history, "output_rms", "a", 1))
    # The next batch is clean, the weights are not.
    assert of_layer(history, "input_nonfinite", "a", 2) == 0
    np.testing.assert_array_equal(history["weight_nonfinite"].values[2], [12, 3, 6, 2])


def test_overflow_in_half_precision_is_a_skipped_step(tmp_path):
    """A step that the loss scale made overflow is skipped and said; gradients are those without the scale."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="mixed_float16", name="a")])
    model.add(layers.Activation("linear", dtype="float32"))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**18)
    model.compile(optimizer, "mse")
    weights = [np.asarray(w, dtype=np.float64) for w in model.get_weights()]
    with watched(tmp_path, every_step) as watch:
        model.fit(TABLE, VALUES * 30, batch_size=12, epochs=8, shuffle=False, verbose=0)
    history = watch.history
    skipped = np.squeeze(history["skipped"].values)
    scales = np.squeeze(history["loss_scale"].values)
    assert skipped[0] == 1 and skipped[-1] == 0
    assert scales[0] == 2.0**18 and scales[1] == 2.0**17
    assert [event.step for event in history.events_of("step-skipped")] == np.flatnonzero(skipped).tolist()
    assert int(optimizer.iterations) == int((skipped == 0).sum())
    taken = int(np.flatnonzero(skipped == 0)[0])
    error = TABLE @ weights[0] + weights[1] - VALUES * 30
    gradient = 2 * TABLE.T.astype(np.float64) @ error / error.size
    assert history["grad_norm"].values[taken][0] == pytest.approx(np.linalg.norm(gradient), rel=5e-3)
    np.testing.assert_array_equal(history["update_norm"].values[0], 0.0)
