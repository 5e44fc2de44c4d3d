"""A neural ordinary differential equation learns a spiral's vector field through a Runge-Kutta solver."""

import argparse

import torch
from torch import nn


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for module in self.net:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1)
                nn.init.zeros_(module.bias)

    def forward(self, state):
        return self.net(state**3)


def spiral(state):
    return state**3 @ torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])


def integrate(field, state, steps, h=0.05):
    states = []
    for _ in range(steps):
        k1 = field(state)
        k2 = field(state + h / 2 * k1)
        k3 = field(state + h / 2 * k2)
        k4 = field(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(state)
    return torch.stack(states)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = torch.tensor([[2.0, 0.0]])
    trajectory = torch.cat([start[None], integrate(spiral, start, 300)])[:, 0]
    model = Field()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    for step in range(400):
        first = torch.randint(290, (32,))
        target = torch.stack([trajectory[first + time] for time in range(1, 9)])
        loss = (integrate(model, trajectory[first], 8) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 80 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    with torch.no_grad():
        error = (integrate(model, trajectory[:290], 8)[-1] - trajectory[8:298]).abs().mean()
        moved = (trajectory[:290] - trajectory[8:298]).abs().mean()
    print("error relative to standing still:", (error / moved).item())


if __name__ == "__main__":
    main()
