"""A stand-in for upstream's pretrain_cpm9g.py, sft_cpm9g.py and sft_cpm9g_delta.py: their options, ranks and log lines.

It trains nothing. Like BMTrain it reads the variables of torchrun and meets the other ranks at a store; rank 0 prints
what upstream prints for each iteration.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys

from torch.distributed import TCPStore

WITH_A_VALUE = (
    "model-config vocab batch-size train-iters save-iters save-name max-length lr inspect-iters warmup-iters"
    " lr-decay-style weight-decay clip-grad loss-scale max-loss-scale min-loss-scale loss-scale-steps flash save"
    " log-dir tensorboard dataset load start-step tp seed epoch gradient-accumulation-steps task-name delta-type lora-r"
    " lora-alpha lora-dropout"
).split()
ALONE = "offload save-model load-grad bf16 drop-last delta-tuning save-origin-model".split()
ITERATIONS = 3


def parsed() -> argparse.Namespace:
    """The options, all of which are known."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in WITH_A_VALUE:
        parser.add_argument(f"--{name}")
    for name in ALONE:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--lora-layer", nargs="+")
    return parser.parse_args()


def meet() -> tuple[int, int]:
    """Wait for all ranks and return (rank, world size)."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # with c10d this port is free, with a static rendezvous torchrun itself serves a store there
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(address, port, world_size, hosts, datetime.timedelta(seconds=300))
    store.set(f"stand-in-{rank}", "")
    store.wait([f"stand-in-{other}" for other in range(world_size)])
    store.add("stand-in-met", 1)
    if hosts:  # stays until nobody asks it any more
        while store.add("stand-in-met", 0) < world_size:
            pass
    return rank, world_size


def main() -> None:
    """Meet the others, say who one is, print the lines of rank 0."""
    options = parsed()
    rank, world_size = meet()
    print(f"stand-in {os.path.basename(sys.argv[0])}: rank {rank} of {world_size}, vocab {options.vocab}", flush=True)
    for number in range(1, ITERATIONS + 1) if rank == 0 else ():
        measured = f"loss: {10 / number:.4f} | lr: {float(options.lr):.4e}, scale: {options.loss_scale}"
        if options.epoch is None:
            line = f"| Iter: {number:6d} | {measured} | avg_time: 0.5000 | token/max: 0.9000 | grad_norm: 1.0000 |"
        else:
            line = f"| Epoch: 0 | Iter: {number}/{ITERATIONS} | {measured} | time: 0.5000 | grad_norm: 1.0000 |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
