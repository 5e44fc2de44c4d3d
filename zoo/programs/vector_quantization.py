"""A vector-quantized autoencoder: a codebook of 32 entries, gradients passed straight through the choice."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class Quantizer(nn.Module):
    def __init__(self, entries=32, dim=4):
        super().__init__()
        self.codebook = nn.Embedding(entries, dim)
        nn.init.uniform_(self.codebook.weight, -1, 1)

    def forward(self, z):
        flat = z.reshape(-1, self.codebook.embedding_dim)
        index = torch.cdist(flat, self.codebook.weight).argmin(1)
        quantized = self.codebook(index).view_as(z)
        loss = F.mse_loss(quantized, z.detach()) + 0.25 * F.mse_loss(z, quantized.detach())
        return z + (quantized - z).detach(), loss


class VQVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
        self.quantizer = Quantizer()
        self.decoder = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, x):
        quantized, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), loss


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = VQVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(600):
        batch = x[torch.randint(1500, (64,))]
        reconstruction, commitment = model(batch)
        loss = F.mse_loss(reconstruction, batch) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    with torch.no_grad():
        error = F.mse_loss(model(x[1500:])[0], x[1500:])
        spread = ((x[1500:] - x[:1500].mean(0)) ** 2).mean()
    print("unexplained variance:", (error / spread).item())


if __name__ == "__main__":
    main()
