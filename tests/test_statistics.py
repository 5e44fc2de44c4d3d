"""Every statistic against a float64 one-liner: what it means, computed naively from the same tensors.

`proves` notes which statistics a test is the oracle of; the last test asks that none is left without one.
"""

import math
import os
import socket
import tempfile
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import isograd
from isograd._record import read_run
from isograd._statistics import STATISTICS
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch import _kernels as kernels

ORACLES = defaultdict(list)

# A file system in memory where there is one: hundreds of runs are recorded here.
MEMORY = next((folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)), None)

few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def proves(*names):
    def register(test):
        for name in names:
            ORACLES[name].append(test.__name__)
        return test

    return register


# ---- tensors of all kinds -------------------------------------------------------------------------------------------

REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*REAL, torch.complex64]
SCALES = [0.0, 1e-30, 1e-4, 1.0, 1e3, 1e30]
SPECIAL = [math.nan, math.inf, -math.inf]


def laid_out(tensor, layout):
    """The same entries in another order of memory."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor
    if layout == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if layout == "channels-last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@st.composite
def tensors(draw, dtypes=tuple(DTYPES), max_dims=4, min_dims=0, scales=tuple(SCALES), special=True, empty=True):
    """Small tensors: any dtype, rank, layout and size of entries, zeros, NaN and Inf sprinkled in."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0 if empty else 1, 5), min_size=min_dims, max_size=max_dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from(scales))
    values = torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3])), 0.0, values)
    if special and draw(st.booleans()):
        bad = draw(st.sampled_from(SPECIAL))
        values = torch.where(torch.rand(shape, generator=generator) < 0.2, bad, values)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "channels-last"]))
    return laid_out(values.to(dtype), layout)


def entries(*tensors_):
    """All entries as plain float64 numbers, complex ones as pairs."""
    parts = []
    for tensor in tensors_:
        plain = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        parts.append((torch.view_as_real(plain) if plain.is_complex() else plain).double().numpy().ravel())
    return np.concatenate(parts) if parts else np.zeros(0)


def norm_of(values, *, double=False):
    """What an L2 norm must read: NaN with a non-finite entry, Inf where the sum of squares exceeds the accumulator."""
    if not len(values) or not np.isfinite(values).all():
        return math.nan
    if len(values) == 1:  # nothing is summed
        return float(np.abs(values[0]))
    with np.errstate(over="ignore", under="ignore"):
        total = float(np.sum(values**2))
    return math.inf if not double and total > float(np.finfo(np.float32).max) else math.sqrt(total)


def agree(expected, found, values=(), rel=2e-6):
    """Equal to float32 accuracy. Squares below float32's smallest normal number may be lost: 1e-19 an entry."""
    lost = 1.1e-19 * math.sqrt(max(1, len(values)))
    assert expected == pytest.approx(found, rel=rel, abs=lost, nan_ok=True)


def recorded(loop, *things):
    """The history of `loop()`, both tiers read at every step."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        with isograd.watch(*things, out=folder, every=1, budget=math.inf) as run:
            loop()
        (history,) = read_run(run.path).histories
    assert not history.events_of("watch-detached"), history.events
    return history


def column(history, statistic, name, row=-1):
    names = [layer.name for layer in history.layers]
    return float(history[statistic].values[row, names.index(name)])


class Pass(nn.Module):
    """Returns what it is given, through one multiplication with a parameter that is 1."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.one.to(x.dtype)


def passed(inputs, signals):
    """A step in which a layer named `layer` returns its inputs, one a call, and `signals` come back to them.

    Returns the history, the outputs and the gradients that `retain_grad` saw.
    """
    model = nn.ModuleDict({"layer": Pass()})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    outputs = []

    def loop():
        losses = []
        for x, signal in zip(inputs, signals, strict=True):
            outputs.append(model["layer"](x))
            outputs[-1].retain_grad()
            product = (outputs[-1] * signal).sum()
            losses.append((product.real if product.is_complex() else product).double())
        sum(losses).backward()
        optimizer.step()

    return recorded(loop, model, optimizer), outputs, [out.grad for out in outputs]


# ---- parameters -----------------------------------------------------------------------------------------------------


