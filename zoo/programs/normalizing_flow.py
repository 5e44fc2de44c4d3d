"""RealNVP: eight affine couplings turn two moons into a Gaussian and back."""

import argparse
import math

import torch
from sklearn.datasets import make_moons
from torch import nn


class Coupling(nn.Module):
    def __init__(self, kept, hidden=48):
        super().__init__()
        self.kept = kept
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        kept, other = x[:, [self.kept]], x[:, [1 - self.kept]]
        scale, shift = self.net(kept).chunk(2, 1)
        scale = torch.tanh(scale)
        other = other * scale.exp() + shift
        parts = (kept, other) if self.kept == 0 else (other, kept)
        return torch.cat(parts, 1), scale.squeeze(1)


class Flow(nn.Module):
    def __init__(self, depth=8):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(index % 2) for index in range(depth))

    def log_prob(self, x):
        total = 0.0
        for coupling in self.couplings:
            x, log_det = coupling(x)
            total = total + log_det
        return total - 0.5 * x.square().sum(1) - math.log(2 * math.pi)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x = torch.tensor(make_moons(4000, noise=0.08, random_state=args.seed)[0], dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    flow = Flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for step in range(500):
        loss = -flow.log_prob(x[torch.randint(3500, (200,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        print("nats per point:", -flow.log_prob(x[3500:]).mean().item())


if __name__ == "__main__":
    main()
