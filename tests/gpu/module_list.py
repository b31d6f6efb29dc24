"""Which modules the GPU tests use, by name; each is one file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from qknorm_tvm import KernelSpec

DTYPES = ("bfloat16", "float16", "float32")
PAIRINGS = tuple(itertools.product(DTYPES, DTYPES))
#: What the benchmarks time too: dtypes, and columns of Q and K.
FIXED = (
    ("bfloat16", "bfloat16", 1536, 256),
    ("bfloat16", "bfloat16", 6144, 1024),
    ("bfloat16", "bfloat16", 768, 128),
    ("bfloat16", "bfloat16", 256, 64),
    ("bfloat16", "bfloat16", 1537, 257),
    ("bfloat16", "bfloat16", 7, 1),
    ("bfloat16", "float32", 1536, 256),
    ("float32", "bfloat16", 1536, 256),
    ("float16", "float16", 1536, 256),
    ("float32", "float32", 1536, 256),
    ("float32", "float32", 6144, 1024),
)


#: What the operations that add up rows are tested with.
STATISTICS = (
    ("bfloat16", 1536, 256),
    ("bfloat16", 6144, 1024),
    ("bfloat16", 640, 128),
    ("bfloat16", 1537, 257),
    ("bfloat16", 7, 1),
    ("bfloat16", 32768, 1024),
    ("float16", 1536, 256),
    ("float32", 1536, 256),
    ("bfloat16", None, None),
    ("float32", None, None),
)


#: Of the layer over ranks: any columns, and those of a rank that is timed, of 1 and of 2.
RANKS = (
    ("bfloat16", None, None),
    ("float32", None, None),
    *(("bfloat16", q, k) for q, k in ((6144, 1024), (3072, 512), (5120, 1024), (2560, 512))),
)


#: What rotates, without its target.
ROTATING = tuple(
    KernelSpec(**{"op": "qk_rms_norm_rope_cache", "target": "cuda", **fields})  # type: ignore[arg-type]
    for fields in (
        {"q_cols": 1536, "k_cols": 256, "head_dim": 128, "rotary_dim": 64},
        {"q_cols": 1536, "k_cols": 256, "head_dim": 128, "rotary_dim": 64, "statistics": "local"},
        {"q_cols": 6144, "k_cols": 1024, "head_dim": 128, "rotary_dim": 128},
        {"q_cols": 6144, "k_cols": 1024, "head_dim": 128, "rotary_dim": 128, "statistics": "local"},
        # Partners read again; elements one by one; neighbours; no rotation.
        {"q_cols": 640, "k_cols": 160, "head_dim": 80, "rotary_dim": 32, "statistics": "local"},
        {"q_cols": 270, "k_cols": 90, "head_dim": 30, "rotary_dim": 20, "writes_k_out": True},
        {"q_cols": 512, "k_cols": 256, "head_dim": 128, "rotary_dim": 64, "interleaved": True,
         "in_dtype": "float16", "rotary_dtype": "float32"},
        {"q_cols": 512, "k_cols": 256, "head_dim": 64, "statistics": "local",
         "in_dtype": "float32"},
        {"q_cols": 512, "k_cols": 256, "head_dim": 128, "rotary_dim": 128, "statistics": "local",
         "cache_dtype": "float8_e4m3fn"},
        {"op": "qk_rms_norm_rope", "q_cols": 1536, "k_cols": 256, "head_dim": 128,
         "rotary_dim": 64},
    )
)  # fmt: skip


_ATTENTION = {"op": "qk_rms_norm_rope_cache", "q_cols": 1536, "k_cols": 256, "head_dim": 128,
              "rotary_dim": 64}  # fmt: skip
#: Of ranks that exchange statistics, without targets.
PEERS = tuple(
    KernelSpec(**{"target": "cuda", "statistics": "peers", **fields})  # type: ignore[arg-type]
    for fields in (
        {"op": "qk_rms_norm", "q_cols": 1536, "k_cols": 256},
        {"op": "qk_rms_norm", "q_cols": 768, "k_cols": 128},
        {"op": "qk_rms_norm", "q_cols": 391, "k_cols": 7},
        {"op": "qk_rms_norm", "q_cols": 6144, "k_cols": 1024, "cast_before_gamma": True},
        _ATTENTION,
        {"op": "qk_rms_norm_rope", "q_cols": 640, "k_cols": 160, "head_dim": 80, "rotary_dim": 32},
    )
)


def _layer(target: str, sizes: Sequence[tuple[str, int | None, int | None]]) -> list[KernelSpec]:
    ops = ("row_mean_of_squares_qk", "qk_rms_norm", "apply_qk_rms_norm")
    return [
        KernelSpec(op=op, in_dtype=dtype, q_cols=q, k_cols=k, target=target)
        for op in ops
        for dtype, q, k in sizes
    ]


def module_specs(target: str) -> dict[str, list[KernelSpec]]:
    """Return the specs of each module.

    Parameters
    ----------
    target : str
        The GPU's own, such as ``"cuda:sm_90"``.
    """

    def fixed(items: Sequence[tuple[str, str, int, int]]) -> list[KernelSpec]:
        return [
            KernelSpec(in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=target)
            for a, b, q, k in items
        ]

    single = fixed(FIXED[:1])
    return {
        "fixed": fixed(FIXED),
        "open": [KernelSpec(in_dtype=a, out_dtype=b, target=target) for a, b in PAIRINGS],
        "single": single,
        "reproducible": [
            KernelSpec(in_dtype=d, q_cols=1536, k_cols=256, target=target, reproducible=True)
            for d in ("bfloat16", "float32")
        ],
        "cast_before_gamma": [
            KernelSpec(
                in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=target, cast_before_gamma=True
            )
            for a, b, q, k in (FIXED[0], FIXED[4], FIXED[6], FIXED[8])
        ],
        "layer": _layer(target, STATISTICS),
        "ranks": _layer(target, RANKS),
        # With their own order of summation, which the tests of local statistics ask for.
        "rotating": [
            *(spec.replace(target=target) for spec in ROTATING),
            *(
                KernelSpec(op="row_mean_of_squares_qk", in_dtype=dtype, target=target)
                for dtype in ("bfloat16", "float32")
            ),
        ],
        # With what the three steps take, which are timed beside.
        "peers": [
            *(spec.replace(target=target) for spec in PEERS),
            *(
                KernelSpec(op=op, q_cols=q, k_cols=k, target=target)
                for op in ("row_mean_of_squares_qk", "apply_qk_rms_norm", "qk_rms_norm")
                for q, k in ((1536, 256), (768, 128))
            ),
            KernelSpec(**{**_ATTENTION, "target": target}),
        ],
        # Of one rank of two, which are timed: MiniMax-M2 and OLMo-2 32B.
        "peer_times": [
            KernelSpec(op="qk_rms_norm", q_cols=768, k_cols=128, statistics="peers", target=target),
            *(
                KernelSpec(
                    op=op,
                    q_cols=q,
                    k_cols=k,
                    target=target,
                    **({"head_dim": 128, "rotary_dim": rotary} if "rope" in op else {}),
                    **({} if statistics is None else {"statistics": statistics}),
                )
                for q, k, rotary in ((3072, 512, 64), (2560, 512, 128))
                for op, statistics in (
                    ("qk_rms_norm", "peers"),
                    ("qk_rms_norm_rope_cache", "peers"),
                    ("row_mean_of_squares_qk", None),
                    ("apply_qk_rms_norm", None),
                    ("qk_rms_norm_rope_cache", "given"),
                )
            ),
        ],
        "layer_other_outputs": [
            KernelSpec(
                op="qk_rms_norm",
                in_dtype=a,
                out_dtype=b,
                q_cols=1536,
                k_cols=256,
                target=target,
                reproducible=reproducible,
                cast_before_gamma=cast,
            )
            for a, b, reproducible, cast in (
                ("bfloat16", "float32", False, False),
                ("float32", "bfloat16", False, False),
                ("bfloat16", "bfloat16", True, False),
                ("bfloat16", "float16", False, True),
            )
        ],
        # Its wait for the previous kernel is taken out: shows that a test would notice.
        "without_wait": single,
        "layer_without_wait": [
            spec for spec in _layer(target, STATISTICS) if spec.in_dtype == "float16"
        ],
        # For a GPU that is older than what the file holds, and for one that is newer.
        "newer_gpu": [single[0].replace(target="cuda:sm_120")],
        "older_gpu": [single[0].replace(target="cuda:sm_80")],
    }


def file_name(name: str, specs: Sequence[KernelSpec]) -> str:
    """Return a module's file name: another list of specs has another name."""
    digest = hashlib.sha256("\n".join(spec.text for spec in specs).encode()).hexdigest()[:12]
    return f"{name}-{digest}.so"


@contextlib.contextmanager
def _no_wait() -> Iterator[None]:
    from tvm import tirx

    from qknorm_tvm.schedules import cuda_device

    original = cuda_device.grid_dependency

    def without(action: str) -> tirx.Expr:
        return tirx.const(0) if action == "wait" else original(action)

    with mock.patch.object(cuda_device, "grid_dependency", without):
        yield


def build_module(name: str, specs: Sequence[KernelSpec], folder: Path) -> Path:
    """Build one module into a folder; needs TVM and nvcc, and no GPU."""
    from qknorm_tvm import compile

    path = folder / file_name(name, specs)
    with _no_wait() if name.endswith("without_wait") else contextlib.nullcontext():
        compile(list(specs)).export(path)
    return path