@st.composite
def updates(draw):
    """(parameters, gradients) of one optimizer; a gradient is missing now and then."""
    parameters, gradients = [], []
    for _ in range(draw(st.integers(1, 4))):
        weight = draw(tensors(scales=(0.0, 1e-4, 1.0, 1e3), special=False))
        gradient = draw(st.none() | tensors(dtypes=(weight.dtype,)).map(lambda t: t.reshape(-1)))
        if gradient is not None:
            repeats = -(-weight.numel() // max(1, gradient.numel()))
            gradient = torch.cat([gradient] * max(1, repeats) + [torch.ones(weight.numel(), dtype=weight.dtype)])
            gradient = gradient[: weight.numel()].reshape(weight.shape)
        parameters.append(weight)
        gradients.append(gradient)
    return parameters, gradients


def stepped(weights, gradients, make=lambda parameters: torch.optim.SGD(parameters, 0.5)):
    """One step with the gradients given: (history, weights before, parameters, optimizer)."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    model = nn.ParameterList(parameters)
    before = [entries(parameter) for parameter in parameters]
    optimizer = make(parameters)

    def loop():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return recorded(loop, model, optimizer), before, parameters, optimizer


@proves("grad_norm", "grad_max", "grad_nonfinite", "global_grad_norm")
@few
@given(updates())
@example(([torch.zeros(3)], [torch.full((3,), 1e30)]))
@example(([torch.zeros(3)], [torch.full((3,), 1e-30)]))
@example(([torch.zeros(3)], [torch.tensor([math.nan, math.inf, -math.inf])]))
@example(([torch.zeros(3), torch.zeros(2)], [torch.tensor([math.nan, 0.0, 1.0]), torch.ones(2)]))
@example(([torch.zeros(0), torch.zeros(())], [torch.zeros(0), torch.tensor(-3.0)]))
def test_gradients(update):
    """Norm, largest entry and non-finite count of each gradient, and the norm of all of them together."""
    weights, gradients = update
    history, *_ = stepped(weights, gradients)
    lengths = []
    for index, gradient in enumerate(gradients):
        found = {name: history[name].values[0, index] for name in ("grad_norm", "grad_max", "grad_nonfinite")}
        values = entries(gradient) if gradient is not None else np.zeros(0)
        if not len(values):
            assert all(map(math.isnan, found.values()))
            continue
        bad = np.sum(~np.isfinite(values))
        assert bad == found["grad_nonfinite"]
        lengths.append(norm_of(values, double=gradient.dtype == torch.float64))
        agree(lengths[-1], found["grad_norm"], values)
        agree(math.nan if bad else np.abs(values).max(), found["grad_max"])
    together = (
        math.sqrt(sum(n**2 if n < 1e150 else math.inf if n == n else n for n in lengths)) if lengths else math.nan
    )
    agree(together, history["global_grad_norm"].values[0], np.zeros(100))


def test_overflow_and_underflow_are_told_from_zero_and_infinity():
    """Entries of 1e30 read an infinite norm with a finite largest entry; of 1e-30, a norm of 0 with one above 0."""
    weights = [torch.zeros(3), torch.zeros(3)]
    history, *_ = stepped(weights, [torch.full((3,), 1e30), torch.full((3,), 1e-30)])

    assert [math.inf, 0.0] == history["grad_norm"].values[0].tolist()
    assert [1e30, 1e-30] == pytest.approx(history["grad_max"].values[0].tolist(), rel=1e-6)
    assert [0.0, 0.0] == history["grad_nonfinite"].values[0].tolist()


@proves("grad_norm", "grad_max", "grad_zero_fraction")
@few
@given(st.lists(st.integers(0, 19), max_size=30), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 4))
def test_sparse_gradients(rows, dtype, width):
    """A sparse gradient, duplicates and all, reads as the dense one that it stands for."""
    weight = nn.Parameter(torch.randn(20, width, dtype=dtype))
    optimizer = torch.optim.SGD([weight], 0.1)
    dense = []

    def loop():
        F.embedding(torch.tensor(rows, dtype=torch.int64), weight, sparse=True).square().sum().backward()
        dense.append(entries(weight.grad))
        optimizer.step()

    history = recorded(loop, nn.ParameterList([weight]), optimizer)
    agree(norm_of(dense[0]), history["grad_norm"].values[0, 0], dense[0])
    agree(np.abs(dense[0]).max(), history["grad_max"].values[0, 0])
    agree(np.mean(dense[0] == 0), history["grad_zero_fraction"].values[0, 0])


@proves("grad_zero_fraction")
@few
@given(tensors(special=False, empty=False))
def test_share_of_zero_gradients(gradient):
    """The share of exactly zero entries; of all of them while they are few."""
    history, *_ = stepped([torch.ones_like(gradient)], [gradient])

    agree(np.mean(entries(gradient) == 0), history["grad_zero_fraction"].values[0, 0])


@proves("grad_max", "grad_zero_fraction", "update_norm", "update_ratio")
@pytest.mark.parametrize("shape", [(300, 200), (120_000,), (8, 16, 20, 30)], ids=str)
def test_sampled_parameter_statistics(shape):
    """Of large tensors a sample is read: within four standard errors of all entries, in every layout."""
    for layout in ("plain", "transposed", "channels-last"):
        gradient = torch.randn(shape) * (torch.rand(shape) < 0.7)
        weight = laid_out(torch.randn(shape), layout)
        history, *_ = stepped([weight], [laid_out(gradient, layout)])
        values = entries(gradient)

        assert norm_of(values) == pytest.approx(history["grad_norm"].values[0, 0], rel=1e-5)
        assert 0.7 * np.abs(values).max() <= history["grad_max"].values[0, 0] <= np.abs(values).max() * (1 + 1e-6)
        assert np.mean(values == 0) == pytest.approx(history["grad_zero_fraction"].values[0, 0], abs=4 * 0.004)
        # Entries are Gaussian or, with probability 0.3, zero: their kurtosis is 3 / 0.7.
        error = 4 * math.sqrt(3 / 0.7 / 4 / 16384)
        assert 0.5 * norm_of(values) == pytest.approx(history["update_norm"].values[0, 0], rel=error)
        ratio = 0.5 * norm_of(values) / norm_of(entries(weight))
        assert ratio == pytest.approx(history["update_ratio"].values[0, 0], rel=2 * error)


@proves("weight_norm", "weight_nonfinite")
@few
@given(st.lists(tensors(), min_size=1, max_size=3))
@example([torch.full((4,), 1e30)])
@example([torch.tensor([1.0, math.inf]), torch.tensor([[math.nan]])])
def test_weights(weights):
    """Norm and non-finite count of each parameter before the step."""
    history, before, parameters, _ = stepped(weights, [torch.zeros_like(weight) for weight in weights])
    for index, values in enumerate(before):
        found = {name: history[name].values[0, index] for name in ("weight_norm", "weight_nonfinite")}
        if not len(values):
            assert all(map(math.isnan, found.values()))
            continue
        assert np.sum(~np.isfinite(values)) == found["weight_nonfinite"]
        agree(norm_of(values, double=parameters[index].dtype == torch.float64), found["weight_norm"], values)


@proves("update_norm", "update_ratio")
@few
@given(updates())
def test_updates(update):
    """How far the step moved each parameter, and that length over the parameter's own."""
    weights, gradients = update
    history, before, parameters, _ = stepped(weights, gradients)
    for index, (old, parameter) in enumerate(zip(before, parameters, strict=True)):
        if not len(old):
            continue
        change = entries(parameter) - old
        found = {name: history[name].values[0, index] for name in ("update_norm", "update_ratio")}
        if not np.isfinite(norm_of(change, double=parameter.dtype == torch.float64)):
            assert all(map(math.isnan, found.values()))
            continue
        # The difference of two half-precision numbers is rounded to their precision once more.
        rel = (
            2 * float(torch.finfo(parameter.dtype).eps) if parameter.dtype in (torch.bfloat16, torch.float16) else 1e-5
        )
        assert norm_of(change, double=True) == pytest.approx(
            found["update_norm"], rel=rel, abs=1e-6 * (1 + np.abs(old).max())
        )
        if norm_of(old) > 1e-6:
            ratio = found["update_norm"] / norm_of(old)
            assert ratio == pytest.approx(found["update_ratio"], rel=1e-4, abs=1e-12)
        elif not np.any(old):
            assert math.isnan(found["update_ratio"])


@proves("state_nonfinite")
@few
@given(st.lists(st.sampled_from([0.5, 1e30, math.nan, math.inf]), min_size=1, max_size=6))
def test_optimizer_state(numbers):
    """Entries of the optimizer's own tensors that are not finite after a step with non-finite gradients."""
    gradients = [torch.tensor(numbers), torch.ones(2)]
    history, _, parameters, optimizer = stepped(
        [torch.zeros(len(numbers)), torch.zeros(2)], gradients, lambda p: torch.optim.Adam(p, 1e-3)
    )
    held = [[t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)] for p in parameters]
    expected = [sum(int((~torch.isfinite(t)).sum()) for t in tensors_) for tensors_ in held]
    if not np.isfinite(numbers).all():
        assert expected == history["state_nonfinite"].values[0].tolist()
    else:  # 1e30 squared overflows in the second moment alone: the state is not read while gradients are finite
        assert [0.0, 0.0] == history["state_nonfinite"].values[0].tolist()


