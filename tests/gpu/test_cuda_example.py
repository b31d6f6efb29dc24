"""The example of a paged cache on a GPU: its own check, and decode steps from one CUDA graph."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_calls import torch
from test_cuda_streams import _capture

import qknorm_tvm
from qknorm_tvm import Module

GetModule = Callable[[str], Module]
_SOURCE = Path(__file__).parents[2] / "examples" / "attention_input.py"
SEQUENCES, PROMPT, STEPS, Q_HEADS, KV_HEADS = 4, 40, 6, 12, 2


@pytest.fixture
def example(get_module: GetModule) -> Any:
    """The example, served by the modules of these tests: nothing is compiled on a GPU's machine."""
    qknorm_tvm.use(get_module("rotating"))
    spec = importlib.util.spec_from_file_location("attention_input", _SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prefill_and_decode(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It compares every step with the unfused graph, and captures the steps that it times."""
    monkeypatch.setattr(sys, "argv", ["attention_input.py", "--prompt", "20", "--steps", "3"])
    with torch.no_grad():
        example.main()
    printed = capsys.readouterr().out
    assert "decode, M = 4: " in printed
    assert "prefill and 3 decode steps equal the unfused graph, bit for bit" in printed


@torch.no_grad()
def test_decode_steps_are_replays_of_one_graph(example: Any) -> None:
    """A position, a slot or statistics that were baked into the graph when it was captured."""
    torch.manual_seed(0)
    widths = [heads * example.HEAD_DIM for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
    per_sequence = -(-(PROMPT + STEPS) // example.BLOCK_SIZE)
    blocks = torch.randperm(SEQUENCES * per_sequence, device="cuda").view(SEQUENCES, per_sequence)
    shape = (2, blocks.numel(), example.BLOCK_SIZE, KV_HEADS, example.HEAD_DIM)
    caches = torch.randn(shape, device="cuda").bfloat16()
    wanted = caches.clone()
    qkv = torch.zeros(SEQUENCES, sum(widths), dtype=torch.bfloat16, device="cuda")
    q, k, v = qkv.split(widths, dim=1)
    step = {
        "q": q, "k": k, "v": v,
        "gamma_q": torch.rand(widths[0], device="cuda"),
        "gamma_k": torch.rand(widths[1], device="cuda"),
        "cos_sin_cache": example.angles(torch.bfloat16).cuda(),
        "positions": torch.zeros(SEQUENCES, dtype=torch.int64, device="cuda"),
        "slot_mapping": torch.full((SEQUENCES,), -1, device="cuda"),
        "qk_var": torch.ones(SEQUENCES, 2, device="cuda"),
        "k_cache": caches[0], "v_cache": caches[1],
    }  # fmt: skip
    q_out = torch.empty_like(q)

    def run() -> None:
        qknorm_tvm.row_mean_of_squares_qk(q, k, qk_var_out=step["qk_var"])
        example.fused({**step, "q_out": q_out})

    graph = _capture(run)
    assert torch.equal(caches, wanted), "a negative slot stored something"
    rows = torch.arange(SEQUENCES, device="cuda")
    for index in range(STEPS):
        # Sequences are of different lengths.
        at = PROMPT + index - 7 * rows
        qkv.copy_(torch.randn_like(qkv))
        step["positions"].copy_(at)
        block = blocks[rows, at // example.BLOCK_SIZE]
        step["slot_mapping"].copy_(block * example.BLOCK_SIZE + at % example.BLOCK_SIZE)
        graph.replay()
        torch.cuda.synchronize()
        unfused = {**step, "k_cache": wanted[0], "v_cache": wanted[1]}
        assert torch.equal(q_out, example.unfused(unfused)), f"q_out differs in step {index}"
        assert torch.equal(caches, wanted), f"the caches differ after step {index}"
