"""A fully connected autoencoder squeezes handwritten digits through eight numbers."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
loader = DataLoader(x[:1500], batch_size=50, shuffle=True)
encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8))
decoder = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 64), nn.Sigmoid())
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)

for epoch in range(25):
    for batch in loader:
        loss = nn.functional.mse_loss(decoder(encoder(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}  loss {loss.item():.4f}")

with torch.no_grad():
    error = ((decoder(encoder(x[1500:])) - x[1500:]) ** 2).mean()
    spread = ((x[1500:] - x[:1500].mean(0)) ** 2).mean()
print("unexplained variance:", (error / spread).item())
