"""The layer over ranks that torchrun starts: results, errors, and on NCCL replays and times.

torchrun --standalone --nproc-per-node 2 tests/tensor_parallel/torchrun_layer.py

One GPU a rank over NCCL where there are GPUs, else CPUs over gloo; ``--share-gpu`` puts all ranks
on one GPU, over gloo. Rank 0 prints; errors come from every rank.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from rank_cases import (
    EPSILON,
    Case,
    check_disagreement,
    check_layer,
    check_module,
    check_uneven,
)
from rank_layer import check_replays
from rank_place import Place, join, leave
from rank_times import NOTE_ONE, method, time_layer
from torch.distributed.elastic.multiprocessing.errors import record

import qknorm_tvm
from qknorm_tvm import machine
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.bench.cuda import device_facts
from qknorm_tvm.cli import output

#: Query heads, KV heads and columns of a head.
LAYERS = {"MiniMax-M2": (48, 8, 128), "OLMo-2 7B": (32, 32, 128), "OLMo-2 32B": (40, 8, 128)}
TIMED, TIMED_ROWS = ("MiniMax-M2", "OLMo-2 32B"), (1, 16, 64)
CPU_ROWS, GPU_ROWS = (0, 1, 16, 64), (0, 1, 16, 64, 512, 16384)
DTYPES = (torch.bfloat16, torch.float32)


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default what there is")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on one GPU, over gloo")
    parser.add_argument(
        "--module", action="append", default=[], help="a .so to use instead of compiling; repeat it"
    )
    parser.add_argument(
        "--rows",
        type=lambda text: tuple(map(int, text.split(","))),
        help="such as 0,1,16: rows of the checks",
    )
    parser.add_argument(
        "--times",
        action=argparse.BooleanOptionalAction,
        help="by default on NCCL; on gloo eager calls are timed",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout", type=float, default=120, help="of a collective, in seconds")
    parser.add_argument(
        "--fail", choices=("disagree", "raise", "absent"), help="what the last rank does wrong"
    )
    return parser.parse_args()


def layers(world: int) -> dict[str, tuple[int, int, int]]:
    """Return the layers that so many ranks can share, one with copies of KV heads among them."""
    shared = dict(LAYERS)
    if world > 1:
        shared["KV heads copied"] = (48, max(1, world // 2), 128)
    return {
        name: (q_heads, kv_heads, head_dim)
        for name, (q_heads, kv_heads, head_dim) in shared.items()
        if not q_heads % world and not (kv_heads % world and world % kv_heads)
    }


def cases(place: Place, rows: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is checked, by name."""
    device = place.device

    def kinds() -> Iterator[tuple[str, Case]]:
        for name, heads in layers(place.world).items():
            for dtype in DTYPES:
                for count in rows:
                    yield f"{name}, M = {count}, {dtype}", Case(*heads, count, dtype, device=device)

    for name, case in kinds():
        yield name, lambda case=case: check_layer(case)
    by_torch = Case(*LAYERS["MiniMax-M2"], 16, statistics="torch", device=device)
    yield "statistics by torch", lambda: check_layer(by_torch)
    yield "module", lambda: check_module(device)
    if place.world > 1:
        for dtype in DTYPES:
            yield f"uneven shards, {dtype}", lambda dtype=dtype: check_uneven(dtype, 7, device)
        yield "disagreement", lambda: check_disagreement(device)
    if place.captures:
        for name, case in kinds():
            if case.rows:
                yield f"replays: {name}", lambda case=case: check_replays(place, case)


def check(place: Place, rows: Sequence[int]) -> None:
    """Run all cases, saying which."""
    start = time.monotonic()
    listed = list(cases(place, rows))
    for name, case in listed:
        place.say(f"{time.monotonic() - start:6.1f} s  {name}")
        case()
    ranks = output.plural(place.world, "rank")
    place.say(f"all {len(listed)} cases passed on {ranks} over {place.backend}")
    if not place.captures:
        place.say(f"not run: replays of CUDA graphs, since {place.backend} cannot be captured")


def fail(place: Place, how: str, timeout: float) -> None:
    """Do something wrong on the last rank; no rank returns."""
    last = place.rank == place.world - 1
    layout = tp.HeadLayout(*LAYERS["MiniMax-M2"], place.world, place.rank)
    if last and how == "raise":
        raise RuntimeError(f"rank {place.rank} fails on purpose")
    if last and how == "absent":
        time.sleep(10 * timeout)
    rows = 5 if last else 4
    cols = layout.q_cols, layout.k_cols
    q, k = (torch.ones(rows, n, dtype=torch.bfloat16, device=place.device) for n in cols)
    gammas = [torch.ones(n, device=place.device) for n in cols]
    try:
        tp.qk_rms_norm(q, k, *gammas, EPSILON, validate=how == "disagree")
        if place.device != "cpu":
            torch.cuda.synchronize()  # where a rank waits on NCCL
    except ValueError as error:
        print(f"rank {place.rank} is told: {error}", flush=True)
        place.everywhere(None)  # torchrun ends the others once the first of them has ended
        raise
    raise AssertionError("nothing failed")


def facts(place: Place) -> list[tuple[str, str]]:
    """Return what a run was made on, and the command."""
    known = {"device": f"{machine.cpu_name()}, {machine.usable_processors()} processors"}
    if place.device != "cpu":
        known = device_facts()
        shared = place.backend == "gloo" and place.world > 1
        known["GPUs"] = f"1, shared by {place.world} ranks" if shared else str(place.world)
    if place.backend == "nccl":
        version = ".".join(map(str, torch.cuda.nccl.version()))
        known["NCCL"] = f"{version}, NCCL_NVLS_ENABLE={os.environ['NCCL_NVLS_ENABLE']}"
    versions = machine.library_versions().items()
    known["versions"] = ", ".join(f"{name} {version}" for name, version in versions)
    script = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    start = f"torchrun --standalone --nproc-per-node {place.world}"
    known["command"] = f"{start} {shlex.join(script)}"
    return list(known.items())


def report_times(place: Place, torch_compile: bool) -> None:
    """Time the layers, and print tables."""
    tables, notes = [], [method(place), *([NOTE_ONE] if place.world == 1 else [])]
    if place.device == "cpu" and machine.load_warning():
        notes.append(machine.load_warning())
    for name in TIMED:
        if name not in layers(place.world):
            notes.append(f"{name} is left out: its heads do not divide over {place.world} ranks")
            continue
        shapes = [Case(*LAYERS[name], rows, device=place.device) for rows in TIMED_ROWS]
        table, more = time_layer(place, name, shapes, torch_compile)
        tables.append(table)
        notes += more
    if place.rank == 0:
        console = output.console()
        for table in tables:
            console.print(table)
        for note in notes:
            console.print(note)


@record
def main() -> None:
    """Join the group and do what was asked for."""
    given = options()
    place = join(given.device, given.share_gpu, given.timeout)
    for path in given.module:
        qknorm_tvm.use(qknorm_tvm.load(path))
    if given.fail:
        fail(place, given.fail, given.timeout)
    if place.rank == 0:
        output.console().print(output.facts(facts(place)))
    with torch.no_grad():
        check(place, given.rows or (CPU_ROWS if place.device == "cpu" else GPU_ROWS))
        if place.captures if given.times is None else given.times:
            report_times(place, given.compile)
    leave(place)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        # Not through the interpreter's end, which may wait for what other ranks never send.
        os._exit(1)
