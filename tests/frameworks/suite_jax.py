import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import isograd
from isograd._diagnose import diagnose
from isograd._record import RunFile
from isograd._schedule import Schedule
from isograd._watch import Shield
from isograd.frameworks.jax import (
    CheapState,
    DeepState,
    Observer,
    describe_run,
    guarded,
    monitor,
    order_of_use,
)
from isograd.frameworks.jax import _kernels as kernels
from isograd.frameworks.jax import _names as names

ROOT = Path(__file__).parents[2]
TINY = {"b": jnp.zeros(4), "w": jnp.ones((3, 4))}


def load_example():
    spec = importlib.util.spec_from_file_location("mlp_digits_optax", ROOT / "examples/mlp_digits_optax.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = load_example()


class Watched:
    """A run file, a shield and an observer of some monitors."""

    def __init__(self, folder, *watchers, **kwargs):
        self.failures = []
        self.file = RunFile.create(folder, meta={}, on_failure=self.failures.append)
        self.shield = Shield(self.failures.append)
        self.observer = Observer(self.file, self.shield, optimizers=watchers, **kwargs)
        self.observer.attach()

    def finish(self):
        self.observer.detach()
        assert self.failures == []
        run = self.file.read()
        self.file.close()
        return run

    def history(self):
        (history,) = self.finish().histories
        return history


@pytest.fixture
def watched(tmp_path):
    made = []

    def make(*watchers, **kwargs):
        made.append(Watched(tmp_path / str(len(made)), *watchers, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.observer.detach()
        one.file.close()


def make_step(optimizer, gradients_of, **jitting):
    """The step of a user's own, and the list that grows with every trace of it."""
    traces = []

    def step(params, opt_state, *batch):
        traces.append(1)
        loss, gradients = gradients_of(params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, **jitting), traces


def constant_gradient(params, value=0.5):
    """A loss whose gradient is `value` everywhere."""
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), jax.tree.map(
        lambda a: jnp.full_like(a, value), params
    )


def train(optimizer, watcher, *, steps=8, params=TINY, gradients_of=constant_gradient, batches=None, **jitting):
    step, traces = make_step(optimizer, gradients_of, **jitting)
    params, opt_state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    for number in range(steps):
        batch = () if batches is None else batches(number)
        params, opt_state, loss = step(params, opt_state, *batch)
        if watcher is not None:
            opt_state = watcher.read(opt_state, loss=loss)
    return params, opt_state, traces


def digits_batches(size=32):
    x, y = map(np.asarray, digits.digits())

    def batch(number):
        chosen = np.random.default_rng(number).integers(0, len(x), size)
        return x[chosen], y[chosen]

    return batch


def digits_gradients(params, x, y):
    return jax.value_and_grad(digits.loss_of)(params, x, y)


def digits_network(seed=0):
    return digits.network(jax.random.key(seed), [64, 32, 32, 10])


# ---- statistics against NumPy ---------------------------------------------------------------------------------------

# XLA takes subnormal numbers for zero.
FLOATS = st.just(0.0) | st.floats(2**-10, 2**10, width=32) | st.floats(-(2**10), -(2**-10), width=32)
SHAPES = [(), (1,), (5,), (1, 4), (4, 1), (3, 4), (2, 3, 4), (2, 1, 3, 2)]  # XLA compiles for each
deep_row, cheap_row = jax.jit(kernels.deep), jax.jit(kernels.cheap)


@st.composite
def triples(draw):
    """(gradient, weight, update) of one shape."""
    shape = draw(st.sampled_from(SHAPES))
    return [draw(arrays(np.float32, shape, elements=FLOATS)) for _ in range(3)]


def spread(weight):
    rows = weight.reshape(-1, weight.shape[-1]).T
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.mean((rows - rows.mean(0)) ** 2) / np.mean(rows**2))


@given(triple=triples())
def test_every_statistic_is_the_formula(triple):
    """What a deep row says of tensors of any shape is what NumPy says in float64, and a cheap row says the same."""
    gradient, weight, update = (array.astype(np.float64) for array in triple)

    cheap, deep = (np.asarray(rows)[:, 0] for rows in deep_row(*([array] for array in triple)))

    expected = [np.linalg.norm(gradient), np.abs(gradient).max(), 0]
    np.testing.assert_allclose(expected, cheap, rtol=1e-5)
    np.testing.assert_allclose(expected, np.asarray(cheap_row([triple[0]]))[:, 0], rtol=1e-5)
    expected = [np.mean(gradient == 0), np.linalg.norm(weight), 0, np.linalg.norm(update)]
    np.testing.assert_allclose(expected, deep[:4], rtol=1e-5)
    if weight.ndim >= 2 and weight.shape[-1] > 1:
        np.testing.assert_allclose(spread(weight), deep[4], rtol=1e-3, atol=2e-4)
    else:
        assert np.isnan(deep[4])


def test_the_spread_of_a_large_weight_is_estimated():
    """Of many units and connections some are compared: within 1 % for independent entries."""
    weight = np.random.default_rng(0).standard_normal((1000, 300)).astype(np.float32) + 1

    _, deep = kernels.deep([weight], [weight], [weight])
    assert deep[4, 0] == pytest.approx(spread(weight.astype(np.float64)), rel=0.01)


def test_identical_units_have_no_spread():
    """Units that are exactly alike give exactly 0, whatever their size; the units are the last axis."""
    column = np.random.default_rng(0).standard_normal((30, 1)).astype(np.float32)
    alike, unlike = np.repeat(column, 8, axis=1) * 1e4, np.repeat(column, 8, axis=1).T

    _, deep = kernels.deep([alike, unlike], [alike, unlike], [alike, unlike])

    assert deep[4, 0] == 0 and deep[4, 1] > 0.5


def test_a_large_gradient_is_sampled_for_its_largest_entry():
    """Norm and counts are exact over millions of entries; the largest entry of a cheap row is a lower bound."""
    gradient = np.random.default_rng(0).standard_normal((1500, 1001)).astype(np.float32)
    norm, largest, bad = np.asarray(kernels.cheap([gradient]))[:, 0]

    assert norm == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-4)
    assert 0.6 * np.abs(gradient).max() < largest <= np.abs(gradient).max() and bad == 0
    gradient[1, 7] = np.inf
    assert np.asarray(kernels.cheap([gradient]))[2, 0] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_gradients_are_summed_in_float32(dtype):
    """100 000 entries of 10 have a norm of 3162, whose square no float16 holds and whose sum no bfloat16 adds up."""
    gradient = jnp.full(100_000, 10, dtype)

    assert np.asarray(kernels.cheap([gradient]))[0, 0] == pytest.approx(3162.2776, rel=1e-5)


