"""What must be there before the first trial; each lack in one sentence with what mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

from ..errors import BuildError, TuningError
from ..spec import KernelSpec
from ..targets import parse_target

COST_MODELS = ("auto", "xgb", "random")


def check_extras(cost_model: str, *, remote: bool) -> str:
    """Return the cost model to use, ``"xgb"`` or ``"random"``.

    Raises
    ------
    TuningError
        A package is missing.
    """
    needed = ["tvm", "cloudpickle", "psutil"]
    needed += ["tornado"] * remote + ["xgboost"] * (cost_model == "xgb")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise TuningError(
            f"tuning needs {' and '.join(missing)}, which {_is(missing)} not installed; install "
            "what it needs with: pip install 'qknorm-tvm[tune]'"
        )
    if cost_model == "auto":
        return "xgb" if importlib.util.find_spec("xgboost") else "random"
    return cost_model


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def check_compiler(text: str) -> None:
    """Check that candidates can be linked.

    Raises
    ------
    TuningError
        There is no compiler.
    """
    try:
        if parse_target(text).kind == "cuda":
            from ..build.cuda import find_nvcc

            find_nvcc()
        else:
            from ..build.native import find_c_compiler

            find_c_compiler(os.environ.get("CC"))
    except (BuildError, RuntimeError) as error:
        raise TuningError(str(error)) from None


def check_numbers(**numbers: Any) -> None:
    """Check that counts are integers from 1 on.

    Raises
    ------
    TypeError, ValueError
        One is not; the message names it.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_specs(specs: Sequence[Any], text: str) -> list[KernelSpec]:
    """Return the specs for the target that is tuned, each once.

    Raises
    ------
    TypeError, ValueError
        One cannot be tuned.
    """
    kind = parse_target(text).kind
    checked = []
    for spec in specs:
        if not isinstance(spec, KernelSpec):
            raise TypeError(f"specs must be KernelSpecs, got {type(spec).__name__}")
        if spec.operation.rotates:
            raise ValueError(
                f"specs must not rotate: {spec.op} cannot be tuned yet, it has a heuristic's config"
            )
        if spec.q_cols is None or spec.k_cols is None:
            raise ValueError(f"specs must have fixed columns to be tuned, got {spec.text}")
        if spec.parsed_target.kind != kind:
            raise ValueError(f"specs must be for {text}, which is tuned, got {spec.text}")
        checked.append(spec.replace(target=text))
    if not checked:
        raise ValueError("specs must name at least one KernelSpec, got none")
    return list(dict.fromkeys(checked))


def check_space(folder: Any) -> None:
    """Check that a folder of logs can be written to.

    Raises
    ------
    TuningError
        It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TuningError(
            f"{folder} cannot be made ({error.strerror}); give another folder with --logs"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TuningError(f"{folder} cannot be written to; give another folder with --logs")
    if shutil.disk_usage(folder).free < 1 << 26:
        raise TuningError(f"less than 64 MiB are free at {folder}; make room for its database")
