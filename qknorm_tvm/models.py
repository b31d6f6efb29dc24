"""Models whose attention normalises the whole Q and K, and the specs that their layers need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from .spec import KernelSpec
from .targets import parse_target
from .tensor_parallel.layout import HeadLayout


@dataclasses.dataclass(frozen=True)
class Model:
    """One model's attention.

    Parameters
    ----------
    q_heads, kv_heads, head_dim : int
        Of a whole layer.
    rotary_dim : int
        Columns of a head that are rotated, in pairs as in GPT-NeoX; 0: none.
    epsilon : float
        Added to the mean squares.
    cast_before_gamma : tuple of bool
        Forms of the norm that are in use. MiniMax-M2's rounds before gamma in Hugging Face's code,
        and not in vLLM's and SGLang's; OLMo's in vLLM's alone.
    dtypes : tuple of str
        Element types in which it is published.
    """

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    rotary_dim: int = 128
    epsilon: float = 1e-6
    cast_before_gamma: tuple[bool, ...] = (False,)
    dtypes: tuple[str, ...] = ("bfloat16",)

    def layout(self, ranks: int) -> HeadLayout:
        """Return a rank's heads; a ``ValueError`` where they do not divide over the ranks."""
        return HeadLayout(self.q_heads, self.kv_heads, self.head_dim, ranks)

    def specs(self, ranks: int, target: str, stages: Iterable[str] = ("norm",)) -> list[KernelSpec]:
        """Return what one rank's layer calls, for each of some `STAGES`.

        Norm: one launch where a rank has all columns, unless the statistics are another's;
        otherwise statistics, which are reduced over the ranks, and apply. On GPUs several ranks
        also have the form of one launch in which they exchange statistics.

        Raises
        ------
        ValueError
            The heads do not divide over the ranks.
        """
        layout = self.layout(ranks)
        operations: list[tuple[str, dict[str, Any]]] = []
        exchanges = ranks > 1 and parse_target(target).kind == "cuda"
        if "norm" in stages:
            operations += [("qk_rms_norm" if ranks == 1 else "row_mean_of_squares_qk", {})]
            operations += [("apply_qk_rms_norm", {})]
            operations += [("qk_rms_norm", {"statistics": "peers"})] if exchanges else []
        rotation = {"head_dim": self.head_dim, "rotary_dim": self.rotary_dim}
        for stage in stages:
            if (op := STAGES[stage]) is not None:
                of_rows = ("local",) if ranks == 1 else ("given", *["peers"] * exchanges)
                operations += [(op, {"statistics": kind, **rotation}) for kind in of_rows]
        return [
            KernelSpec(
                op=op,
                in_dtype=dtype,
                q_cols=layout.q_cols,
                k_cols=layout.k_cols,
                cast_before_gamma=cast,
                target=target,
                **fields,
            )
            for dtype in self.dtypes
            for op, fields in operations
            for cast in (self.cast_before_gamma if op != "row_mean_of_squares_qk" else (False,))
        ]


#: What a pack may hold for each layer, with the operation that rotates where one does.
STAGES = {"norm": None, "rope": "qk_rms_norm_rope", "rope-cache": "qk_rms_norm_rope_cache"}

#: Models by the name that the command line knows them by.
MODELS = {
    # MiniMax-M2 to M2.7.
    "minimax-m2": Model(48, 8, rotary_dim=64, cast_before_gamma=(True, False)),
    # OLMo-2 and OLMo-3; OLMo-3 has no 1B and 13B.
    "olmo2-1b": Model(16, 16, cast_before_gamma=(False, True)),
    "olmo2-7b": Model(32, 32, cast_before_gamma=(False, True)),
    "olmo2-13b": Model(40, 40, cast_before_gamma=(False, True)),
    "olmo2-32b": Model(40, 8, cast_before_gamma=(False, True)),
    "olmo3-7b": Model(32, 32, cast_before_gamma=(False, True)),
    "olmo3-32b": Model(40, 8, cast_before_gamma=(False, True)),
    # Every fourth layer has attention, and positions only from the layers between.
    "olmo-hybrid-7b": Model(30, 30, rotary_dim=0),
    "olmoe": Model(16, 16, epsilon=1e-5),
}


def modules_of(specs: Iterable[KernelSpec]) -> list[Sequence[KernelSpec]]:
    """Group specs into modules: a file for each target, columns, dtypes and form of the norm.

    A module picks a spec by the dtypes and columns of a call, which do not show the form.
    """
    groups: dict[tuple, list[KernelSpec]] = {}
    for spec in dict.fromkeys(specs):
        normalised = spec.out_dtype if spec.operation.normalises else spec.in_dtype
        key = (spec.target, spec.q_cols, spec.k_cols, spec.in_dtype, normalised)
        groups.setdefault((*key, spec.cast_before_gamma), []).append(spec)
    return list(groups.values())
