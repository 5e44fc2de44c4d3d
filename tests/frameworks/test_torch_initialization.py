"""Weights drawn afresh, against closed forms and measured signals."""

import copy
import io
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isograd import _changes as changes
from isograd.frameworks.torch import Applier, initialize
from isograd.frameworks.torch._initialization import critical_variances

APPLIED = []


@pytest.fixture(autouse=True)
def seeded():
    """What a test has applied is undone when it is over: weights stay drawn, nothing goes on listening."""
    torch.manual_seed(0)
    yield
    while APPLIED:
        APPLIED.pop().undo()


@contextmanager
def treated(*wanted):
    """A program in which these changes are applied; yields (undo, refusals)."""
    refusals = []
    applier = Applier(wanted, on_event=lambda kind, data: None, on_refusal=refusals.append)
    APPLIED.append(applier)
    applier.listen()
    try:
        yield applier.undo, refusals
    finally:
        applier.stop()


def plain(depth, width, activation):
    return nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(width, width), activation())], nn.Linear(width, 4)
    )


def gradient_ratio(model, width, rows=64):
    """Gradient norm of the signal at the first layer over that at the last hidden one, for random cotangents."""
    hidden = [m for m in model if isinstance(m, nn.Linear)]
    signals = {}

    def watch(name, out):
        out.register_hook(lambda g: signals.update({name: g}))

    for name, layer in (("first", hidden[0]), ("last", hidden[-2])):
        layer.register_forward_hook(lambda m, a, out, name=name: watch(name, out))
    out = model(torch.randn(rows, width))
    out.backward(torch.randn_like(out))
    return float(signals["first"].norm() / signals["last"].norm())


def reinitialized(model, method):
    with treated(changes.ReinitializeLayers(method=method)) as (_, refusals):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        assert refusals == []
    return optimizer


@pytest.mark.parametrize("method, variance", [("xavier", 2 / (300 + 200)), ("kaiming", 2 / 300)])
def test_weights_have_the_methods_variance_and_biases_are_zero(method, variance):
    """Glorot: 2 / (fan_in + fan_out); He in front of a rectifier: 2 / fan_in."""
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2))
    reinitialized(model, method)
    # the standard error of a variance over n = 60000 entries is sqrt(2 / n) = 0.6 %
    assert pytest.approx(variance, rel=0.03) == float(model[0].weight.detach().var())
    assert not model[0].bias.any()


