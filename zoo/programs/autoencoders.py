"""Three autoencoders of handwritten digits: denoising, sparse (an L1 penalty on the code), convolutional."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Denoising(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU())
        self.decode = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, x):
        return self.decode(self.encode(x))

    def loss(self, x):
        noisy = x + 0.3 * torch.randn_like(x)
        return F.mse_loss(self(noisy), x)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(64, 128)
        self.decoder = nn.Linear(128, 64)

    def forward(self, x):
        return self.decoder(torch.relu(self.encoder(x)))

    def loss(self, x):
        code = torch.relu(self.encoder(x))
        return F.mse_loss(self.decoder(code), x) + 1e-3 * code.abs().mean()


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 2, stride=2), nn.LeakyReLU(0.1), nn.ConvTranspose2d(8, 1, 2, stride=2)
        )

    def forward(self, x):
        return self.decoder(self.encoder(x.view(-1, 1, 8, 8))).flatten(1)

    def loss(self, x):
        return F.mse_loss(self(x), x)


KINDS = {"denoising": Denoising, "sparse": Sparse, "convolutional": Convolutional}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = KINDS[args.kind]()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(500):
        loss = model.loss(x[torch.randint(1500, (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    with torch.no_grad():
        error = F.mse_loss(model(x[1500:]), x[1500:])
        spread = ((x[1500:] - x[:1500].mean(0)) ** 2).mean()
    print("unexplained variance:", (error / spread).item())


if __name__ == "__main__":
    main()