def _drifting_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []
    with isograd.watch(model, optimizer, out=folder, every=1, budget=math.inf) as run:
        for step in range(3):
            if step == 2 and rank == 1:
                with torch.no_grad():
                    model.module.weight.mul_(1.25)
            norms.append(norm_of(entries(model.module.weight)))
            optimizer.zero_grad()
            model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
    (history,) = run.histories()
    torch.save((norms, history["replica_difference"].values), f"{folder}/rank-{rank}")
    torch.distributed.destroy_process_group()


@proves("replica_difference")
def test_replicas_that_drift_apart(tmp_path):
    """Two ranks: 0 while their weights are equal, then the difference of the norms over the larger one, on both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_drifting_rank, (port, str(tmp_path)), nprocs=2)
    (first, seen), (second, same) = (torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in (0, 1))

    np.testing.assert_array_equal(seen, same)
    assert [[0.0, 0.0], [0.0, 0.0]] == seen[:2].tolist()
    assert abs(first[2] - second[2]) / max(first[2], second[2]) == pytest.approx(seen[2, 0], rel=1e-5)
    assert 0.0 == seen[2, 1]


# ---- the numbers of a step ----------------------------------------------------------------------------------------


@proves(
    "loss",
    "loss_nonfinite",
    "micro_batches",
    "clip_factor",
    "global_grad_norm_unclipped",
    "global_grad_norm",
    "loss_scale",
    "skipped",
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    factors=st.lists(st.sampled_from([0.5, 2.0, -3.0, math.inf, math.nan]), min_size=1, max_size=4),
    limit=st.none() | st.sampled_from([1e-3, 1.0, 100.0]),
    scale=st.none() | st.sampled_from([1.0, 1024.0, 65536.0]),
    fused=st.booleans(),
)
def test_the_numbers_of_a_step(factors, limit, scale, fused):
    """Losses, micro-batches, clipping and scaling of a step whose losses are linear, so that all is known by hand."""
    assume(not (fused and limit is not None))  # a fused optimizer unscales inside its step, so nobody clips before
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    make = torch.optim.Adam if fused else torch.optim.SGD
    optimizer = make([weight], 1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)

    def loop():
        for factor in factors:
            scaler.scale(weight.sum() * factor).backward()
        if limit is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([weight], limit)
        scaler.step(optimizer)

    history = recorded(loop, nn.ParameterList([weight]), optimizer)
    found = {
        name: history[name].values[0]
        for name in STATISTICS
        if name in history.series and STATISTICS[name].axis == "step"
    }
    bad = sum(not math.isfinite(factor) for factor in factors)
    slope = sum(factors)
    before = math.sqrt(3) * abs(slope) if not bad else math.nan
    clip = min(1.0, limit / (before + 1e-6)) if limit is not None and not bad else 1.0

    assert len(factors) == found["micro_batches"]
    assert bad == found["loss_nonfinite"]
    agree(math.nan if bad else sum(-0.5 * factor for factor in factors) / len(factors), found["loss"], rel=1e-5)
    assert (scale or 1.0) == found["loss_scale"]
    assert float(scale is not None and bool(bad)) == found["skipped"]
    if not bad:
        agree(clip, found["clip_factor"], rel=1e-5)
    agree(before, found["global_grad_norm_unclipped"], rel=1e-5)
    agree(before * clip, found["global_grad_norm"], rel=1e-5)


@proves("carried_grad_norm")
@few
@given(
    st.lists(st.lists(st.sampled_from([0.5, 2.0, 3.0]), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["clears", "clears-to-none", "forgets"]),
)
def test_gradients_left_behind(steps, habit):
    """What the gradients held when a step's first backward pass began: the earlier steps' sum where nobody clears."""
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight, other], 1e-3)
    held = []

    def loop():
        for factors in steps:
            if habit != "forgets":
                optimizer.zero_grad(set_to_none=habit == "clears-to-none")
            held.append(norm_of(entries(*(p.grad for p in (weight, other) if p.grad is not None)), double=True))
            for factor in factors:
                (weight.sum() * factor + other.sum()).backward()
            optimizer.step()

    history = recorded(loop, nn.ParameterList([weight, other]), optimizer)
    expected = [0.0 if math.isnan(norm) else norm for norm in held]

    assert expected == pytest.approx(history["carried_grad_norm"].values.tolist(), rel=1e-6)


def test_gradients_returned_are_no_gradients_left_behind():
    """A pass whose gradients `torch.autograd.grad` returns adds to nothing: what stands then may be cleared later. Its
    loss is not the step's, unless it is the only one.
    """
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 1e-3)

    def loop():
        for step in range(3):
            (gradient,) = torch.autograd.grad((weight * weight).sum() * 100, weight, create_graph=True)
            optimizer.zero_grad()
            if step < 2:
                ((weight - 0.001 * gradient).sum() * 0 + step).backward()
            else:
                weight.grad = gradient.detach()
            optimizer.step()

    history = recorded(loop, nn.ParameterList([weight]), optimizer)

    assert [0.0, 0.0] == history["carried_grad_norm"].values.tolist()[:2]
    assert math.isnan(history["carried_grad_norm"].values[2])
    assert [0, 1, 300] == pytest.approx(history["loss"].values.tolist())


@proves("learning_rate")
@few
@given(st.lists(st.floats(1e-8, 10.0), min_size=1, max_size=4), st.booleans())
def test_learning_rates(rates, is_tensor):
    """The rate that each group's step used, a tensor or a number, before a scheduler changes it."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(r) if is_tensor else r} for r in rates]
    optimizer = torch.optim.SGD(groups, 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    def loop():
        for _ in range(3):
            for group in groups:
                group["params"][0].grad = torch.ones(2)
            optimizer.step()
            scheduler.step()

    model = nn.ParameterList(group["params"][0] for group in groups)
    found = recorded(loop, model, optimizer)["learning_rate"].values

    np.testing.assert_allclose(found, np.outer([1, 0.5, 0.25], rates), rtol=1e-6)


@proves("step_seconds", "watch_seconds")
def test_seconds(monkeypatch):
    """A step's time holds the user's and the watcher's own, which is told apart."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    plain = kernels.extremes

    def slow(tensors_):
        time.sleep(0.02)
        return plain(tensors_)

    monkeypatch.setattr(kernels, "extremes", slow)
    wall = []

    def loop():
        for _ in range(5):
            start = time.perf_counter()
            weight.sum().backward()
            time.sleep(0.03)
            optimizer.step()
            wall.append(time.perf_counter() - start)

    history = recorded(loop, optimizer)
    steps, watching = history["step_seconds"].values, history["watch_seconds"].values

    assert (watching >= 0.02).all()
    assert (steps - watching >= 0.03 - 1e-3).all()
    # The first step also holds what came before it; what follows the step is counted in the next one.
    assert steps[1:].sum() == pytest.approx(sum(wall[1:]), rel=0.2)


# ---- layers: values -----------------------------------------------------------------------------------------------


@proves(
    "output_rms", "output_mean", "output_min", "output_max", "output_zero_fraction", "output_nonfinite",
    "output_size", "calls",
)  # fmt: skip
@few
@given(st.lists(tensors(min_dims=1), min_size=1, max_size=3))
@example([torch.full((3,), 1e30)])
@example([torch.full((3,), 1e-30)])
@example([torch.zeros(0, 3)])
@example([torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_outputs(inputs):
    """Size, moments, range, zeros and non-finite entries of what a layer returned, over all of its calls."""
    history, outputs, _ = passed(inputs, [torch.ones_like(x) for x in inputs])
    values = entries(*(x for x in outputs))
    bad = np.sum(~np.isfinite(values))

    def found(statistic):
        return column(history, statistic, "layer")

    assert len(outputs) == found("calls")
    assert len(values) == found("output_size")
    assert bad == found("output_nonfinite")
    if bad or not len(values):
        for name in ("output_rms", "output_mean", "output_min", "output_max"):
            assert math.isnan(found(name))
        return
    double = all(x.dtype == torch.float64 for x in outputs)
    peak = np.abs(values).max()
    if double or peak < 1e15:
        agree(norm_of(values, double=True) / math.sqrt(len(values)), found("output_rms"), values, rel=1e-5)
    agree(values.min(), found("output_min"))
    agree(values.max(), found("output_max"))
    assert np.mean(values) == pytest.approx(found("output_mean"), abs=1e-5 * peak + 1e-37)
    agree(np.mean(values == 0), found("output_zero_fraction"))


@proves("input_nonfinite")
@few
@given(tensors(dtypes=(torch.float32,), min_dims=1, empty=False, scales=(1.0,)), st.booleans())
def test_inputs_of_a_layer_with_bad_outputs(x, overflows):
    """Where outputs are not finite, the non-finite entries that entered: 0 where the layer itself made them."""
    if overflows:
        x = x.nan_to_num(0.0, 0.0, 0.0) + 1e20
    model = nn.ModuleDict({"layer": Square()})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def loop():
        model["layer"](x).sum().backward()
        optimizer.step()

    history = recorded(loop, model, optimizer)

    assert np.sum(~np.isfinite(entries(x))) == column(history, "input_nonfinite", "layer")
    assert np.sum(~np.isfinite(entries(x * x))) == column(history, "output_nonfinite", "layer")


class Square(Pass):
    def forward(self, x):
        return x * x * self.one


@proves("output_std", "output_min", "output_max", "output_mean", "column_scale_ratio", "output_nonfinite")
@few
@given(tensors(dtypes=tuple(REAL), min_dims=1, scales=(1e-4, 1.0, 100.0), empty=False))
@example(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
@example(torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 1.0]]))
@example(torch.zeros(4, 3))
def test_inputs_of_the_program(x):
    """Spread, range and column scales of the data that enters the model."""
    history, *_ = passed([x], [torch.ones_like(x)])
    values = entries(x)
    if not np.isfinite(values).all():
        assert np.sum(~np.isfinite(values)) == column(history, "output_nonfinite", "layer.input")
        assert math.isnan(column(history, "output_std", "layer.input"))
        return
    peak = np.abs(values).max()
    for name, expected in (("output_min", values.min()), ("output_max", values.max())):
        agree(expected, column(history, name, "layer.input"))
    assert np.mean(values) == pytest.approx(column(history, "output_mean", "layer.input"), abs=1e-5 * peak + 1e-37)
    if len(values) > 1:
        assert np.std(values) == pytest.approx(column(history, "output_std", "layer.input"), abs=1e-5 * peak, rel=1e-5)
    if x.dim() == 2 and x.shape[1] > 1:
        columns = [column[column != 0] for column in values.reshape(x.shape).T]
        present = np.array([np.sqrt(np.mean(column**2)) for column in columns if len(column)])
        present = present[present > 0]
        expected = present.max() / present.min() if len(present) else 1.0
        assert expected == pytest.approx(column(history, "column_scale_ratio", "layer.input"), rel=1e-4)


@proves("row_sum_min", "row_sum_max")
@few
@given(tensors(dtypes=tuple(REAL), min_dims=2, scales=(1e-4, 1.0, 100.0), special=False, empty=False), st.booleans())
def test_sums_over_rows(x, normalize):
    """Smallest and largest sum over the last axis of what enters the loss: 1 where rows are probabilities."""
    if normalize:
        x = torch.softmax(x.double(), -1)
    model = nn.ModuleDict({"layer": Pass()})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def loop():
        F.mse_loss(model["layer"](x), torch.zeros_like(x)).backward()
        optimizer.step()

    history = recorded(loop, model, optimizer)
    sums = np.sum(entries(x).reshape(x.shape), axis=-1)
    found = [column(history, name, "loss.prediction") for name in ("row_sum_min", "row_sum_max")]

    assert [sums.min(), sums.max()] == pytest.approx(found, rel=1e-4, abs=1e-5 * np.abs(entries(x)).sum())


@proves("padding_fraction")
@few
@given(st.integers(1, 6), st.integers(1, 4), st.none() | st.integers(0, 2), st.integers(0, 10**6))
def test_padding(samples, length, padding, seed):
    """The share of an embedding's samples that are nothing but its padding index."""
    ids = torch.randint(0, 3, (samples, length), generator=torch.Generator().manual_seed(seed))
    model = nn.ModuleDict({"layer": nn.Embedding(3, 4, padding_idx=padding)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loop():
        model["layer"](ids).sum().backward()
        optimizer.step()

    found = column(recorded(loop, model, optimizer), "padding_fraction", "layer")
    if padding is None:
        assert math.isnan(found)
    else:
        assert np.mean([all(number == padding for number in row) for row in ids.tolist()]) == pytest.approx(found)


# ---- layers: signals ------------------------------------------------------------------------------------------------


@st.composite
def returned(draw):
    """Gradients that come back to the calls of a layer, all of one dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    return draw(st.lists(tensors(dtypes=(dtype,), min_dims=1, empty=False), min_size=1, max_size=3))


@proves("signal_norm", "signal_max", "signal_nonfinite", "call_signal_norm")
@few
@given(returned())
@example([torch.full((3,), 1e30)])
@example([torch.full((3,), 1e-30)])
@example([torch.tensor([math.nan, 1.0]), torch.ones(2)])
@example([torch.tensor([1e-30, -2.0]), torch.tensor([[3.0]])])
def test_signals(signals):
    """Norm, largest entry and non-finite entries of the gradient with respect to a layer's output, call by call too."""
    history, _, signals = passed([torch.ones_like(signal) for signal in signals], signals)
    values = entries(*signals)
    double = signals[0].dtype == torch.float64
    bad = np.sum(~np.isfinite(values))

    assert bad == column(history, "signal_nonfinite", "layer")
    lengths = np.array([norm_of(entries(signal), double=double) for signal in signals])  # together in float64
    agree(math.nan if bad else math.sqrt(sum(lengths**2)), column(history, "signal_norm", "layer"), values)
    agree(math.nan if bad else np.abs(values).max(), column(history, "signal_max", "layer"))
    if len(signals) > 1 and not bad:
        profile = history.profiles["call_signal_norm"]["layer"].values[0]
        for signal, found in zip(signals, profile, strict=True):
            agree(norm_of(entries(signal), double=double), found, entries(signal))


def test_a_large_signal_is_read_whole_for_its_norm():
    """Of a signal larger than the sample the norm is exact and the largest entry a lower bound of its own size."""
    signal = torch.randn(300, 200)
    history, *_ = passed([torch.ones(300, 200)], [signal])

    assert norm_of(entries(signal)) == pytest.approx(column(history, "signal_norm", "layer"), rel=1e-5)
    assert 0.7 * float(signal.abs().max()) <= column(history, "signal_max", "layer") <= float(signal.abs().max())


# ---- layers: activations --------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU(), "leaky-relu": nn.LeakyReLU(0.2), "prelu": nn.PReLU(init=0.4), "prelu-channels": nn.PReLU(6, 0.3),
    "rrelu": nn.RReLU(), "elu": nn.ELU(0.5), "celu": nn.CELU(0.5), "selu": nn.SELU(), "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
    "hardtanh": nn.Hardtanh(-2.0, 1.0), "relu6": nn.ReLU6(), "softplus": nn.Softplus(),
    "softplus-beta": nn.Softplus(beta=2.0),
    "softsign": nn.Softsign(),
}  # fmt: skip

FUNCTIONS = {
    "relu": F.relu, "leakyrelu": lambda x: F.leaky_relu(x, 0.2), "elu": lambda x: F.elu(x, 0.5), "gelu": F.gelu,
    "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardtanh": lambda x: F.hardtanh(x, -2.0, 1.0),
    "softplus": lambda x: F.softplus(x, beta=2.0),
}  # fmt: skip

BOUNDED = {"sigmoid": 0.25, "tanh": 1.0, "hardtanh": 1.0, "relu6": 1.0, "softsign": 1.0}


def activated(activation, x):
    """The history of a step in which `activation` worked on `x`, and its derivative there, as autograd has it."""
    model = nn.ModuleDict({"layer": Pass()})
    if isinstance(activation, nn.Module):
        model["act"] = activation
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    slopes = []

    def loop():
        before = model["layer"](x)
        out = activation(before)
        slopes.append(entries(*torch.autograd.grad(out.sum(), before, retain_graph=True)).reshape(x.shape))
        out.sum().backward()
        optimizer.step()

    return recorded(loop, model, optimizer), slopes[0]


@proves("activation_slope", "saturation", "dead_fraction")
@pytest.mark.parametrize("name", ACTIVATIONS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_activations(name, seed, scale):
    """Slope, saturated share and dead units of each activation module against its derivative by autograd."""
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)) * scale
    x[:, 0] = -x[:, 0].abs() - 3
    history, slopes = activated(ACTIVATIONS[name], x)

    check_activation(history, "act", name, slopes, error=2e-3 if name == "gelu-tanh" else 1e-5)


def check_activation(history, layer, name, slopes, error):
    found = {s: column(history, s, layer) for s in ("activation_slope", "saturation", "dead_fraction")}
    assert math.sqrt(np.mean(slopes**2)) == pytest.approx(found["activation_slope"], rel=max(1e-4, error), abs=error)
    if name in BOUNDED:
        assert np.mean(slopes < 0.05 * BOUNDED[name]) == pytest.approx(found["saturation"], abs=1e-6)
    else:
        assert math.isnan(found["saturation"])
    if name in ("relu", "hardtanh", "relu6"):
        assert np.mean((slopes == 0).all(axis=0)) == pytest.approx(found["dead_fraction"], abs=1e-6)
    else:
        assert math.isnan(found["dead_fraction"])


@proves("activation_slope", "saturation", "dead_fraction")
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_functional_activations(name, seed, scale):
    """The same of an activation function, read from the autograd graph."""
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)) * scale
    x[:, 0] = -x[:, 0].abs() - 3
    history, slopes = activated(FUNCTIONS[name], x)

    check_activation(history, f"layer.{name}", name, slopes, error=1e-5)


