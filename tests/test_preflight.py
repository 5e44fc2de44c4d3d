"""What a preflight finds, how it agrees with real passes, that it leaves no trace, and what it says of mistakes."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd._cli import main
from isograd._mean_field import Stage, walk
from isograd._preflight import sizes_of
from isograd.frameworks.torch._curvature import adam_scale, hessian_product, largest_eigenvalue
from isograd.frameworks.torch._rehearsal import recurrence_of, spectral_radius
from isograd.frameworks.torch._structure import _recurrent_results

torch.set_num_threads(1)


def perceptron(depth=3, width=32, activation=nn.ReLU, outputs=5, gain=2.0):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    model = nn.Sequential(*layers, nn.Linear(width, outputs))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, math.sqrt(gain / layer.in_features))
    return model


def classes(rows=64, width=32, outputs=5):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, width, generator=draw), torch.randint(outputs, (rows,), generator=draw)


class Residual(nn.Module):
    def __init__(self, width=64, scale=0.5):
        super().__init__()
        self.norm, self.rise, self.fall = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x):
        return x + self.scale * self.fall(F.gelu(self.rise(self.norm(x))))


class Gated(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.out(torch.cat([torch.sigmoid(self.gate(x)) * self.value(x), 0.5 * x - 1], dim=-1))


class Attending(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)) + x


class Loose(nn.Module):
    """Weights that belong to no layer."""

    def __init__(self, width=64):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        return torch.relu(x @ self.first) @ self.second.T


class Branching(nn.Module):
    """Its code asks for values, which no symbol has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x if x.sum() > 0 else -x)