def test_nonfinite_entries_overflow_and_underflow():
    """NaN and Inf are counted; squares that overflow leave an infinite norm and no count, tiny ones a norm of 0."""
    gradients = [
        np.array([1, np.nan, np.inf, -np.inf, 2], np.float32),
        np.full(4, 1e30, np.float32),
        np.full(4, 1e-30, np.float32),
        np.zeros(4, np.float32),
    ]
    norms, largest, bad = np.asarray(kernels.cheap(gradients))

    np.testing.assert_array_equal([3, 0, 0, 0], bad)
    np.testing.assert_array_equal([np.inf, 0, 0], norms[1:])
    np.testing.assert_array_equal(np.float32([1e30, 1e-30, 0]), largest[1:])


def test_complex_gradients():
    """The norm of complex entries is that of their absolute values."""
    gradient = np.array([3 + 4j, 0, 1j], np.complex64)

    assert np.asarray(kernels.cheap([gradient]))[0, 0] == pytest.approx(math.sqrt(26))


# ---- what it does to training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer, wraps",
    [
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-3)), True),
        (optax.adam(3e-3), False),
    ],
    ids=["sgd", "clipped adamw", "adam in a chain"],
)
def test_training_is_the_same(watched, optimizer, wraps):
    """Weights after 40 steps are those of an unwatched run, to float32 rounding, wrapped or in a chain."""
    setting = {"steps": 40, "params": digits_network(), "gradients_of": digits_gradients, "batches": digits_batches()}
    expected, _, _ = train(optimizer, None, **setting)
    watcher = monitor(optimizer) if wraps else monitor()
    run = watched(watcher)

    found, _, _ = train(watcher if wraps else optax.chain(watcher, optimizer), watcher, **setting)

    assert run.history().num_steps == 40
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("deep, traces", [(True, 2), (False, 1)])
def test_a_step_is_compiled_once_for_each_tier(watched, deep, traces):
    """200 steps trace the user's step twice: for deep and for cheap steps; once where there are no deep ones."""
    watcher = monitor(optax.sgd(1e-3), deep=deep)
    run = watched(watcher)

    _, _, seen = train(watcher, watcher, steps=200)
    history = run.history()

    assert len(seen) == traces and history.num_steps == 200
    assert ("weight_norm" in history) == deep
    if deep:
        assert history["weight_norm"].steps[:20].tolist() == [*range(20)] and len(history["weight_norm"]) < 40


def test_donated_buffers(watched):
    """A step that takes over its arguments' memory is read as any other."""
    watcher = monitor(optax.adam(1e-3))
    run = watched(watcher)

    train(watcher, watcher, steps=50, donate_argnums=(0, 1))
    history = run.history()

    assert history["loss"].steps.tolist() == [*range(50)] and np.isfinite(history["loss"].values).all()
    np.testing.assert_allclose(history["grad_norm"].values, [[1.0, math.sqrt(3)]] * 50, rtol=1e-6)