@proves("dead_fraction")
@few
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([2, 3, 4]))
def test_units_are_channels_in_images_and_features_elsewhere(batch, units, seed, dims):
    """A unit is an index of the feature axis: the last one, or the channels of an image."""
    generator = torch.Generator().manual_seed(seed)
    shape = {2: (batch, units), 3: (batch, 3, units), 4: (batch, units, 3, 2)}[dims]
    axis = 1 if dims == 4 else dims - 1
    x = torch.randint(-3, 2, shape, generator=generator).float()
    history, _ = activated(nn.ReLU(), x)
    others = tuple(dim for dim in range(dims) if dim != axis)

    assert np.mean((x.numpy() <= 0).all(axis=others)) == pytest.approx(column(history, "dead_fraction", "act"))


@proves("output_zero_fraction", "output_mean", "saturation", "activation_slope", "dead_fraction")
def test_sampled_layer_statistics():
    """Of large outputs a sample is read: within four standard errors of all entries, and no feature is left out."""
    x = torch.randn(600, 512) * 2
    x[:, 7] = -1
    out = torch.relu(x)
    relu, _ = activated(nn.ReLU(), x)
    tanh, slopes = activated(nn.Tanh(), x)

    assert np.mean(entries(out) == 0) == pytest.approx(column(relu, "output_zero_fraction", "act"), abs=4 * 0.004)
    assert np.mean(entries(out)) == pytest.approx(column(relu, "output_mean", "act"), abs=4 * float(out.std()) / 128)
    assert 1 / 512 == pytest.approx(column(relu, "dead_fraction", "act"))
    assert np.mean(slopes < 0.05) == pytest.approx(column(tanh, "saturation", "act"), abs=4 * 0.004)
    assert math.sqrt(np.mean(slopes**2)) == pytest.approx(column(tanh, "activation_slope", "act"), abs=4 * 0.004)


