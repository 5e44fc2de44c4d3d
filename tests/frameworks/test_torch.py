"""What the PyTorch observer makes of real programs: one behaviour per test, against oracles computed by hand."""

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad, clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import isograd
from isograd._record import read_run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def watch(tmp_path):
    """`watch(*things)`: everything is read at every step."""

    def start(*things, **options):
        options = {"every": 1, "budget": math.inf, **options}
        return isograd.watch(*things, out=tmp_path / "runs", **options)

    return start


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def only(run):
    (history,) = run.histories()
    return history


def reading(history, statistic, name, row=-1):
    """The last (or `row`th) reading of one layer or parameter."""
    names = [layer.name for layer in history.layers], [parameter.name for parameter in history.parameters]
    values = history[statistic].values
    for known in names:
        if name in known and values.shape[1] == len(known):
            return float(values[row, known.index(name)])
    raise AssertionError(f"{statistic} has no column {name}: {names}")


def layer(history, name):
    return next(entry for entry in history.layers if entry.name == name)


def profile(history, name):
    return history.profiles["call_signal_norm"][name].values[-1]


def norm_of(*tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


# ---- parameters and their groups -----------------------------------------------------------------------------------


def test_every_parameter_group_has_its_learning_rate(watch):
    """Learning rates are recorded per group, as each step used them."""
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}], momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with watch(model, optimizer) as run:
        for _ in range(3):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            scheduler.step()
    history = only(run)

    assert [[0.5, 0.1], [0.25, 0.05], [0.125, 0.025]] == pytest.approx(history["learning_rate"].values)
    assert [0, 0, 1, 1] == [parameter.group for parameter in history.parameters]
    assert [0.9, 0.9] == [group["momentum"] for group in history.groups]


def test_a_group_added_later_gets_a_column(watch):
    """A group that the optimizer is given during training appears with its own learning rate."""
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert [0.5, 0.1] == history["learning_rate"].values[-1].tolist()
    assert 1 == next(p.group for p in history.parameters if p.name == "2.weight")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.embed = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.shared(torch.tanh(self.shared(self.embed(x)))))


def test_a_module_called_twice_is_one_layer_with_two_calls(watch):
    """A shared module has one column: two calls a step, and their signals together."""
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randint(0, 7, (5,))
    with watch(model, optimizer) as run:
        first = model.shared(model.embed(x))
        second = model.shared(torch.tanh(first))
        first.retain_grad()
        second.retain_grad()
        step(F.cross_entropy(model.head(second), x), optimizer)
    history = only(run)

    assert ["shared"] == [entry.name for entry in history.layers if entry.name == "shared"]
    assert 2 == reading(history, "calls", "shared")
    assert norm_of(first.grad, second.grad) == pytest.approx(reading(history, "signal_norm", "shared"), rel=1e-5)
    assert [norm_of(first.grad), norm_of(second.grad)] == pytest.approx(profile(history, "shared"), rel=1e-5)


def test_a_tied_parameter_is_one_parameter(watch):
    """A weight that two modules hold is recorded once, under its first name."""
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(F.cross_entropy(model(torch.arange(5)), torch.arange(5)), optimizer)

    assert ["shared.weight", "shared.bias", "embed.weight"] == [p.name for p in only(run).parameters]


def test_frozen_parameters_are_known_as_such(watch):
    """Frozen parameters have a column, say that they are not trainable, and have no gradient reading."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    frozen = {p.name for p in history.parameters if not p.trainable and not p.optimized and p.group == -1}
    assert {"0.weight", "0.bias"} == frozen
    assert math.isnan(reading(history, "grad_norm", "0.weight"))
    assert math.isnan(reading(history, "grad_nonfinite", "0.weight"))
    assert reading(history, "grad_norm", "2.weight") > 0


def test_what_a_frozen_layer_returns_is_no_input(watch):
    """Only what comes from outside is an input, not the output of a frozen layer."""
    model = nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5)).square().mean(), optimizer)

    assert ["0.input"] == [entry.name for entry in only(run).layers if entry.role == "input"]


def test_an_unused_parameter_has_no_gradient(watch):
    """A parameter that the loss does not reach reads NaN, not 0, and the other norms are complete without it."""
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model["used"](torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert math.isnan(reading(history, "grad_norm", "unused.weight"))
    assert math.isnan(reading(history, "grad_nonfinite", "unused.weight"))
    assert norm_of(*(p.grad for p in model["used"].parameters())) == pytest.approx(
        history["global_grad_norm"].values[0]
    )
    assert "unused" in [entry.name for entry in history.layers]
    assert math.isnan(reading(history, "calls", "unused"))


def test_a_zero_gradient_is_zero(watch):
    """A parameter whose gradient is exactly zero reads 0, not NaN."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step((model(torch.randn(4, 5)) * 0).sum(), optimizer)
    history = only(run)

    assert 0 == np.abs(history["grad_max"].values).max() == history["global_grad_norm"].values[0]
    assert 1 == history["grad_zero_fraction"].values.min()


def test_sparse_gradients(watch):
    """A sparse embedding gradient has the norms of the dense one; what it does not store counts as zero."""
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.tensor([[1, 2, 2], [3, 3, 3]])
    with watch(model, optimizer) as run:
        step(model(x).square().mean(), optimizer)
        gradient = model[0].weight.grad.to_dense()
    history = only(run)

    assert norm_of(gradient) == pytest.approx(reading(history, "grad_norm", "0.weight"), rel=1e-6)
    assert float(gradient.abs().max()) == pytest.approx(reading(history, "grad_max", "0.weight"))
    assert 0.7 == pytest.approx(reading(history, "grad_zero_fraction", "0.weight"))


def test_a_sparse_gradient_that_stores_nothing_is_zero(watch):
    """A sparse gradient without a single stored row is an exactly zero gradient, not a missing one."""
    weight = nn.Parameter(torch.randn(10, 4))
    optimizer = torch.optim.SGD([weight], 0.1)
    with watch(optimizer) as run:
        weight.grad = torch.sparse_coo_tensor(
            torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4), (10, 4), check_invariants=True
        )
        optimizer.step()
    history = only(run)

    assert 0 == history["grad_norm"].values[0, 0] == history["grad_max"].values[0, 0]
    assert 1 == history["grad_zero_fraction"].values[0, 0]


