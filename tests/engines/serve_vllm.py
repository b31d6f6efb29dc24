"""Serve a tiny model by the real vLLM, and write what it answered: a process of a test.

    python serve_vllm.py OUT '{"model": "olmo2", "dtype": "bfloat16", "ranks": 2, ...}'

OUT is written as JSON: for each run tokens, log-probabilities as exact hexadecimal numbers, the
steps that the model was run for, and the calls of this package's operations in them. The plugin is
loaded by vLLM itself, through its entry point, or left off by QKNORM_TVM_ENGINES=0.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from pathlib import Path
from typing import Any

import checkpoints

#: Lengths of prompts. A step takes at most `STEP` tokens: the longer ones come in chunks.
LENGTHS, STEP, NEW = (1, 5, 17, 40, 63), 24, 32


def count(worker: Any) -> None:
    """Count, in a worker, the calls of each operation and the steps of the model."""
    from qknorm_tvm.call import cache

    counts: collections.Counter[str] = collections.Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return call

    for op, known in cache.entries.items():
        for key, entry in known.items():
            known[key] = counted(op, entry)
    model = worker.model_runner.model
    model.forward = counted("steps", model.forward)
    worker.qknorm_counts = counts


def counts(worker: Any) -> dict[str, int]:
    """Return what has been counted in a worker."""
    return dict(worker.qknorm_counts)


def widest(worker: Any) -> list[str]:
    """Return the types of the norms' weights in a worker."""
    names = worker.model_runner.model.named_parameters()
    return sorted({str(p.dtype) for name, p in names if "q_norm" in name or "k_norm" in name})


def scale_k(worker: Any) -> None:
    """Make a worker's K 1 % too large: what the comparison must see."""
    for name, parameter in worker.model_runner.model.named_parameters():
        if name.endswith("k_norm.weight"):
            parameter.data.mul_(1.01)


def run(options: dict[str, Any], folder: Path, *, eager: bool, scaled_k: bool) -> dict[str, Any]:
    """Return what one engine answers."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype=options["dtype"],
        tensor_parallel_size=options["ranks"],
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_batched_tokens=STEP,
        max_num_seqs=8,
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
        **options.get("engine", {}),
    )
    if scaled_k:
        llm.collective_rpc(scale_k)
    prompts = [
        {"prompt_token_ids": [(7 * i * i + 11 * i + length) % 509 + 3 for i in range(length)]}
        for length in LENGTHS
    ]
    parameters = SamplingParams(
        temperature=0.0, max_tokens=NEW, min_tokens=NEW, logprobs=5, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    # What is counted is what has been called before.
    llm.generate(prompts[:1], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    llm.collective_rpc(count)
    outputs = [output.outputs[0] for output in llm.generate(prompts, parameters, use_tqdm=False)]
    result = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [{str(token): value.logprob.hex() for token, value in step.items()} for step in one]
            for one in (output.logprobs for output in outputs)
        ],
        "counts": llm.collective_rpc(counts),
        "norm_dtypes": llm.collective_rpc(widest),
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def main(out: str, text: str) -> None:
    """Run what is asked for; vLLM's processes import this file, and must not."""
    options = json.loads(text)
    results = []
    # One folder for all processes of a test: vLLM's cache of compiled graphs knows it by name.
    folder = Path(options["folder"])
    if not folder.exists():
        checkpoints.write(folder, options["model"], options["dtype"], options.get("kv_heads"))
    for asked in options["runs"]:
        os.environ["QKNORM_TVM_ENGINE_STATISTICS"] = asked.get("statistics", "fused")
        result = run(options, folder, eager=asked["eager"], scaled_k=asked.get("scaled_k", False))
        results.append(asked | result)
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
