"""Deep Q-learning with replay and a target network: find the goal in a 5 x 5 grid."""

import argparse
import collections
import copy
import random

import torch
from torch import nn

SIZE, MOVES = 5, ((-1, 0), (1, 0), (0, -1), (0, 1))
GOAL = (SIZE - 1, SIZE - 1)


def step(state, action):
    row = min(max(state[0] + MOVES[action][0], 0), SIZE - 1)
    column = min(max(state[1] + MOVES[action][1], 0), SIZE - 1)
    done = (row, column) == GOAL
    return (row, column), 1.0 if done else -0.05, done


def encode(states):
    cells = torch.tensor([row * SIZE + column for row, column in states])
    return nn.functional.one_hot(cells, SIZE * SIZE).float()


def play(network, epsilon, limit=40):
    state, history = (0, 0), []
    for _ in range(limit):
        if random.random() < epsilon:
            action = random.randrange(4)
        else:
            with torch.no_grad():
                action = network(encode([state])).argmax().item()
        following, reward, done = step(state, action)
        history.append((state, action, reward, following, done))
        state = following
        if done:
            break
    return history


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    policy = nn.Sequential(nn.Linear(SIZE * SIZE, 64), nn.ReLU(), nn.Linear(64, 4))
    target = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    memory = collections.deque(maxlen=3000)
    updates = 0
    for episode in range(120):
        history = play(policy, epsilon=max(0.05, 1 - episode / 60))
        memory.extend(history)
        for _ in range(6 if len(memory) > 200 else 0):
            states, actions, rewards, following, done = zip(*random.sample(memory, 64), strict=True)
            value = policy(encode(states)).gather(1, torch.tensor(actions)[:, None]).squeeze(1)
            with torch.no_grad():
                future = target(encode(following)).max(1).values * (1 - torch.tensor(done).float())
            loss = nn.functional.smooth_l1_loss(value, torch.tensor(rewards) + 0.95 * future)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(policy.parameters(), 100)
            optimizer.step()
            updates += 1
            if updates % 50 == 0:
                target.load_state_dict(policy.state_dict())
        if episode % 20 == 0:
            print(f"episode {episode}  steps {len(history)}")
    print("return of the greedy policy:", sum(reward for _, _, reward, _, _ in play(policy, epsilon=0)))


if __name__ == "__main__":
    main()