def test_complex_parameters_and_outputs(watch):
    """Complex tensors are read as pairs of real numbers."""
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 2, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        hidden = model[0](torch.randn(6, 4, dtype=torch.complex64))
        step(model[1](hidden).abs().square().mean(), optimizer)
    history = only(run)

    pairs = torch.view_as_real(model[0].weight.grad)
    assert norm_of(pairs) == pytest.approx(reading(history, "grad_norm", "0.weight"), rel=1e-5)
    assert norm_of(torch.view_as_real(hidden)) / 6 == pytest.approx(reading(history, "output_rms", "0"), rel=1e-5)
    assert 0 == history["grad_nonfinite"].values.sum() == history["loss_nonfinite"].values.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_precisions(watch, dtype):
    """Half and double precision models are read like any other, accumulated in float32 or wider."""
    model = nn.Linear(64, 32, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer) as run:
        out = model(torch.randn(16, 64, dtype=dtype))
        step(out.square().mean(), optimizer)
    history = only(run)

    assert str(dtype) == f"torch.{history.parameters[0].dtype}"
    assert norm_of(model.weight.grad) == pytest.approx(reading(history, "grad_norm", "weight"), rel=1e-5)
    assert norm_of(out) / math.sqrt(out.numel()) == pytest.approx(reading(history, "output_rms", "model"), rel=1e-5)
    assert reading(history, "update_ratio", "weight") > 0


def test_mixed_precisions_in_one_optimizer(watch):
    """One optimizer over float16, bfloat16, float32 and float64 parameters gives every norm."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    weights = [nn.Parameter(torch.full((3,), 2.0, dtype=dtype)) for dtype in dtypes]
    optimizer = torch.optim.SGD(weights, 0.01)
    with watch(optimizer) as run:
        step(sum(weight.double().square().sum() for weight in weights), optimizer)

    assert [math.sqrt(48)] * 4 == pytest.approx(only(run)["grad_norm"].values[0].tolist(), rel=1e-6)


def test_empty_tensors(watch):
    """Parameters and batches without entries are no reason to stop: what has no entries has no reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 0)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        hidden = model[0](torch.randn(2, 4))
        step(hidden.square().sum() + model[1](hidden).sum() + model[0](torch.randn(0, 4)).sum(), optimizer)
    history = only(run)

    assert not history.events_of("watch-detached")
    assert 2 == reading(history, "calls", "0")
    assert 6 == reading(history, "output_size", "0")
    assert 0 == reading(history, "output_size", "1")
    assert math.isnan(reading(history, "output_rms", "1"))
    assert math.isnan(reading(history, "grad_norm", "1.weight"))


def test_gradients_that_are_no_plain_blocks_of_memory(watch):
    """Expanded and column gradients larger than the sample are read at their own entries."""
    ones, column = nn.Parameter(torch.randn(40_000)), nn.Parameter(torch.randn(40_000, 1))
    optimizer = torch.optim.SGD([ones, column], 0.1)
    matrix = torch.zeros(40_000, 7)
    matrix[:, 3] = torch.arange(40_000) % 2
    with watch(optimizer) as run:
        ones.grad = torch.ones(()).expand(40_000)
        column.grad = matrix[:, 3:4]
        optimizer.step()
    history = only(run)

    assert [200.0, math.sqrt(20_000)] == pytest.approx(history["grad_norm"].values[0].tolist())
    assert [0.0, 0.5] == pytest.approx(history["grad_zero_fraction"].values[0].tolist())


def test_loose_tensors_are_named_after_variables(watch):
    """A program that trains tensors without a module is watched; module statistics say why they are missing."""
    slope, offset = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    x = torch.linspace(0, 1, 10)
    with watch() as run:
        optimizer = torch.optim.SGD([slope, offset], 0.1)
        for _ in range(3):
            step((slope * x + offset - 2 * x).square().mean(), optimizer)
    history = only(run)

    assert ["slope", "offset"] == [p.name for p in history.parameters]
    assert "loose tensors" in history.unmeasured["output_rms"]


# ---- several models and optimizers -----------------------------------------------------------------------------------


def gan(steps, generator, discriminator, opt_g, opt_d, *, detach=True):
    """A textbook loop; returns the losses of both players."""
    losses = {"generator": [], "discriminator": []}
    for _ in range(steps):
        fake = generator(torch.randn(6, 4))
        opt_d.zero_grad()
        real_score = discriminator(torch.randn(6, 3))
        fake_score = discriminator(fake.detach() if detach else generator(torch.randn(6, 4)).detach())
        loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        loss.backward()
        opt_d.step()
        losses["discriminator"].append(loss.item())
        opt_g.zero_grad()
        loss = F.softplus(-discriminator(fake)).mean()
        loss.backward()
        opt_g.step()
        losses["generator"].append(loss.item())
    return losses


def players():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)
    )


@pytest.mark.parametrize("told", [True, False], ids=["given", "found"])
def test_a_gan_is_two_subjects(watch, told):
    """Two models with an optimizer each are two subjects, named after the user's variables, with their own losses."""
    if told:
        generator, discriminator = players()
        opt_g, opt_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (generator, discriminator))
        run = watch(generator, discriminator, opt_g, opt_d)
    else:
        run = watch()
        generator, discriminator = players()
        opt_g, opt_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (generator, discriminator))
    with run:
        losses = gan(5, generator, discriminator, opt_g, opt_d)
    histories = {history.subject: history for history in run.histories()}

    assert {"generator", "discriminator"} == histories.keys()
    for name, history in histories.items():
        assert 5 == history.num_steps
        assert losses[name] == pytest.approx(history["loss"].values.tolist())
        assert {"0", "1", "2"} == {entry.name for entry in history.layers if entry.role == "module"}
        assert ["0.weight", "0.bias", "2.weight", "2.bias"] == [p.name for p in history.parameters]
        assert not np.isnan(history["grad_norm"].values).any()


def test_a_players_calls_count_in_its_own_step(watch):
    """A discriminator's pass in the generator's step is not counted for it; the generator's in the other's step is."""
    generator, discriminator = players()
    opt_g, opt_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (generator, discriminator))
    with watch(generator, discriminator, opt_g, opt_d) as run:
        gan(4, generator, discriminator, opt_g, opt_d)
    histories = {history.subject: history for history in run.histories()}

    assert [2.0] * 4 == [reading(histories["discriminator"], "calls", "0", row) for row in range(4)]
    assert [1.0] * 4 == [reading(histories["generator"], "calls", "0", row) for row in range(4)]
    assert all(reading(histories["generator"], "signal_norm", "0", row) > 0 for row in range(4))


