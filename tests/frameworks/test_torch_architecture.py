"""What the graph of a loss says of an architecture: depth, shortcuts and normalizations of hand-made networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd._loss_graph import loss_graphs
from isograd._record import read_run
from isograd.frameworks.torch import _architecture as architecture
from isograd.frameworks.torch import _trace as trace


def facts_of(model, x=None):
    torch.manual_seed(0)
    out = model(torch.randn(2, 6, 8) if x is None else x)
    found = trace.read_graph(out.square().mean())
    return architecture.facts(found.edges, found.names)


class RMSNorm(nn.Module):
    """Root-mean-square normalization, written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerNorm(nn.Module):
    """Layer normalization, written out."""

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)


class Block(nn.Module):
    """A transformer block; `style`: where it normalizes."""

    def __init__(self, style, norm=nn.LayerNorm):
        super().__init__()
        self.style, self.first, self.second = style, norm(8), norm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.1))

    def attend(self, h):
        return self.attention(h, h, h, need_weights=False)[0]

    def forward(self, x):
        if self.style == "post":
            x = self.first(x + self.attend(x))
            return self.second(x + self.mlp(x))
        x = x + self.attend(self.first(x))
        return x + self.mlp(self.second(x))


def transformer(style, norm, blocks=3, final=()):
    return nn.Sequential(nn.Linear(8, 8), *[Block(style, norm) for _ in range(blocks)], *final, nn.Linear(8, 4))


NORMS = {"torch": nn.LayerNorm, "rms": nn.RMSNorm, "rms by hand": RMSNorm, "by hand": lambda width: LayerNorm()}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("style", ["pre", "post"])
def test_transformers(style, norm):
    """Every sub-layer has a shortcut; a post-norm block normalizes both of its sums, a pre-norm block none."""
    found = facts_of(transformer(style, norm))

    assert 6 == found["shortcuts"]
    assert 6 == found["norms"]
    assert (6 if style == "post" else 0) == found["post_norms"]
    # In every block: the projection of the values, that of the output, and the two of the MLP.
    assert 3 * 4 + 2 == found["products"]


def test_a_final_norm_reads_the_last_sum_alone():
    """The normalization behind the last pre-norm block counts among those that read a sum which nothing else reads."""
    assert 1 == facts_of(transformer("pre", nn.LayerNorm, final=[nn.LayerNorm(8)]))["post_norms"]


class Residual(nn.Module):
    """A block of a ResNet, with a projection where the number of channels changes."""

    def __init__(self, before, after):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after),
        )  # fmt: skip
        projection = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if before == after else projection

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def test_residual_network():
    """Identities and projections are both shortcuts; batch normalization inside the branches is no post-norm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(4, 4), Residual(4, 6), Residual(6, 6), nn.Flatten())
    found = facts_of(model, torch.randn(2, 3, 5, 5))

    assert {"products": 7, "shortcuts": 3, "norms": 7, "post_norms": 0}.items() <= found.items()


class Dense(nn.Module):
    """A block of a DenseNet: every layer reads all before it."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 + 4 * i, 4) for i in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], -1)
        return x


class Cells(nn.Module):
    """A recurrence over the first axis but one."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell(8, 8)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Parallel(nn.Module):
    """Branches of equal depth, added and multiplied."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.one(x) + self.other(x).exp() * torch.tanh(self.one(x))


def plain(depth):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())])


SHORTCUTS = {
    "plain": (lambda: plain(30), 30, 0),
    "plain, normalized": (lambda: nn.Sequential(*[nn.Sequential(plain(1), nn.LayerNorm(8)) for _ in range(5)]), 5, 0),
    "dense": (lambda: nn.Sequential(nn.Linear(8, 8), Dense()), 4, 3),
    "parallel branches": (lambda: nn.Sequential(nn.Linear(8, 8), Parallel()), 2, 0),
    "plain recurrence": (lambda: nn.Sequential(nn.Linear(8, 8), Cells(nn.RNNCell)), 7, 0),
}