@given(st.integers(1, 200_000), st.integers(1, 700))
def test_a_sample_visits_every_feature(count, features):
    """The sample of an activation is small and, however many features there are, meets all of them."""
    rows = max(1, count // features)
    sample = kernels.activation_sample(torch.arange(rows * features).reshape(rows, features))

    assert len(sample) <= kernels.ACTIVATION_SAMPLE
    if len(sample) >= features:
        assert features == len({int(index) % features for index in sample})


@given(
    st.sampled_from([1, 3, 100, 16384, 16385, 70_000]), st.sampled_from(["plain", "column", "expanded", "transposed"])
)
def test_a_parameters_sample_holds_its_own_entries(size, layout):
    """Whatever the memory looks like, the sample consists of entries of the tensor; all of them while they are few."""
    tensor = torch.arange(float(size))
    if layout == "column":
        tensor = torch.stack([torch.full((size,), -1.0), tensor, torch.full((size,), -1.0)], 1)[:, 1:2]
    elif layout == "expanded":
        tensor = torch.tensor(5.0).expand(size)
    elif layout == "transposed" and size % 5 == 0:
        tensor = tensor.reshape(5, -1).T
    sample = kernels.parameter_sample(tensor).reshape(-1)

    assert set(sample.tolist()) <= set(tensor.reshape(-1).tolist())
    assert min(size, kernels.PARAMETER_SAMPLE) == len(sample)


@given(st.lists(tensors(empty=False, special=False), min_size=1, max_size=4))
def test_kernels_agree_with_each_other(tensors_):
    """`norms`, `norm`, `largest` and `extremes` read the same tensors alike, whatever their dtypes are together."""
    plain = [kernels.real(tensor.nan_to_num(0.0, 0.0, 0.0)) for tensor in tensors_]
    for tensor, both, peak, host in zip(
        plain, kernels.norms(plain), kernels.largest(plain), kernels.extremes(plain), strict=True
    ):
        values = entries(tensor)
        agree(norm_of(values, double=tensor.dtype == torch.float64), float(both), values)
        agree(float(both), float(kernels.norm(tensor)), values)
        agree(np.abs(values).max(), float(peak))
        agree(np.abs(values).max(), host)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_other_dtypes(dtype):
    """Values of dtypes that hold no gradients, or that torch cannot reduce, are read as well."""
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    read = {name: float(reading) for name, reading in calls.read_values(values, boundary=True).readings.items()}

    assert {"low": 0.0, "high": 1.0, "mean": pytest.approx(4 / 6), "norm": pytest.approx(2.0)}.items() <= read.items()


# ---- rows: how much alike they are ----------------------------------------------------------------------------------


@proves("unit_spread")
@few
@given(tensors(dtypes=tuple(REAL), min_dims=2, scales=(0.0, 1e-4, 1.0, 1e3), special=False, empty=False))
@example(torch.full((7, 3), 0.1))
@example(torch.randn(3, 1, 1).expand(3, 4, 2).contiguous())
@example(torch.randn(4, 5) * torch.randn(4, 1))
def test_spread_of_units(weight):
    """RMS about the mean over units over RMS; exactly 0 for equal units, and nothing for one unit or all zeros."""
    history, *_ = stepped([weight], [torch.zeros_like(weight)])
    found = history["unit_spread"].values[0, 0]
    rows = weight.double().reshape(len(weight), -1).numpy()
    if len(rows) == 1 or not np.any(rows):
        assert math.isnan(found)
        return
    expected = np.sqrt(np.mean((rows - rows.mean(0)) ** 2) / np.mean(rows**2))
    if np.array_equal(rows, np.broadcast_to(rows[0], rows.shape)):
        assert found == 0
    # Sums of differences from the first unit are at most `units` times as large as the spread.
    assert expected == pytest.approx(found, rel=1e-5, abs=1e-6 * len(rows))


@pytest.mark.parametrize("shape", [(1000, 300), (80, 40, 3, 3), (64, 7)], ids=str)
def test_spread_of_many_units(shape):
    """Of large weights 64 units and 256 entries of each are read: the share of what they have in common shows."""
    torch.manual_seed(0)
    weight = torch.randn(shape) + 2 * torch.randn(1, *shape[1:])
    history, *_ = stepped([weight], [torch.zeros_like(weight)])
    rows = weight.double().reshape(len(weight), -1).numpy()

    expected = np.sqrt(np.mean((rows - rows.mean(0)) ** 2) / np.mean(rows**2))
    assert expected == pytest.approx(history["unit_spread"].values[0, 0], rel=0.1)


def cosine_between_rows(rows):
    """Mean cosine between two different rows, those that are all zero left out; NaN for fewer than two."""
    rows = rows[np.any(rows != 0, axis=1)]
    if len(rows) < 2 or not np.isfinite(rows).all():
        return math.nan
    unit = rows / np.sqrt(np.sum(rows**2, axis=1, keepdims=True))
    return np.mean((unit @ unit.T)[~np.eye(len(rows), dtype=bool)])


@proves("row_similarity")
@few
@given(st.lists(tensors(min_dims=2, scales=(0.0, 1e-4, 1.0, 1e30)), min_size=1, max_size=3))
@example([torch.full((6, 3), 0.3)])
@example([torch.ones(5, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])])
def test_similarity_of_rows(inputs):
    """Mean cosine between two rows of the last output with two axes: features are channels in images, else last."""
    kept = [x for x in inputs if x.is_complex() is False]
    assume(kept)
    history, outputs, _ = passed(kept, [torch.ones_like(x) for x in kept])
    outputs = [out for out in outputs if out.numel()]
    if not outputs:
        return
    last = outputs[-1].detach().double()
    rows = last.movedim(1 if last.dim() >= 4 else -1, -1).flatten(0, -2).numpy()
    assume(len(rows) <= 64)  # more are sampled: see below

    assert cosine_between_rows(rows) == pytest.approx(
        column(history, "row_similarity", "layer"), rel=1e-5, abs=1e-5, nan_ok=True
    )