def test_nothing_is_kept_of_what_the_monitor_wraps(watched):
    """The watcher keeps no reference to weights or moments, whose memory a step may need."""
    watcher = monitor(optax.adam(1e-3))
    watched(watcher)
    _, opt_state, _ = train(watcher, watcher, steps=3)
    moments = opt_state.inner[0].mu["w"]
    before = sys.getrefcount(moments)
    opt_state = watcher.read(opt_state)

    assert sys.getrefcount(moments) == before


# ---- steps and losses -----------------------------------------------------------------------------------------------


def test_scan_over_steps(watched):
    """Steps inside `jax.lax.scan`: the losses that it stacks go to their steps."""
    watcher = monitor(optax.sgd(0.01))
    run = watched(watcher)

    @jax.jit
    def ten(params, opt_state):
        def one(carry, _):
            params, opt_state = carry
            loss, gradients = constant_gradient(params)
            updates, opt_state = watcher.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(one, (params, opt_state), length=10)

    params, opt_state = TINY, watcher.init(TINY)
    for _ in range(7):
        (params, opt_state), losses = ten(params, opt_state)
        opt_state = watcher.read(opt_state, loss=losses)
    history = run.history()

    assert history["loss"].steps.tolist() == [*range(70)]
    np.testing.assert_allclose(history["loss"].values, 12 - 16 * 0.005 * np.arange(70), rtol=1e-5)


def test_a_scan_longer_than_the_rows_loses_its_first_steps(watched):
    """Of 10 steps in a call with 4 rows, the last 4 are recorded: there are gaps, and nothing is invented."""
    watcher = monitor(optax.sgd(0.01), rows=4)
    run = watched(watcher)

    @jax.jit
    def ten(opt_state):
        def one(opt_state, _):
            return watcher.update(TINY, opt_state, TINY)[1], 1.0

        return jax.lax.scan(one, opt_state, length=10)

    opt_state = watcher.init(TINY)
    for _ in range(2):
        opt_state, losses = ten(opt_state)
        opt_state = watcher.read(opt_state, loss=losses)

    assert run.history()["grad_norm"].steps.tolist() == [6, 7, 8, 9, 16, 17, 18, 19]


def test_the_loss_that_update_is_given(watched):
    """Optax's own way to hand over a loss, `update(..., value=loss)`, is recorded where `read` has none."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    for number in range(6):
        _, opt_state = jax.jit(watcher.update)(TINY, opt_state, TINY, value=jnp.float32(number))
        opt_state = watcher.read(opt_state)

    assert run.history()["loss"].values.tolist() == [0, 1, 2, 3, 4, 5]


def test_micro_batches(watched):
    """Under `optax.MultiSteps` a step is an update, and its loss the mean over its micro-batches."""
    watcher = monitor(optax.sgd(0.1))
    optimizer = optax.MultiSteps(watcher, 3)
    run = watched(watcher)
    opt_state, update = optimizer.init(TINY), jax.jit(optimizer.update)
    for number in range(60):
        _, opt_state = update(TINY, opt_state, TINY)
        opt_state = watcher.read(opt_state, loss=float(number))
    history = run.history()

    assert history["loss"].values.tolist() == [3.0 * step + 1 for step in range(20)]
    assert set(history["micro_batches"].values) == {3}


def test_reading_every_tenth_step(watched):
    """Reading now and then records every step's gradients; a loss belongs to the step that was read."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    for number in range(40):
        _, opt_state = jax.jit(watcher.update)(TINY, opt_state, TINY)
        if number % 10 == 9:
            opt_state = watcher.read(opt_state, loss=float(number))
    history = run.history()

    assert history["grad_norm"].steps.tolist() == [*range(40)]
    assert history["loss"].values[9::10].tolist() == [9, 19, 29, 39]
    assert np.isnan(np.delete(history["loss"].values, [9, 19, 29, 39])).all()


def test_a_state_from_a_checkpoint(watched):
    """A training that goes back to an earlier state writes its steps again."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher)
    step, _ = make_step(watcher, constant_gradient)
    params, opt_state = TINY, watcher.init(TINY)
    for number in range(30):
        params, opt_state, loss = step(params, opt_state)
        opt_state = watcher.read(opt_state, loss=loss)
        if number == 9:
            kept = params, opt_state
    run.observer.drain()
    params, opt_state = kept
    for _ in range(5):
        params, opt_state, _ = step(params, opt_state)
        opt_state = watcher.read(opt_state, loss=-1.0)
    history = run.history()

    assert history.num_steps == 30
    assert (history["loss"].values == -1).nonzero()[0].tolist() == [10, 11, 12, 13, 14]


def test_a_loss_that_is_not_finite(watched):
    """It is counted, and the loss is NaN."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    for loss in (1.0, math.nan, math.inf):
        _, opt_state = watcher.update(TINY, opt_state, TINY)
        opt_state = watcher.read(opt_state, loss=jnp.asarray(loss))
    history = run.history()

    assert history["loss_nonfinite"].values.tolist() == [0, 1, 1]
    assert np.isnan(history["loss"].values).tolist() == [False, True, True]


