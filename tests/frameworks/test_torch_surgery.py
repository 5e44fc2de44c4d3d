"""What surgery makes of real models, against the same models written out by hand."""

import copy
import io
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import mse_loss as imported_loss
from torch.nn.functional import relu as imported_relu

import isograd
from isograd import _changes as changes
from isograd.frameworks.torch import Applier
from isograd.remedies.insert_normalization import InsertNormalization
from isograd.remedies.replace_activations import ReplaceActivations


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextmanager
def treated(*wanted):
    """A program in which these changes are applied; yields (undo, refusals)."""
    refusals = []
    applier = Applier(wanted, on_event=lambda kind, data: None, on_refusal=refusals.append)
    applier.listen()
    applier.listen_last()
    try:
        yield applier.undo, refusals
    finally:
        applier.undo()


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, x=X, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


class Functional(nn.Module):
    """Activations are functions; the output has one, too."""

    def __init__(self, activation=torch.sigmoid, output=None):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.activation, self.output = activation, output

    def forward(self, x):
        h = self.activation(self.second(self.activation(self.first(x))))
        return self.last(h) if self.output is None else self.output(self.last(h))


class Shared(nn.Module):
    """One activation module, registered last, for hidden layers and the output."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(6, 6), nn.Linear(6, 2), nn.Sigmoid()

    def forward(self, x):
        return self.act(self.last(self.act(self.first(x))))


# ---- activations ------------------------------------------------------------------------------------------------

WAYS = {
    "torch.sigmoid": torch.sigmoid,
    "method": lambda x: x.sigmoid(),
    "functional": F.sigmoid,
    "looked-up": lambda x: torch.sigmoid(x),  # noqa: PLW0108
}


@pytest.mark.parametrize("way", WAYS)
def test_function_calls_in_forward_are_replaced_however_they_are_made(way):
    """The treated model computes what the same model with the other function computes."""
    model = Functional(WAYS[way])
    twin = Functional(F.gelu)
    twin.load_state_dict(model.state_dict())
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="gelu")) as (undo, refusals):
        sgd(model)
        assert torch.equal(twin(X), model(X))
        assert refusals == []
        undo()
        twin.activation = torch.sigmoid
        assert torch.equal(twin(X), model(X))


def in_statement(act):
    """A function that writes into its argument, called for that alone."""

    def activation(x):
        act(x)
        return x

    return activation


IN_PLACE = {
    "method": in_statement(lambda x: x.relu_()),
    "torch": in_statement(lambda x: torch.relu_(x)),  # noqa: PLW0108
    "functional": in_statement(lambda x: F.relu(x, inplace=True)),
    "positional": in_statement(lambda x: F.relu(x, True)),
    "keyword": in_statement(lambda x: F.relu(input=x, inplace=True)),
    "result": lambda x: F.relu(x, inplace=True),
}


@pytest.mark.parametrize("way", IN_PLACE)
def test_activations_in_place_stay_in_place(way):
    """Where the program goes on with the argument it goes on with the other activation's result, and its gradient."""
    model, twin = Functional(IN_PLACE[way]), Functional(F.gelu)
    twin.load_state_dict(model.state_dict())
    with treated(changes.ReplaceActivations(sources=("relu",), target="gelu")) as (_, refusals):
        train(model, sgd(model))
        assert refusals == []
        answer = model(X)
    train(twin, sgd(twin))
    torch.testing.assert_close(twin(X), answer)
    torch.testing.assert_close(twin.first.weight.grad, model.first.weight.grad)


@pytest.mark.parametrize("way", IN_PLACE)
def test_shortcuts_lead_around_activations_in_place(way):
    """x + relu(f(x)), also where relu writes into its argument."""
    model = Functional(IN_PLACE[way])
    with treated(changes.InsertShortcuts(kind="residual")):
        train(model, sgd(model, lr=0.0))
        answer = model(X)
    h = X + torch.relu(model.first(X))
    torch.testing.assert_close(model.last(h + torch.relu(model.second(h))), answer)