def test_outputs_made_for_the_other_player_do_not_count(watch):
    """A second pass of the generator, detached for the discriminator's step, is no part of the generator's step."""
    generator, discriminator = players()
    opt_g, opt_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (generator, discriminator))
    with watch(generator, discriminator, opt_g, opt_d) as run:
        gan(4, generator, discriminator, opt_g, opt_d, detach=False)
    histories = {history.subject: history for history in run.histories()}

    assert [1.0] * 4 == [reading(histories["generator"], "calls", "0", row) for row in range(4)]
    assert [1.0] * 4 == [reading(histories["generator"], "calls", "0.input", row) for row in range(4)]


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = players()


def test_a_gan_inside_one_module(watch):
    """Two players that are children of one module are two subjects, each with its own layers and parameters only."""
    both = Both()
    opt_g = torch.optim.Adam(both.generator.parameters(), 1e-3)
    opt_d = torch.optim.Adam(both.discriminator.parameters(), 1e-3)
    with watch(both, opt_g, opt_d) as run:
        losses = gan(4, both.generator, both.discriminator, opt_g, opt_d)
    histories = {history.subject: history for history in run.histories()}

    assert {"generator", "discriminator"} == {
        entry.name.split(".")[0] for h in histories.values() for entry in h.layers if entry.role == "module"
    }
    assert 2 == len(histories)
    for history in histories.values():
        (player,) = {p.name.split(".")[0] for p in history.parameters}
        assert {f"{player}.0", f"{player}.1", f"{player}.2"} == {e.name for e in history.layers if e.role == "module"}
        assert losses[player] == pytest.approx(history["loss"].values.tolist())


def test_optimizers_that_step_together_are_one_subject(watch):
    """Two optimizers that share the parameters of one model and step after one loss are one subject, in one step."""
    model = mlp()
    body, head = torch.optim.SGD(model[0].parameters(), 0.5), torch.optim.Adam(model[2].parameters(), 0.01)
    with watch(model, body, head) as run:
        for _ in range(3):
            loss = model(torch.randn(4, 5)).square().mean()
            model.zero_grad()
            loss.backward()
            body.step()
            head.step()
    history = only(run)

    assert 3 == history.num_steps
    assert not np.isnan(history["grad_norm"].values).any()
    assert [0.5, 0.01] == history["learning_rate"].values[-1].tolist()
    assert {"0", "1", "2"} == {entry.name for entry in history.layers if entry.role == "module"}
    assert norm_of(*(p.grad for p in model.parameters())) == pytest.approx(history["global_grad_norm"].values[-1])


def test_an_optimizer_made_anew_every_epoch_continues(watch):
    """A loop that makes a new optimizer every epoch is one subject with one learning rate column."""
    model = mlp()
    with watch(model) as run:
        for epoch in range(3):
            optimizer = torch.optim.SGD(model.parameters(), 0.1 / (epoch + 1))
            for _ in range(2):
                step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert 6 == history.num_steps
    assert [0.1, 0.1, 0.05, 0.05, 0.1 / 3, 0.1 / 3] == pytest.approx(history["learning_rate"].values[:, 0].tolist())
    assert (6, 1) == history["learning_rate"].values.shape
    assert not np.isnan(history["grad_norm"].values).any()


def test_an_optimizer_inside_another_is_one_step(watch):
    """An optimizer that wraps another one and lets it step makes one step, not two."""

    class Wrapper(Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        @torch.no_grad()
        def step(self, closure=None):
            self.inner.step()

    model = mlp()
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    with watch(model) as run:
        for _ in range(3):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert 3 == history.num_steps
    assert not np.isnan(history["update_norm"].values).any()


def test_a_step_that_raised_does_not_blind(watch):
    """After an optimizer step that raised and was caught, the following steps are seen."""

    class Sometimes(torch.optim.SGD):
        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = mlp()
    first, second = Sometimes(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    first.fails = True
    with watch(model) as run:
        model(torch.randn(4, 5)).square().mean().backward()
        with pytest.raises(RuntimeError, match="memory"):
            first.step()
        for _ in range(3):
            step(model(torch.randn(4, 5)).square().mean(), second)

    assert 3 == only(run).num_steps


# ---- modules -----------------------------------------------------------------------------------------------------


def test_layers_replaced_after_the_optimizer_was_made(watch):
    """A head replaced after the optimizer was made is seen: its parameters are in no optimizer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
        model[2] = nn.Linear(8, 4)
        for _ in range(2):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    new = [p for p in history.parameters if p.shape == (4, 8)]
    assert [False] == [p.optimized for p in new]
    assert (4, 4) in [entry.shape for entry in history.layers]


def test_a_list_that_is_never_called(watch):
    """A root that only holds its layers and is never called itself has its layers read, under the user's names."""
    blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 3)])
    optimizer = torch.optim.SGD(blocks.parameters(), 0.1)
    with watch() as run:
        optimizer = torch.optim.SGD(blocks.parameters(), 0.1)
        step(blocks[1](blocks[0](torch.randn(2, 5)).relu()).square().mean(), optimizer)
    history = only(run)

    assert "blocks" == history.subject
    assert [1.0, 1.0] == [reading(history, "calls", name) for name in ("0", "1")]


def test_modules_in_a_plain_list_are_found(watch):
    """Layers kept in a plain list, a common mistake, are found through the optimizer that holds their parameters."""
    layers = [nn.Linear(5, 5), nn.Linear(5, 3)]
    with watch() as run:
        optimizer = torch.optim.SGD([p for entry in layers for p in entry.parameters()], 0.1)
        step(layers[1](layers[0](torch.randn(2, 5)).relu()).square().mean(), optimizer)
    history = only(run)

    assert 2 == sum(entry.kind == "linear" for entry in history.layers)
    assert not np.isnan(history["signal_norm"].values[0][[e.kind == "linear" for e in history.layers]]).any()