IMAGES, ROWS, TOKENS = (16, 3, 16, 16), (64, 64), (8, 12, 64)
STRUCTURES = {
    "tanh": (lambda: perceptron(6, 64, nn.Tanh, 64), ROWS),
    "steep-leaky-relu": (lambda: perceptron(6, 64, lambda: nn.LeakyReLU(0.3), 64), ROWS),
    "relu6": (lambda: perceptron(6, 64, nn.ReLU6, 64), ROWS),
    "prelu": (lambda: perceptron(6, 64, nn.PReLU, 64), ROWS),
    "dropout": (lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.4))]),
                (512, 64)),
    "residual": (lambda: nn.Sequential(*[Residual() for _ in range(6)], nn.Linear(64, 8)), ROWS),
    "gated": (lambda: nn.Sequential(Gated(), Gated(), Gated()), ROWS),
    "attention": (lambda: nn.Sequential(Attending(), Attending(), nn.Linear(64, 8)), TOKENS),
    "transformer": (lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True), 3, enable_nested_tensor=False),
        TOKENS),
    "loose": (lambda: nn.Sequential(Loose(), nn.Linear(64, 64), Loose(), nn.Linear(64, 8)), ROWS),
    "batch-norm": (lambda: nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64),
                                                                         nn.Tanh())], nn.Linear(64, 8)), (16, 64)),
    "running-batch-norm": (lambda: nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(64, 64),
                           nn.BatchNorm1d(64), nn.ReLU())], nn.Linear(64, 8)).eval(), ROWS),
    "convolutions": (lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular", stride=2), nn.GroupNorm(4, 32), nn.SiLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 64)), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_predictions_agree_with_a_real_pass(name):
    """Output scale and gradient norm, predicted of every layer from the structure alone, are those of a forward and a
    backward pass within a quarter, and the gradient over the whole network within a tenth of a decade per decade or so.
    """
    build, shape = STRUCTURES[name]
    torch.manual_seed(0)
    found = isograd.preflight(build(), batch=torch.randn(shape), sharpness=False).preflight
    measured = {layer.name: layer for layer in found.weighted}
    predicted = [layer for layer in found.prediction.weighted if layer.name in measured]

    assert 1.0 == found.prediction.understood
    assert len(predicted) == len(measured)
    for layer in predicted:
        # Finite width and depth: a relative deviation of sqrt(depth / width), a third here. Attention at small logits
        # is the limit of uniform weights.
        assert layer.output_rms == pytest.approx(measured[layer.name].output_rms, rel=0.33)
        if layer.signal > 0.05:
            assert layer.signal == pytest.approx(measured[layer.name].signal, rel=0.4)


def test_weights_without_a_layer_are_named_by_their_parameter():
    """Products with parameters that belong to no layer are layers of the prediction, under the parameters' names."""
    prediction = isograd.preflight(STRUCTURES["loose"][0]()).preflight.prediction

    assert ["0.first", "0.second", "1", "2.first", "2.second", "3"] == [layer.name for layer in prediction.weighted]


def test_structure_of_code_that_cannot_be_traced_is_said_to_be_unknown():
    """A model whose code asks for values has no structure that could be told; the batch still measures it."""
    found = isograd.preflight(Branching(), F.cross_entropy, classes()).preflight

    assert "nothing" == found.prediction.how
    assert 0.0 == found.prediction.understood
    assert math.isfinite(found.decades)
    assert any("could not be told" in sentence for sentence in found.sentences())


def test_a_part_that_cannot_be_traced_is_one_unknown_stage():
    """Behind a part that cannot be traced nothing is predicted, before the loss what the theory knows still is."""
    model = nn.Sequential(nn.Linear(32, 32), Branching(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    found = isograd.preflight(model)
    prediction = found.preflight.prediction

    assert ("1",) == prediction.unknown
    assert 0.8 == prediction.understood
    assert not prediction.reaches_input
    assert math.isnan(prediction.weighted[0].signal)
    # Past the unknown part the scale of signals is not known, so neither is the slope of tanh; ends are.
    assert 1.0 == prediction.weighted[-1].signal
    assert () == found.causes


def test_what_is_unknown_stays_unknown():
    """A stage of a kind that the theory does not cover makes the gradient before it unknown, not one."""
    stages = [
        Stage(name="x", kind="input"),
        Stage(name="a", kind="linear", sources=(0,), weight_variance=1.0),
        Stage(name="b", kind="sorted", sources=(1,)),
        Stage(name="c", kind="linear", sources=(2,), weight_variance=1.0),
    ]
    found = walk(stages, how="graph")

    assert ("b",) == found.unknown
    assert 2 / 3 == pytest.approx(found.understood)
    assert math.isnan(found.layers[0].signal)
    assert 1.0 == found.layers[1].signal


@pytest.mark.parametrize("value", [math.inf, 1e200, 0.0, math.nan])
def test_weights_of_any_size_are_walked(value):
    """Weights that are infinite, huge, zero or NaN give predictions, if only that nothing is known."""
    model = perceptron(4).double()
    with torch.no_grad():
        model[2].weight.fill_(value)
    prediction = isograd.preflight(model).preflight.prediction

    assert 1.0 == prediction.understood
    assert 5 == len(prediction.weighted)


def test_a_batch_of_two_is_too_small_for_the_theory():
    """Below four rows the factor of batch normalization is unknown; what stands before the loss remains known."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    prediction = isograd.preflight(model, batch=torch.randn(2, 8), sharpness=False).preflight.prediction

    assert math.isnan(prediction.weighted[0].signal)
    assert 1.0 == prediction.weighted[1].signal


# ---- it leaves no trace -----------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Dropout, running statistics, a counter, a cache and draws from three generators."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5))
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.cache = 0, None

    def forward(self, x):
        self.calls += 1
        self.seen += len(x)
        self.cache = x
        return self.layers(x) + random.random() + float(np.random.rand())


def bits(model, optimizer):
    state = {**model.state_dict(), **{f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}}
    tensors = {name: value.clone() for name, value in state.items()}
    moments = [
        value.clone() for s in optimizer.state.values() for value in s.values() if isinstance(value, torch.Tensor)
    ]
    return tensors, moments, (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))


def test_nothing_of_the_users_changes():
    """Weights, buffers, gradients, optimizer state, attributes, modes, hooks and all generators are as they were."""
    model, (x, y) = Everything(), classes()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    gradients, calls, cache = [p.grad for p in model.parameters()], model.calls, model.cache
    before = bits(model, optimizer)

    isograd.preflight(model, nn.CrossEntropyLoss(), (x, y), optimizer)
    isograd.preflight(model)

    after = bits(model, optimizer)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(map(torch.equal, before[1], after[1]))
    assert torch.equal(before[2][0], after[2][0])
    assert before[2][1:] == after[2][1:]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert (calls, True) == (model.calls, model.cache is cache)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_batch_that_the_model_changes_in_place_stays_as_it_is():
    """Inputs and targets are the user's: a model that overwrites its input overwrites a copy, each time a fresh one."""

    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron()

        def forward(self, x):
            return self.net(x.mul_(1e-3))

    (x, y), model = classes(), Overwriting()
    found = isograd.preflight(model, F.cross_entropy, (x, y), sharpness=False).preflight

    assert torch.equal(classes()[0], x)
    assert F.cross_entropy(model.net(1e-3 * x), y).item() == pytest.approx(found.start.loss, rel=1e-5)


def test_a_loss_function_that_holds_the_model_leaves_its_gradients_alone():
    """A penalty on the original's own weights inside of the loss function gives these no gradient."""
    model = perceptron()
    penalty = lambda out, y: F.cross_entropy(out, y) + 1e-3 * sum(p.square().sum() for p in model.parameters())  # noqa: E731

    isograd.preflight(model, penalty, classes())

    assert [None] * 8 == [p.grad for p in model.parameters()]


def test_a_run_that_is_watched_hears_nothing(tmp_path):
    """A preflight inside of a watched program adds no step and no loss to its record, and watching goes on."""
    model, (x, y) = perceptron(), classes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(out=tmp_path) as run:
        for step in range(4):
            if step == 2:
                isograd.preflight(model, F.cross_entropy, (x, y), optimizer)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    (history,) = run.histories()

    assert 4 == history.num_steps
    assert np.isfinite(history["loss"].values).all()
    assert [1.0] * 4 == history["micro_batches"].values.tolist()


def test_evaluation_mode_and_no_grad_are_no_obstacle():
    """A model in evaluation mode is measured as it is, also where gradients are switched off."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        found = isograd.preflight(model, F.cross_entropy, classes()).preflight

    assert math.isfinite(found.decades)
    assert not model.training


def test_switched_off(monkeypatch):
    """Under ISOGRAD=off nothing is done and nothing is found."""
    monkeypatch.setenv("ISOGRAD", "off")
    diagnosis = isograd.preflight(perceptron(), F.cross_entropy, classes())

    assert (True, None, ()) == (diagnosis.healthy, diagnosis.preflight, diagnosis.subjects)


# ---- what it finds ----------------------------------------------------------------------------------------------


def test_a_healthy_model_is_healthy():
    """A well-initialized network with its loss, batch and optimizer has no cause at warning or above."""
    model = perceptron(5)
    diagnosis = isograd.preflight(model, F.cross_entropy, classes(), torch.optim.Adam(model.parameters()))

    assert diagnosis.healthy, str(diagnosis)
    diagnosis.raise_for_findings()


@pytest.mark.parametrize("batch", [None, torch.randn(64, 64)], ids=["structure", "batch"])
def test_a_deep_network_with_default_weights_is_sick(batch):
    """20 layers of ReLU with PyTorch's own initialization lose the gradient, told from the structure or the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(21) for m in (nn.Linear(64, 64), nn.ReLU())])
    diagnosis = isograd.preflight(model, batch=batch)
    names = {name for c in diagnosis.causes for name in (c.finding.name, *(s.name for s in c.symptoms))}

    assert not diagnosis.healthy
    assert "vanishing-gradients" in names
    assert "initialization-too-small" in names
    with pytest.raises(isograd.UnhealthyRun, match="Gradient norm from"):
        diagnosis.raise_for_findings()


def test_the_gradient_of_weights_is_predicted_for_one_sample():
    """Predicted gradients of weight matrices are those of one sample with that cotangent, within a quarter."""
    torch.manual_seed(0)
    model, x = perceptron(3, 256, nn.Tanh, 256), torch.randn(1, 256)
    (history,) = isograd.preflight(model).histories
    out = model(x)
    (out * torch.randn(out.shape)).sum().backward()
    last = out.shape[1] ** 0.5  # the cotangent's norm: predictions are relative to it
    predicted = dict(zip([p.name for p in history.parameters], history["grad_norm"].values[0], strict=True))

    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() / last == pytest.approx(predicted[name], rel=0.25)


LOSSES = [
    (F.cross_entropy, (64,), math.log(5), "ln 5"),
    (F.binary_cross_entropy_with_logits, (64, 5), math.log(2), "ln 2"),
    (F.mse_loss, (64, 5), None, "variance of the targets"),
    (F.l1_loss, (64, 5), math.nan, ""),
]


@pytest.mark.parametrize("loss_fn, shape, expected, reason", LOSSES, ids=["classes", "binary", "squared", "absolute"])
def test_the_loss_at_the_start_and_what_it_should_be(loss_fn, shape, expected, reason):
    """The loss on the batch stands beside ln K, ln 2 or the variance of the targets; of other losses alone."""
    model, (x, _) = perceptron(), classes()
    y = torch.randint(2, shape).float() if len(shape) > 1 else torch.randint(5, shape)
    expected = y.var(correction=0).item() if expected is None else expected
    start = isograd.preflight(model, loss_fn, (x, y), sharpness=False).preflight.start

    assert loss_fn(model(x), y).item() == pytest.approx(start.loss, rel=1e-5)
    assert expected == pytest.approx(start.expected, rel=1e-5, nan_ok=True)
    assert reason == start.reason


class Many(nn.Module):
    """Two inputs, and a loss of its own where it gets labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(32, 5)

    def forward(self, x, shift=None, labels=None):
        out = self.net(x if shift is None else x + shift)
        return out if labels is None else {"logits": out, "loss": F.cross_entropy(out, labels)}


X, Y = classes()
BATCHES = [
    (F.cross_entropy, (X, Y)),
    (F.cross_entropy, [X, Y]),
    (F.cross_entropy, (X, torch.zeros(32), Y)),
    (F.cross_entropy, ((X, torch.zeros(32)), Y)),
    (F.cross_entropy, ({"x": X, "shift": torch.zeros(32)}, Y)),
    (None, {"x": X, "labels": Y}),
    (lambda out: F.cross_entropy(out, Y), X),
    (lambda out, x: F.cross_entropy(out, Y) + 0 * x.sum(), X),
    (lambda out: F.cross_entropy(out, Y), (X,)),
]


@pytest.mark.parametrize("loss_fn, batch", BATCHES)
def test_batches_as_loaders_yield_them(loss_fn, batch):
    """Inputs, inputs with a target, several inputs and mappings reach the model and the loss in their places."""
    torch.manual_seed(0)
    model = Many()
    found = isograd.preflight(model, loss_fn, batch).preflight

    assert F.cross_entropy(model(X), Y).item() == pytest.approx(found.start.loss, rel=1e-5)
    assert found.curvature.sharpness > 0


def test_without_an_optimizer_what_belongs_to_one_is_unmeasured():
    """Learning rates and updates of a step that no optimizer of the user's made are not shown as the user's."""
    diagnosis = isograd.preflight(perceptron(), F.cross_entropy, classes(), sharpness=False)
    (history,) = diagnosis.histories

    assert "update_ratio" not in history.series
    assert "there was no optimizer" == history.unmeasured["learning_rate"]
    assert () == history.groups
    assert "loss" in history


def test_what_units_do_is_said():
    """Dead units, saturated ones and the largest attention logit are named with their layer and share."""
    torch.manual_seed(0)
    dead = perceptron(2)
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    pinned = perceptron(2, activation=nn.Tanh, gain=400.0)
    said = [*isograd.preflight(dead, batch=X).preflight.sentences()]
    said += isograd.preflight(pinned, batch=X).preflight.sentences()
    attending = isograd.preflight(Attending(), batch=torch.randn(TOKENS)).preflight

    assert "Most dead: 1, 100 % of its units." in said
    assert any(sentence.startswith("Most saturated: ") for sentence in said)
    q, k, _ = torch.nn.Linear(64, 192)(torch.randn(TOKENS)).chunk(3, -1)
    typical = (q @ k.transpose(-2, -1) / 8).abs().max().item()
    assert attending.largest_logit == pytest.approx(typical, rel=1)


# ---- curvature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -30.0, 30.0], ids=["mixed", "negative", "positive"])
@pytest.mark.parametrize("size", [1, 2, 60])
def test_the_largest_eigenvalue_is_that_of_the_whole_matrix(size, shift):
    """Lanczos' iteration finds the most positive eigenvalue of a symmetric matrix, also where all are negative."""
    draw = np.random.default_rng(size)
    a = draw.normal(size=(size, size))
    matrix = torch.from_numpy(a + a.T + shift * np.eye(size))
    start = [torch.from_numpy(draw.normal(size=size))]
    found = largest_eigenvalue(lambda v: [matrix @ v[0]], start, most=size + 5, tolerance=1e-6)

    assert np.linalg.eigvalsh(matrix.numpy())[-1] == pytest.approx(found.value, rel=1e-6)
    assert found.products <= size + 5


def test_products_with_the_hessian():
    """Products with the (preconditioned) Hessian are those of the matrix that autograd writes out in full."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        torch.randn(7, 3),
        torch.randn(7, 1),
    )
    x, y, parameters = x.double(), y.double(), list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def loss(flat):
        named = zip([n for n, _ in model.named_parameters()], flat.split(sizes), parameters, strict=True)
        weights = {name: part.view_as(p) for name, part, p in named}
        return F.mse_loss(torch.func.functional_call(model, weights, x), y)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    hessian = torch.autograd.functional.hessian(loss, flat)
    scale, vector = torch.rand(sum(sizes)).double(), torch.randn(sum(sizes)).double()
    shaped = lambda v: [part.view_as(p) for part, p in zip(v.split(sizes), parameters, strict=True)]  # noqa: E731
    found = hessian_product(F.mse_loss(model(x), y), parameters, shaped(scale))(shaped(vector))

    assert torch.allclose(scale * (hessian @ (scale * vector)), torch.cat([f.flatten() for f in found]))


def test_the_preconditioner_of_adam():
    """P^(-1/2) is that of torch's Adam: an Adam step without momentum is the gradient over sqrt(v) + epsilon."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.0, 0.99), eps=0.01)
    fresh = adam_scale(optimizer, [weight], [torch.tensor([1.0, 0.0, -4.0])])
    for _ in range(3):
        weight.grad = torch.randn(3)
        before = weight.detach().clone()
        optimizer.step()
    (scale,) = adam_scale(optimizer, [weight], [torch.zeros(3)])

    assert torch.allclose(fresh[0], torch.tensor([1.01, 0.01, 4.01]).rsqrt())
    assert torch.allclose(before - 0.1 * scale.square() * weight.grad, weight.detach())


OPTIMIZERS = [
    (None, 2.0),
    (lambda p: torch.optim.SGD(p, lr=0.1), 2.0),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 3.8),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 2.8),
]


@pytest.mark.parametrize("make, limit", OPTIMIZERS, ids=["none", "plain", "momentum", "nesterov"])
def test_the_largest_stable_learning_rate(make, limit):
    """On a quadratic loss, gradient descent just below the stable rate converges, and just above it diverges."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(40, 1)
    model = nn.Linear(4, 1)
    optimizer = None if make is None else make(model.parameters())
    curvature = isograd.preflight(model, F.mse_loss, (x, y), optimizer).preflight.curvature
    inputs = torch.cat([x, torch.ones(40, 1)], 1).double()
    exact = torch.linalg.eigvalsh(2 * inputs.T @ inputs / 40)[-1].item()

    assert exact == pytest.approx(curvature.sharpness, rel=1e-3)
    assert limit / exact == pytest.approx(curvature.stable_learning_rate, rel=1e-3)
    for share, converges in ((0.97, True), (1.03, False)):
        twin = nn.Linear(4, 1)
        trained = (make or OPTIMIZERS[1][0])(twin.parameters())
        trained.param_groups[0]["lr"] = share * curvature.stable_learning_rate
        start = F.mse_loss(twin(x), y).item()
        for _ in range(400):
            trained.zero_grad()
            loss = F.mse_loss(twin(x), y)
            loss.backward()
            trained.step()
        assert converges == (loss.item() < start)


def test_a_model_without_second_derivatives_says_why():
    """Where the loss cannot be differentiated twice, the sentence says so and everything else is measured."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron()

        def forward(self, x):
            return -torch.cdist(self.net(x), torch.eye(5), compute_mode="donot_use_mm_for_euclid_dist")

    found = isograd.preflight(Model(), F.cross_entropy, classes()).preflight

    assert found.curvature is None
    assert any(note.startswith("Sharpness could not be measured: ") for note in found.notes)
    assert math.isfinite(found.decades)


# ---- mistakes ---------------------------------------------------------------------------------------------------


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("it holds a socket")


MISTAKES = [
    (lambda: isograd.preflight(3), r"takes a torch module, not int"),
    (lambda: isograd.preflight(perceptron(), optimizer=3), r"must be a torch optimizer, not int"),
    (lambda: isograd.preflight(perceptron(), batch=()), r"the batch is empty"),
    (lambda: isograd.preflight(perceptron(), batch=torch.randn(4, 7)), r"does not take this batch: mat1 and mat2"),
    (lambda: isograd.preflight(perceptron(), F.cross_entropy, (X, Y[:3])), r"does not take this output and target"),
    (lambda: isograd.preflight(perceptron(), lambda o, y: o, (X, Y)), r"one number as a tensor, not shape \[64, 5\]"),
    (lambda: isograd.preflight(perceptron(), lambda o, y: 3.0, (X, Y)), r"one number as a tensor, not float"),
    (lambda: isograd.preflight(perceptron(), lambda o, y: o.detach().sum(), (X, Y)), r"does not depend on any param"),
    (
        lambda: isograd.preflight(perceptron().requires_grad_(False), batch=X),
        r"no parameter of the model requires a gr",
    ),
    (lambda: isograd.preflight(Uncopyable(4, 4)), r"cannot be copied, so nothing can be tried: it holds a socket"),
]


@pytest.mark.parametrize("mistake, sentence", MISTAKES)
def test_mistakes_are_one_sentence(mistake, sentence):
    """What does not fit together is a ValueError whose only line says what and where."""
    with pytest.raises(ValueError, match=sentence) as raised:
        mistake()

    assert 1 == len(str(raised.value).splitlines())


# ---- the command line -------------------------------------------------------------------------------------------

TARGETS = """
import torch
from torch import nn

def healthy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    batch = torch.randn(16, 8), torch.randint(3, (16,))
    return model, batch, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)

def sick():
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(21) for m in (nn.Linear(64, 64), nn.ReLU())])

def tokens():
    return nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 4))

def fails():
    raise OSError("no data here\\nnor there")

def leaves():
    raise SystemExit(3)

def nothing():
    return None

def five():
    return 1, 2, 3, 4, 5

number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "flights.py").write_text(TARGETS, encoding="utf-8")
    (tmp_path / "broken_flights.py").write_text("import torch\nraise KeyError('x')\n", encoding="utf-8")
    (tmp_path / "needy_flights.py").write_text("import no_such_thing\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    yield tmp_path
    __import__("sys").modules.pop("flights", None)


@pytest.mark.parametrize("target", ["flights:healthy", "flights.py:healthy"])
def test_a_healthy_target(folder, capsys, target):
    """A healthy model ends with status 0, and the verdict shows prediction, loss and stable learning rate."""
    assert 0 == main(["preflight", target])
    said = " ".join(capsys.readouterr().out.split())

    assert "healthy" in said
    assert "a model before its first step" in said
    for fact in ("Understood 100 %", "predicted: ", "measured on the batch: ", "1.099 expected (ln 3)", "(yours: 0.1)"):
        assert fact in said


def test_a_sick_target(folder, capsys):
    """A sick model ends with status 1, and JSON holds the causes and the facts under "preflight"."""
    assert 1 == main(["preflight", "flights:sick", "--json"])
    found = json.loads(capsys.readouterr().out)

    assert {"healthy", "causes", "preflight", "schema"} <= found.keys()
    assert found["preflight"]["predicted"]["decades"] == pytest.approx(-20 * 0.389, rel=0.03)
    assert found["preflight"]["measured"] is None
    assert "vanishing-gradients" in json.dumps(found["causes"])


@pytest.mark.parametrize(
    "target, shape", [("flights:sick", "16x64"), ("flights:sick", "16,64"), ("flights:tokens", "2x9")]
)
def test_a_random_batch_of_a_shape(folder, capsys, target, shape):
    """`--input` measures on a random batch of that shape, of whole numbers where the model begins with an embedding."""
    assert main(["preflight", target, "--input", shape, "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)["preflight"]

    assert found["measured"]["layers"][-1]["output_rms"] > 0
    assert found["curvature"] is None


REFUSED = [
    (["nowhere:model"], "There is no module nowhere."),
    (["nowhere.py:model"], "There is no file nowhere.py."),
    (["flights"], "'flights' names no callable: write module:callable, or file.py:callable."),
    (["flights:missing"], "flights has no missing."),
    (["flights:number"], "flights has a number that cannot be called."),
    (["flights:fails"], "flights:fails raised OSError: no data here nor there; it is called without arguments."),
    (["flights:leaves"], "flights:leaves raised SystemExit: 3; it is called without arguments."),
    (["flights:nothing"], "flights:nothing returned NoneType where a model was expected."),
    (["flights:five"], "flights:five returned 5 things: return (model, batch, loss_fn, optimizer) or fewer."),
    (["broken_flights:model"], "Importing broken_flights raised KeyError: 'x'."),
    (["needy_flights:model"], "Importing needy_flights raised ModuleNotFoundError: No module named 'no_such_thing'."),
    (["flights:sick", "--input", "8x0"], "'8x0' is no shape: write sizes above 0 as in 64x1x28x28, the batch first."),
    (["flights:sick", "--input", "8x7"],
     "the model does not take this batch: mat1 and mat2 shapes cannot be multiplied (8x7 and 64x64)."),
    (["flights:healthy", "--input", "8x8"],
     "flights:healthy returns a batch of its own: leave out the shape of a random one."),
]  # fmt: skip


@pytest.mark.parametrize("arguments, sentence", REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_mistakes_on_the_command_line_are_one_sentence(folder, capsys, arguments, sentence):
    """A target that cannot be used ends with status 2 and one sentence on stderr, nothing on stdout."""
    assert 2 == main(["preflight", *arguments])
    captured = capsys.readouterr()

    assert ("", f"isograd: {sentence}\n") == (captured.out, captured.err)


@pytest.mark.parametrize("text", ["64x1x28x28", "64,1,28,28", "(64, 1, 28, 28)"])
def test_shapes_as_people_write_them(text):
    """A shape is sizes with `x` or commas between, in brackets or not."""
    assert (64, 1, 28, 28) == sizes_of(text)


@pytest.mark.parametrize("size", [40, 128, 129, 200])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_spectral_radius_is_that_of_the_eigenvalues(size, scale):
    """Random, orthogonal, diagonal, nilpotent, defective and zero matrices, against LAPACK's eigenvalues."""
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(size)) / size**0.5
    matrices = [
        random,
        torch.linalg.qr(random)[0],
        torch.eye(size) * 0.9,
        torch.diag(torch.ones(size - 1), 1),
        torch.triu(torch.ones(size, size)),
        torch.zeros(size, size),
    ]
    for matrix in matrices:
        expected = float(np.abs(np.linalg.eigvals((matrix * scale).double().numpy())).max())

        assert pytest.approx(expected, rel=2e-3, abs=1e-12 * scale) == spectral_radius((matrix * scale)[None])
    stack = torch.stack([matrices[0], matrices[2]])
    assert spectral_radius(stack) == max(spectral_radius(one[None]) for one in stack)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("shape", [(5, 3, 7), (5, 7)], ids=["batch", "sequence"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: nn.RNN(7, 6, **o),
        lambda **o: nn.GRU(7, 6, num_layers=2, **o),
        lambda **o: nn.LSTM(7, 6, bidirectional=True, **o),
        lambda **o: nn.LSTM(7, 6, proj_size=4, num_layers=2, **o),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_of_recurrences_are_those_of_torch(make, batch_first, shape):
    """What stands for the result of a recurrence on tensors without values has the shapes of the result."""
    module, x = make(batch_first=batch_first), torch.randn(shape)

    def shapes(result):
        return tuple(map(shapes, result)) if isinstance(result, tuple) else result.shape

    assert shapes(module(x)) == shapes(_recurrent_results(module, x))


def test_a_projected_recurrence_has_no_eigenvalues_of_its_own():
    """The gates of an LSTM whose state is projected from 6 units to 3 are [6, 3]: no number stands for them."""
    torch.manual_seed(0)
    found = recurrence_of("lstm", nn.LSTM(4, 6, proj_size=3), None)
    assert (0.0, 0.0) == (found.spectral_radius, found.largest_singular_value)


def test_gates_are_judged_one_by_one():
    """The spectral radius of an LSTM is the largest of its four recurrent matrices."""
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 6)
    gates = lstm.weight_hh_l0.detach().split(6)
    expected = max(float(torch.linalg.eigvals(gate.double()).abs().max()) for gate in gates)
    assert pytest.approx(expected) == recurrence_of("lstm", lstm, None).spectral_radius