def test_a_function_that_the_program_has_imported_by_name_is_replaced():
    """`from torch.nn.functional import relu` left the function itself in the program's module."""

    class Imported(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(imported_relu(self.first(x)))

    model = Imported()
    with treated(changes.ReplaceActivations(sources=("relu",), target="tanh")):
        sgd(model)
        assert torch.equal(model.last(torch.tanh(model.first(X))), model(X))
    assert imported_relu is F.relu


@pytest.mark.parametrize(
    "output", [torch.sigmoid, lambda x: x.sigmoid(), nn.Sigmoid()], ids=["function", "method", "module"]
)
def test_the_outputs_own_activation_stays(output):
    """Hidden sigmoids become GELU; the one behind the last layer is the model's answer."""
    model = Functional(torch.sigmoid, output)
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="gelu")):
        sgd(model)
        answer = model(X)
    hidden = F.gelu(model.second(F.gelu(model.first(X))))
    assert torch.equal(torch.sigmoid(model.last(hidden)), answer)


def test_where_only_the_output_has_such_an_activation_nothing_is_replaced_and_that_is_said():
    """The module is an attribute: that it stands behind the last layer only the forward pass shows."""
    model = Functional(torch.relu, nn.Sigmoid())
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="gelu")) as (_, refusals):
        train(model, sgd(model))
        assert "No hidden activation of the kind sigmoid" in refusals[0]
        assert type(model.output) is nn.Sigmoid


def test_modules_in_a_sequence_become_others_in_place_but_for_the_outputs():
    """Names, state and references stay; types and results are the target's."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2), nn.Sigmoid())
    before = model[1]
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="leaky-relu")) as (undo, _):
        sgd(model)
        assert [nn.Linear, nn.LeakyReLU, nn.Linear, nn.Sigmoid] == [type(m) for m in model]
        assert model[1] is before
        assert torch.equal(torch.sigmoid(model[2](F.leaky_relu(model[0](X)))), model(X))
        undo()
        assert type(model[1]) is nn.Sigmoid
        assert vars(nn.Sigmoid()).keys() == vars(model[1]).keys()


def test_a_module_shared_by_hidden_layers_and_output_is_decided_call_by_call():
    """Behind the last layer it is still a sigmoid, before it a GELU; also in copies, and none of it in pickles."""
    model = Shared()
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="gelu")):
        sgd(model)
        assert isinstance(model.act, nn.GELU)
        twin = copy.deepcopy(model)
        answers = [model(X), twin(X), model(X), twin(X)]
        buffer = io.BytesIO()
        torch.save(model, buffer)
    expected = torch.sigmoid(model.last(F.gelu(model.first(X))))
    assert all(torch.equal(expected, answer) for answer in answers)
    assert b"isograd" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded.act) is nn.GELU
    assert torch.equal(F.gelu(model.last(F.gelu(model.first(X)))), loaded(X))


def test_a_plain_recurrent_network_learns_another_nonlinearity():
    """tanh becomes ReLU inside torch's own recurrence."""
    model = nn.RNN(6, 4, batch_first=True)
    twin = nn.RNN(6, 4, batch_first=True, nonlinearity="relu")
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 6)
    with treated(changes.ReplaceActivations(sources=("tanh",), target="relu")) as (undo, _):
        sgd(model)
        assert torch.equal(twin(x)[0], model(x)[0])
        undo()
        assert not torch.equal(twin(x)[0], model(x)[0])


def test_a_transformer_layer_keeps_its_activation_as_a_function_which_is_replaced_in_training_and_inference():
    """`TransformerEncoderLayer(activation="relu")` becomes the one with GELU."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="relu", batch_first=True)
    twin = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8)
    with treated(changes.ReplaceActivations(sources=("relu",), target="gelu")):
        sgd(model)
        torch.testing.assert_close(twin(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(twin.eval()(x), model.eval()(x))


def test_only_the_named_layers_are_replaced():
    """`layers` chooses modules by name, function calls by the layer before them."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    functional = Functional(torch.relu)
    change = changes.ReplaceActivations(sources=("relu",), target="tanh", layers=("3", "second.relu"))
    with treated(change):
        sgd(model)
        sgd(functional)
        assert [nn.ReLU, nn.Tanh] == [type(model[1]), type(model[3])]
        answer = functional(X)
    expected = functional.last(torch.tanh(functional.second(torch.relu(functional.first(X)))))
    assert torch.equal(expected, answer)


def test_functions_outside_of_the_model_are_left_alone():
    """The loop's own sigmoid of something else is no activation of the model."""
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="relu")):
        model = Functional()
        sgd(model)
        model(X)
        assert float(torch.sigmoid(torch.tensor(-1.0))) == pytest.approx(0.2689414)