# ---- pytrees --------------------------------------------------------------------------------------------------------


def test_leaves_that_have_no_gradient(watched):
    """Integers, None and empty arrays pass unharmed and have no column."""
    params = {"table": jnp.arange(3), "nothing": None, "empty": jnp.zeros((0, 3)), "w": jnp.ones((2, 2)), "s": 2.0}
    gradients = {**params, "w": jnp.full((2, 2), 3.0)}
    watcher = monitor()
    run = watched(watcher)
    opt_state = watcher.init(params)
    updates, opt_state = jax.jit(watcher.update)(gradients, opt_state, params)
    watcher.read(opt_state)
    history = run.history()

    assert updates["nothing"] is None and updates["table"].tolist() == [0, 1, 2]
    assert [parameter.name for parameter in history.parameters] == ["s", "w"]
    assert history["grad_norm"].values.tolist() == [[2, 6]]


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}])
def test_a_pytree_without_leaves(watched, params):
    """There is nothing to measure, and no failure."""
    watcher = monitor(optax.adam(1e-3))
    run = watched(watcher)
    opt_state = watcher.init(params)
    _, opt_state = jax.jit(watcher.update)(params, opt_state, params)
    watcher.read(opt_state, loss=1.0)

    assert run.history().parameters == ()


def test_a_parameter_that_gets_no_gradient(watched):
    """None in place of a gradient is NaN: it was not zero, there was none."""
    watcher = monitor()
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    _, opt_state = watcher.update({"b": None, "w": TINY["w"]}, opt_state, TINY)
    watcher.read(opt_state)

    values = run.history()["grad_max"].values[0]
    assert np.isnan(values[0]) and values[1] == 1


@settings(max_examples=5)
@given(shapes=st.dictionaries(st.text("abc", min_size=1), st.sampled_from([(), (2,), (1, 2)]), min_size=1))
def test_columns_are_those_of_their_names(shapes):
    """Whatever the pytree, the column of a parameter holds the norm of its own gradient."""
    params = {name: np.full(shape, 1 + number, np.float32) for number, (name, shape) in enumerate(shapes.items())}
    watcher = monitor()
    _, state = watcher.update(params, watcher.init(params), params)

    for column, parameter in enumerate(watcher.parameters):
        assert state.rows[0, 0, column] == pytest.approx(np.linalg.norm(params[parameter.name]), rel=1e-6)


# ---- names and order ------------------------------------------------------------------------------------------------


def layer_names(params, order=()):
    layers = names.layers_of(names.parameters_of(params), order)
    return [layer.name for layer in sorted(layers, key=lambda layer: layer.position)]


def dense(n=3, m=4):
    return {"kernel": np.ones((n, m)), "bias": np.ones(m)}


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"params": {f"Dense_{i}": dense() for i in range(12)}}, [f"Dense_{i}" for i in range(12)]),
        ([(np.ones((2, 2)), np.ones(2))] * 3, ["0", "1", "2"]),
        ({"w1": np.ones((2, 2)), "b1": np.ones(2), "w10": np.ones((2, 2)), "w2": np.ones((2, 2))}, ["w1", "w2", "w10"]),
        ({"linear": dense(), "linear_1": dense(), "linear_2": dense()}, ["linear", "linear_1", "linear_2"]),
        (
            {
                "Dense_0": dense(),
                "Conv_0": {"kernel": np.ones((3, 3, 1, 4))},
                "Embed_0": {"embedding": np.ones((9, 4))},
            },
            ["Embed_0", "Conv_0", "Dense_0"],
        ),
        ({"encoder": {"Dense_0": dense()}, "decoder": {"Dense_0": dense()}}, []),
        ({"up": dense(), "down": dense()}, []),
        ({"bias": np.ones(3)}, []),
    ],
)
def test_order_by_names(params, expected):
    """Numbers order layers; names that only the alphabet orders tell nothing of the forward pass."""
    assert layer_names(params) == expected


def test_order_as_given():
    """Names of layers or parameters in the order of use; a name that there is not is told with those that there are."""
    params = {"up": dense(), "down": dense()}

    assert layer_names(params, ["up", "down/kernel"]) == ["up", "down"]
    with pytest.raises(ValueError, match=r"^order names 'left', which is no parameter or layer; there are down, up, d"):
        monitor(order=["left"]).init(params)


