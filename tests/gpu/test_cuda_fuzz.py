"""Random calls on the GPU: bit-exact, or an error and nothing written; see `fuzz_device`.

``QKNORM_TVM_FUZZ_CASES=10000`` makes so many cases, other ones in every run; by default they are
always the same.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from fuzz_device import run_cases

_GIVEN = os.environ.get("QKNORM_TVM_FUZZ_CASES")
_CASES = int(_GIVEN or 2000)
#: The API takes the last that fits: not the fused operation whose rsqrt is 1 / sqrt.
_MODULES = ("open", "fixed", "cast_before_gamma", "layer_other_outputs", "layer", "rotating")


def test_exact_or_refused(module_path: Callable[[str], Path]) -> None:
    """A wrong bit in some layout; a byte written beside an output, or by a refusal."""
    first = 0 if _GIVEN is None else secrets.randbelow(1 << 40)
    done = run_cases("cuda", first, _CASES, [module_path(name) for name in _MODULES])
    assert done["exact"] + done["refused"] == _CASES
    assert min(done["exact"], done["refused"]) > _CASES // 5
    assert done["many rows"] > _CASES // 50
    print(f"from case {first}: {done}")