def test_a_checkpointed_model_is_replaced_in_the_recomputation_as_well():
    """What checkpointing computes again in the backward pass is the treated model: gradients are the twin's."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Functional):
        def forward(self, x):
            h = checkpoint(lambda v: self.activation(self.first(v)), x, use_reentrant=False)
            return self.last(self.activation(self.second(h)))

    model, twin = Checkpointed(torch.sigmoid), Functional(F.gelu)
    twin.load_state_dict(model.state_dict())
    with treated(changes.ReplaceActivations(sources=("sigmoid",), target="gelu")):
        sgd(model)
        model(X).sum().backward()
    twin(X).sum().backward()
    torch.testing.assert_close(twin.first.weight.grad, model.first.weight.grad)


# ---- the output's activation ------------------------------------------------------------------------------------

SOFTMAXES = {
    "sequence": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2), nn.Softmax(dim=1)),
    "attribute": lambda: Functional(torch.tanh, nn.Softmax(dim=1)),
    "function": lambda: Functional(torch.tanh, lambda x: F.softmax(x, dim=1)),
    "method": lambda: Functional(torch.tanh, lambda x: x.softmax(1)),
}


@pytest.mark.parametrize("way", SOFTMAXES)
def test_the_outputs_activation_is_passed_through(way):
    """The answer is what the last layer with weights returns; undone, it is a softmax again."""
    model = SOFTMAXES[way]()
    last = linears(model)[-1]
    returned = []
    with treated(changes.RemoveOutputActivation(kind="softmax")) as (undo, refusals):
        optimizer = sgd(model)
        handle = last.register_forward_hook(lambda m, a, out: returned.append(out))
        train(model, optimizer)
        assert torch.equal(returned[-1], model(X)) or torch.equal(returned[-1], returned[-1])
        answer = model(X)
        assert torch.equal(returned[-1], answer)
        assert refusals == []
        undo()
        handle.remove()
        torch.testing.assert_close(model(X).sum(1), torch.ones(12))


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.squeeze(1)], ids=["as-is", "squeezed"])
def test_an_activation_that_the_loop_calls_on_the_answer_is_passed_through(shape):
    """`sigmoid(model(x))` before a loss that applies it again."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    with treated(changes.RemoveOutputActivation(kind="sigmoid")):
        sgd(model)
        answer = shape(model(X))
        assert torch.sigmoid(answer) is answer
        assert float(torch.sigmoid(torch.zeros(()))) == 0.5


def test_hidden_activations_of_the_same_kind_stay():
    """Only what is behind the last layer with weights is removed."""
    model = Shared()
    with treated(changes.RemoveOutputActivation(kind="sigmoid")):
        sgd(model)
        assert torch.equal(model.last(torch.sigmoid(model.first(X))), model(X))


# ---- normalization ----------------------------------------------------------------------------------------------


def tower():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)
    )


NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "group": lambda n: nn.GroupNorm(2, n), "rms": nn.RMSNorm}


@pytest.mark.parametrize("kind", NORMS)
def test_normalization_stands_behind_every_hidden_layer_and_is_trained(kind):
    """Names of layers stay; the model computes what the one with the modules in place computes, step after step."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))
    twin = nn.Sequential(nn.Linear(6, 10), NORMS[kind](10), nn.Tanh(), nn.Linear(10, 2))
    twin[0].load_state_dict(model[0].state_dict())
    twin[3].load_state_dict(model[2].state_dict())
    with treated(changes.InsertNormalization(kind=kind)) as (undo, _):
        optimizer, other = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
        assert "0.normalization.weight" in model.state_dict()
        assert len(optimizer.param_groups) == 1
        train(model, optimizer, steps=3)
        train(twin, other, steps=3)
        torch.testing.assert_close(twin(X), model(X))
        undo()
    assert list(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)).state_dict()) == list(model.state_dict())
    assert [id(p) for p in model.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    "kind, norm",
    [
        ("batch", nn.BatchNorm2d),
        ("layer", lambda c: nn.GroupNorm(1, c)),
        ("group", lambda c: nn.GroupNorm(4, c)),
        ("rms", None),
    ],
)
def test_convolutions_are_normalized_over_their_channels(kind, norm):
    """Axis 1 of what a convolution returns."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    raw = model[0](IMAGES).detach()
    seen = []
    with treated(changes.InsertNormalization(kind=kind)):
        sgd(model)
        model[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
        model(IMAGES)
    eps = torch.finfo(torch.float32).eps
    expected = raw / (raw.square().mean(1, keepdim=True) + eps).sqrt() if norm is None else norm(4)(raw).detach()
    torch.testing.assert_close(expected, seen[0])


@pytest.mark.parametrize(
    ("remedy", "make", "x"),
    [
        *[(InsertNormalization(kind=kind), tower, X) for kind in NORMS],
        *[(InsertNormalization(kind=kind), tower, X.reshape(3, 4, 6)) for kind in NORMS],
        *[(InsertNormalization(kind=kind), convolutional, IMAGES) for kind in ("batch", "layer", "group")],
        *[(ReplaceActivations(target=target), tower, X) for target in ("relu", "leaky-relu", "gelu")],
    ],
)
def test_the_code_to_paste_does_what_the_treatment_does(remedy, make, x, tmp_path):
    """A model edited by the printed code computes what the treated one computes, with parameters of the same count."""
    with isograd.watch(model := make(), optimizer := sgd(model), out=tmp_path, every=1) as run:
        train(model, optimizer, x=x)
    (history,) = run.histories()
    torch.manual_seed(0)
    pasted = make()
    exec(remedy.code(history), {"model": pasted, "torch": torch})  # what a user does
    with treated(*remedy.changes(history)):
        torch.manual_seed(0)
        model = make()
        optimizer = sgd(model)
        treated_result = model(x)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(pasted.parameters()))
    torch.testing.assert_close(treated_result, pasted(x))
    assert not torch.equal(make()(x), pasted(x))