@proves("row_similarity")
@pytest.mark.parametrize("shape, axis", [((40, 50, 300), -1), ((30, 24, 9, 8), 1), ((2000, 7), -1)], ids=str)
def test_similarity_of_many_rows(shape, axis):
    """Of many rows 64 are compared, and they come from everywhere: one in two that is turned around is noticed."""
    torch.manual_seed(0)
    common = torch.randn(shape[axis]).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    values = torch.randn(shape) + 2 * common
    is_even = (torch.arange(shape[0]) % 2 == 0).reshape(-1, *[1] * (len(shape) - 1))
    for whole in (values, torch.where(is_even, values, -values)):
        squared, count = (float(reading) for reading in kernels.directions(kernels.some_rows(whole, axis)))
        expected = cosine_between_rows(whole.movedim(axis, -1).flatten(0, -2).double().numpy())

        assert expected == pytest.approx(calls.mean_cosine(squared, count), abs=0.1)


@pytest.mark.parametrize("activation", [F.relu, torch.tanh, F.gelu, F.silu, F.softplus], ids=lambda f: f.__name__)
def test_similarity_behind_functional_activations(activation):
    """An activation that is called as a function is compared row by row as a module is."""
    torch.manual_seed(0)
    model = nn.Linear(5, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = torch.randn(12, 5)

    def loop():
        activation(model(x)).square().sum().backward()
        optimizer.step()

    history = recorded(loop, model, optimizer)
    expected = cosine_between_rows(activation(model(x).detach().double()).numpy())
    name = next(layer.name for layer in history.layers if layer.role == "operation")

    assert expected == pytest.approx(column(history, "row_similarity", name), abs=1e-5)


@proves("distinct_values")
@few
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 9), st.sampled_from([(), (1,), (3,), (2, 4)]))
def test_distinct_inputs_and_targets(seed, length, kinds, shape):
    """How many different entries along the first axis inputs and targets have; 0 and -0 are one."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, kinds, (length,), generator=generator)
    values = torch.randn(kinds, *shape, generator=generator)[kind]
    values = torch.where(torch.rand(values.shape, generator=generator) < 0.2, -0.0 * values, values)
    model = Pass()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def loop():
        F.mse_loss(model(values), values.clone()).backward()
        optimizer.step()

    history = recorded(loop, model, optimizer)
    expected = len(np.unique(values.double().reshape(length, -1).numpy() + 0.0, axis=0))

    assert expected == column(history, "distinct_values", "model.input")
    assert expected == column(history, "distinct_values", "loss.target")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_distinct_values_of_every_type(dtype):
    """Numbers of every type are told apart, and half a million of them by 256 at most."""
    values = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    assert 2 == float(kernels.num_distinct(kernels.real(values)))
    assert 256 == float(kernels.num_distinct(torch.arange(524_288)))
    assert 1 == float(kernels.num_distinct(torch.zeros(100, 50_000)))


@pytest.mark.parametrize("affine, momentum", [(True, 0.1), (False, 0.5), (True, None)])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 7), (5, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("is_followed", [False, True], ids=["alone", "fused"])
@proves("batch_statistics_gap")
def test_batch_statistics(shape, affine, momentum, is_followed):
    """How far each batch is from the running statistics as they were before it."""
    torch.manual_seed(0)
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    bases = (type("Normalized", (cls,), {"forward": lambda self, x: cls.forward(self, x).tanh()}), cls)
    model = nn.ModuleDict({"scale": Pass(), "norm": bases[not is_followed](3, affine=affine, momentum=momentum)})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    expected = []

    def loop():
        for step in range(4):
            x = torch.randn(shape) * (step + 1) + step
            norm = model["norm"]
            mean = x.double().movedim(1, 0).reshape(3, -1).mean(1)
            apart = (mean - norm.running_mean.double()) / (norm.running_var.double() + norm.eps).sqrt()
            expected.append(float(apart.square().mean().sqrt()))
            norm(model["scale"](x)).square().sum().backward()
            optimizer.step()

    history = recorded(loop, model, optimizer)
    if momentum is None:
        expected[0] = math.nan  # a first batch replaces the running statistics: what was before it is lost
    found = [column(history, "batch_statistics_gap", "norm", row) for row in range(4)]

    assert expected == pytest.approx(found, rel=2e-3, nan_ok=True)


def test_batch_statistics_of_a_large_batch():
    """Where the graph does not hold them, the batch's statistics are estimated from rows, within their noise."""
    torch.manual_seed(0)
    x = torch.randn(64, 16, 20, 20) * 3 + 1
    mean, variance = kernels.channel_moments(x)

    assert 64 * 400 > 16384 // 16
    assert torch.allclose(mean, torch.full((16,), 1.0), atol=4 * 3 / math.sqrt(1024))
    assert torch.allclose(variance, torch.full((16,), 9.0), rtol=4 * math.sqrt(2 / 1024))


