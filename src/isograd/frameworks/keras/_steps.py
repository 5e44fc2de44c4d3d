"""The three backends of Keras: how a step is instrumented, and how what it read leaves it.

TensorFlow: the traced step writes its vector into a ring, a `tf.Variable` of this module. JAX: the step returns it
beside its logs; forward readings leave the gradient's trace beside the loss, gradients with respect to outputs as the
gradient of a matrix that nothing depends on. PyTorch: the step runs eagerly and leaves it in a list.

Each class makes the two train functions of one model, one per tier, and says what has arrived.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from isograd._guard import Guard
from isograd.frameworks import Shield
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras import _guarding as guarding
from isograd.frameworks.keras import _kernels as kernels
from isograd.frameworks.keras._instrument import Instrument, replaced
from isograd.frameworks.keras._reading import Layouts, Place, Reading, Tier
from isograd.frameworks.keras._stepping import acting_rate

Vector = NDArray[np.float32]

RING = 64
"""Steps that the ring holds at most before it is read."""

TIMES = 1024
"""Time steps of a recurrent layer whose signals are read at most on JAX, where their number is not known beforehand."""


class Steps:
    """What the backends share. `guard`: what may be done at a bad step."""

    def __init__(self, model: Any, shield: Shield, guard: Guard | None = None) -> None:
        self.model, self.shield, self.guard, self.layouts = model, shield, guard, Layouts()
        self.plain = model.train_function
        self.failed: Exception | None = None  # why the last step had to be done without readings

    def functions(self) -> dict[Tier, Callable[..., Any]]:
        """The train functions of both tiers, called as Keras calls its own."""
        raise NotImplementedError

    def arrived(self) -> list[Vector]:
        """The vectors of the steps since the last time, in their order; waits for them."""
        raise NotImplementedError

    # ---- what an optimizer is given and what it changes ------------------------------------------------------------

    def _before_apply(self, instrument: Instrument, optimizer: Any, gradients: Any, variables: Any) -> dict[str, Any]:
        """Read gradients, and at deep steps weights, in front of the update."""
        reading, number = instrument._reading, len(instrument._reading.optimizers)
        dense = [None if g is None else self.dense(g) for g in gradients]
        reading.optimizers.append((optimizer, *variables))
        present = [g for g in dense if g is not None]
        sums = self.square_sums([self.shielded(g) for g in present])
        squares = iter(sums)
        later = reading.later
        later[Place("optimizer", number, "learning_rate")] = ops.cast(acting_rate(describe.inner(optimizer)), "float32")
        scale = _loss_scale(optimizer)
        if scale is not None:
            later[Place("optimizer", number, "scale")] = ops.cast(scale, "float32")
        found: list[list[Any]] = []
        limit = describe.inner(optimizer).clipvalue
        for gradient in dense:
            if gradient is None:
                found.append([ops.full((), float("nan"), dtype="float32")] * 3)
                continue
            plain = kernels.wide(gradient)
            square = next(squares)
            bad = kernels.nonfinite(plain) if reading.is_deep else 1.0 - ops.cast(ops.isfinite(square), "float32")
            found.append([square, kernels.largest(plain, sampled=not reading.is_deep), bad])
        later[Place("parameters", number, "gradients")] = ops.stack([ops.stack(one) for one in found])
        if limit is not None:
            bound = float(limit) if scale is None else limit * scale
            cut = [None if g is None else kernels.square_sum(ops.clip(kernels.wide(g), -bound, bound)) for g in dense]
            missing = ops.full((), float("nan"), dtype="float32")
            later[Place("parameters", number, "clipped")] = ops.stack([missing if c is None else c for c in cut])
        kept: dict[str, Any] = {"number": number}
        if present and guarding.skips(self.guard, optimizer):
            kept["is_good"] = is_good = guarding.is_finite(sums, present, self.cond)
            reading.good.append(is_good)
            later[Place("optimizer", number, "skipped")] = 1.0 - ops.cast(is_good, "float32")
        if not reading.is_deep:
            return kept
        before = [self.copied(v) for v in variables]
        zeros = [
            ops.full((), float("nan"), dtype="float32") if g is None else kernels.count(ops.equal(kernels.wide(g), 0.0))
            for g in dense
        ]
        later[Place("parameters", number, "zeros")] = ops.stack(zeros)
        later[Place("parameters", number, "weights")] = ops.stack(
            [ops.stack([kernels.square_sum(kernels.wide(w)), kernels.nonfinite(kernels.wide(w))]) for w in before]
        )
        several = [kernels.unit_spread(w) if len(w.shape) > 1 and w.shape[-1] > 1 else None for w in before]
        missing = ops.full((), float("nan"), dtype="float32")
        later[Place("parameters", number, "spread")] = ops.stack([missing if s is None else s for s in several])
        return {**kept, "before": before}

    def _after_apply(self, instrument: Instrument, kept: dict[str, Any] | None, after: Sequence[Any]) -> None:
        """Read how far the weights have moved."""
        if not kept or "before" not in kept:
            return
        pairs = zip(kept["before"], after, strict=True)
        moved = [kernels.square_sum(kernels.wide(new) - kernels.wide(old)) for old, new in pairs]
        instrument._reading.later[Place("parameters", kept["number"], "updates")] = ops.stack(moved)

    # ---- what differs ---------------------------------------------------------------------------------------------

    def dense(self, gradient: Any) -> Any:
        """A gradient as one tensor."""
        return gradient

    def shielded(self, tensor: Any) -> Any:
        """The same tensor, which the compiler does not fuse with the update."""
        return tensor

    def square_sums(self, tensors: Sequence[Any]) -> list[Any]:
        """Sum of squares of each, in float32."""
        return [kernels.square_sum(kernels.wide(tensor)) for tensor in tensors]

    def copied(self, variable: Any) -> Any:
        """The value of a variable as it is now."""
        return ops.convert_to_tensor(variable)

    def apart(self, operation: Any, args: Any, kwargs: Any, reading: Reading) -> Any:
        """What a layer returns before its activation, computed beside the step; None where that is not needed."""
        return None

    def uses_logits(self, prediction: Any) -> bool:
        """Whether Keras takes what entered the output's softmax or sigmoid in the place of its result."""
        return False

    def cond(self, predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """`then()` or `otherwise()`, decided where the step runs."""
        raise NotImplementedError

    # ---- what the forward pass changes ----------------------------------------------------------------------------

    def _state(self) -> list[tuple[Any, Any]]:
        """(variable, its value before the step) of what is put back at a bad step."""
        if not any(guarding.skips(self.guard, optimizer) for optimizer in describe.optimizers_of(self.model)):
            return []
        return [(variable, self.copied(variable)) for variable in guarding.state_of(self.model)]

    def _put_back(self, held: Sequence[tuple[Any, Any]], reading: Reading) -> None:
        """Undo what the forward pass of a bad step has changed."""
        if not held or not reading.good:
            return

        def put_back() -> Any:
            for variable, value in held:
                variable.assign(value)
            return ops.zeros((), dtype="bool")

        self.cond(ops.all(ops.stack(reading.good)), lambda: ops.ones((), dtype="bool"), put_back)


def _loss_scale(optimizer: Any) -> Any:
    """What gradients are too large by, None where nothing scales the loss."""
    scale = getattr(optimizer, "dynamic_scale", None)
    if scale is not None:
        return ops.copy(ops.convert_to_tensor(scale))  # PyTorch changes it in place
    return getattr(optimizer, "loss_scale_factor", None)


# ---- TensorFlow -----------------------------------------------------------------------------------------------------


class TensorFlowSteps(Steps):
    """Steps in a `tf.function`, with XLA or without, or eager ones."""

    rows = RING

    def __init__(self, model: Any, shield: Shield, guard: Guard | None = None) -> None:
        super().__init__(model, shield, guard)
        self._rings: dict[int, _Ring] = {}
        self._count: Any = None
        self._asked: list[tuple[Any, int]] = []  # inputs of recurrent layers, and the calls that they belong to

    def functions(self) -> dict[Tier, Callable[..., Any]]:
        return {tier: self.model._make_function(self._step(tier)) for tier in ("cheap", "deep")}

    def _step(self, tier: Tier) -> Callable[..., Any]:
        import tensorflow as tf

        def step(data: Any) -> Any:
            reading = Reading(tier)
            reading.where = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
            with contextlib.ExitStack() as stack:
                stack.enter_context(Instrument(self.model, reading, self, self.shield).installed())
                stack.enter_context(self._tapes(reading))
                held = self.shield.call(self._state) or []
                logs = self.model.train_step(data)
                self.shield.call(self._put_back, held, reading)
            self.shield.call(self._emit, reading)
            return logs

        return step

    def _emit(self, reading: Reading) -> None:
        """Write the vector of the step into the ring of its layout."""
        import tensorflow as tf

        pieces = {**reading.forward, **reading.behind()}
        number = self.layouts.number(reading.layout(pieces))
        with tf.init_scope():
            if self._count is None:
                self._count = tf.Variable(0, dtype=tf.int64, trainable=False)
            if number not in self._rings:
                self._rings[number] = _Ring(self.layouts[number].width, self.rows)
        ring = self._rings[number]
        place = self._count.assign_add(1) - 1
        vector = tf.concat([tf.cast(place, tf.float32)[None], kernels.packed([*pieces.values()])], 0)
        ring.write(vector)

    def arrived(self) -> list[Vector]:
        rows: list[tuple[float, Vector]] = []
        for number, ring in self._rings.items():
            own = [np.float32(number)]
            rows.extend((float(vector[0]), np.concatenate([own, vector[1:]])) for vector in ring.read())
        return [vector for _, vector in sorted(rows, key=lambda pair: pair[0])]

    @contextlib.contextmanager
    def tapped_optimizer(self, optimizer: Any, instrument: Instrument) -> Iterator[None]:
        original = optimizer.apply

        def apply(grads: Any, trainable_variables: Any = None) -> None:
            grads = list(grads)
            variables = list(trainable_variables or optimizer._trainable_variables)
            if not optimizer.built:
                with keras.name_scope(optimizer.name, caller=optimizer):  # as Keras does
                    optimizer.build(variables)
            kept = self.shield.call(self._before_apply, instrument, optimizer, grads, variables) or {}
            if "is_good" in kept:
                guarding.tensorflow_apply(kept["is_good"], lambda: original(grads, trainable_variables))
            else:
                original(grads, trainable_variables)
            self.shield.call(self._after_apply, instrument, kept, variables)

        with replaced(optimizer, "apply", apply):
            yield

    def cond(self, predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return guarding.tensorflow_cond(predicate, then, otherwise)

    def tapped(self, out: Any, index: int, reading: Reading) -> Any:
        import tensorflow as tf

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def identity(x: Any) -> Any:
            def grad(upstream: Any) -> Any:
                self.shield.call(self._take, upstream, index, reading)
                return upstream

            return tf.identity(x), grad

        tapped = identity(out)
        logits = getattr(out, "_keras_logits", None)
        if logits is None and _operation_of(out) in ("Softmax", "Sigmoid"):
            logits = out.op.inputs[0]  # where Keras would have found them
        if logits is not None:
            tapped._keras_logits = logits
        if hasattr(out, "_keras_mask"):
            tapped._keras_mask = out._keras_mask
        return tapped

    def _take(self, upstream: Any, index: int, reading: Reading) -> None:
        if self.is_here(upstream, reading):
            found = kernels.signal(self.dense(upstream))
            known = reading.signals.get(index)
            reading.signals[index] = found if known is None else known + found

    def tapped_in_time(self, x: Any, index: int, reading: Reading) -> Any:
        if reading.channels:
            reading.channels[-1].watch(x)
            self._asked.append((x, index))
        return x

    @contextlib.contextmanager
    def _tapes(self, reading: Reading) -> Iterator[None]:
        """Within it a tape that is asked for the gradients of weights tells of what, where `compute_loss` has not been
        called; and it finds those of the inputs of recurrent layers, too: it would not go that far back.
        """
        import tensorflow as tf

        enter, gradient = tf.GradientTape.__enter__, tf.GradientTape.gradient
        reading.channels, self._asked = [], []

        def entered(tape: Any) -> Any:
            reading.channels.append(tape)
            return enter(tape)

        def asked(tape: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
            extra = self._asked if isinstance(sources, (list, tuple)) and tape in reading.channels[-1:] else []
            self._asked = []
            if not reading.num_losses and any(
                isinstance(s, (tf.Variable, keras.Variable)) for s in keras.tree.flatten(sources)
            ):
                self.shield.call(self._take_loss, target, reading)
            found = gradient(tape, target, [*sources, *(x for x, _ in extra)] if extra else sources, *args, **kwargs)
            if not extra:
                return found
            for (_, index), upstream in zip(extra, found[-len(extra) :], strict=True):
                if upstream is not None:
                    self.shield.call(self._take_times, upstream, index, reading)
            return found[: -len(extra)]

        tf.GradientTape.__enter__, tf.GradientTape.gradient = entered, asked
        try:
            yield
        finally:
            tf.GradientTape.__enter__, tf.GradientTape.gradient = enter, gradient
            self._asked = []

    def _take_loss(self, target: Any, reading: Reading) -> None:
        import tensorflow as tf

        if isinstance(target, tf.Tensor) and self.is_here(target, reading):
            reading.put_loss(tf.reduce_sum(target))  # which is what the tape differentiates

    def _take_times(self, upstream: Any, index: int, reading: Reading) -> None:
        if self.is_here(upstream, reading):
            reading.times[index] = kernels.signal_of_times(self.dense(upstream), 1)

    def is_here(self, tensor: Any, reading: Reading) -> bool:
        import tensorflow as tf

        now = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        return now is reading.where and isinstance(tensor, (tf.Tensor, tf.IndexedSlices))

    def square_sums(self, tensors: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        # In one pass, without the squares as a tensor of their own.
        return [2.0 * tf.nn.l2_loss(kernels.wide(tensor)) for tensor in tensors]

    def dense(self, gradient: Any) -> Any:
        import tensorflow as tf

        # Of an embedding's sparse gradient only this one adds up the entries that share a row.
        return tf.convert_to_tensor(gradient)

    def copied(self, variable: Any) -> Any:
        import tensorflow as tf

        return tf.identity(ops.convert_to_tensor(variable))

    def apart(self, operation: Any, args: Any, kwargs: Any, reading: Reading) -> Any:
        """TensorFlow joins a product, its bias and its activation into one operation where nobody else reads what is
        between them, and the joined one rounds differently.
        """
        import tensorflow as tf

        if reading.where is None or self.model.jit_compile:
            return None

        def unknown(value: Any) -> Any:  # to the graph's optimizer, which would find that both compute the same
            return tf.compat.v1.placeholder_with_default(value, value.shape) if isinstance(value, tf.Tensor) else value

        args, kwargs = keras.tree.map_structure(unknown, (args, kwargs))
        with contextlib.ExitStack() as stack:
            if "activation" in vars(operation):
                stack.enter_context(replaced(operation, "activation", keras.activations.linear))
            return operation.call(*args, **kwargs)

    def uses_logits(self, prediction: Any) -> bool:
        return getattr(prediction, "_keras_logits", None) is not None or _operation_of(prediction) in (
            "Softmax",
            "Sigmoid",
        )


def _operation_of(tensor: Any) -> str:
    """The type of the graph operation that made a tensor, "" for an eager one."""
    try:
        return str(tensor.op.type)
    except AttributeError:
        return ""


class _Ring:
    """The last `size` vectors of one layout, on the device."""

    def __init__(self, width: int, size: int) -> None:
        import tensorflow as tf

        self._size = size
        self._rows = tf.Variable(tf.zeros([size, width + 1]), trainable=False)
        self._next = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._seen = 0

    def write(self, vector: Any) -> None:
        place = self._next.assign_add(1) - 1
        self._rows.scatter_nd_update([[place % self._size]], vector[None])

    def read(self) -> list[Vector]:
        """The vectors that are new."""
        end = int(self._next.numpy())
        if end == self._seen:
            return []
        rows, first = self._rows.numpy(), max(self._seen, end - self._size)
        self._seen = end
        return [rows[place % self._size].copy() for place in range(first, end)]


# ---- JAX ------------------------------------------------------------------------------------------------------------


class JaxSteps(Steps):
    """Steps in a `jax.jit`, or eager ones."""

    def __init__(self, model: Any, shield: Shield, guard: Guard | None = None) -> None:
        super().__init__(model, shield, guard)
        self._waiting: deque[Any] = deque()
        self._worked: set[Tier] = set()
        self._auxiliary: Any = None
        self._packed: list[tuple[list[Place], Any]] = []  # what left each differentiation of the step

    def functions(self) -> dict[Tier, Callable[..., Any]]:
        return {tier: self.model._make_function(self._compiled(tier)) for tier in ("cheap", "deep")}

    def _compiled(self, tier: Tier) -> Callable[..., Any]:
        import jax

        def step(state: Any, data: Any) -> Any:
            return self._stepped(tier, state, data)

        if not self.model.run_eagerly and self.model.jit_compile:
            shardings = None
            if keras.distribution.distribution() is not None:
                shardings = (None, self.model._get_state_sharding_spec())
            step = jax.jit(step, donate_argnums=0, out_shardings=shardings)

        def train_step(state: Any, data: Any) -> Any:
            try:
                (logs, vector), state = step(state, data)
            except Exception as error:
                if tier in self._worked:
                    raise
                done = self._plain_step()(state, data)  # nothing has been donated yet, and the batch is at hand
                self.failed = error
                return done
            self._worked.add(tier)
            self._waiting.append(vector)
            return logs, state

        return train_step

    def _plain_step(self) -> Callable[..., Any]:
        """The step as Keras compiles it."""
        import jax

        if self.model.run_eagerly or not self.model.jit_compile:
            return self.model.train_step  # type: ignore[no-any-return]
        return jax.jit(self.model.train_step, donate_argnums=0)

    def _stepped(self, tier: Tier, state: Any, data: Any) -> Any:
        import jax
        import jax.numpy as jnp

        reading = Reading(tier)
        trainable, others, *rest = state
        if reading.is_deep:
            calls = 2 * sum(1 for _ in describe.layers_of(self.model)) + 64
            signals = jnp.full((calls, len(kernels.SIGNAL)), 0.0, dtype="float32")
            times = jnp.zeros((_recurrent(self.model), TIMES), dtype="float32")
            trainable = [*trainable, signals, times]
        self._packed = []
        differentiated = self._value_and_grad(jax.value_and_grad, reading)
        with (
            Instrument(self.model, reading, self, self.shield).installed(),
            replaced(jax, "value_and_grad", differentiated),
        ):
            logs, (trainable, after, *rest) = self.model.train_step((trainable, others, *rest), data)
        after = list(after)
        after = self.shield.call(self._kept, reading, others, after) or after
        vector = self.shield.call(self._vector, reading)
        empty = jnp.full((1,), -1.0, dtype="float32")
        return (logs, empty if vector is None else vector), (trainable, after, *rest)

    def _kept(self, reading: Reading, before: Sequence[Any], after: Sequence[Any]) -> list[Any] | None:
        """Variables that are not trained, after a step: at a bad one as they were before the forward pass."""
        import jax.numpy as jnp

        if not reading.good:
            return None
        mine = {id(variable) for variable in guarding.state_of(self.model)}
        is_good = jnp.all(jnp.stack(reading.good))
        several = zip(self.model.non_trainable_variables, before, after, strict=True)
        return [jnp.where(is_good, new, old) if id(v) in mine else new for v, old, new in several]

    def _vector(self, reading: Reading) -> Any:
        import jax.numpy as jnp

        # What was read where a program differentiates in a way of its own cannot leave it.
        places = [place for known, _ in self._packed for place in known]
        forward = jnp.concatenate([jnp.zeros((0,), dtype="float32"), *(packed for _, packed in self._packed)])
        self._packed = []
        if self._auxiliary is not None:
            signals, times = self._auxiliary
            self._auxiliary = None
            for index, call in enumerate(reading.calls):
                if call.times:
                    reading.times[index] = times[_row_in_time(reading, index)][: call.times]
                elif index < signals.shape[0]:
                    reading.signals[index] = signals[index]
        behind = reading.behind()
        layout = reading.layout({**{place: reading.forward[place] for place in places}, **behind})
        number = self.layouts.number(layout)
        return jnp.concatenate([jnp.array([number], dtype="float32"), forward, kernels.packed([*behind.values()])])

    def _value_and_grad(self, original: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
        """`jax.value_and_grad` of a step, Keras's or the user's own, which hands on what is read inside it."""

        def value_and_grad(fun: Any, argnums: Any = 0, has_aux: bool = False, **options: Any) -> Callable[..., Any]:
            if argnums != 0 or reading.where is not None:
                return original(fun, argnums, has_aux, **options)  # type: ignore[no-any-return]
            places: list[Place] = []

            def read(trainable: Any, *args: Any, **kwargs: Any) -> Any:
                known = len(reading.forward)
                reading.where = _current_trace()
                try:
                    if reading.is_deep and isinstance(trainable, list):
                        *trainable, signals, times = trainable
                        reading.channels = signals, times
                    out = fun(trainable, *args, **kwargs)
                    places[:] = [*reading.forward][known:]
                    packed = self.shield.call(kernels.packed, [reading.forward[place] for place in places])
                finally:
                    reading.where = None
                loss, aux = out if has_aux else (out, None)
                return loss, (aux, packed)

            def found(*args: Any, **kwargs: Any) -> Any:
                (loss, (aux, packed)), gradients = original(read, argnums, has_aux=True, **options)(*args, **kwargs)
                if packed is not None:
                    self._packed.append((places, packed))
                return (loss, aux) if has_aux else loss, gradients

            return found

        return value_and_grad

    def arrived(self) -> list[Vector]:
        waiting, self._waiting = self._waiting, deque()
        vectors = [np.asarray(vector) for vector in waiting]
        return [vector for vector in vectors if vector[0] >= 0]

    @contextlib.contextmanager
    def tapped_optimizer(self, optimizer: Any, instrument: Instrument) -> Iterator[None]:
        original = optimizer.stateless_apply

        def stateless_apply(state: Any, grads: Any, variables: Any) -> Any:
            grads, variables = list(grads), list(variables)
            known = len(optimizer._trainable_variables)
            if instrument._reading.is_deep and len(grads) == known + 2:
                *grads, signals, times = grads
                variables = variables[:-2]
                self._auxiliary = signals, times
            scope = keras.StatelessScope(state_mapping=list(zip(optimizer.variables, state, strict=True)))
            with scope:
                self._values = variables
                kept = self.shield.call(
                    self._before_apply, instrument, optimizer, grads, optimizer._trainable_variables
                )
            if kept is not None and "is_good" in kept:
                new, state = guarding.jax_apply(kept["is_good"], original, state, grads, variables)
            else:
                new, state = original(state, grads, variables)
            self.shield.call(self._after_apply, instrument, kept, new)
            return new, state

        with replaced(optimizer, "stateless_apply", stateless_apply):
            yield

    def _before_apply(self, instrument: Instrument, optimizer: Any, gradients: Any, variables: Any) -> dict[str, Any]:
        values = {id(v): value for v, value in zip(variables, self._values, strict=True)}
        self._copies = values
        return super()._before_apply(instrument, optimizer, gradients, variables)

    def copied(self, variable: Any) -> Any:
        return self._copies[id(variable)]

    def cond(self, predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return guarding.jax_cond(predicate, then, otherwise)

    def shielded(self, tensor: Any) -> Any:
        import jax

        # XLA would fuse the sum into the update of the CPU backend and take its vector instructions away.
        return jax.lax.optimization_barrier(tensor)  # type: ignore[no-untyped-call]

    def tapped(self, out: Any, index: int, reading: Reading) -> Any:
        if reading.channels is None or index >= reading.channels[0].shape[0]:
            return out
        return _jax_tap()(out, reading.channels[0][index])

    def tapped_in_time(self, x: Any, index: int, reading: Reading) -> Any:
        row = _row_in_time(reading, index)
        if reading.channels is None or row >= reading.channels[1].shape[0] or x.shape[1] > TIMES:
            reading.calls[index].times = 0
            return x
        return _jax_tap_in_time()(x, reading.channels[1][row])

    def is_here(self, tensor: Any, reading: Reading) -> bool:
        return reading.where is not None and _current_trace() is reading.where


def _row_in_time(reading: Reading, index: int) -> int:
    """Which of the recurrent layers a call belongs to."""
    return sum(1 for call in reading.calls[:index] if call.times)


def _recurrent(model: Any) -> int:
    return sum(isinstance(layer, keras.layers.RNN) for layer in describe.layers_of(model))


def _current_trace() -> Any:
    from jax._src import core

    return core.trace_ctx.trace


def _jax_tap() -> Callable[..., Any]:
    """x -> x, whose gradient with respect to the second argument is what `kernels.signal` reads."""
    import jax

    @jax.custom_vjp
    def tap(x: Any, channel: Any) -> Any:
        return x

    def backward(_: None, upstream: Any) -> Any:
        return upstream, kernels.signal(upstream)

    tap.defvjp(lambda x, channel: (x, None), backward)
    return tap


def _jax_tap_in_time() -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def tap(x: Any, channel: Any) -> Any:
        return x

    def backward(_: None, upstream: Any) -> Any:
        found = kernels.signal_of_times(upstream, 1)
        return upstream, jnp.zeros((TIMES,), dtype="float32").at[: found.shape[0]].set(found)

    tap.defvjp(lambda x, channel: (x, None), backward)
    return tap


# ---- PyTorch --------------------------------------------------------------------------------------------------------


class TorchSteps(Steps):
    """Eager steps."""

    def __init__(self, model: Any, shield: Shield, guard: Guard | None = None) -> None:
        super().__init__(model, shield, guard)
        self._waiting: list[Any] = []

    def functions(self) -> dict[Tier, Callable[..., Any]]:
        return {tier: self._function(tier) for tier in ("cheap", "deep")}

    def _function(self, tier: Tier) -> Callable[..., Any]:
        def function(data: Any) -> Any:
            with replaced(self.model, "train_step", self._step(tier, self.model.train_step)):
                return self.plain(data)

        return function

    def _step(self, tier: Tier, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(data: Any) -> Any:
            reading = Reading(tier)
            held = self.shield.call(self._state) or []
            with Instrument(self.model, reading, self, self.shield).installed(), self._backward(reading):
                logs = original(data)
            self.shield.call(self._put_back, held, reading)
            self.shield.call(self._emit, reading)
            return logs

        return step

    @contextlib.contextmanager
    def _backward(self, reading: Reading) -> Iterator[None]:
        """Within it a backward pass tells of what, where `compute_loss` has not been called."""
        import torch

        tensors: Any = torch.Tensor  # its methods carry no types
        original = tensors.backward

        def backward(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not reading.num_losses:
                self.shield.call(reading.put_loss, tensor.detach().sum())
            return original(tensor, *args, **kwargs)

        tensors.backward = backward
        try:
            yield
        finally:
            tensors.backward = original

    def _emit(self, reading: Reading) -> None:
        import torch

        with torch.no_grad():
            pieces = {**reading.forward, **reading.behind()}
            self._waiting.append((self.layouts.number(reading.layout(pieces)), kernels.packed([*pieces.values()])))

    def arrived(self) -> list[Vector]:
        waiting, self._waiting = self._waiting, []
        return [np.concatenate([[np.float32(number)], vector.cpu().numpy()]) for number, vector in waiting]

    @contextlib.contextmanager
    def tapped_optimizer(self, optimizer: Any, instrument: Instrument) -> Iterator[None]:
        original = optimizer.apply

        def apply(grads: Any, trainable_variables: Any = None) -> None:
            grads = list(grads)
            variables = list(trainable_variables or optimizer._trainable_variables)
            if not optimizer.built:
                with keras.name_scope(optimizer.name, caller=optimizer):  # as Keras does
                    optimizer.build(variables)
            kept = self.shield.call(self._before_apply, instrument, optimizer, grads, variables) or {}
            if bool(kept.get("is_good", True)):
                original(grads, trainable_variables)
            self.shield.call(self._after_apply, instrument, kept, variables)

        with replaced(optimizer, "apply", apply):
            yield

    def _before_apply(self, instrument: Instrument, optimizer: Any, gradients: Any, variables: Any) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            return super()._before_apply(instrument, optimizer, gradients, variables)

    def _after_apply(self, instrument: Instrument, kept: dict[str, Any] | None, after: Sequence[Any]) -> None:
        import torch

        with torch.no_grad():
            super()._after_apply(instrument, kept, after)

    def square_sums(self, tensors: Sequence[Any]) -> list[Any]:
        from isograd.frameworks.torch._kernels import norms

        return [norm.square() for norm in norms([tensor.detach() for tensor in tensors])]

    def copied(self, variable: Any) -> Any:
        return ops.convert_to_tensor(variable).detach().clone()

    def cond(self, predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return guarding.torch_cond(predicate, then, otherwise)

    def tapped(self, out: Any, index: int, reading: Reading) -> Any:
        if out.requires_grad:
            out.register_hook(lambda upstream: self.shield.call(self._take, upstream, index, reading))
        return out

    def _take(self, upstream: Any, index: int, reading: Reading) -> None:
        import torch

        with torch.no_grad():
            reading.signals[index] = kernels.signal(upstream)

    def tapped_in_time(self, x: Any, index: int, reading: Reading) -> Any:
        if x.requires_grad:
            x.register_hook(lambda upstream: self.shield.call(self._take_times, upstream, index, reading))
            return x
        # Data has no gradient unless it is asked for one.
        asked = x.detach().requires_grad_()
        asked.register_hook(lambda upstream: self.shield.call(self._take_times, upstream, index, reading))
        return asked

    def _take_times(self, upstream: Any, index: int, reading: Reading) -> None:
        import torch

        with torch.no_grad():
            reading.times[index] = kernels.signal_of_times(upstream, 1)

    def is_here(self, tensor: Any, reading: Reading) -> bool:
        import torch

        return isinstance(tensor, torch.Tensor) and tensor.device.type != "meta"


BACKENDS: dict[str, type[Steps]] = {"tensorflow": TensorFlowSteps, "jax": JaxSteps, "torch": TorchSteps}
"""By the name that Keras has for it."""