def test_order_of_use():
    """Operations are followed into functions, casts, loops and branches; the alphabet plays no part."""
    params = {name: jnp.eye(3) for name in "dacb"} | {"unused": jnp.eye(3)}

    def forward(params, x):
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        x = jax.jit(lambda x, w: jnp.tanh(x @ w.T))(x, params["d"])
        x, _ = jax.lax.scan(lambda x, _: (x @ params["b"], None), x, length=2)
        x = jax.checkpoint(lambda x, w: jax.nn.relu(x @ w))(x, params["c"])
        return jax.lax.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x, x, params["a"]).sum()

    assert order_of_use(forward, params, jnp.ones((2, 3), jnp.bfloat16)) == ("d", "b", "c", "a")
    assert layer_names(params, order_of_use(forward, params, jnp.ones((2, 3), jnp.bfloat16))) == ["d", "b", "c", "a"]


def test_fans():
    """Fans of kernels, whose last axis counts outputs, as Glorot and Bengio define them."""
    params = {
        "Conv_0": {"kernel": np.ones((3, 5, 2, 7))},
        "Dense_0": dense(),
        "Embed_0": {"embedding": np.ones((9, 6))},
    }
    layers = {layer.name: layer for layer in names.layers_of(names.parameters_of(params))}

    found = {name: (layer.kind, layer.units, layer.fan_in, layer.fan_out) for name, layer in layers.items()}
    assert found == {
        "Conv_0": ("conv", 7, 30, 105),
        "Dense_0": ("linear", 4, 3, 4),
        "Embed_0": ("embedding", 6, 1, 6),
    }


# ---- where the state stands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around, kind",
    [
        (lambda m: optax.chain(optax.clip(1.0), m, optax.adam(1e-3)), "Adam"),
        (lambda m: optax.chain(optax.chain(m), optax.masked(optax.sgd(0.1, 0.9), {"b": True, "w": False})), "SGD"),
        (lambda m: optax.inject_hyperparams(lambda learning_rate: optax.chain(m, optax.sgd(learning_rate)))(0.1), None),
        (lambda m: optax.apply_if_finite(optax.chain(m, optax.rmsprop(0.1)), 3), "RMSprop"),
        (lambda m: optax.multi_transform({"a": optax.chain(m, optax.sgd(0.1))}, {"b": "a", "w": "a"}), None),
    ],
)
def test_inside_other_transformations(watched, around, kind):
    """The state is found in chains and wrappers, changes its tier there, and the optimizer's kind is told."""
    watcher = monitor()
    run = watched(watcher)
    _, opt_state, traces = train(around(watcher), watcher, steps=25)
    history = run.history()

    assert len(traces) == 2 and history.num_steps == 25 and len(history["weight_norm"]) == 21
    assert history.groups[0].get("optimizer") == kind
    assert sum(type(leaf) is CheapState for leaf in jax.tree.leaves(opt_state, is_leaf=is_state)) == 1


def is_state(node):
    return isinstance(node, CheapState)


def test_learning_rate_that_is_injected(watched):
    """`optax.inject_hyperparams` puts a schedule's rate and Adam's constants into the state: they are recorded."""
    watcher = monitor(optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 10), b1=0.8))
    run = watched(watcher)
    train(watcher, watcher, steps=10)
    history = run.history()

    np.testing.assert_allclose(history["learning_rate"].values[:, 0], np.linspace(0.1, 0, 11)[:10], rtol=1e-5)
    assert history.groups[0]["optimizer"] == "Adam"
    assert history.groups[0]["betas"] == pytest.approx([0.8, 0.999])
    assert "learning_rate" not in history.unmeasured


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(11):
            x = linen.relu(linen.Dense(4)(x))
        return x


