"""A variational autoencoder of handwritten digits; --beta weighs the divergence from the prior."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class VAE(nn.Module):
    def __init__(self, latent=6):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.mean = nn.Linear(64, latent)
        self.log_variance = nn.Linear(64, latent)
        self.fc2 = nn.Linear(latent, 64)
        self.fc3 = nn.Linear(64, 64)

    def encode(self, x):
        hidden = F.relu(self.fc1(x))
        return self.mean(hidden), self.log_variance(hidden)

    def reparameterize(self, mean, log_variance):
        return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)

    def decode(self, z):
        return self.fc3(F.relu(self.fc2(z)))

    def forward(self, x):
        mean, log_variance = self.encode(x)
        return self.decode(self.reparameterize(mean, log_variance)), mean, log_variance


def loss_function(logits, x, mean, log_variance, beta):
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum() / len(x)
    return reconstruction + beta * divergence


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(25):
        model.train()
        total = 0.0
        for chosen in torch.randperm(1500).split(64):
            optimizer.zero_grad()
            logits, mean, log_variance = model(x[chosen])
            loss = loss_function(logits, x[chosen], mean, log_variance, args.beta)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        if epoch % 5 == 0:
            print(f"epoch {epoch}  loss {total / 1500:.2f}")
    model.eval()
    with torch.no_grad():
        mean, _ = model.encode(x[1500:])
        error = F.mse_loss(torch.sigmoid(model.decode(mean)), x[1500:])
        spread = ((x[1500:] - x[:1500].mean(0)) ** 2).mean()
    print("unexplained variance:", (error / spread).item())


if __name__ == "__main__":
    main()
