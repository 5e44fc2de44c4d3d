"""Q-learning on recorded transitions that bootstraps from the network which it trains.

Seen      The temporal-difference error grows exponentially.
Cause     A moving target, a maximum over actions, and a discount near 1.
Fix       A target network, the Huber loss, clipped gradients.
Source    github.com/danijar/dreamer/issues/20, github.com/facebookresearch/ReAgent/issues/189,
          github.com/keras-rl/keras-rl/issues/28
Sure      A: the author's answer
Repaired  A loss below 1, and values that stay of the size of the rewards
"""

import copy

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("bootstrapped-target", "learning-rate-too-high")
UNREACHABLE = "Which network gives the targets stands in the program's source."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    states, next_states = torch.randn(500, 6) * 3, torch.randn(500, 6) * 3
    rewards = torch.randn(500, 1)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    target_model = copy.deepcopy(model)
    actions = torch.randint(0, 4, (500, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    losses, mean_values = [], []
    for step in range(1500):
        rows = torch.randint(0, 500, (32,))
        with torch.no_grad():
            bootstrap = target_model if args.fixed else model
            targets = rewards[rows] + 0.99 * bootstrap(next_states[rows]).max(1, keepdim=True)[0]
        values = model(states[rows]).gather(1, actions[rows])
        loss = F.smooth_l1_loss(values, targets) if args.fixed else F.mse_loss(values, targets)
        optimizer.zero_grad()
        loss.backward()
        if args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        mean_values.append(model(states).max(1)[0].mean().item())
        if args.fixed and step % 500 == 499:
            target_model.load_state_dict(model.state_dict())

    loss = sum(losses[-50:]) / 50
    verdict(
        loss < 1 and abs(mean_values[-1]) < 100,  # rewards of about 1 over 1 - 0.99
        first_loss=losses[0], loss=loss, first_value=mean_values[0], value=mean_values[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