def test_layers_that_are_normalized_already_are_left_alone():
    """A convolution with batch normalization behind it gets no second one; where all have one it is refused."""
    mixed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    whole = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with treated(changes.InsertNormalization(kind="layer")):
        sgd(mixed)
        assert not hasattr(mixed[0], "normalization")
        assert hasattr(mixed[3], "normalization")
    with treated(changes.InsertNormalization(kind="layer")) as (_, refusals):
        train(whole, sgd(whole))
        assert "already" in refusals[0]


def test_a_sequence_of_vectors_is_normalized_per_vector():
    """A linear layer on (batch, time, features): batch normalization counts every vector as a sample."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 5, 6)
    expected = nn.BatchNorm1d(4)(model[0](x).reshape(15, 4)).reshape(3, 5, 4)
    with treated(changes.InsertNormalization(kind="batch")):
        sgd(model)
        torch.testing.assert_close(model[2](torch.tanh(expected)), model(x))


def test_inserted_parameters_are_trained_by_an_optimizer_with_state_from_its_start(tmp_path):
    """Adagrad makes its state when it is constructed; live insertion gives the new parameters theirs."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.Adagrad(model.parameters())
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        train(model, optimizer)
        run.apply(changes.InsertNormalization(kind="layer"))
        before = model[0].normalization.weight.detach().clone()
        train(model, optimizer, steps=2)
    assert not torch.equal(before, model[0].normalization.weight)


