"""Build the modules of the GPU tests on a machine without a GPU: TARGET, the folder, names.

All modules where no names are given.

python tests/gpu/build_modules.py cuda:sm_90 modules/
QKNORM_TVM_TEST_MODULES=modules pytest -m gpu tests/gpu     # on the GPU machine, without TVM
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from module_list import build_module, module_specs


def main(target: str, folder: str, *names: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    lists = module_specs(target)
    for name in names or lists:
        specs = lists[name]
        start = time.perf_counter()
        path = build_module(name, specs, Path(folder))
        print(f"{path} {path.stat().st_size} bytes, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
