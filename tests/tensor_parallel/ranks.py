"""Ranks as processes that run every case of `rank_cases`: ``ranks.py WORLD FOLDER MODULES...``.

The ranks are forked after torch is imported, which takes a second of CPU time for each otherwise.
Nothing has started a thread by then. What a rank prints is in FOLDER, as ``rank-N.log``.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback

import rank_cases
import torch
import torch.distributed as dist

import qknorm_tvm


def rank_main(world: int, rank: int, folder: str, modules: list[str]) -> None:
    """Join the group and run the cases."""
    torch.set_num_threads(1)
    for module in modules:
        qknorm_tvm.use(qknorm_tvm.load(module))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        world_size=world,
        rank=rank,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, case in rank_cases.cases(world):
        start = time.monotonic()
        print(f"{name} ...", end="", flush=True)
        case()
        print(f" {time.monotonic() - start:.2f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    print("all cases passed", flush=True)


def fork(world: int, rank: int, folder: str, modules: list[str]) -> int:
    """Start a rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        rank_main(world, rank, folder, modules)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """Start the ranks and wait for them; returns how many failed."""
    world, folder, modules = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for rank in range(world):
        fork(world, rank, folder, modules)
    return sum(os.wait()[1] != 0 for _ in range(world))


if __name__ == "__main__":
    sys.exit(main())
