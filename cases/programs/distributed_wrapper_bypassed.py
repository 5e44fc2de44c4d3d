"""Two data-parallel processes that compute their loss on `ddp.module` in place of `ddp`.

Seen      Slow or poor convergence on several devices; the ranks drift apart.
Cause     Only the wrapper's own forward pass arms the averaging of gradients.
Fix       The wrapper is called.
Source    github.com/k2-fsa/icefall/issues/226, github.com/kohya-ss/sd-scripts/issues/924, 989
Sure      A: found by the one who reported it
Repaired  Weights that differ by less than 1e-6 between the ranks
"""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("replica-drift",)
UNREACHABLE = "Which of two objects the loop calls stands in its source."


def train(rank, port, seed, fixed, answers):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(100 + rank)

    for _ in range(30):
        x = torch.randn(32, 8, generator=draw)
        y = (x[:, rank] > 0).long()
        optimizer.zero_grad()
        loss = F.cross_entropy((ddp if fixed else ddp.module)(x), y)
        loss.backward()
        optimizer.step()

    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    everywhere = [torch.zeros_like(weights) for _ in range(2)]
    dist.all_gather(everywhere, weights)
    if rank == 0:
        answers.put(((everywhere[0] - everywhere[1]).norm() / everywhere[0].norm()).item())
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    args = arguments(__doc__)
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(train, (free_port(), args.seed, args.fixed, answers), nprocs=2)
    divergence = answers.get()
    verdict(divergence < 1e-6, relative_divergence=divergence)


if __name__ == "__main__":
    main()