@proves("signal_zero_fraction")
@few
@given(st.lists(tensors(dtypes=(torch.float32, torch.float64), empty=False, special=False), min_size=1, max_size=3))
def test_share_of_zero_signals(signals):
    """The share of exactly zero entries of the gradients that come back to a layer, all calls together."""
    history, _, gradients = passed([torch.ones_like(s) for s in signals], signals)

    agree(np.mean(entries(*gradients) == 0), column(history, "signal_zero_fraction", "layer"))


@proves("graph_nodes")
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "carried"])
def test_nodes_of_a_graph(detach):
    """How many nodes the loss depends on: the same at every step, unless a state drags its past along."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    counts = []

    def nodes(node, seen):
        if node is not None and node not in seen:
            seen.add(node)
            for below, _ in node.next_functions:
                nodes(below, seen)
        return len(seen)

    def loop():
        state = torch.zeros(1, 3)
        for _ in range(5):
            state = 0.5 * (state.detach() if detach else state) + layer(torch.randn(1, 2)).tanh()
            loss = state.square().sum()
            counts.append(nodes(loss.grad_fn, set()))
            loss.backward(retain_graph=True)
            optimizer.step()

    history = recorded(loop, layer, optimizer)

    assert counts == history["graph_nodes"].values.tolist()
    assert detach == (counts[1] == counts[4])


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(query, key, *, scale=None, mask=None, causal=False):
    """(entropy, largest |logit|) of softmax(q k^T scale + mask), query by query in float64."""
    query, key = query.detach().double(), key.detach().double()
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones_like(logits, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask > -math.inf)
    bias = 0 if mask is None or mask.dtype == torch.bool else mask.double()
    weights = torch.softmax((logits + bias).masked_fill(~visible, -math.inf), -1)
    shares = []
    for row in weights.reshape(-1, weights.shape[-1]):
        seen = row[row > 0]
        if len(seen) > 1:
            shares.append(float(-(seen * seen.log()).sum() / math.log(len(seen))))
    return (np.mean(shares) if shares else math.nan), float(logits[visible].abs().max())


def attended(run_attention, *inputs):
    """The attention statistics of one step through `run_attention(*inputs)`, whose inputs need gradients."""
    model = nn.ModuleDict({"layer": Pass()})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def loop():
        run_attention(*(model["layer"](x) for x in inputs)).square().sum().backward()
        optimizer.step()

    history = recorded(loop, model, optimizer)
    return [column(history, name, "layer.attention") for name in ("attention_entropy", "attention_logit_max")]


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(6, 6).tril().bool()},
    "additive": {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) * 3},
    "minus-infinity": {"attn_mask": torch.zeros(6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf)},
    "padding": {"attn_mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None, :]},
    "very-negative": {"attn_mask": torch.zeros(6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -1e9)},
    "scale": {"scale": 0.9},
    "causal-scale": {"is_causal": True, "scale": 2.5},
}


@proves("attention_entropy", "attention_logit_max")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [0, 3], ids=["single", "heads"])
def test_scaled_dot_product_attention(name, heads):
    """Entropy and largest logit of torch's own attention function, masked and scaled in every way."""
    torch.manual_seed(0)
    shape = (2, heads, 6, 4) if heads else (2, 6, 4)
    options = dict(MASKS[name])
    if not heads and name == "padding":
        options["attn_mask"] = options["attn_mask"][:, 0]
    query, key, value = (torch.randn(shape) * 2 for _ in range(3))
    found = attended(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), query, key, value)
    mask, scale, causal = options.get("attn_mask"), options.get("scale"), options.get("is_causal", False)
    expected = attention(query, key, mask=mask, scale=scale, causal=causal)
    if name == "very-negative":  # what is masked by a large negative number counts among the logits all the same
        assert expected[0] == pytest.approx(found[0], rel=1e-4)
        assert expected[1] <= found[1] * (1 + 1e-4) < 1e3
    else:
        assert expected == pytest.approx(found, rel=1e-4)