def test_a_copy_of_the_model_uses_its_own_normalization():
    """An average of weights is a deep copy: it must not run through the original's layers."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    with treated(changes.InsertNormalization(kind="layer")):
        sgd(model)
        twin = copy.deepcopy(model)
        expected = model(X).detach()
        with torch.no_grad():
            twin[0].normalization.weight.zero_()
        assert torch.equal(expected, model(X))
        assert not torch.equal(expected, twin(X))


# ---- shortcuts --------------------------------------------------------------------------------------------------


def deep(activation=nn.Tanh, norm=nn.Identity):
    blocks = [m for _ in range(3) for m in (nn.Linear(6, 6), norm(6), activation())]
    return nn.Sequential(*blocks, nn.Linear(6, 2))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_residual_shortcuts_lead_around_layer_normalization_and_activation(norm):
    """x + f(x) for each block of equal shape."""
    model = deep(norm=norm)
    with treated(changes.InsertShortcuts(kind="residual")) as (undo, refusals):
        train(model, sgd(model, lr=0.0))
        model.eval()
        answer = model(X)
        assert refusals == []
        undo()
    h = X
    for i in range(0, 9, 3):
        h = h + model[i + 2](model[i + 1](model[i](h)))
    torch.testing.assert_close(model[9](h), answer)
    assert torch.equal(nn.Sequential(*model)(X), model(X))


def test_function_calls_end_a_block_as_modules_do():
    """`tanh(self.second(h))` gets its shortcut behind the function."""
    model = Functional(torch.tanh)
    with treated(changes.InsertShortcuts(kind="residual")):
        sgd(model)
        answer = model(X)
    h = X + torch.tanh(model.first(X))
    h = h + torch.tanh(model.second(h))
    torch.testing.assert_close(model.last(h), answer)


def test_rezero_begins_as_the_identity_and_learns_its_scales():
    """x + a f(x) with a = 0, trained in the group of the layer's weight."""
    model = deep(norm=nn.LayerNorm)
    with treated(changes.InsertShortcuts(kind="rezero")) as (undo, _):
        optimizer = sgd(model)
        torch.testing.assert_close(model[9](X), model(X))
        train(model, optimizer)
        scales = [model[i].shortcut_scale for i in (0, 3, 6)]
        assert all(float(scale.detach()) != 0 for scale in scales)
        undo()
    assert not any("shortcut_scale" in name for name in model.state_dict())
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_shortcuts_join_what_keeps_its_shape_only():
    """A convolution with stride or other channels has none, one with equal channels and padding has."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    with treated(changes.InsertShortcuts(kind="residual")):
        sgd(model)
        answer = model(IMAGES)
    h = torch.relu(model[0](IMAGES))
    h = h + torch.relu(model[2](h))
    torch.testing.assert_close(nn.Sequential(*list(model)[4:])(h), answer)


def test_gradients_no_longer_vanish_through_shortcuts():
    """Twenty sigmoid layers lose every digit of the gradient; with shortcuts the first layer hears of the loss."""
    model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(6, 6), nn.Sigmoid())], nn.Linear(6, 1))
    norms = []
    for wanted in ((), (changes.InsertShortcuts(kind="residual"),)):
        with treated(*wanted):
            sgd(model)
            model.zero_grad()
            model(X).sum().backward()
            norms.append(float(model[0].weight.grad.norm()))
    assert norms[0] < 1e-8
    assert norms[1] > 1e-2


def test_changes_of_a_model_work_together():
    """GELU in place of sigmoid, normalization behind layers and shortcuts around both."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2))
    wanted = (
        changes.InsertShortcuts(kind="residual"),
        changes.InsertNormalization(kind="layer"),
        changes.ReplaceActivations(sources=("sigmoid",), target="gelu"),
    )
    with treated(*wanted):
        sgd(model)
        first = nn.Linear(6, 6)
        first.load_state_dict({k: v for k, v in model[0].state_dict().items() if k in ("weight", "bias")})
        torch.testing.assert_close(model[2](X + F.gelu(nn.LayerNorm(6)(first(X)))), model(X))


# ---- data -------------------------------------------------------------------------------------------------------


def test_inputs_are_standardized_with_the_first_batches_and_then_no_further():
    """Per column (x - mean) / std of all rows of the first batches; constant columns are only centered."""
    model = nn.Linear(3, 1)
    seen = []
    batches = [torch.randn(32, 3) * torch.tensor([100.0, 1e-3, 0.0]) + torch.tensor([5.0, 2.0, 7.0]) for _ in range(4)]
    with treated(changes.StandardizeInputs(batches=3)):
        optimizer = sgd(model, lr=0.0)
        model.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        for x in batches:
            train(model, optimizer, x)
    rows = torch.cat(batches[:3]).double()
    std = rows.std(0, correction=0)
    std[2] = 1.0
    torch.testing.assert_close(((batches[3] - rows.mean(0)) / std).float(), seen[3], rtol=1e-3, atol=1e-3)


def test_images_are_standardized_per_channel_and_integers_not_at_all():
    """Channels are features; token ids are names."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 1))
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
    seen = []
    images = IMAGES * torch.tensor([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1) + 50
    with treated(changes.StandardizeInputs()) as (_, refusals):
        sgd(model)
        sgd(tokens)
        model.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(images)
        tokens(torch.arange(5))
    assert refusals == []
    torch.testing.assert_close(torch.zeros(3), seen[0].mean((0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.ones(3), seen[0].std((0, 2, 3), correction=0))


REGRESSION_LOSSES = {
    "functional": lambda p, y: F.mse_loss(p, y),  # noqa: PLW0108  # looked up at the call
    "imported": lambda p, y: imported_loss(p, y),  # noqa: PLW0108
    "keywords": lambda p, y: F.mse_loss(target=y, input=p),
    "squared": lambda p, y: ((y - p) ** 2).mean(),
    "reshaped": lambda p, y: F.mse_loss(p.squeeze(1), y.squeeze(1)),
    "module": nn.MSELoss(),
}


@pytest.mark.parametrize("loss", REGRESSION_LOSSES.values(), ids=REGRESSION_LOSSES)
def test_standardized_targets_train_the_network_of_standardized_targets(loss):
    """Same weights as a program that standardizes its targets, while the loss is still in the program's units."""
    model, twin = nn.Linear(6, 1), nn.Linear(6, 1)
    twin.load_state_dict(model.state_dict())
    y = X.sum(1, keepdim=True) * 1000 + 5000
    z = (y - y.mean()) / y.std(correction=0)
    losses = []
    other = sgd(twin)
    with treated(changes.StandardizeTargets(batches=1)) as (_, refusals):
        optimizer = sgd(model)
        for _ in range(5):
            optimizer.zero_grad()
            found = loss(model(X), y)
            found.backward()
            optimizer.step()
            other.zero_grad()
            plain = F.mse_loss(twin(X), z)
            plain.backward()
            other.step()
            losses.append(found.item() / plain.item() / float(y.var(correction=0)))
    assert refusals == []
    torch.testing.assert_close(twin.weight, model.weight)
    assert pytest.approx([1.0] * 5, rel=1e-3) == losses


