"""The script that torchrun starts, on CPUs over gloo; on GPUs `tests/gpu/test_cuda_ranks.py`."""

from __future__ import annotations

import pytest
from rank_processes import run_ranks
from test_many_ranks import modules, needs_gloo, torch

pytestmark = [pytest.mark.frameworks, needs_gloo]
#: A rank that hangs fails the test instead of stopping the run.
SECONDS = 120


def run(*options: str, seconds: float = SECONDS) -> tuple[int, str]:
    module = modules()[0]
    return run_ranks(2, "--device", "cpu", "--module", module, *options, seconds=seconds)


def test_every_case_and_the_tables() -> None:
    status, output = run("--times", "--no-compile")
    assert status == 0, output
    assert "cases passed on 2 ranks over gloo" in output
    for layer in ("MiniMax-M2, 3072/512", "OLMo-2 32B, 2560/512"):
        assert f"{layer} columns a rank, bfloat16, 2 over gloo" in output


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        (
            "disagree",
            [
                f"rank {rank} is told: rows of q and k must be the same on every rank, "
                "got 4 on rank 0; 5 on rank 1"
                for rank in (0, 1)
            ],
        ),
        ("raise", ["RuntimeError: rank 1 fails on purpose"]),
        ("absent", ["Timed out waiting"]),
    ],
)
def test_an_error_on_one_rank_ends_both(how: str, messages: list[str]) -> None:
    """A rank that waits for ever for one that is gone; an exit status of 0."""
    status, output = run("--fail", how, "--timeout", "5")
    assert status != 0, output
    for message in messages:
        assert message in output


def test_a_run_that_hangs_is_ended() -> None:
    """Ranks that outlive the test, or that it waits for."""
    with pytest.raises(pytest.fail.Exception, match="not done after 8 s"):
        run("--fail", "absent", seconds=8)


def test_too_few_gpus() -> None:
    """The first CUDA call that fails says nothing about what to do."""
    count = torch.cuda.device_count()
    if count > 1:
        pytest.skip(f"two ranks have a GPU each here, found {count}")
    status, output = run("--device", "cuda")
    assert status != 0
    assert f"GPUs must be 2 for 2 ranks, got {count}: give --share-gpu for one GPU, or" in output