@proves("attention_entropy", "attention_logit_max")
def test_grouped_queries():
    """Several query heads that share one head of keys are read head by head."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    found = attended(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), query, key, value)

    assert attention(query, key.repeat_interleave(2, 1)) == pytest.approx(found, rel=1e-4)


@proves("attention_entropy", "attention_logit_max")
@pytest.mark.parametrize("style", ["divided", "scaled-first", "multiplied", "masked", "einsum", "added"])
def test_attention_written_by_hand(style):
    """softmax(q k^T / sqrt(d)) as users write it is recognized in the graph."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 6, 4) * 2 for _ in range(3))
    mask = torch.ones(6, 6).tril().bool()

    def by_hand(q, k, v):
        if style == "scaled-first":
            logits = (q / 2) @ k.mT
        elif style == "multiplied":
            logits = q @ k.mT * 0.5
        elif style == "einsum":
            logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2
        else:
            logits = q @ k.transpose(-2, -1) / math.sqrt(4)
        if style == "masked":
            logits = logits.masked_fill(~mask, -math.inf)
        if style == "added":
            logits = logits + torch.zeros(6, 6).masked_fill(~mask, -math.inf)
        return torch.softmax(logits, -1) @ v

    found = attended(by_hand, query, key, value)

    assert attention(query, key, mask=mask if style in ("masked", "added") else None) == pytest.approx(found, rel=1e-4)


@proves("attention_entropy", "attention_logit_max")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_multihead_attention(need_weights, masked, dropout):
    """`nn.MultiheadAttention` is read inside, with weights asked for or not, masked or not, with dropout or not."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dropout=dropout)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    x = torch.randn(3, 6, 8) * 3
    mask = torch.ones(6, 6).triu(1).bool() if masked else None  # True hides, unlike in the function
    projected = x @ layer.in_proj_weight.T + layer.in_proj_bias
    query, key, _ = (part.reshape(3, 6, 2, 4).transpose(1, 2) for part in projected.chunk(3, -1))

    def loop():
        layer(x, x, x, attn_mask=mask, need_weights=need_weights)[0].square().sum().backward()
        optimizer.step()

    history = recorded(loop, layer, optimizer)
    found = [column(history, name, "layer.attention") for name in ("attention_entropy", "attention_logit_max")]

    assert attention(query, key, mask=None if mask is None else ~mask) == pytest.approx(found, rel=1e-4)


@proves("attention_logit_max", "attention_entropy")
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 200), st.booleans())
@settings(max_examples=40)
def test_sampled_attention_is_a_sample(batch, heads, tokens, causal):
    """Of many queries a sample is read: its entropy is a share, its largest logit a lower bound."""
    assume(batch * heads * tokens <= 20_000)
    torch.manual_seed(0)
    query, key = torch.randn(batch, heads, tokens, 2), torch.randn(batch, heads, tokens, 2)
    entropy, peak = kernels.attention_from_operands(query, key, 1.0, causal=causal)
    logits = query @ key.mT

    assert float(peak) <= float(logits.abs().max()) * (1 + 1e-5)
    assert math.isnan(entropy) if tokens == 1 else 0 <= float(entropy) <= 1 + 1e-6
    whole = max(8, kernels.ENTROPY_WEIGHTS // tokens)
    if batch * heads <= kernels.HEADS and batch * heads * tokens <= whole:
        expected = attention(query, key, scale=1.0, causal=causal)
        assert expected == pytest.approx((float(entropy), float(peak)), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("batch, heads, tokens", [(64, 8, 16), (32, 4, 128), (8, 12, 64), (3, 16, 8), (1, 32, 8)])
def test_many_heads_are_looked_at(batch, heads, tokens):
    """A head that runs away in the whole batch is seen: of up to six heads each, of more at least six."""
    query, key = torch.randn(batch, heads, tokens, 2), torch.randn(batch, heads, tokens, 2)
    seen = 0
    for head in range(heads):
        loud = query.clone()
        loud[:, head] *= 1e6
        _, peak = kernels.attention_from_operands(loud, key, 1.0)
        seen += float(peak) > 1e4

    assert seen >= min(heads, 6)


def test_attention_under_autocast_is_read_in_full_precision():
    """A backward pass inside autocast does not round what is read."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 6, 4) * 3, torch.randn(2, 2, 6, 4) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernels.attention_from_operands(query, key, 0.5)

    assert attention(query, key) == pytest.approx([float(reading) for reading in found], rel=1e-5)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_no_statistic_is_without_an_oracle():
    """Every statistic is compared with its definition by a test of this file, and nothing else is."""
    tests = {name for name, value in globals().items() if name.startswith("test_") and callable(value)}

    assert STATISTICS.keys() == ORACLES.keys()
    assert {name for names in ORACLES.values() for name in names} <= tests