def test_the_targets_of_another_model_are_its_own():
    """A second model's loss, computed between the first one's, has no part in what the first one's targets are."""
    model, other = nn.Linear(6, 1), nn.Linear(6, 1)
    y = X.sum(1, keepdim=True) * 10 + 50
    with treated(changes.StandardizeTargets(batches=3)):
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(X), y).backward()
            F.mse_loss(other(X), -1e6 * torch.ones(12, 1)).backward()
            optimizer.step()
        with torch.no_grad():
            answer = model(X)
    torch.testing.assert_close(answer, model(X) * y.std(correction=0) + y.mean())


def test_standardized_targets_of_an_absolute_error():
    """The gradient of an absolute error has no scale: that of the standardized problem is the same sign."""
    model, twin = nn.Linear(6, 1), nn.Linear(6, 1)
    twin.load_state_dict(model.state_dict())
    y = X.sum(1, keepdim=True) * 1000 + 5000
    z = (y - y.mean()) / y.std(correction=0)
    with treated(changes.StandardizeTargets(batches=1)):
        sgd(model)
        F.l1_loss(model(X), y).backward()
    F.l1_loss(twin(X), z).backward()
    torch.testing.assert_close(twin.weight.grad, model.weight.grad)


def test_targets_learned_from_stay_out_of_evaluation():
    """Statistics are those of training batches; the answer in evaluation is in the targets' units."""
    model = nn.Linear(6, 1)
    y = X.sum(1, keepdim=True) * 10 + 500
    with treated(changes.StandardizeTargets()):
        optimizer = sgd(model)
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(model(X), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            assert float((model(X) - y).abs().mean()) < 1.0


# ---- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_and_inputs_are_held_and_computed_in_float32(dtype):
    """The same parameter objects, in float32, on inputs in float32."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    held = list(model.parameters())
    with treated(changes.RaisePrecision()) as (undo, _):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        before = held[0].detach().clone()
        train(model, optimizer, X.to(dtype))
        assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
        assert {torch.float32} == {p.dtype for p in held} | {model(X.to(dtype)).dtype}
        assert not torch.equal(before, held[0])
        undo()
        assert {dtype} == {p.dtype for p in held}
        model(X.to(dtype))


def test_autocast_is_off_inside_the_model():
    """Layers compute in float32 under the program's autocast; outside of the model it is as the program wants it."""
    model = nn.Linear(6, 4)
    with treated(changes.RaisePrecision()):
        sgd(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(X).dtype == torch.float32
            assert (X @ X.T).dtype == torch.bfloat16


# ---- what the run file says -------------------------------------------------------------------------------------


def test_the_observer_reads_the_changed_model(tmp_path):
    """Kinds of layers are the new ones, names the old ones; the inserted layer has a column of its own."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2))
    optimizer = sgd(model)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        train(model, optimizer)
        undo = run.apply(
            [
                changes.ReplaceActivations(sources=("sigmoid",), target="relu"),
                changes.InsertNormalization(kind="layer"),
                changes.InsertShortcuts(kind="residual"),
            ]
        )
        train(model, optimizer, steps=2)
    undo()
    (history,) = run.histories()
    kinds = {layer.name: layer.kind for layer in history.layers}
    assert kinds["1"] == "relu"
    assert kinds["0.normalization"] == "layer-norm"
    names = [layer.name for layer in history.layers]
    rms = history["output_rms"].values[-1]
    assert rms[names.index("0.normalization")] == pytest.approx(1.0, rel=1e-2)
    assert history["output_zero_fraction"].values[-1][names.index("1")] > 0.2  # the activation, not its sum with x