def test_positions_follow_the_first_use(watch):
    """Layers are ordered by use, not by registration."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 3), nn.Linear(5, 8)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(2, 5)).square().mean(), optimizer)
    names = [entry.name for entry in only(run).layers]

    assert ["first.input", "first", "first.relu", "last"] == names[:4]


def test_functional_activations_are_layers_of_their_own(watch):
    """A functional activation is an operation named after the layer before it, with activation statistics."""
    model = nn.Linear(5, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        pre = model(torch.randn(32, 5))
        out = torch.sigmoid(pre)
        out.retain_grad()
        step(out.square().mean(), optimizer)
    history = only(run)
    (operation,) = [entry for entry in history.layers if entry.role == "operation"]
    slope = (out * (1 - out)).detach().square().mean().sqrt()

    assert ("model.sigmoid", "sigmoid") == (operation.name, operation.kind)
    assert float(slope) == pytest.approx(reading(history, "activation_slope", "model.sigmoid"), rel=1e-5)
    assert norm_of(out.grad) == pytest.approx(reading(history, "signal_norm", "model.sigmoid"), rel=1e-5)


def test_boundaries_of_the_program(watch):
    """What enters the model and what enters the loss are layers of their own, with range, spread and shape."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(7, 5) * 3 + 1, torch.randn(7, 3)
    with watch(model, optimizer) as run:
        prediction = model(x)
        step(F.mse_loss(prediction, y), optimizer)
    history, prediction = only(run), prediction.detach()

    for name, values in (("model.input", x), ("loss.prediction", prediction), ("loss.target", y)):
        assert tuple(values.shape) == layer(history, name).shape
        assert float(values.min()) == pytest.approx(reading(history, "output_min", name))
        assert float(values.max()) == pytest.approx(reading(history, "output_max", name))
        assert float(values.std(correction=0)) == pytest.approx(reading(history, "output_std", name), rel=1e-5)
    rows = prediction.sum(-1)
    assert float(rows.min()) == pytest.approx(reading(history, "row_sum_min", "loss.prediction"), abs=1e-5)
    assert float(rows.max()) == pytest.approx(reading(history, "row_sum_max", "loss.prediction"), abs=1e-5)


def test_integer_inputs_and_targets(watch):
    """Token ids and class numbers are boundaries as well: their range is read exactly."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randint(3, 47, (6, 3)), torch.tensor([0, 1, 2, 2, 1, 1])
    with watch(model, optimizer) as run:
        step(F.cross_entropy(model(x), y), optimizer)
    history = only(run)

    assert "int64" == layer(history, "0.input").type == layer(history, "loss.target").type
    assert float(x.min()) == reading(history, "output_min", "0.input")
    assert float(x.max()) == reading(history, "output_max", "0.input")
    assert 2 == reading(history, "output_max", "loss.target")
    assert "linear" == layer(history, "2").kind


@pytest.mark.parametrize("shapes, broadcast", [(((8, 1), (8,)), True), (((8, 1), (8, 1)), False)])
def test_a_broadcast_in_the_loss_is_a_fact(watch, shapes, broadcast):
    """Prediction [n, 1] against target [n] is noted as broadcast, with the prediction's own shape."""
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        step(F.mse_loss(model(torch.randn(8, 5)).reshape(shapes[0]), torch.randn(shapes[1])), optimizer)
    (event,) = only(run).events_of("loss-graph")

    assert broadcast == event.data["loss"]["broadcast"]
    assert list(shapes[0]) == event.data["loss"]["prediction_shape"]


def test_the_loss_graph_lists_operations_from_the_loss_down(watch):
    """The head of the graph is recorded once, from the loss to the last layer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(3):
            step(F.cross_entropy(model(torch.randn(4, 5)), torch.tensor([0, 1, 2, 0])), optimizer)
    (event,) = only(run).events_of("loss-graph")

    assert ["NllLoss", "LogSoftmax", "Addmm"] == event.data["operations"]


def test_a_loss_that_is_a_child_of_the_model(watch):
    """A loss module inside the model returns a scalar: it is a layer like any other."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.criterion = nn.Linear(5, 3), nn.CrossEntropyLoss()

        def forward(self, x, y):
            return self.criterion(self.fc(x), y)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])), optimizer)
    history = only(run)

    assert 1 == reading(history, "signal_norm", "criterion")
    assert history["loss"].values[0] == pytest.approx(reading(history, "output_max", "criterion"))


def test_a_module_that_returns_a_parameter_leaves_no_hook_on_it(watch):
    """A module that hands out its own parameter is read, and the parameter carries no hook after the step."""

    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(3, 4))

        def forward(self):
            return self.tokens

    prompt, head = Prompt(), nn.Linear(4, 1)
    model = nn.ModuleList([prompt, head])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(3):
            step(head(prompt()).square().mean(), optimizer)
            assert not prompt.tokens._backward_hooks
    history = only(run)

    assert reading(history, "grad_norm", "0.tokens") == pytest.approx(reading(history, "signal_norm", "0"))