def test_flax_train_state(watched):
    """A linen model with its TrainState, handed over whole; checkpoints are read back into either tier."""
    net, watcher = Net(), monitor(optax.adam(1e-3))
    run = watched(watcher)
    params = net.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=watcher)
    fresh = state

    @jax.jit
    def step(state, x):
        loss, gradients = jax.value_and_grad(lambda p: (state.apply_fn({"params": p}, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=gradients), loss

    for _ in range(25):
        state, loss = step(state, jnp.ones((2, 4)))
        state = watcher.read(state, loss=loss)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    history = run.history()

    assert [layer.name for layer in history.layers] == [f"Dense_{i}" for i in range(11)]
    assert [parameter.layer for parameter in history.parameters][::2] == sorted(f"Dense_{i}" for i in range(11))
    assert history.parameters[0].name == "Dense_0/bias" and history.parameters[0].layer == "Dense_0"
    assert type(restored.opt_state) is DeepState and restored.opt_state.count == 25


def test_nnx_optimizer(watched):
    """An `nnx.Optimizer` is changed in place, as NNX does."""
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    watcher = monitor(optax.adam(1e-3))
    run = watched(watcher)
    optimizer = nnx.Optimizer(model, watcher, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    for _ in range(25):
        loss = step(model, optimizer, jnp.ones((2, 2)))
        assert watcher.read(optimizer, loss=loss) is optimizer
    history = run.history()

    assert len(traces) == 2 and history.num_steps == 25 and len(history["update_norm"]) == 21
    assert [layer.name for layer in history.layers] == ["layers/0", "layers/1"]
    assert [p.name for p in history.parameters][:2] == ["layers/0/bias", "layers/0/kernel"]


def test_mistakes_are_told_in_a_sentence():
    """A state without a monitor's, with two, of another model, of another transformation; too few rows."""
    watcher = monitor(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^read\(\) was given a tuple that holds no state of a monitor: make it with"):
        watcher.read(optax.adam(0.1).init(TINY))
    with pytest.raises(ValueError, match=r"holds the states of 2 monitors: hand over the part"):
        watcher.read(optax.chain(monitor(), watcher).init(TINY))
    other = monitor(optax.sgd(0.1)).init(TINY)
    with pytest.raises(ValueError, match=r"of 2 parameters, but the gradients of 1 came in: use one monitor\(\) for"):
        watcher.update(TINY["w"], other, TINY["w"])
    with pytest.raises(ValueError, match=r"^read\(\) was given several states in one, of a vmap: hand over one"):
        watcher.read(jax.vmap(watcher.init)({"w": jnp.ones((5, 2))}))
    with pytest.raises(ValueError, match=r"^monitor\(\) was given the state of tuple"):
        watcher.update(TINY, (), TINY)
    with pytest.raises(ValueError, match=r"^rows must be at least 4 steps, not 1"):
        monitor(rows=1)


def test_what_read_returns_is_to_be_used(watched, capsys):
    """A loop that does not go on with it has every step measured in full, and is told so once."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    for _ in range(40):
        _, opt_state = watcher.update(TINY, opt_state, TINY)
        watcher.read(opt_state)

    assert len(run.history()["weight_norm"]) == 40
    assert capsys.readouterr().err.count("what read() returns is not used: write opt_state = watcher.read(") == 1


def test_without_an_observer():
    """Nobody watches: steps are cheap ones after the first read."""
    watcher = monitor(optax.sgd(0.1))
    _, opt_state, traces = train(watcher, watcher, steps=10)

    assert type(opt_state) is CheapState and len(traces) == 2


# ---- the observer ---------------------------------------------------------------------------------------------------


def test_healthy_training_and_what_cannot_be_read(watched):
    """On digits nothing is wrong; what a monitor cannot see is said in words."""
    watcher = monitor(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))
    seen = []
    run = watched(watcher, on_step=lambda subject, step, readings: seen.append((subject, step, sorted(readings))))
    train(watcher, watcher, steps=150, params=digits_network(), gradients_of=digits_gradients, batches=digits_batches())
    found = run.finish()
    diagnosis = diagnose(found.histories, run=found.id)
    why = {one.missing: one.why for one in diagnosis.unmeasured}

    assert diagnosis.healthy, str(diagnosis)
    assert seen == [("model", step, ["global_grad_norm", "loss"]) for step in range(150)]
    assert why["dead_fraction"].startswith("optax hands over gradients and weights, no layers")
    assert why["learning_rate"].endswith("optax.inject_hyperparams puts it there")
    assert why["clip_factor"].startswith("a monitor sees gradients in one place of a chain")
    assert "loss" not in why and "update_ratio" not in why


def test_nothing_was_said_of_loss_or_weights(watched):
    """No loss, no params, no optimizer: each is missing in words."""
    watcher = monitor()
    run = watched(watcher)
    opt_state = watcher.init(TINY)
    for _ in range(5):
        _, opt_state = watcher.update(TINY, opt_state)
        opt_state = watcher.read(opt_state)
    history = run.history()

    assert "loss" not in history.series
    assert history.unmeasured["loss"] == "read(opt_state, loss=...) was never given a loss"
    assert history.unmeasured["weight_norm"] == "update() was given no params"
    assert history.unmeasured["update_norm"] == "a monitor in a chain sees no updates: monitor(optimizer) does"
    assert "grad_zero_fraction" in history


def deep_sigmoid(key, depth=8, width=24):
    sizes = [64, *[width] * depth, 10]
    return digits.network(key, sizes)


def sigmoid_loss(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.sigmoid(x @ layer["kernel"] * 0.3 + layer["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params[-1]["kernel"] + params[-1]["bias"], y).mean()


def test_vanishing_gradients_are_found(watched):
    """Ten layers of sigmoids: the gradients of the weights shrink towards the input."""
    watcher = monitor(optax.sgd(0.01), deep=False)
    run = watched(watcher)
    train(
        watcher, watcher, steps=60, params=deep_sigmoid(jax.random.key(0)),
        gradients_of=jax.value_and_grad(sigmoid_loss), batches=digits_batches(),
    )  # fmt: skip
    found = run.finish()
    causes = {cause.finding.name for cause in diagnose(found.histories).causes}
    symptoms = {one.name for cause in diagnose(found.histories).causes for one in cause.symptoms}

    assert "vanishing-gradients" in causes | symptoms


def test_a_rate_that_is_too_high_is_found(watched):
    """Plain gradient descent with a rate of 30 on digits."""
    watcher = monitor(optax.sgd(30.0))
    run = watched(watcher)
    train(watcher, watcher, steps=40, params=digits_network(), gradients_of=digits_gradients, batches=digits_batches())
    found = run.finish()

    assert diagnose(found.histories).causes[0].finding.name == "learning-rate-too-high"


def test_a_batch_with_nan_is_found(watched):
    """From the step on at which one entry of a batch is NaN, gradients are counted as not finite."""
    watcher = monitor(optax.adam(1e-3), deep=False)
    run = watched(watcher)
    batches = digits_batches()

    def broken(number):
        x, y = batches(number)
        x[0, 0] = np.nan if number == 30 else x[0, 0]
        return x, y

    train(watcher, watcher, steps=40, params=digits_network(), gradients_of=digits_gradients, batches=broken)
    found = run.finish()
    (history,) = found.histories
    diagnosis = diagnose(found.histories)

    bad = np.nansum(history["grad_nonfinite"].values, axis=1)
    assert np.flatnonzero(bad)[0] == 30 and np.isnan(history["global_grad_norm"].values[30])
    assert any("nonfinite-values" in (c.finding.name, *[s.name for s in c.symptoms]) for c in diagnosis.causes)
    assert not diagnosis.healthy


def test_an_unusual_step_makes_the_next_ones_deep(watched):
    """A jump of the loss brings a deep reading before the schedule would."""
    watcher = monitor(optax.sgd(0.0))
    run = watched(watcher, make_schedule=lambda: Schedule(every=10_000))
    opt_state = watcher.init(TINY)
    for number in range(120):
        _, opt_state = jax.jit(watcher.update)(TINY, opt_state, TINY)
        opt_state = watcher.read(opt_state, loss=1.0 if number < 96 else 1e9)
        if number % 8 == 0:
            run.observer.drain()
    steps = run.history()["weight_norm"].steps

    assert any(96 < step < 115 for step in steps)


def test_two_monitors_are_two_subjects(watched):
    """A GAN's two optimizers, observed without naming them; names are made unique."""
    one, other = monitor(optax.sgd(0.1), name="net"), monitor(optax.sgd(0.1), name="net")
    run = watched()
    states = [one.init(TINY), other.init({"k": jnp.ones(2)})]
    for _ in range(5):
        _, states[0] = one.update(TINY, states[0], TINY)
        _, states[1] = other.update({"k": jnp.ones(2)}, states[1], {"k": jnp.ones(2)})
        states = [one.read(states[0], loss=1.0), other.read(states[1], loss=2.0)]

    assert run.observer.subjects == ["net", "net-2"]
    assert [h.series["loss"].values[-1] for h in run.finish().histories] == [1, 2]


def test_only_its_own_monitors(watched):
    """An observer of one monitor does not hear of another."""
    mine, other = monitor(optax.sgd(0.1)), monitor(optax.sgd(0.1))
    run = watched(mine)
    train(other, other, steps=3)

    assert run.observer.subjects == [] and run.finish().histories == ()


def test_life_of_an_observer(watched):
    """Draining shows what was read, detaching twice is harmless, its state goes on in another that writes nothing."""
    called = []
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher, between=lambda: called.append(1))
    step, _ = make_step(watcher, constant_gradient)
    params, opt_state = TINY, watcher.init(TINY)
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state)
        opt_state = watcher.read(opt_state, loss=loss)
    run.observer.settle()
    run.observer.redescribe()

    assert run.file.read().histories[0].num_steps == 30 and len(called) == 30
    assert run.observer.deep_step >= 20
    learned = json.loads(json.dumps(run.observer.state_dict()))
    assert learned["model"]["loss"][2] >= 29
    run.observer.detach()
    run.observer.detach()

    later = watched(watcher)
    later.observer.load_state_dict(learned)
    opt_state = watcher.read(opt_state)
    later.observer.drain()
    assert later.observer.state_dict()["model"]["loss"] == learned["model"]["loss"]
    assert later.file.read().histories[0]["grad_norm"].steps.tolist() == [29]  # what was before is the other's
    later.observer.release()
    watcher.read(opt_state)
    later.observer.drain()
    assert later.file.read().histories[0].num_steps == 30


def test_an_error_of_its_own_stops_nothing(watched):
    """When the watcher breaks, `read` still returns a state to go on with."""
    watcher = monitor(optax.sgd(0.1))
    run = watched(watcher, on_step=lambda *_: 1 / 0)
    _, opt_state, _ = train(watcher, watcher, steps=40)
    run.observer.detach()

    assert type(opt_state) is CheapState and opt_state.count == 40
    assert len(run.failures) == 1 and run.failures[0].startswith("ZeroDivisionError")


def test_facts_about_the_process():
    """They are JSON values."""
    assert json.loads(json.dumps(describe_run()))["optax"] == optax.__version__


def test_watch(tmp_path):
    """`isograd.watch` takes monitors, and says in a sentence what else it does not take."""
    watcher = monitor(optax.sgd(0.1), name="net")
    with isograd.watch(watcher, out=tmp_path, guard=isograd.Guard(skip=True)) as run:
        train(watcher, watcher, steps=30)
    found = run.run()
    (history,) = found.histories

    assert (history.subject, history.num_steps, history.meta["framework"]) == ("net", 30, "jax")
    assert history.events_of("guard-refused")[0].data["why"].endswith("guarded leaves bad steps out inside")
    assert run.diagnose().steps == 30
    with pytest.raises(ValueError, match=r"takes monitors of optax optimizers, as .* not GradientTransformationExtraA"):
        isograd.watch(optax.sgd(0.1), out=tmp_path)


def test_importing_isograd_imports_no_framework():
    """`import isograd` stays fast and works without JAX."""
    code = "import sys, isograd; sys.exit(bool({'jax', 'optax', 'flax'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_example():
    """The example runs as it stands, unwatched, and learns."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples/mlp_digits_optax.py", "--steps", "61"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]

    assert (done.returncode, done.stderr) == (0, "")
    assert len(losses) == 4 and losses[-1] < 0.2 * losses[0]


# ---- the guard ------------------------------------------------------------------------------------------------------


def guarded_training(optimizer, watcher, bad, steps=12):
    guard = guarded(optimizer)
    params, state, kept = digits_network(), guard.init(digits_network()), []
    batches = digits_batches()

    @jax.jit
    def step(params, state, x, y):
        loss, gradients = digits_gradients(params, x, y)
        params, state = guard.step(gradients, state, params)
        return params, state, loss

    for number in range(steps):
        x, y = batches(number)
        kept.append((params, state))
        x[0, 0] = bad if number in (3, 7) else x[0, 0]
        params, state, loss = step(params, state, x, y)
        if watcher is not None:
            state = watcher.read(state, loss=loss)
    return params, state, kept


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_is_left_out_exactly(bad):
    """Weights, moments and counters stay in the same bits, and the steps that are left out are counted."""
    params, state, kept = guarded_training(optax.adam(1e-3), None, bad)

    assert state.skipped == 2 and state.inner[0].count == 10
    for number in (3, 7):
        before, after = kept[number], kept[number + 1]
        for one, other in zip(
            jax.tree.leaves((before[0], before[1].inner)), jax.tree.leaves((after[0], after[1].inner)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_guard_without_bad_steps_changes_nothing():
    """The trained weights are those without it, to float32 rounding."""
    expected, _, _ = train(
        optax.adam(1e-3),
        None,
        steps=12,
        params=digits_network(),
        gradients_of=digits_gradients,
        batches=digits_batches(),
    )
    batches, guard = digits_batches(), guarded(optax.adam(1e-3))
    params, state = digits_network(), guard.init(digits_network())
    for number in range(12):
        _, gradients = jax.jit(digits_gradients)(params, *batches(number))
        params, state = jax.jit(guard.step)(gradients, state, params)

    assert state.skipped == 0
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_huge_but_finite_gradients_are_taken():
    """Only NaN and Inf are left out, not what overflows when it is squared."""
    guard = guarded(optax.sgd(1e-30))
    params, state = guard.step({"b": jnp.full(4, 1e30), "w": None}, guard.init({"b": TINY["b"], "w": None}),
                               {"b": TINY["b"], "w": None})  # fmt: skip

    assert state.skipped == 0 and params["b"].tolist() == [-1] * 4


def test_skipped_steps_are_events(watched):
    """A monitor inside the guard records the steps that were taken; those that were left out are events."""
    watcher = monitor(optax.adam(1e-3))
    run = watched(watcher)
    guarded_training(watcher, watcher, math.nan)
    history = run.history()

    assert history.num_steps == 10 and np.isfinite(history["loss"].values).all()
    assert [event.step for event in history.events_of("bad-step-skipped")] == [3, 6]
