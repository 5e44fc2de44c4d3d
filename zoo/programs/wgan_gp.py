"""A Wasserstein GAN with gradient penalty on two moons: five critic steps for one of the generator."""

import argparse

import torch
from sklearn.datasets import make_moons
from torch import autograd, nn


class MLP(nn.Module):
    def __init__(self, inputs, outputs, hidden=64):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x):
        return self.main(x)


def gradient_penalty(critic, real, fake):
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((slope.norm(2, dim=1) - 1) ** 2).mean()


def sliced_distance(a, b, directions=100):
    across = nn.functional.normalize(torch.randn(2, directions), dim=0)
    levels = torch.linspace(0.01, 0.99, 99)
    return ((a @ across).quantile(levels, 0) - (b @ across).quantile(levels, 0)).abs().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    moons = torch.tensor(make_moons(4000, noise=0.05, random_state=args.seed)[0], dtype=torch.float32)
    moons = (moons - moons.mean(0)) / moons.std(0)
    generator, critic = MLP(2, 2), MLP(2, 1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for iteration in range(400):
        for parameter in critic.parameters():
            parameter.requires_grad = True
        for _ in range(5):
            real = moons[torch.randint(len(moons), (128,))]
            with torch.no_grad():
                fake = generator(torch.randn(128, 2))
            critic_loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake)
            critic.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
        for parameter in critic.parameters():
            parameter.requires_grad = False
        loss = -critic(generator(torch.randn(128, 2))).mean()
        generator.zero_grad()
        loss.backward()
        generator_optimizer.step()
        if iteration % 50 == 0:
            print(f"iteration {iteration}  critic {critic_loss.item():.3f}  generator {loss.item():.3f}")
    with torch.no_grad():
        distance = sliced_distance(generator(torch.randn(2000, 2)), moons)
    print("distance from the data:", distance.item())


if __name__ == "__main__":
    main()
