"""Modules for the GPU tests: pre-built ones, or built here; and the reason where they are skipped.

``QKNORM_TVM_TEST_MODULES`` names the folder that ``build_modules.py`` wrote, on any machine.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from module_list import build_module, file_name, module_specs

from qknorm_tvm import Module, load

GetModule = Callable[[str], Module]


def _why_not() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if not os.environ.get("QKNORM_TVM_TEST_MODULES") and importlib.util.find_spec("tvm") is None:
        return "TVM is not installed, and QKNORM_TVM_TEST_MODULES names no pre-built modules"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = _why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from qknorm_tvm.call.arrays import cuda_target

    given = os.environ.get("QKNORM_TVM_TEST_MODULES")
    folder = Path(given) if given else tmp_path_factory.mktemp("modules")
    lists = module_specs(cuda_target(0))

    def get(name: str) -> Path:
        path = folder / file_name(name, lists[name])
        if given and not path.exists():
            raise FileNotFoundError(f"{path}: build it with tests/gpu/build_modules.py")
        return path if path.exists() else build_module(name, lists[name], folder)

    return get


@pytest.fixture(scope="session")
def get_module(module_path: Callable[[str], Path]) -> GetModule:
    loaded: dict[str, Module] = {}

    def get(name: str) -> Module:
        if name not in loaded:
            loaded[name] = load(module_path(name))
        return loaded[name]

    return get
