"""Calls on GPU tensors and the comparison with unfused torch, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qknorm_tvm import Module
from qknorm_tvm.bench.cuda import equal_bits
from qknorm_tvm.check.reference_torch import apply_qk_rms_norm as torch_graph

torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")

NAMES = ("q_out", "k_out", "gamma_q", "gamma_k", "qk_var", "q", "k")


@dataclasses.dataclass
class Call:
    """The arguments of one call, on the GPU."""

    q_out: Any
    k_out: Any
    gamma_q: Any
    gamma_k: Any
    qk_var: Any
    q: Any
    k: Any
    epsilon: float = 1e-6

    def arguments(self) -> list[Any]:
        return [*(getattr(self, name) for name in NAMES), self.epsilon]

    def expected(self) -> tuple[Any, Any]:
        return torch_graph(
            self.q, self.k, self.qk_var, self.gamma_q, self.gamma_k, self.epsilon, self.q_out.dtype
        )

    def run(self, module: Module) -> None:
        module.apply_qk_rms_norm(*self.arguments())

    def is_exact(self, expected: tuple[Any, Any]) -> bool:
        return equal_bits(self.q_out, expected[0]) and equal_bits(self.k_out, expected[1])

    def poison(self) -> None:
        for out in (self.q_out, self.k_out):
            out.fill_(float("nan"))


def make_call(
    rows: int,
    q_cols: int = 1536,
    k_cols: int = 256,
    in_dtype: str = "bfloat16",
    out_dtype: str | None = None,
    *,
    seed: int = 0,
    device: str = "cuda",
) -> Call:
    """Return random inputs and outputs full of NaN."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, generator=generator)

    x, out = getattr(torch, in_dtype), getattr(torch, out_dtype or in_dtype)
    call = Call(
        q_out=torch.empty(rows, q_cols, device=device, dtype=out),
        k_out=torch.empty(rows, k_cols, device=device, dtype=out),
        gamma_q=1 + random(q_cols) / 8,
        gamma_k=1 + random(k_cols) / 8,
        qk_var=random(rows, 2).abs() + 0.1,
        q=random(rows, q_cols).to(x),
        k=random(rows, k_cols).to(x),
    )
    call.poison()
    return call


def check(module: Module, call: Call, label: str = "") -> None:
    """Call and compare with unfused torch, bit for bit."""
    expected = call.expected()
    call.run(module)
    assert call.is_exact(expected), label
