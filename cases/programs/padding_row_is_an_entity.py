"""An embedding whose padding row, 0, is the number of a real entity.

Seen      Entity 0 never learns; the accuracy can be perfect all the same.
Cause     The gradient of the padding row is masked.
Fix       No padding row (or numbers that begin at 1).
Source    github.com/ibalazevic/TuckER/issues/17
Sure      A: the author: a mistake
Repaired  A loss of that class below 0.01
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("parameters-unreached", "frozen-parameters")
UNREACHABLE = "Which row counts as padding is settled where the embedding is made."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    entities = torch.randint(0, 5, (400,))
    model = nn.Sequential(nn.Embedding(5, 8, padding_idx=None if args.fixed else 0), nn.Linear(8, 5, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for _ in range(300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(entities), entities)
        loss.backward()
        optimizer.step()

    first = entities[entities == 0]
    loss_of_first = F.cross_entropy(model(first), first).item()
    verdict(
        loss_of_first < 0.01,
        loss=loss.item(), loss_of_first_class=loss_of_first, grad_norm_of_row=model[0].weight.grad[0].norm().item(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
