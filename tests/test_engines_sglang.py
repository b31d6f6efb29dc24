"""The attention layers of the real SGLang with its plugin, against SGLang without, on CPUs.

No model is served. Needs SGLang, and this package with its entry points beside it: in this
environment, or in that of the Python that QKNORM_TVM_TEST_SGLANG names. SGLang is installed without
its requirements there, beside torch for CPUs and transformers, and then what its models import;
torchvision and gguf are stood in for::

    pip install --no-deps sglang==0.5.23 qknorm-tvm orjson IPython
    QKNORM_TVM_TEST_SGLANG=/path/to/bin/python pytest -m slow tests/test_engines_sglang.py
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

SCRIPT = Path(__file__).parent / "engines" / "hook_sglang.py"
sys.path.insert(0, str(SCRIPT.parent))
from hook_sglang import DTYPES, HEAD_DIM, KV_HEADS, Q_HEADS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.frameworks]


@pytest.fixture(scope="module")
def python() -> str:
    return engine_python("sglang", "QKNORM_TVM_TEST_SGLANG", "sglang.srt.plugins")


def modules_of(ranks: int) -> str:
    """Compile what the layers call, and return QKNORM_TVM_MODULES."""
    fused = "qk_rms_norm" if ranks == 1 else "row_mean_of_squares_qk"
    paths = []
    for dtype in DTYPES:
        specs = [
            KernelSpec(
                op=op, in_dtype=dtype, q_cols=Q_HEADS * HEAD_DIM // ranks,
                k_cols=KV_HEADS * HEAD_DIM // ranks, target=OWN,
            )
            for op in ("apply_qk_rms_norm", fused)
        ]  # fmt: skip
        paths.append(compiled(f"sglang-{dtype}-{ranks}", *specs))
    return os.pathsep.join(map(str, paths))


def answers(python: str, out: Path, ranks: int, settings: dict[str, str]) -> tuple[list[Any], str]:
    """Run SGLang's layers; return what each rank wrote, and all that was logged."""
    launcher = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    launcher += ["--local-addr", "127.0.0.1"]
    with pytest.MonkeyPatch.context() as patch:
        # SGLang's own norms of MiniMax-M2 would be compiled, and sum in another order.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        for name, value in settings.items():
            patch.setenv(name, value)
        status, log = run_group([*launcher, str(SCRIPT), str(out)], seconds=900)
    assert status == 0, log[-6000:]
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)], log


@pytest.mark.parametrize("ranks", [1, 2])
def test_sglang_layers_answer_as_without_the_plugin(
    ranks: int, python: str, tmp_path: Path
) -> None:
    own, log = answers(python, tmp_path / "own", ranks, {"QKNORM_TVM_ENGINES": "0"})
    assert "qknorm-tvm:" not in log
    settings = {"QKNORM_TVM_MODULES": modules_of(ranks), "QKNORM_TVM_CACHE_DIR": str(tmp_path)}
    for statistics in ("torch", "fused"):
        settings["QKNORM_TVM_ENGINE_STATISTICS"] = statistics
        got, log = answers(python, tmp_path / statistics, ranks, settings)
        for name in ("MiniMaxM2QKRMSNorm: forward", "Olmo2Attention: _apply_qk_norm"):
            assert log.count(f"{name} replaced by qknorm_tvm's kernels") == ranks
        if statistics == "torch":
            assert got == own
            continue
        for mine, others in zip(got, own, strict=True):
            for layer, outputs in others.items():
                # Roundings of a mean; in bfloat16 such a mean moves elements to a neighbour.
                rel = 2**-7 if "bfloat16" in layer else 1e-6
                for one, other in zip(mine[layer], outputs, strict=True):
                    assert [*map(tuple, one)] == [
                        pytest.approx(row, rel=rel, abs=1e-7) for row in map(tuple, other)
                    ]
