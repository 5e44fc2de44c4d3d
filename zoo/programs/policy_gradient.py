"""REINFORCE or an actor-critic keeps a pole upright on a cart (Barto, Sutton and Anderson's equations)."""

import argparse
import math

import torch
from torch import nn
from torch.distributions import Categorical


class CartPole:
    """32 carts at once; an episode ends for each cart when its pole leans by 12 degrees or it leaves the track."""

    def reset(self, count=32):
        self.state = 0.1 * torch.rand(count, 4) - 0.05
        self.alive = torch.ones(count, dtype=torch.bool)
        return self.state

    def step(self, action):
        x, v, angle, spin = self.state.unbind(1)
        force = 20.0 * action - 10.0
        push = (force + 0.05 * spin**2 * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        glide = push - 0.05 * turn * angle.cos() / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * glide, angle + 0.02 * spin, spin + 0.02 * turn], 1)
        reward = self.alive.float()
        self.alive = self.alive & (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < 12 * math.pi / 180)
        return self.state, reward


def rollout(environment, policy, limit=100):
    state, log_probabilities, entropies, rewards, states = environment.reset(), [], [], [], []
    for _ in range(limit):
        distribution = Categorical(logits=policy(state))
        action = distribution.sample()
        states.append(state)
        log_probabilities.append(distribution.log_prob(action))
        entropies.append(distribution.entropy())
        state, reward = environment.step(action.float())
        rewards.append(reward)
    return torch.stack(states), torch.stack(log_probabilities), torch.stack(entropies), torch.stack(rewards)


def discounted(rewards, gamma=0.97):
    returns, running = torch.empty_like(rewards), torch.zeros(rewards.shape[1])
    for time in reversed(range(len(rewards))):
        running = rewards[time] + gamma * running
        returns[time] = running
    return returns


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["reinforce", "actor-critic"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    parameters = list(policy.parameters()) + (list(critic.parameters()) if args.kind == "actor-critic" else [])
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    environment = CartPole()
    for iteration in range(60):
        states, log_probabilities, entropies, rewards = rollout(environment, policy)
        returns, count = discounted(rewards), rewards.sum()
        if args.kind == "reinforce":
            mean = (returns * rewards).sum() / count
            std = (((returns - mean) ** 2 * rewards).sum() / count).sqrt()
            loss = -(log_probabilities * (returns - mean) / (std + 1e-6) * rewards).sum() / count
        else:
            value = critic(states).squeeze(2)
            advantage = (returns - value) * rewards
            actor_loss = -(log_probabilities * advantage.detach()).sum() / count
            loss = actor_loss + 0.5 * advantage.square().sum() / count - 0.01 * (entropies * rewards).sum() / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        if iteration % 10 == 0:
            print(f"iteration {iteration}  episode length {rewards.sum(0).mean().item():.1f}")
    with torch.no_grad():
        print("mean episode length:", rollout(environment, policy)[3].sum(0).mean().item())


if __name__ == "__main__":
    main()
