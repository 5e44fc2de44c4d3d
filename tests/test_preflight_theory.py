"""Published numbers of signal propagation and curvature, measured by a preflight of networks or predicted by it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import isograd
from isograd._theory import (
    batch_norm_factor,
    critical_point,
    edge_of_chaos,
    fixed_point,
    function_of,
    largest_of,
    pair,
    stable_sharpness,
)

torch.set_num_threads(1)

# The norm of the gradient changes by sqrt(chi) per layer of a plain network with PyTorch's default initialization,
# sigma_w^2 = 1/3 (He et al. 2015, Poole et al. 2016; quadrature): Kaiming-uniform with a = sqrt(5).
DEFAULT_FACTORS = [
    (nn.ReLU, 0.408), (nn.Tanh, 0.576), (nn.Sigmoid, 0.1414), (nn.GELU, 0.289), (nn.SiLU, 0.289),
]  # fmt: skip

# tanh, sigma_b^2 = 0.05: weight variance and chi at the fixed point (Schoenholz et al. 2017, figure 2).
TANH_PHASES = [(1.00, 0.7590), (1.50, 0.9386), (1.76095, 1.0), (2.50, 1.1335), (4.00, 1.3424)]

# Rows of the batch and the factor of the squared gradient norm per layer (Yang et al. 2019, theorem 8).
BATCH_NORM_RATES = [(nn.ReLU, 8, 1.788), (nn.ReLU, 32, 1.522), (nn.ReLU, 128, 1.480), (nn.Identity, 16, 1.077)]

# Gradient at the input of time step T/10 over that at T, T = 50, 100 units: Gers et al. 2000, Jozefowicz et al. 2015
# (forget bias), Tallec & Ollivier 2018 (chrono), Le et al. 2015 (identity), each recomputed.
THROUGH_TIME = [
    ("lstm", 1.4e-9), ("lstm with forget bias 1", 1.1e-3), ("lstm with chrono biases", 1.1e-1),
    ("orthogonal tanh", 2.0e-1), ("identity relu", 3.6e-1),
]  # fmt: skip


def plain(depth, width, activation, **linear):
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width, **linear), activation())])


def gaussian(model, weight_variance, bias_variance=0.0):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, math.sqrt(weight_variance / module.in_features))
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, math.sqrt(bias_variance))
    return model


def measured(model, *batch, **others):
    return isograd.preflight(model, batch=batch[0] if len(batch) == 1 else batch, sharpness=False, **others).preflight


def factor(layers, first, last):
    """The gradient norm's factor per layer between two layers, numbered from 1."""
    return (layers[first - 1].signal / layers[last - 1].signal) ** (1 / (last - first))


def mean_log(values):
    return math.exp(np.mean(np.log(values)))


@pytest.mark.parametrize("activation, expected", DEFAULT_FACTORS)
def test_plain_networks_lose_the_predicted_share_per_layer(activation, expected):
    """20 layers of 256 units with default weights: measured and predicted factors are the closed form's within 3 %."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(measured(plain(20, 256, activation), torch.randn(64, 256)))

    assert mean_log([factor(f.weighted, 5, 17) for f in found]) == pytest.approx(expected, rel=0.03)
    assert mean_log([factor(f.prediction.weighted, 5, 17) for f in found]) == pytest.approx(expected, rel=0.03)


def test_edge_of_chaos_of_tanh():
    """With bias variance 0.05 tanh networks are critical at a weight variance of 1.76095 (Schoenholz et al. 2017)."""
    critical = edge_of_chaos("tanh", 0.05)

    assert critical == pytest.approx(1.76095, abs=1e-4)
    assert fixed_point("tanh", weight_variance=critical, bias_variance=0.05) == pytest.approx(0.5700, abs=1e-4)


@pytest.mark.parametrize("variance, chi", TANH_PHASES)
def test_phases_of_tanh_networks(variance, chi):
    """Measured in 60 layers of 300 units, chi of tanh networks is that of the phase diagram within 2 %."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = gaussian(plain(60, 300, nn.Tanh), variance, 0.05)
        found.append(measured(model, torch.randn(32, 300)))

    assert mean_log([factor(f.weighted, 10, 50) ** 2 for f in found]) == pytest.approx(chi, rel=0.02)
    # Predicted from the weights as drawn, which vary by 1 / 300.
    assert mean_log([factor(f.prediction.weighted, 10, 50) ** 2 for f in found]) == pytest.approx(chi, rel=0.01)


