"""Deep Q-learning with a target network on a chain of eight states that pays at its end.

Scary     The temporal-difference error doubles, with spikes forty times as high.
Healthy   It grows with the values: the return rises to nearly the best one of 34
          (github.com/tensorflow/agents/issues/316).
"""

import copy

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()
STATES, EPISODE = 8, 40


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(STATES, 64), nn.ReLU(), nn.Linear(64, 2))
    target_model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    one_hot = torch.eye(STATES)

    def act(state, step):
        if torch.rand(1) < max(0.1, 1 - step / 1500):
            return torch.randint(0, 2, (1,)).item()
        return model(one_hot[state]).argmax().item()

    transitions, losses, returns, state, paid = [], [], [], 0, 0.0
    for step in range(4000):
        # The draw of the action stands before the draw of the coin, whether it is used or not.
        action = act(state, step)
        next_state = min(STATES - 1, state + 1) if action == 1 else max(0, state - 1)
        reward = 1.0 if next_state == STATES - 1 else 0.0
        transitions.append((state, action, reward, next_state))
        state, paid = next_state, paid + reward
        if step % EPISODE == EPISODE - 1:
            returns.append(paid)
            state, paid = 0, 0.0
        if len(transitions) > 200 and step % 2 == 0:
            rows = torch.randint(0, len(transitions), (64,)).tolist()
            states, actions, rewards, next_states = zip(*(transitions[row] for row in rows), strict=True)
            with torch.no_grad():
                best = target_model(one_hot[list(next_states)]).max(1, keepdim=True)[0]
            targets = torch.tensor(rewards)[:, None] + 0.99 * best
            values = model(one_hot[list(states)]).gather(1, torch.tensor(actions)[:, None])
            loss = F.mse_loss(values, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 100 == 0:
                target_model.load_state_dict(model.state_dict())

    early, late = sum(returns[:10]) / 10, sum(returns[-10:]) / 10
    verdict(
        late > 25, word="healthy",
        early_loss=sum(losses[50:150]) / 100, loss=sum(losses[-100:]) / 100, largest_loss=max(losses),
        early_return=early, late_return=late,
    )  # fmt: skip


if __name__ == "__main__":
    main()
