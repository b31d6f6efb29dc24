"""The layer over ranks on GPUs, by `tests/tensor_parallel/torchrun_layer.py`; figures are printed.

Run with ``-rP`` to see them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gpu_calls import torch
from rank_processes import run_ranks

ModulePath = Callable[[str], Path]
#: With torch.compile, which is most of it.
SECONDS = 400


def _run(module_path: ModulePath, world: int, *options: str) -> tuple[int, str]:
    given = ["--module", str(module_path("ranks")), *options]
    status, output = run_ranks(world, *given, seconds=SECONDS)
    print(output)
    return status, output


def _options(sharing: bool) -> list[str]:
    """Return those of two ranks: on one GPU, or on two where there are two."""
    count = torch.cuda.device_count()
    if not sharing and count < 2:
        pytest.skip(f"NCCL takes one rank a GPU: needs 2, found {count}")
    return ["--share-gpu"] if sharing else ["--device", "cuda"]


BOTH = pytest.mark.parametrize("sharing", [True, False], ids=["gloo-one-gpu", "nccl-two-gpus"])


def test_one_rank_over_nccl(module_path: ModulePath) -> None:
    """Results, replays with NCCL's all-reduce inside, and times."""
    status, output = _run(module_path, 1, "--device", "cuda")
    assert status == 0, output
    assert "cases passed on 1 rank over nccl" in output


@BOTH
def test_two_ranks(module_path: ModulePath, sharing: bool) -> None:
    status, output = _run(module_path, 2, *_options(sharing))
    assert status == 0, output
    assert f"cases passed on 2 ranks over {'gloo' if sharing else 'nccl'}" in output


@BOTH
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("disagree", "got 4 on rank 0; 5 on rank 1"),
        ("raise", "rank 1 fails on purpose"),
        ("absent", ""),  # in the backend's words, which are long
    ],
)
def test_an_error_on_one_rank_ends_both(
    module_path: ModulePath, sharing: bool, how: str, message: str
) -> None:
    """A rank that waits on the GPU for ever."""
    status, output = _run(module_path, 2, *_options(sharing), "--fail", how, "--timeout", "10")
    assert status != 0
    assert message in output
    if how == "disagree":
        assert all(f"rank {rank} is told: rows of q and k" in output for rank in (0, 1))