@pytest.mark.parametrize("activation, batch, rate", BATCH_NORM_RATES)
def test_batch_normalization_makes_plain_networks_explode(activation, batch, rate):
    """In 40 normalized layers of 600 units the squared gradient norm grows by the theorem's rate within 2 %."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        layers = [(nn.Linear(600, 600, bias=False), nn.BatchNorm1d(600, eps=1e-12), activation()) for _ in range(40)]
        found.append(measured(nn.Sequential(*[m for layer in layers for m in layer]), torch.randn(batch, 600)))

    assert mean_log([factor(f.weighted, 5, 30) ** 2 for f in found]) == pytest.approx(rate, rel=0.02)
    assert mean_log([factor(f.prediction.weighted, 5, 30) ** 2 for f in found]) == pytest.approx(rate, rel=0.005)
    assert batch_norm_factor(batch, "relu" if activation is nn.ReLU else "identity") == pytest.approx(rate, rel=2e-3)


def at_the_edge(make_optimizer, steps, *, first):
    """The mean sharpness over the last part of a full-batch training, and the last curvature."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(500, 64, generator=draw)
    y = nn.functional.one_hot((x @ torch.randn(64, 10, generator=draw)).argmax(1), 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
    optimizer = make_optimizer(model.parameters())

    def loss_fn(output, target):
        return 0.5 * (output - target).square().sum() / len(target)

    found = []
    for step in range(steps):
        if step >= first and (step - first) % ((steps - first) // 3) == 0:
            found.append(isograd.preflight(model, loss_fn, (x, y), optimizer).preflight.curvature)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return float(np.mean([curvature.sharpness for curvature in found])), found[-1]


def test_gradient_descent_trains_at_the_edge_of_stability():
    """Full-batch gradient descent with rate 0.4 settles at a sharpness of 2 / 0.4 within 6 % (Cohen et al. 2021)."""
    sharpness, last = at_the_edge(lambda p: torch.optim.SGD(p, lr=0.4), 900, first=630)

    assert sharpness == pytest.approx(2 / 0.4, rel=0.06)
    assert last.stable_learning_rate == pytest.approx(0.4, rel=0.06)


def test_adam_trains_at_its_edge_of_stability():
    """Full-batch Adam settles at a preconditioned sharpness of 38 / rate within 4 % (Cohen et al. 2022)."""
    sharpness, last = at_the_edge(lambda p: torch.optim.Adam(p, lr=1e-3), 800, first=560)

    assert stable_sharpness("adam", momentum=0.9) == pytest.approx(38)
    assert sharpness == pytest.approx(38_000, rel=0.04)
    assert last.stable_learning_rate == pytest.approx(1e-3, rel=0.04)


@pytest.mark.parametrize(
    "limit, ratio, first, last",
    [(math.sqrt(1 / 1000), 0.097, 0.30, 0.03), (math.sqrt(6 / 2000), 0.575, 0.46, 0.29)],
    ids=["standard", "normalized"],
)
def test_glorots_initializations(limit, ratio, first, last):
    """5 layers of 1000 tanh: back-propagated gradients and activations shrink as figures 6 and 7 of Glorot & Bengio
    (2010) have it for U(+-1/sqrt(n)), and keep their size for the normalized initialization, within 15 %.
    """
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = plain(5, 1000, nn.Tanh)
        for layer in model[::2]:
            nn.init.uniform_(layer.weight, -limit, limit)
            nn.init.zeros_(layer.bias)
        found.append(measured(model, 0.577 * torch.randn(300, 1000)))
    activations = [[layer for layer in f.layers if layer.kind == "tanh"] for f in found]

    assert mean_log([f.weighted[0].signal / f.weighted[4].signal for f in found]) == pytest.approx(ratio, rel=0.15)
    assert mean_log([tanh[0].output_rms for tanh in activations]) == pytest.approx(first, rel=0.15)
    assert mean_log([tanh[4].output_rms for tanh in activations]) == pytest.approx(last, rel=0.15)


def lsuv(model, x):
    """Layer-sequential unit-variance initialization (Mishkin & Matas 2016), without its shift of the mean."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight /= layer(x).std()
        with torch.no_grad():
            x = layer(x)
    return model


def test_lsuv_keeps_every_layer_at_unit_scale():
    """60 layers of 256 GELU: behind LSUV every output deviates by 1 within 0.1 and gradients keep their size within a
    factor of 20; behind Kaiming's initialization they do not.
    """
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    calibrated = measured(lsuv(plain(60, 256, nn.GELU), x), x)
    kaiming = measured(gaussian(plain(60, 256, nn.GELU), 2.0), x)

    assert all(abs(layer.output_rms - 1) < 0.1 for layer in calibrated.weighted)
    assert 0.05 < calibrated.weighted[0].signal < 20
    assert kaiming.weighted[0].signal < 5e-3
    assert kaiming.prediction.weighted[0].signal < 5e-3


def recurrent(name):
    """A recurrent layer of 100 units with the initialization that its name tells."""
    model = nn.LSTM(1, 100) if name.startswith("lstm") else nn.RNN(1, 100, nonlinearity=name.split()[-1])
    forget = slice(100, 200)
    with torch.no_grad():
        if "forget" in name:
            model.bias_hh_l0[forget], model.bias_ih_l0[forget] = 1.0, 0.0
        if "chrono" in name:
            model.bias_ih_l0.zero_()
            model.bias_hh_l0.zero_()
            model.bias_hh_l0[forget] = torch.log(torch.empty(100).uniform_(1, 49))
            model.bias_hh_l0[:100] = -model.bias_hh_l0[forget]
        if "orthogonal" in name:
            nn.init.orthogonal_(model.weight_hh_l0)
        if "identity" in name:
            nn.init.eye_(model.weight_hh_l0)
            nn.init.zeros_(model.bias_hh_l0)
            nn.init.zeros_(model.bias_ih_l0)
            nn.init.normal_(model.weight_ih_l0, 0, 0.001)
    return model


def decays(name, seeds, x):
    for seed in range(seeds):
        torch.manual_seed(seed)
        (found,) = measured(recurrent(name), x).recurrences
        assert 50 == found.time_steps
        yield found.decay


@pytest.mark.parametrize("name, ratio", THROUGH_TIME)
def test_gradients_through_time(name, ratio):
    """What is left of the gradient after nine tenths of 50 time steps is within a decade of the published value."""
    torch.manual_seed(0)
    found = mean_log(list(decays(name, 3, torch.randn(50, 32, 1))))

    assert abs(math.log10(found / ratio)) < 1


def test_gradients_through_time_of_a_plain_recurrence():
    """Of tanh with PyTorch's default weights, of variance 1 / (3 units), 3^(-1/2) is left per step in the median: the
    tail of products of random matrices is heavy, so single networks are up to four decades above it.
    """
    torch.manual_seed(0)
    found = np.median(np.log10(list(decays("tanh", 15, 0.1 * torch.randn(50, 8, 1)))))

    assert found == pytest.approx(45 * math.log10(3**-0.5), abs=0.6)


class Attention(nn.Module):
    """Self-attention of one head without anything else; `scale` of a shortcut around it, None for none."""

    def __init__(self, width, scale=None):
        super().__init__()
        self.qkv, self.out, self.seen, self.scale = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Identity(),
            scale,
        )
        for layer in (self.qkv, self.out):
            nn.init.normal_(layer.weight, 0, width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed = self.out(torch.softmax(q @ k.transpose(-2, -1) / x.shape[-1] ** 0.5, -1) @ v)
        return self.seen(mixed if self.scale is None else x + self.scale * mixed)


def test_attention_without_shortcuts_makes_tokens_equal():
    """Four layers of attention alone leave tokens with a mean cosine above 0.99 (Dong et al. 2021); with shortcuts and
    branches scaled by 1 / sqrt(layers), 33 layers leave it below 0.05 (Noci et al. 2022).
    """
    torch.manual_seed(0)
    x = torch.randn(1, 64, 128)
    alone = measured(nn.Sequential(*[Attention(128) for _ in range(6)]), x)
    scaled = measured(nn.Sequential(*[Attention(128, 33**-0.5) for _ in range(33)]), x)
    tokens = {layer.name: layer.similarity for found in (alone,) for layer in found.layers}

    assert tokens["0.seen"] < 0.7
    assert tokens["3.seen"] > 0.99
    assert {layer.name: layer.similarity for layer in scaled.layers}["32.seen"] < 0.05
    assert any("Tokens nearly equal" in sentence for sentence in alone.sentences())
    assert not any("Tokens nearly equal" in sentence for sentence in scaled.sentences())


class Transformer(nn.Module):
    """A language model of `depth` blocks, 128 wide with 4 heads, Xavier-initialized."""

    def __init__(self, depth, *, norm_first):
        super().__init__()
        self.tokens = nn.Embedding(1000, 128)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=norm_first) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(128) if norm_first else nn.Identity(), nn.Linear(128, 1000)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.tokens.weight)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def last_gradient(depth, *, norm_first):
    torch.manual_seed(depth)
    x, y = torch.randint(0, 1000, (2, 32)), torch.randint(0, 1000, (2, 32))
    model = Transformer(depth, norm_first=norm_first)
    found = isograd.preflight(
        model, lambda out, t: nn.functional.cross_entropy(out.flatten(0, 1), t.flatten()), (x, y), sharpness=False
    )
    (history,) = found.histories
    column = [parameter.name for parameter in history.parameters].index(f"blocks.{depth - 1}.linear2.weight")
    return history["grad_norm"].values[0, column]


@pytest.mark.parametrize("norm_first, slope", [(True, -0.5), (False, 0.0)], ids=["pre-norm", "post-norm"])
def test_gradient_near_the_output_of_transformers(norm_first, slope):
    """The gradient of the last feed-forward weights falls as 1 / sqrt(depth) with pre-norm and does not depend on depth
    with post-norm: the log-log slope over 2 to 32 layers is within 0.1 (Xiong et al. 2020, theorem 1).
    """
    depths = [2, 6, 18, 32]
    norms = [last_gradient(depth, norm_first=norm_first) for depth in depths]

    assert np.polyfit(np.log(depths), np.log(norms), 1)[0] == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize(
    "kind, weights, biases, q", [("gelu", 1.98305826, 0.17292239, 3.5616), ("silu", 1.98800468, 0.55514317, 14.3202)]
)
def test_critical_initializations(kind, weights, biases, q):
    """The half-stable critical points of GELU and SiLU are those of Roberts, Yaida & Hanin (2022) to 1e-6."""
    found = critical_point(kind)

    assert found.weight_variance == pytest.approx(weights, abs=1e-6)
    assert found.bias_variance == pytest.approx(biases, abs=1e-6)
    assert found.q == pytest.approx(q, abs=1e-4)


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_activations_without_a_critical_point_of_that_kind(kind):
    """tanh is critical at vanishing signals and ReLU at signals of every size: neither has a half-stable point."""
    with pytest.raises(ValueError, match="no critical point at a finite size"):
        critical_point(kind)


@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.8])
def test_moments_of_pairs_are_those_of_draws(kind, rho):
    """E[phi(u) phi(v)], E[phi'(u) phi'(v)] and E[u v phi'(u) phi'(v)] are the averages over correlated Gaussians."""
    draw, q = np.random.default_rng(0), 2.0
    u, w = draw.normal(0, math.sqrt(q), (2, 400_000))
    v = rho * u + math.sqrt(1 - rho**2) * w
    one, found = function_of(kind), pair(function_of(kind), q, rho * q)
    slopes = one.slope(u) * one.slope(v)

    # 400,000 draws: a standard error of 0.3 % of the spread, which is at most 5 here.
    assert found.value == pytest.approx(np.mean(one.value(u) * one.value(v)), abs=0.015)
    assert found.slope == pytest.approx(np.mean(slopes), abs=0.005)
    assert found.weighted == pytest.approx(np.mean(u * v * slopes), abs=0.015)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_largest_of_several(count):
    """First and second moments of the largest of several Gaussians, rectified or not, are those of draws."""
    largest = np.random.default_rng(0).normal(size=(200_000, count)).max(axis=1)

    for power in (1, 2):
        assert largest_of(count, power) == pytest.approx(np.mean(largest**power), abs=0.02)
        assert largest_of(count, power, rectified=True) == pytest.approx(
            np.mean(np.maximum(largest, 0) ** power), abs=0.02
        )
