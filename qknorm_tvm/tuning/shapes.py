"""What is tuned by default: per-rank shapes of models that use the operation, and row counts."""

from __future__ import annotations

from ..spec import KernelSpec

#: Q and K columns of a whole layer, by model: heads times head size.
MODELS = {
    "MiniMax-M2": (48 * 128, 8 * 128),
    "OLMo-2 7B": (32 * 128, 32 * 128),
    "OLMo-2 32B": (40 * 128, 8 * 128),
}
#: Ranks over which the heads are divided.
TENSOR_PARALLEL = (1, 2, 4, 8)
#: Decode, and prefill.
ROWS = (1, 16, 64, 512, 4096, 16384)


def default_shapes() -> list[tuple[int, int]]:
    """Return ``(q_cols, k_cols)`` of one rank of every model, each pair once."""
    return list(
        dict.fromkeys(
            (q_cols // ranks, k_cols // ranks)
            for q_cols, k_cols in MODELS.values()
            for ranks in TENSOR_PARALLEL
        )
    )


def default_specs(target: str) -> list[KernelSpec]:
    """Return the bfloat16 specs that are tuned by default for a target."""
    return [KernelSpec(q_cols=q, k_cols=k, target=target) for q, k in default_shapes()]