@pytest.mark.parametrize("make, products, shortcuts", SHORTCUTS.values(), ids=SHORTCUTS)
def test_other_networks(make, products, shortcuts):
    """The longest chain of products with weights is the depth; only what skips some of them is a shortcut."""
    found = facts_of(make())

    assert (products, shortcuts, 0) == (found["products"], found["shortcuts"], found["post_norms"])


def test_gates_are_shortcuts():
    """An LSTM's cell state skips the products of its step."""
    assert facts_of(nn.Sequential(nn.Linear(8, 8), Cells(nn.LSTMCell)))["shortcuts"] >= 4


def test_products_of_activations_are_no_depth():
    """Attention multiplies activations with each other: only its projections count."""
    first, query, values = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def attend(x):
        h = first(x)
        return torch.softmax(query(h) @ h.mT, -1) @ values(h)

    assert 2 == facts_of(attend)["products"]


AVERAGE = torch.full((6, 6), 1 / 6)

MIXING = {
    # an adjacency matrix from the left, sparse or dense, and messages that are added up
    "dense": (lambda h: AVERAGE @ h, 1),
    "sparse": (lambda h: torch.sparse.mm(AVERAGE.to_sparse(), h), 1),
    "messages": (lambda h: torch.zeros(6, 8).index_add(0, torch.tensor([0, 1, 1]), h[:3]), 1),
    # scores and weighted sum
    "attention": (lambda h: torch.softmax(h @ h.T, -1) @ h, 2),
    "none": (lambda h: h, 0),
    # a fixed matrix on the right combines features, not rows
    "features": (lambda h: h @ torch.ones(8, 8), 0),
    "frozen layer": (nn.Linear(8, 8).requires_grad_(False), 0),
}


@pytest.mark.parametrize("mix, mixings", MIXING.values(), ids=MIXING)
def test_rows_that_meet(mix, mixings):
    """Products that combine rows are counted where an activation's rows meet, and are no depth."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(mix(torch.relu(self.first(x))))

    found = facts_of(Net(), torch.randn(6, 8))

    assert mixings == found["mixings"]
    if mixings:
        assert 2 == found["products"]


def test_a_graph_without_layers_has_no_architecture():
    """A loss of a single parameter has no depth."""
    loose = nn.Parameter(torch.ones(3))

    assert not any(facts_of(lambda x: loose * 2).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_know_the_type_of_their_output(tmp_path, dtype):
    """Modules, operations, inputs and what enters the loss have the type of the values that were read there."""
    model = nn.Linear(4, 3, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        F.mse_loss(torch.tanh(model(torch.randn(5, 4, dtype=dtype))), torch.zeros(5, 3, dtype=dtype)).backward()
        optimizer.step()
    (history,) = read_run(run.path).histories

    assert {"module", "operation", "input", "prediction", "target"} == {layer.role for layer in history.layers}
    assert {str(dtype).removeprefix("torch.")} == {layer.dtype for layer in history.layers}


def test_autocast_shows_in_the_type(tmp_path):
    """Under autocast a layer's output is in half precision, whatever its weights and its input are in."""
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(5, 4)).square().mean()
        loss.backward()
        optimizer.step()
    (history,) = read_run(run.path).histories

    found = {layer.name: layer.dtype for layer in history.layers}
    assert {"0.input": "float32", "0": "bfloat16"}.items() <= found.items()


def test_the_facts_are_recorded(tmp_path):
    """A run's loss graph holds what its graph says of the architecture."""
    model = transformer("post", nn.LayerNorm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        for _ in range(3):
            model(torch.randn(2, 6, 8)).square().mean().backward()
            optimizer.step()
    (history,) = read_run(run.path).histories
    (graph,) = loss_graphs(history)

    assert (14, 6, 6, 6) == (graph.products, graph.shortcuts, graph.norms, graph.post_norms)
