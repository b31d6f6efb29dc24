"""The attention input of a model in one launch: prefill into a paged cache, then decode steps.

Every step is compared bit for bit with the unfused torch graph, then timed. On a GPU the decode
step is captured in a CUDA graph, otherwise it runs on the CPU::

    python examples/attention_input.py --picture attention_input.png

Needs torch; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import qknorm_tvm

HEAD_DIM, ROTARY_DIM, BLOCK_SIZE, MAX_POSITION = 128, 64, 16, 4096
EPSILON = 1e-6


def angles(dtype: torch.dtype) -> torch.Tensor:
    """Return `cos_sin_cache`: cosines in the first half of a row, sines in the second."""
    frequencies = 10000.0 ** (-torch.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
    turns = torch.arange(MAX_POSITION)[:, None] * frequencies
    return torch.cat([turns.cos(), turns.sin()], dim=1).to(dtype)


def fused(t: dict[str, Any]) -> torch.Tensor:
    """Norm, rotate and store in one launch; return q_out."""
    return qknorm_tvm.qk_rms_norm_rope_cache(**t, head_dim=HEAD_DIM, epsilon=EPSILON)[0]


def unfused(t: dict[str, Any]) -> torch.Tensor:
    """Do the same in torch, operation by operation."""
    cos, sin = t["cos_sin_cache"][t["positions"]].float()[:, None].chunk(2, dim=-1)
    rs = (t["qk_var"] + EPSILON).rsqrt()
    half, outputs = ROTARY_DIM // 2, []
    for column, name in enumerate("qk"):
        x = t[name]
        y = ((x.float() * rs[:, column, None]) * t[f"gamma_{name}"]).to(x.dtype)
        y = y.view(len(x), -1, HEAD_DIM)
        a, b = y[..., :half].float(), y[..., half:ROTARY_DIM].float()
        parts = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
        outputs.append(torch.cat([*parts, y[..., ROTARY_DIM:]], dim=-1))
    slots = t["slot_mapping"]
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    t["k_cache"][block, offset] = outputs[1]
    t["v_cache"][block, offset] = t["v"].view(len(slots), -1, HEAD_DIM)
    return outputs[0].flatten(1)


def microseconds(run: Callable[[], Any], device: str) -> float:
    """Return the median time of a call."""
    samples = []
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / 5 * 1e6)
    return statistics.median(samples)


def captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return a CUDA graph's replay of a call, or on CPUs the call."""
    if device == "cpu":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def draw(path: str, times: dict[str, tuple[float, float]], device: str) -> None:
    """Write a picture of the times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (label, colour) in enumerate((("one launch", "#D55E00"), ("unfused", "#56B4E9"))):
        places = [place + 0.4 * index for place in range(len(times))]
        axes.bar(places, [pair[index] for pair in times.values()], 0.4, label=label, color=colour)
    axes.set_xticks([place + 0.2 for place in range(len(times))], list(times))
    axes.set_yscale("log")
    axes.set_ylabel(f"µs, {device}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--steps", type=int, default=8, help="decode steps")
    parser.add_argument("--heads", type=int, nargs=2, default=(12, 2), help="of Q, and of K and V")
    parser.add_argument("--picture", help="where to write a picture of the times")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q_heads, kv_heads = options.heads
    count, tokens = options.sequences, options.prompt + options.steps
    # Each sequence has blocks of its own, in any order.
    per_sequence = -(-tokens // BLOCK_SIZE)
    blocks = torch.randperm(count * per_sequence).view(count, per_sequence).to(device)
    shape = (2, blocks.numel(), BLOCK_SIZE, kv_heads, HEAD_DIM)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
    weights = {
        "gamma_q": torch.rand(q_heads * HEAD_DIM, device=device),
        "gamma_k": torch.rand(kv_heads * HEAD_DIM, device=device),
        "cos_sin_cache": angles(torch.bfloat16).to(device),
    }

    def step(positions: torch.Tensor) -> dict[str, Any]:
        """Return one step's tensors: a projection's output, and where its rows go."""
        rows = torch.arange(count, device=device).repeat_interleave(len(positions))
        at = positions.to(device).repeat(count)
        widths = [heads * HEAD_DIM for heads in (q_heads, kv_heads, kv_heads)]
        qkv = torch.randn(len(at), sum(widths), device=device).bfloat16()
        q, k, v = qkv.split(widths, dim=1)
        return {
            "q": q, "k": k, "v": v, **weights, "positions": at,
            "slot_mapping": blocks[rows, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
            "qk_var": qknorm_tvm.row_mean_of_squares_qk(q, k),
        }  # fmt: skip

    times = {}
    for index in range(options.steps + 1):
        first = 0 if index == 0 else options.prompt + index - 1
        positions = torch.arange(first, options.prompt if index == 0 else first + 1)
        tensors = step(positions)
        runs = []
        for function, cache in zip((fused, unfused), caches, strict=True):
            call = {**tensors, "k_cache": cache[0], "v_cache": cache[1]}
            runs.append(lambda function=function, call=call: function(call))
        q_out, wanted = runs[0](), runs[1]()
        assert torch.equal(q_out, wanted), f"q_out differs in step {index}"
        assert torch.equal(*caches), f"the caches differ after step {index}"
        if index < 2:
            label = ("prefill", "decode")[index] + f", M = {len(tensors['q'])}"
            replays = [captured(run, device) for run in runs]
            times[label] = tuple(microseconds(run, device) for run in replays)
            print(f"{label}: {times[label][0]:.1f} µs in one launch, {times[label][1]:.1f} unfused")
    print(f"prefill and {options.steps} decode steps equal the unfused graph, bit for bit")
    if options.picture:
        draw(options.picture, times, device)


if __name__ == "__main__":
    with torch.no_grad():
        main()