# ---- recurrences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_read_at_its_output(watch, cls):
    """A recurrent layer is one layer: size and signal of its own output."""
    rnn, head = cls(3, 5, batch_first=True), nn.Linear(5, 2)
    model = nn.ModuleDict({"rnn": rnn, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        out, _ = rnn(torch.randn(4, 6, 3))
        out.retain_grad()
        step(head(out).square().mean(), optimizer)
    history = only(run)

    assert (cls.__name__.lower(), 5) == (layer(history, "rnn").kind, layer(history, "rnn").units)
    assert norm_of(out) / math.sqrt(out.numel()) == pytest.approx(reading(history, "output_rms", "rnn"), rel=1e-5)
    assert norm_of(out.grad) == pytest.approx(reading(history, "signal_norm", "rnn"), rel=1e-5)


def test_a_packed_sequence(watch):
    """A recurrent layer over a packed sequence is read at the packed entries."""
    rnn = nn.GRU(3, 5)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    with watch(rnn, optimizer) as run:
        out, _ = rnn(pack_padded_sequence(torch.randn(6, 2, 3), torch.tensor([6, 4])))
        step(out.data.square().mean(), optimizer)

    assert 50 == reading(only(run), "output_size", "rnn")


def unrolled(rnn, x, everything):
    """Per time step, the gradient that reaches tanh's output in a hand-written copy of a one-layer `nn.RNN`."""
    hidden, states = torch.zeros(x.shape[1], rnn.hidden_size), []
    for x_t in x:
        hidden = torch.tanh(x_t @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + hidden @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        hidden.retain_grad()
        states.append(hidden)
    (torch.stack(states) if everything else states[-1]).square().mean().backward()
    rnn.zero_grad()
    return [norm_of(state.grad) for state in states]


@pytest.mark.parametrize("everything", [True, False], ids=["every-step", "last-step"])
def test_a_vanilla_recurrence_shows_its_signal_through_time(watch, everything):
    """The activation inside `nn.RNN` is an operation with one call per time step, in the order of time."""
    rnn = nn.RNN(3, 5)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.0)
    x = torch.randn(7, 2, 3)
    expected = unrolled(rnn, x, everything)
    with watch(rnn, optimizer) as run:
        out, _ = rnn(x)
        step((out if everything else out[-1]).square().mean(), optimizer)
    history = only(run)

    assert ("operation", "tanh") == (layer(history, "rnn.tanh").role, layer(history, "rnn.tanh").kind)
    assert 7 == reading(history, "calls", "rnn.tanh")
    assert expected == pytest.approx(profile(history, "rnn.tanh").tolist(), rel=1e-4)


def test_gates_show_per_time_step(watch):
    """The gates of `nn.GRU` on the CPU are operations: two sigmoids and one tanh a time step."""
    rnn = nn.GRU(3, 5)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    with watch(rnn, optimizer) as run:
        step(rnn(torch.randn(7, 2, 3))[0][-1].square().mean(), optimizer)
    history = only(run)

    assert [14.0, 7.0] == [reading(history, "calls", name) for name in ("rnn.sigmoid", "rnn.tanh")]
    assert profile(history, "rnn.tanh")[-1] > profile(history, "rnn.tanh")[0] > 0


@pytest.mark.parametrize("cls", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_cell_called_step_by_step_shows_its_signal_through_time(watch, cls):
    """Each call of a recurrent cell has its own signal, in the order of time, as `retain_grad` finds it."""
    cell, head = cls(3, 5), nn.Linear(5, 1)
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = []
    with watch(model, optimizer) as run:
        state = None
        for x in torch.randn(9, 4, 3):
            state = cell(x, state)
            states.append(state[0] if cls is nn.LSTMCell else state)
            states[-1].retain_grad()
        step(head(states[-1]).square().mean(), optimizer)
    history = only(run)

    assert 9 == reading(history, "calls", "cell")
    assert [norm_of(s.grad) for s in states] == pytest.approx(profile(history, "cell").tolist(), rel=1e-4)


# ---- accumulation, clipping, scaling ------------------------------------------------------------------------------


def test_gradient_accumulation_is_one_step(watch):
    """Several backward passes before a step are one step: losses averaged, gradients as accumulated, calls counted."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        losses = []
        for _ in range(4):
            loss = model(torch.randn(4, 5)).square().mean()
            losses.append(loss.item())
            loss.backward()
        optimizer.step()
    history = only(run)

    assert 1 == history.num_steps
    assert 4 == history["micro_batches"].values[0] == reading(history, "calls", "0")
    assert sum(losses) / 4 == pytest.approx(history["loss"].values[0])
    assert norm_of(*(p.grad for p in model.parameters())) == pytest.approx(history["global_grad_norm"].values[0])


def clip_by_attribute(*arguments):
    return nn.utils.clip_grad_norm_(*arguments)


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_by_attribute], ids=["from-import", "attribute"])
def test_clipping_is_seen_from_both_sides(watch, clip):
    """The norm before clipping, the factor, and the gradients after it are all recorded."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        (model(torch.randn(4, 5)) * 50).square().mean().backward()
        before = clip(model.parameters(), 0.25)
        optimizer.step()
        after = norm_of(*(p.grad for p in model.parameters()))
    history = only(run)

    assert float(before) == pytest.approx(history["global_grad_norm_unclipped"].values[0], rel=1e-5)
    assert after == pytest.approx(history["global_grad_norm"].values[0], rel=1e-5)
    assert 0.25 / float(before) == pytest.approx(history["clip_factor"].values[0], rel=1e-5)


def test_clipping_that_does_nothing(watch):
    """Gradients below the limit are left alone: factor 1, equal norms."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        model(torch.randn(4, 5)).square().mean().backward()
        clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
    history = only(run)

    assert 1 == history["clip_factor"].values[0]
    assert history["global_grad_norm"].values[0] == pytest.approx(history["global_grad_norm_unclipped"].values[0])


def test_layers_clipped_one_by_one(watch):
    """Where layers are clipped separately the unclipped norm is still that of all gradients before."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        (model(torch.randn(4, 5)) * 50).square().mean().backward()
        before = norm_of(*(p.grad for p in model.parameters()))
        factors = [0.5 / float(clip_grad_norm_(model[index].parameters(), 0.5)) for index in (0, 2)]
        optimizer.step()
    history = only(run)

    assert before == pytest.approx(history["global_grad_norm_unclipped"].values[0], rel=1e-5)
    assert min(factors) == pytest.approx(history["clip_factor"].values[0], rel=1e-4)


def test_clipping_after_the_step_is_an_event(watch):
    """Clipping when no gradient is fresh, after the step, is noted."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(2):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            clip_grad_norm_(model.parameters(), 0.25)
        step(model(torch.randn(4, 5)).square().mean(), optimizer)

    assert [0.25, 0.25] == [event.data["limit"] for event in only(run).events_of("clip-after-step")]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_gradient_scaler_is_seen_through(watch, fused):
    """Loss and gradients are recorded unscaled, with the scale; a step left out for an overflow says so."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=100)
    losses, norms = [], []
    with watch(model, optimizer) as run:
        for index in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 5)).square().mean() * (math.inf if index == 2 else 1.0)
            losses.append(loss.item())
            norms.append(norm_of(*torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    history = only(run)

    kept = [0, 1, 3]
    assert 4 == history.num_steps
    assert [0, 0, 1, 0] == history["skipped"].values.tolist()
    assert [4096, 4096, 4096, 2048] == history["loss_scale"].values.tolist()
    assert [norms[i] for i in kept] == pytest.approx(history["global_grad_norm"].values[kept].tolist(), rel=1e-4)
    assert [2] == [event.step for event in history.events_of("step-skipped")]
    assert history["grad_nonfinite"].values[2].min() > 0


def test_unscaling_before_clipping(watch):
    """With `unscale_` and clipping before the scaler's step, both norms are in the loss's own units."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with watch(model, optimizer) as run:
        scaler.scale((model(torch.randn(4, 5)) * 50).square().mean()).backward()
        scaler.unscale_(optimizer)
        before = clip_grad_norm_(model.parameters(), 0.25)
        scaler.step(optimizer)
    history = only(run)

    assert float(before) == pytest.approx(history["global_grad_norm_unclipped"].values[0], rel=1e-5)
    assert 0.25 == pytest.approx(history["global_grad_norm"].values[0], rel=1e-4)


def test_autocast(watch):
    """Under CPU autocast layers are read at their bfloat16 outputs and parameters at their float32 gradients."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model[0](torch.randn(4, 5))
            loss = model[2](model[1](hidden)).float().square().mean()
        step(loss, optimizer)
    history = only(run)

    assert torch.bfloat16 == hidden.dtype
    assert norm_of(hidden) / math.sqrt(32) == pytest.approx(reading(history, "output_rms", "0"), rel=1e-5)
    assert norm_of(model[0].weight.grad) == pytest.approx(reading(history, "grad_norm", "0.weight"), rel=1e-5)


# ---- unusual ways to step -------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts how often its forward pass runs."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.runs = nn.Linear(6, 6), nn.Tanh(), 0

    def forward(self, x):
        self.runs += 1
        return self.act(self.fc(torch.sigmoid(x)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_layers_are_read_once(watch, reentrant):
    """Activation checkpointing runs a block twice; it is read once, rightly, and never run by the watcher."""
    blocks = nn.ModuleList([Counting(), Counting()])
    optimizer = torch.optim.SGD(blocks.parameters(), 0.0)
    x = torch.randn(3, 6, requires_grad=True)

    def losses(run_block):
        for _ in range(2):
            hidden = x
            for block in blocks:
                hidden = run_block(block, hidden)
            yield hidden.square().mean()

    with watch(blocks, optimizer) as plain:
        for loss in losses(lambda block, h: block(h)):
            loss.backward()
        optimizer.step()
    for block in blocks:
        block.runs = 0
    with watch(blocks, optimizer) as run:
        for loss in losses(lambda block, h: checkpoint(block, h, use_reentrant=reentrant)):
            loss.backward()
        optimizer.step()
    expected, history = only(plain), only(run)

    assert [4, 4] == [block.runs for block in blocks]
    for name in ("0.fc", "0.act", "1.fc", "1.act"):
        for statistic in ("calls", "output_rms", "signal_norm", "output_size"):
            assert reading(expected, statistic, name) == pytest.approx(reading(history, statistic, name), rel=1e-5)


def test_tensors_packed_for_an_earlier_step_are_not_unpacked(watch):
    """A checkpointed graph that outlives another model's step is still not run by the watcher when it is read."""
    block, critic = Counting(), nn.Linear(6, 1)
    opt_b, opt_c = torch.optim.SGD(block.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.1)
    with watch(block, critic, opt_b, opt_c) as run:
        made = checkpoint(block, torch.randn(3, 6), use_reentrant=False)
        step(critic(made.detach()).square().mean(), opt_c)
        step(critic(made).square().mean(), opt_b)
    histories = run.histories()

    assert 2 == block.runs
    assert all("packed" in history.unmeasured["attention_entropy"] for history in histories)


def test_a_line_search_is_one_step(watch):
    """LBFGS evaluates its closure several times: one step, with the loss of the first and the gradients of the last."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    losses, count = [], 0

    def closure():
        nonlocal count
        count += 1
        optimizer.zero_grad()
        for half in (x[:4], y[:4]), (x[4:], y[4:]):
            loss = F.mse_loss(model(half[0]), half[1]) / 2
            loss.backward()
            losses.append(loss.item())
        return loss

    with watch(model, optimizer) as run:
        starts = []
        for _ in range(3):
            starts.append(len(losses))
            optimizer.step(closure)
    history = only(run)

    assert 3 == history.num_steps < count
    assert [sum(losses[start : start + 2]) / 2 for start in starts] == pytest.approx(history["loss"].values, rel=1e-6)
    assert [2, 2, 2] == history["micro_batches"].values.tolist()
    assert norm_of(*(p.grad for p in model.parameters())) == pytest.approx(
        history["global_grad_norm"].values[-1], rel=1e-5
    )
    assert (history["update_norm"].values > 0).all()


def test_optimizers_inside_the_backward_pass(watch):
    """One optimizer per parameter, stepping during the backward pass, is one step of one subject."""
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    norms = {}

    def apply(parameter):
        norms[parameter] = norm_of(parameter.grad)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(apply)
    with watch() as run:
        losses = [model(torch.randn(4, 5)).square().mean() for _ in range(1)]
        losses[0].backward()
        loss = model(torch.randn(4, 5)).square().mean()
        loss.backward()
    history = only(run)

    assert 2 == history.num_steps
    assert [losses[0].item(), loss.item()] == pytest.approx(history["loss"].values.tolist())
    assert ["0.weight", "0.bias", "2.weight", "2.bias"] == [p.name for p in history.parameters]
    assert [norms[p] for p in model.parameters()] == pytest.approx(history["grad_norm"].values[-1].tolist())


def test_gradients_through_autograd_grad(watch):
    """A loop that calls `torch.autograd.grad` on the loss and sets gradients itself is a training step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        loss = model(torch.randn(4, 5)).square().mean()
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
            parameter.grad = gradient
        optimizer.step()
    history = only(run)

    assert loss.item() == pytest.approx(history["loss"].values[0])
    assert 1 == history["micro_batches"].values[0]
    assert reading(history, "signal_norm", "2") > 0


def test_a_gradient_penalty_is_no_loss(watch):
    """The inner derivative of a gradient penalty is neither a loss nor a signal."""
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    with watch(critic, optimizer) as run:
        x = torch.randn(4, 3, requires_grad=True)
        score = critic(x)
        (slope,) = torch.autograd.grad(outputs=score.sum(), inputs=x, create_graph=True)
        loss = score.mean() + (slope.norm(dim=1) - 1).square().mean()
        step(loss, optimizer)
    history = only(run)

    assert 1 == history["micro_batches"].values[0]
    assert loss.item() == pytest.approx(history["loss"].values[0])
    # Only the mean of the four scores reaches the score itself; the penalty goes past it.
    assert 0.5 == pytest.approx(reading(history, "signal_norm", "2"), rel=1e-5)


def test_an_attack_on_the_inputs_is_no_loss(watch):
    """`backward(inputs=…)` towards something else than parameters is not part of the step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        x = torch.randn(4, 5, requires_grad=True)
        model(x).sum().backward(inputs=[x])
        loss = model((x + x.grad.sign()).detach()).square().mean()
        step(loss, optimizer)

    assert [loss.item()] == pytest.approx(only(run)["loss"].values.tolist())


def test_backward_takes_what_torch_takes(watch):
    """Generators of tensors and edges of the graph reach torch's own functions whole."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        losses = [model(torch.randn(4, 5)).square().mean() for _ in range(2)]
        torch.autograd.backward(loss for loss in losses)
        found = torch.autograd.grad((model(torch.ones(1, 5)).sum() for _ in range(1)), (p for p in model.parameters()))
        edge = torch.autograd.graph.get_gradient_edge(model(torch.ones(1, 5)).sum())
        torch.autograd.backward(edge)
        optimizer.step()

    assert 4 == len(found)
    assert 1 == only(run).num_steps
    assert not only(run).events_of("watch-detached")


def test_no_argument_at_all(watch):
    """`watch()` finds the model through the optimizer that is made later, and names it after the user's variable."""
    with watch() as run:
        network = mlp()
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for _ in range(2):
            step(network(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert "network" == history.subject
    assert ["0", "1", "2"] == [entry.name for entry in history.layers if entry.role == "module"]
    assert not np.isnan(history["signal_norm"].values[:, 1]).any()


def test_others_are_left_alone(watch):
    """A watch on one model records nothing of another one that trains beside it."""
    model, other = mlp(), mlp()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, other)]
    with watch(model) as run:
        for m, optimizer in zip((model, other), optimizers, strict=True):
            step(m(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert ("model", 1) == (history.subject, history.num_steps)


# ---- what is not training -----------------------------------------------------------------------------------------


def test_evaluation_is_not_counted(watch):
    """Passes under `no_grad`, `inference_mode` and in eval mode are no part of a step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(2):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            with torch.no_grad():
                model(torch.randn(4, 5))
            with torch.inference_mode():
                model(torch.randn(4, 5))
            model.eval()
            model(torch.randn(4, 5))
            model.train()
    history = only(run)

    assert [1.0, 1.0] == history["calls"].values[:, [e.name for e in history.layers].index("0")].tolist()


def test_workers_are_silent(watch, capfd):
    """Data-loading workers forked while a run is watched neither print nor touch the run file."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = TensorDataset(torch.randn(32, 5), torch.randn(32, 3))
    with watch(model, optimizer) as run:
        for x, y in DataLoader(
            data, batch_size=4, num_workers=2, multiprocessing_context="fork", collate_fn=trained_in_worker
        ):
            step(F.mse_loss(model(x), y), optimizer)
    (history,) = read_run(run.path).histories

    assert ("", "") == capfd.readouterr()
    assert 8 == history.num_steps


def trained_in_worker(rows):
    """Batches whose making uses modules and an optimizer of its own."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model(torch.ones(1, 2)).sum(), optimizer)
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def test_a_copy_knows_nothing_of_the_watch(watch):
    """A model copied while hooks are on is not watched, and its hooks do nothing."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
        twin = copy.deepcopy(model)
        x = torch.randn(4, 5)
        assert torch.equal(model(x), twin(x))
        twin(x).sum().backward()
        optimizer.zero_grad()
        step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert 2 == reading(history, "calls", "0")
    assert 2 == history.num_steps


def test_a_pickled_model_needs_no_isograd(watch, tmp_path):
    """A model saved while it is watched loads and runs where isograd does not exist."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(4, 5)
    with watch(model, optimizer):
        step(model(x).square().mean(), optimizer)
        assert any(module._forward_hooks for module in model.modules())
        torch.save(model, tmp_path / "whole.pt")
        (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
        torch.save({"x": x, "out": model(x).detach(), "state": optimizer.state_dict()}, tmp_path / "expected.pt")
    script = f"""
import pickle, sys
sys.modules["isograd"] = None
import torch
expected = torch.load({str(tmp_path / "expected.pt")!r})
saved = torch.load({str(tmp_path / "whole.pt")!r}, weights_only=False)
pickled = pickle.load(open({str(tmp_path / "model.pickle")!r}, "rb"))
for model in (saved, pickled):
    out = model(expected["x"])
    assert torch.equal(out, expected["out"])
    out.sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert ("", 0) == (done.stderr, done.returncode)


# ---- how runs end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, state, event", [(RuntimeError, "failed", "exception"), (KeyboardInterrupt, "interrupted", "interrupted")]
)
def test_what_was_seen_is_kept(watch, kind, state, event):
    """After an exception or Ctrl-C in the loop the steps seen are in the file, with what ended them, and diagnosed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        for index in range(30):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            if index == 25:
                raise kind("enough")

    run = watch(model, optimizer)
    with pytest.raises(kind, match="enough"), run:
        train()
    recorded = read_run(run.path)
    (history,) = recorded.histories

    assert state == recorded.meta["state"]
    assert 26 == history.num_steps
    assert ["enough"] == [e.data["message"] for e in history.events_of(event)]
    assert 26 == run.diagnose().steps


@pytest.mark.parametrize("every", [1, 1000])
def test_an_exception_in_the_middle_of_a_step(watch, capfd, every):
    """What was read of the step that an exception cut short is kept as well, deep step or not."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []

    def train():
        for index in range(31):
            loss = model(torch.randn(4, 5)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if index == 30:
                raise RuntimeError("enough")
            optimizer.step()

    run = watch(model, optimizer, every=every)
    with pytest.raises(RuntimeError, match="enough"), run:
        train()
    history = only(run)

    assert "" == capfd.readouterr().err
    assert losses == pytest.approx(history["loss"].values.tolist())
    assert norm_of(*(p.grad for p in model.parameters())) == pytest.approx(history["global_grad_norm"].values[-1])
    assert 0 == history["skipped"].values[-1]


def test_an_assertion_on_the_loss_before_the_first_step(watch):
    """A program that refuses a NaN loss before any backward pass still learns the operation that made it."""
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = watch(model, optimizer)

    def train():
        out = model(torch.randn(4, 5))
        shifted = torch.log(out - out.max())
        loss = shifted.mean() * 0
        assert torch.isfinite(loss), "loss is not finite"

    with pytest.raises(AssertionError, match="not finite"), run:
        train()
    (event,) = only(run).events_of("nonfinite")
    causes = {cause.finding.name: cause.finding.message for cause in run.diagnose().causes}

    assert "Log" == event.data["operation"]
    assert event.data["reason"].startswith("log of ")
    assert 4 == event.data["count"]
    assert "log of " in causes["invalid-operation"]
    assert "`shifted = torch.log(out - out.max())`" in causes["invalid-operation"]


def test_the_first_bad_operation_is_the_first_in_time(watch):
    """Of several bad operations the one that the forward pass ran first is named, whatever the graph's shape."""
    model = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        out = model(torch.randn(4, 5))
        bad = (out - out.max() - 1).sqrt()
        for _ in range(5):
            bad = bad * 1.5
        also_bad = torch.log(out - out.max() - 1)
        step(bad.mean() + also_bad.mean(), optimizer)
    (event,) = only(run).events_of("nonfinite")

    assert "Sqrt" == event.data["operation"]


def test_scripted_submodules(watch):
    """A scripted submodule runs outside Python: it is left alone, and the layers around it are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(5, 8), scripted, nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(3):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert 3 == history.num_steps
    assert not np.isnan(history["grad_norm"].values).any()
    assert [1.0, 1.0] == [reading(history, "calls", name) for name in ("0", "2")]


def test_lazy_modules(watch):
    """A lazy module is known by what it became: its class, its shapes, its fan-in."""
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(2):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
    history = only(run)

    assert [(8, 5), (8,), (3, 8), (3,)] == [p.shape for p in history.parameters]
    assert (5, 8) == (layer(history, "0").fan_in, layer(history, "0").fan_out)
    assert [1.0, 1.0] == [reading(history, "calls", name) for name in ("0", "2")]


def test_a_lazy_module_that_is_never_called(watch, capfd):
    """A lazy module that stays without a shape is no reason to stop."""
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "lazy": nn.LazyConv2d(8, 3)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as run:
        for _ in range(2):
            step(model["used"](torch.randn(4, 5)).square().mean(), optimizer)

    assert "" == capfd.readouterr().err
    assert (0, 0) == (layer(only(run), "lazy").fan_in, layer(only(run), "lazy").fan_out)


def test_function_transforms_are_left_alone(watch, capfd):
    """Per-sample gradients by `torch.func` run through watched layers without being read or disturbed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_of(values, x):
        return torch.func.functional_call(model, values, (x,)).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))
    x = torch.randn(4, 5)
    expected = per_sample(parameters, x)
    with watch(model, optimizer) as run:
        step(model(x).square().mean(), optimizer)
        found = per_sample(parameters, x)
        step(model(x).square().mean(), optimizer)

    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert 2 == only(run).num_steps
    assert "" == capfd.readouterr().err


def test_tracing_records_the_model_alone(watch):
    """A model traced while it is watched gives the same graph as one that is not."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = str(torch.jit.trace(model, torch.ones(1, 5)).inlined_graph)
        with watch(model, optimizer):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            found = str(torch.jit.trace(model, torch.ones(1, 5)).inlined_graph)

    assert expected.count("aten::") == found.count("aten::")


# ---- leave no trace -------------------------------------------------------------------------------------------------


def taps():
    """Everything of torch's that a watch may replace."""
    hooks = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    return {
        "backward": torch.autograd.backward,
        "grad": torch.autograd.grad,
        "optimizer": Optimizer.__init__,
        "scaler": torch.amp.GradScaler.step,
        "clip": clip_grad._clip_grads_with_norm_,
        "saved": torch.autograd.graph.saved_tensors_hooks.__enter__,
        "hooks": [dict(hook) for hook in hooks],
        "forward": dict(torch.nn.modules.module._global_forward_hooks),
    }


@pytest.mark.parametrize("error", [None, RuntimeError("enough"), KeyboardInterrupt(), SystemExit(0)], ids=repr)
def test_everything_is_put_back(watch, error):
    """After a watch, however it ended, torch's functions are the original objects and no hook is left."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = taps()
    run = watch(model, optimizer)
    assert taps() != before
    step(model(torch.randn(4, 5)).square().mean(), optimizer)
    run.close(error)

    assert before == taps()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_two_watches_at_once(watch):
    """A watch inside a watch records the same; torch is restored when the last one ends."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = taps()
    with watch(model, optimizer) as outer:
        with watch(model, optimizer) as inner:
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
        step(model(torch.randn(4, 5)).square().mean(), optimizer)

    assert before == taps()
    assert [1, 2] == [only(inner).num_steps, only(outer).num_steps]
    assert only(inner)["grad_norm"].values[0].tolist() == only(outer)["grad_norm"].values[0].tolist()


def test_nothing_of_a_step_is_kept(watch):
    """Batch, outputs, loss and graph are gone right after the step, while everything is read at every step."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Identity(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    class Marker:
        """Lives as long as the graph that it hangs on."""

        def __call__(self, gradient):
            return None

    def once():
        marker = Marker()
        x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
        hidden = torch.tanh(model[1](model[0](x)))
        out = model[3](model[2](hidden))
        loss = F.cross_entropy(out, y)
        loss.register_hook(marker)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [weakref.ref(thing) for thing in (x, y, hidden, out, loss)], weakref.ref(marker)

    gc.disable()
    try:
        with watch(model, optimizer):
            for _ in range(3):
                tensors, graph = once()
                assert [None] * 5 == [ref() for ref in tensors]
                assert graph() is None
    finally:
        gc.enable()


def test_nothing_of_an_evaluation_is_kept(watch):
    """Outputs of passes with gradients but without a backward pass are gone when the user lets go of them."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gc.disable()
    try:
        with watch(model, optimizer):
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            out = model(torch.randn(4, 5))
            ref = weakref.ref(out)
            del out
            assert ref() is None
    finally:
        gc.enable()


def resident():
    """Bytes of physical memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "with-evaluation"])
def test_memory_does_not_grow(watch, evaluates):
    """Over 5,000 deep steps objects and bytes stay where they were, and over fewer with evaluations between them."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(4, 2)

    def train(steps):
        for number in range(steps):
            step(torch.sigmoid(model(x)).square().mean(), optimizer)
            if evaluates:
                model.eval()
                model(x)
                model.train()
                model(x)
            if number % 50 == 49:
                run._file.flush()  # the recording thread has written what it was given: its queue stays short
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks(), resident()

    with watch(model, optimizer) as run:
        objects, blocks, size = train(500)
        steps = 1000 if evaluates else 4500
        after = train(steps)
        assert 500 + steps == run.step

    # An object or three blocks kept at every third step would exceed these; resident memory varies by a few pages.
    assert after[0] - objects < steps / 3
    assert after[1] - blocks < steps
    assert after[2] - size < 16e6


def test_optimizers_made_over_and_over_do_not_pile_up(watch):
    """A program that makes a new model and optimizer again and again lets go of the old ones while it is watched."""
    refs = []
    with watch():
        for _ in range(5):
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            step(model(torch.randn(4, 5)).square().mean(), optimizer)
            refs.append((weakref.ref(model), weakref.ref(optimizer)))
        del model, optimizer
        step(torch.zeros(1, requires_grad=True).sum(), torch.optim.SGD(mlp().parameters(), 0.1))
        gc.collect()

        assert [(None, None)] * 5 == [(model(), optimizer()) for model, optimizer in refs]


def test_models_are_saved_as_without(watch):
    """`state_dict` of a watched model, saved, has the same bytes as that of one that is not watched."""

    def saved(model):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return buffer.getvalue()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = saved(copy.deepcopy(model))
    with watch(model, optimizer):
        assert expected == saved(model)