@pytest.mark.parametrize(
    "activation, gain",
    [(nn.ReLU, 2.0), (nn.GELU, 2.0), (nn.Tanh, 1.0), (nn.Sigmoid, 1.0), (nn.SELU, 1.0)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_gain_is_that_of_the_activation_behind_the_layer(activation, gain):
    """sqrt(2) in front of rectifiers, 1 in front of the others (SELU keeps a variance of 1 so) and of the output."""
    model = nn.Sequential(nn.Linear(300, 300), activation(), nn.Linear(300, 300))
    reinitialized(model, "kaiming")
    assert pytest.approx(gain / 300, rel=0.03) == float(model[0].weight.detach().var())
    assert pytest.approx(1 / 300, rel=0.03) == float(model[2].weight.detach().var())


def test_the_gain_of_a_function_call_is_read_from_the_models_code():
    """`F.relu` in `forward` is no module; the code names it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(300, 300), nn.Linear(300, 2)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    model = Net()
    reinitialized(model, "kaiming")
    assert pytest.approx(2 / 300, rel=0.03) == float(model.first.weight.detach().var())


def test_orthogonal_weights_keep_lengths():
    """W W^T = I in front of tanh, 2 I in front of ReLU."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    reinitialized(model, "orthogonal")
    first, second = model[0].weight.detach(), model[2].weight.detach()
    torch.testing.assert_close(torch.eye(40), first @ first.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(2 * torch.eye(40), second @ second.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind, expected",
    [("gelu", (1.98306, 0.17292)), ("silu", (1.98800, 0.55514)), ("relu", (2.0, 0.0)), ("tanh", (1.0, 0.0))],
)
def test_critical_variances_are_the_published_ones(kind, expected):
    """Roberts, Yaida & Hanin 2022, section 5.3.4."""
    assert pytest.approx(expected, abs=2e-4) == critical_variances(kind)


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU])
def test_critical_weights_carry_a_gradient_through_sixty_layers(activation):
    """Kaiming loses three decades and more there; at the critical point the ratio stays within one decade."""
    ratios = {}
    for method in ("kaiming", "critical"):
        model = plain(60, 128, activation)
        reinitialized(model, method)
        ratios[method] = gradient_ratio(model, 128)
    assert ratios["kaiming"] < 1e-2
    assert 0.1 < ratios["critical"] < 10


def test_every_layer_has_unit_variance_after_the_first_batch():
    """LSUV: within its tolerance of 0.1, in the first forward pass, whose own result is already the final one."""
    model = plain(8, 50, nn.GELU)
    x = torch.randn(64, 50)
    with treated(changes.ReinitializeLayers(method="lsuv")):
        torch.optim.SGD(model.parameters(), lr=0.0)
        first = model(x)
        first.sum().backward()
        second = model(x)
    assert torch.equal(first, second)
    spreads, h = [], x
    for layer in model:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            spreads.append(float(h.detach().std()))
    assert all(0.9 < spread < 1.1 for spread in spreads)
    assert all("forward" not in vars(layer) for layer in model)


def test_a_forward_pass_of_a_layers_own_is_scaled_as_well_and_stays():
    """What a program has put in the place of one layer's `forward` is called while LSUV waits, and afterwards."""
    model = plain(2, 50, nn.GELU)
    calls = []

    def own(x):
        calls.append(1)
        return 3 * F.linear(x, model[2].weight, model[2].bias)

    model[2].forward = own
    initialize(model, "lsuv")
    model(torch.randn(64, 50))
    assert calls
    assert model[2].forward is own
    assert 0.9 < float(model[:3](torch.randn(256, 50)).detach().std()) < 1.1


class Block(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        h = x
        for layer in self.layers:
            h = layer(torch.relu(h))
        return x + h


@pytest.mark.parametrize("layers", [2, 3])
def test_fixup_starts_residual_branches_at_zero_and_scales_the_rest(layers):
    """L^(-1 / (2 m - 2)) times He's standard deviation; the last layer of a branch and the classifier are zero."""
    model = nn.Sequential(nn.Linear(8, 100), *[Block(100, layers) for _ in range(4)], nn.Linear(100, 3))
    with torch.no_grad():
        for bias in (p for p in model.parameters() if p.dim() == 1):
            bias.zero_()
    reinitialized(model, "fixup")
    for block in list(model)[1:-1]:
        assert not block.layers[-1].weight.any()
        expected = math.sqrt(2 / 100) * 4 ** (-1 / (2 * layers - 2))
        assert pytest.approx(expected, rel=0.05) == float(block.layers[0].weight.detach().std())
    assert not model(torch.randn(2, 8)).any()


def test_fixup_draws_only_the_layers_that_are_named():
    """Branches of other layers, and the classifier, keep their bits."""
    model = nn.Sequential(*[Block(10, 2) for _ in range(3)], nn.Linear(10, 3))
    before = [p.detach().clone() for p in model.parameters()]
    change = changes.ReinitializeLayers(method="fixup", layers=("1.layers.0", "1.layers.1"))
    with treated(change) as (_, refusals):
        torch.optim.SGD(model.parameters(), lr=0.0)
    drawn = [name for (name, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)]
    assert ["1.layers.0.weight", "1.layers.0.bias", "1.layers.1.weight", "1.layers.1.bias"] == drawn
    assert refusals == []


# ---- recurrent layers -------------------------------------------------------------------------------------------


def test_the_two_forget_biases_of_an_lstm_add_up_to_one():
    """Gers et al. 2000, with torch's two biases."""
    model = nn.LSTM(3, 5, num_layers=2)
    reinitialized(model, "forget-bias")
    for number in range(2):
        total = (getattr(model, f"bias_ih_l{number}") + getattr(model, f"bias_hh_l{number}")).detach()
        torch.testing.assert_close(torch.ones(5), total[5:10])


def test_chrono_biases_span_the_length_of_the_first_batch():
    """b_forget is in [0, log(T - 1)], spread over it as log U[1, T - 1] is, and b_input its opposite."""
    model = nn.LSTM(3, 400, batch_first=True)
    with treated(changes.ReinitializeLayers(method="chrono")):
        torch.optim.SGD(model.parameters(), lr=0.0)
        model(torch.randn(2, 100, 3))
    total = (model.bias_ih_l0 + model.bias_hh_l0).detach()
    forget = total[400:800]
    assert 0 <= float(forget.min())
    assert float(forget.max()) <= math.log(99)
    # E[log U] on [1, b] is b log b / (b - 1) - 1; its standard deviation is below 1: 400 draws give 0.05
    assert pytest.approx(99 * math.log(99) / 98 - 1, abs=0.2) == float(forget.mean())
    torch.testing.assert_close(-forget, total[:400])


def test_chrono_biases_of_a_gru_hold_the_update_gate_open():
    """The update gate of torch's GRU keeps the state: its bias is log U[1, T - 1]."""
    model = nn.GRU(3, 50)
    with treated(changes.ReinitializeLayers(method="chrono")):
        torch.optim.SGD(model.parameters(), lr=0.0)
        model(torch.randn(30, 2, 3))
    total = (model.bias_ih_l0 + model.bias_hh_l0).detach()
    assert float(total[50:100].min()) >= 0
    assert float(total[50:100].max()) <= math.log(29)


def test_identity_recurrence_carries_the_state():
    """W_hh = I and no bias (Le et al. 2015)."""
    model = nn.RNN(3, 6, nonlinearity="relu")
    reinitialized(model, "identity-recurrence")
    assert torch.equal(torch.eye(6), model.weight_hh_l0)
    assert not (model.bias_ih_l0.any() or model.bias_hh_l0.any())


@pytest.mark.parametrize(
    "cls, gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)], ids=lambda v: getattr(v, "__name__", "")
)
def test_every_gates_recurrent_matrix_is_orthogonal(cls, gates):
    """In models with recurrence, those matrices are what is applied again and again."""
    model = nn.ModuleDict({"rnn": cls(3, 6), "head": nn.Linear(6, 2)})
    head = model["head"].weight.detach().clone()
    reinitialized(model, "orthogonal")
    for matrix in model["rnn"].weight_hh_l0.detach().chunk(gates):
        torch.testing.assert_close(torch.eye(6), matrix @ matrix.T, atol=1e-5, rtol=0)
    assert torch.equal(head, model["head"].weight)
    biases = [b for name, b in model["rnn"].named_parameters() if name.startswith("bias")]
    assert (cls is nn.RNN) == (not any(bias.any() for bias in biases))  # gates keep the biases that they were given


def test_gates_of_a_projected_state_are_drawn_gate_by_gate():
    """With a projection from 6 units to 3 each gate is [6, 3], with orthonormal columns."""
    model = nn.LSTM(4, 6, proj_size=3)
    reinitialized(model, "orthogonal")
    for matrix in model.weight_hh_l0.detach().split(6):
        torch.testing.assert_close(torch.eye(3), matrix.T @ matrix, atol=1e-5, rtol=0)


class Adapter(nn.Module):
    """A low-rank product of the program's own, a constant scale and a random table."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(4, 20)), nn.Parameter(torch.ones(64, 4))
        self.scale, self.table = nn.Parameter(torch.ones(64)), nn.Parameter(torch.randn(8, 20))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


@pytest.mark.parametrize("held", [True, False], ids=["module", "loose"])
def test_matrices_of_one_value_are_drawn_wherever_they_are(held):
    """Outside of torch's layers matrices of equal entries get Glorot's variance, and undo puts them back."""
    adapter = Adapter()
    tensors = (
        list(adapter.parameters())
        if held
        else [p.detach().requires_grad_(p.requires_grad) for p in adapter.parameters()]
    )
    before = [t.detach().clone() for t in tensors]
    with treated(changes.ReinitializeLayers(method="kaiming")) as (undo, refusals):
        torch.optim.SGD([t for t in tensors if t.requires_grad], lr=0.1)
        assert [False, False, True, True, True] == [torch.equal(a, t) for a, t in zip(before, tensors, strict=True)]
        assert refusals == []
        # The variance of 80 and 256 uniform numbers has a standard error of at most 10 %.
        assert pytest.approx(2 / 24, rel=0.4) == float(tensors[0].detach().var())
        assert pytest.approx(2 / 68, rel=0.4) == float(tensors[1].detach().var())
        undo()
    assert all(torch.equal(a, t) for a, t in zip(before, tensors, strict=True))


def test_other_changes_to_a_model_are_refused_for_loose_tensors():
    """Without a module there is nothing to normalize, and the sentence says so."""
    loose = torch.zeros(4, 4, requires_grad=True)
    with treated(changes.InsertNormalization(kind="batch")) as (_, refusals):
        optimizer = torch.optim.SGD([loose], lr=0.1)
        loose.square().sum().backward()
        optimizer.step()
    assert ["The program trains loose tensors: there is no module to change."] == refusals


# ---- the program's own randomness -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kaiming", "orthogonal", "critical", "lsuv"])
def test_the_programs_random_numbers_are_those_of_the_untreated_run(method):
    """Data order and dropout are the same in both arms of a trial; and the weights are not the data's numbers."""
    numbers = []
    for wanted in ((), (changes.ReinitializeLayers(method=method),)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 2))
        with treated(*wanted):
            torch.optim.SGD(model.parameters(), lr=0.0)
            model(torch.ones(4, 6))
            numbers.append(torch.randn(5))
    assert torch.equal(*numbers)


def test_generators_of_devices_that_sleep_are_not_seeded(monkeypatch):
    """Seeding them would be kept until the program wakes them: its dropout there would not be the untreated run's."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = nn.Linear(4, 4)
    reinitialized(model, "kaiming")
    assert seeded == []


def test_the_same_seed_draws_the_same_weights_and_another_seed_others():
    """A trial can be repeated."""
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        reinitialized(model, "kaiming")
        drawn.append(model.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_weights_that_have_trained_since_cannot_be_put_back():
    """Undone before the first step the bits are the old ones; afterwards a sentence says that they are gone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    before = [p.detach().clone() for p in model.parameters()]
    with treated(changes.ReinitializeLayers(method="xavier")) as (undo, _):
        torch.optim.SGD(model.parameters(), lr=0.1)
        assert not torch.equal(before[0], model[0].weight)
        assert undo() == ()
        assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
    with treated(changes.ReinitializeLayers(method="xavier")) as (undo, _):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        (sentence,) = undo()
        assert "gone" in sentence


def test_a_model_can_be_initialized_without_a_run():
    """`initialize(model, "critical")` is the code that a user would paste."""
    model = plain(2, 200, nn.GELU)
    initialize(model, "critical")
    weights, biases = critical_variances("gelu")
    assert pytest.approx(weights / 200, rel=0.05) == float(model[0].weight.detach().var())
    assert pytest.approx(biases, rel=0.4) == float(model[0].bias.detach().var())


@pytest.mark.parametrize("method", ["kaiming", "lsuv"])
def test_a_model_that_was_initialized_holds_nothing_of_ours_after_its_first_batch(method):
    """No hook stays, and no attribute."""
    model = plain(2, 8, nn.Tanh)
    before = [sorted(vars(module)) for module in model.modules()]
    initialize(model, method)
    model(torch.randn(4, 8))
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_method_that_does_not_fit_leaves_the_model_as_it_was():
    """No hook stays where there is nothing recurrent."""
    model = plain(2, 8, nn.Tanh)
    with pytest.raises(changes.CannotApply, match="recurrent"):
        initialize(model, "chrono")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_made_before_the_first_batch_is_a_model_of_its_own():
    """It computes with its own weights, and its pickle holds nothing of ours."""
    model = plain(2, 8, nn.Tanh)
    x = torch.randn(64, 8)
    with treated(changes.ReinitializeLayers(method="lsuv")):
        torch.optim.SGD(model.parameters(), lr=0.0)
        twin = copy.deepcopy(model).eval()
        drawn = twin(x)
        model(x)
        assert torch.equal(drawn, twin(x))
        buffer = io.BytesIO()
        torch.save(twin, buffer)
    buffer.seek(0)
    assert b"isograd" not in buffer.getvalue()
    assert torch.equal(drawn, torch.load(buffer, weights_only=False)(x))
