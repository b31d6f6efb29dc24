"""The layer over real processes: gloo, 2 and 16 ranks; the cases are in `rank_cases`.

``QKNORM_TVM_CAMPAIGN=1`` runs them with 4 and 8 ranks too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from rank_processes import run_group
from support import DTYPES, compiled

from qknorm_tvm import KernelSpec
from qknorm_tvm.targets import host_cpu_target

torch = pytest.importorskip("torch", reason="torch is not installed")

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
pytestmark = pytest.mark.frameworks
#: A rank that hangs fails the test instead of stopping the run.
SECONDS = 240
_CAMPAIGN = bool(os.environ.get("QKNORM_TVM_CAMPAIGN"))


def modules() -> list[str]:
    """Compile what the ranks need once, for any number of columns; returns the files."""
    target = host_cpu_target()
    apply = [KernelSpec(in_dtype=dtype, target=target) for dtype in DTYPES]
    statistics = [
        KernelSpec("row_mean_of_squares_qk", in_dtype, "float32", target=target)
        for in_dtype in ("bfloat16", "float32")
    ]
    fused = KernelSpec("qk_rms_norm", target=target)  # of groups of one rank
    rounded = KernelSpec(target=target, cast_before_gamma=True)
    rotated = [
        KernelSpec(op=op, q_cols=96, k_cols=32, head_dim=32, rotary_dim=16, target=target)
        for op in ("qk_rms_norm_rope", "qk_rms_norm_rope_cache")
    ]
    return [
        str(compiled("ranks", *apply, *statistics, fused, *rotated)),
        str(compiled("ranks-rounded", rounded)),
    ]


def logs(folder: Path) -> str:
    return "\n".join(f"---- {log.name}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))


@needs_gloo
@pytest.mark.parametrize("world", [2, 4, 8, 16] if _CAMPAIGN else [2, 16])
def test_every_case(world: int, tmp_path: Path) -> None:
    ranks = Path(__file__).with_name("ranks.py")
    status, output = run_group(
        [sys.executable, str(ranks), str(world), str(tmp_path), *modules()],
        seconds=SECONDS,
        logs=lambda: logs(tmp_path),
    )
    assert status == 0, f"{output}\n{logs(tmp_path)}"
    for rank in range(world):
        assert (tmp_path / f"rank-{rank}.log").read_text().endswith("all cases passed\n")
