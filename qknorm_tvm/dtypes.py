"""Element types: what TVM, NumPy, torch and DLPack call each, and how values are rounded to it.

One name serves the spec, TVM, NumPy (with ml_dtypes) and torch: they agree on all of these.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class ElementType:
    """One element type.

    Parameters
    ----------
    name : str
        In a spec, TVM, NumPy and torch.
    dlpack_code : str
        DLPack's type code, as its header names it.
    bits : int
    is_operand : bool
        Whether Q, K and their outputs may have it.
    numpy_module : str
        The module that NumPy's type comes from. It is imported when the type is asked for: a type
        of ml_dtypes that nobody uses costs nothing.
    storage : str or None
        NumPy's type in whose name DLPack exchanges it, where DLPack's own is unknown to NumPy.
    """

    name: str
    dlpack_code: str
    bits: int
    is_operand: bool = False
    numpy_module: str = "numpy"
    storage: str | None = None

    @property
    def bytes(self) -> int:
        """Size of one element."""
        return self.bits // 8

    @property
    def c_dlpack(self) -> str:
        """The `DLDataType`, as an initializer in C."""
        return f"{{{self.dlpack_code}, {self.bits}, 1}}"

    @functools.cached_property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's type."""
        import numpy as np

        return np.dtype(getattr(importlib.import_module(self.numpy_module), self.name))

    @property
    def torch(self) -> Any:
        """torch's type."""
        return getattr(importlib.import_module("torch"), self.name)

    def round(self, values: npt.NDArray) -> npt.NDArray:
        """Round float32 values: to the nearest, ties to even, too large ones to infinity.

        Denormals are kept; every NaN stays one. All targets round so.
        """
        import numpy as np

        with np.errstate(all="ignore"):
            return values.astype(self.numpy)


#: Element types by name. Operands first, in the order in which messages list them.
ELEMENT_TYPES = {
    element.name: element
    for element in (
        ElementType(
            "bfloat16",
            "kDLBfloat",
            16,
            is_operand=True,
            numpy_module="ml_dtypes",
            storage="uint16",
        ),
        ElementType("float16", "kDLFloat", 16, is_operand=True),
        ElementType("float32", "kDLFloat", 32, is_operand=True),
        ElementType("int64", "kDLInt", 64),
        ElementType(
            "float8_e4m3fn",
            "kDLFloat8_e4m3fn",
            8,
            numpy_module="ml_dtypes",
            storage="uint8",
        ),
    )
}

#: Element types of q, k and their outputs, with their size in bytes.
DTYPE_BYTES = {
    name: element.bytes for name, element in ELEMENT_TYPES.items() if element.is_operand
}


def numpy_dtypes() -> dict[str, np.dtype[Any]]:
    """Return NumPy's types for the element types of operands."""
    return {name: ELEMENT_TYPES[name].numpy for name in DTYPE_BYTES}
