"""The frameworks whose arrays are accepted: how each is looked at, allocated and passed on."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

from ..dtypes import DTYPE_BYTES, ELEMENT_TYPES
from ..spec import KernelSpec
from ..targets import host_cpu_target

Call = Callable[..., Any]


def canonical_dtype(name: str, dtype: Any) -> str:
    """Return a spec's name for a dtype given as a string or a framework's own object."""
    text = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    text = str(text).rpartition(".")[2]
    if text not in DTYPE_BYTES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return text


def _array_namespace(array: Any) -> Any:
    """Return the module of an array's framework that makes arrays, or None where it has none."""
    namespace = getattr(array, "__array_namespace__", None)
    if namespace:
        return namespace()
    # CuPy 14 does not follow the array API.
    module = sys.modules.get(type(array).__module__.partition(".")[0])
    return module if hasattr(module, "empty") else None


def _is_jax(array: Any) -> bool:
    """Whether an array is JAX's, which cannot be written to."""
    xp = _array_namespace(array)
    return xp is not None and xp.__name__.partition(".")[0] == "jax"


class Adapter:
    """What differs between frameworks; this one is for whatever offers DLPack."""

    def dtype(self, array: Any) -> str:
        """Return the element type's name, such as ``"bfloat16"``."""
        return str(array.dtype).rpartition(".")[2]

    def target(self, array: Any) -> str:
        """Return the spec target for the device that the array is on."""
        try:
            kind, index = array.__dlpack_device__()
        except Exception as error:  # such as an array that is being traced
            raise TypeError(f"q cannot be passed by DLPack: {error}") from error
        if int(kind) in (1, 3):
            return host_cpu_target()
        if int(kind) == 2:
            return cuda_target(int(index))
        raise ValueError(f"q must be on the CPU or a CUDA device, got DLPack device type {kind}")

    def check_metadata(self, name: str, array: Any) -> None:
        """Refuse an array whose shape and element type cannot be asked for."""
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise TypeError(
                f"{name} must have the attributes dtype and shape, got {type(array).__name__}"
            )

    def device_index(self, array: Any) -> int:
        """Return the number of the array's device."""
        return int(array.__dlpack_device__()[1])

    def empty(
        self, like: Any, shape: tuple[int, int], dtype: str, *, name: str = "q_out and k_out"
    ) -> Any:
        """Allocate a packed array of the same framework and device; `name` is for messages."""
        import tvm_ffi

        xp = _array_namespace(like)
        if _is_jax(like):
            raise ValueError(
                f"{name} must be given for JAX arrays, which cannot be written to, got None: pass "
                "NumPy arrays"
            )
        if xp is not None:
            with like.device if hasattr(like.device, "__enter__") else _nothing():
                return xp.empty(shape, dtype=dtype)
        raise ValueError(
            f"{name} must be given for {type(like).__name__}, which has no way to "
            f"allocate ({tvm_ffi.__name__} passes it by DLPack), got None"
        )

    def bounds(self, array: Any) -> tuple[int, int]:
        """Return the least and the largest number of an array that has some; waits for the GPU."""
        if not hasattr(array, "min"):
            raise ValueError(
                f"validate must be False for {type(array).__name__}, whose numbers cannot be "
                "looked at, got True"
            )
        return int(array.min()), int(array.max())

    def fast_call(self, function: Call, general: Call, spec: KernelSpec) -> Call:
        """Return the shortest way to `function` for calls with arrays of this framework.

        Both take the tensors of the spec's operation, epsilon if it has one, and a stream. What
        the short way does not expect, an error included, it leaves to `general`: the module has
        written nothing by then.
        """
        return general

    def view(self, name: str, array: Any, *, writable: bool) -> Any:
        """Return what tvm-ffi takes for this array; no copy."""
        import tvm_ffi

        if writable and _is_jax(array):
            raise ValueError(f"{name} must be writable, got a JAX array: pass a NumPy array")
        try:
            return tvm_ffi.from_dlpack(array)
        except Exception as error:
            raise TypeError(f"{name} cannot be passed by DLPack: {error}") from error

    def refuse_derivative(self, name: str, array: Any) -> None:
        """Refuse an array whose derivative is asked for."""

    def count_write(self, array: Any) -> None:
        """Tell the array's framework that it has been written to, where that counts."""


def _spelt_out(
    spec: KernelSpec, condition: str, convert: dict[str, str], after: str, names: dict[str, Any]
) -> Call:
    """Return a function of the tensors and scalars of the spec's operation, and a stream.

    It calls ``function`` where `condition` holds, each tensor by the expression that `convert`
    gives, and then runs `after`; otherwise, and where an error comes, ``general``. Every argument
    is spelt out in its source, made here from the table of operations: loops over the arguments
    cost a third more at M = 1, where the call is all.
    """
    given = spec.operation.names
    absent = {*spec.operation.tensors} - {tensor.name for tensor in spec.tensors}
    convert = {**convert, **dict.fromkeys(absent, "None")}
    # With a tensor that this spec does not take it is another spec's call.
    condition = " and ".join([condition, *(f"{name} is None" for name in sorted(absent))])
    passed = ", ".join(convert.get(name, name) for name in given)
    source = f"""
def call({", ".join(given)}, stream):
    try:
        fits = stream is None and {condition}
        if fits:
            function({passed}{names.get("storage", "")})
    except Exception:  # said again, with the argument's name
        fits = False
    if fits:
        {after}
    else:
        general({", ".join(given)}, stream)
"""
    exec(source, names)
    return names["call"]


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class NumpyAdapter(Adapter):
    """NumPy arrays, with ml_dtypes' bfloat16, where that is installed: DLPack does not know it."""

    def fast_call(self, function: Call, general: Call, spec: KernelSpec) -> Call:
        import numpy as np

        conditions, convert = [], {}
        names = {"function": function, "general": general, "storage": ", 1"}
        for tensor in spec.tensors:
            if tensor.is_output:
                conditions.append(f"{tensor.name}.flags.writeable")
            element = ELEMENT_TYPES[spec.dtype_of(tensor)]
            if element.storage:
                # It goes as other bits: the module could not tell it from a caller's own.
                names |= {element.name: element.numpy, element.storage: np.dtype(element.storage)}
                conditions.append(f"{tensor.name}.dtype == {element.name}")
                convert[tensor.name] = f"{tensor.name}.view({element.storage})"
        return _spelt_out(spec, " and ".join(conditions), convert, "return", names)

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name)

    def target(self, array: Any) -> str:
        return host_cpu_target()

    def device_index(self, array: Any) -> int:
        return 0

    def empty(
        self, like: Any, shape: tuple[int, int], dtype: str, *, name: str = "q_out and k_out"
    ) -> Any:
        import numpy as np

        try:
            element_type = ELEMENT_TYPES[dtype].numpy
        except ModuleNotFoundError as error:
            raise ValueError(
                "out_dtype must be float16 or float32 for NumPy arrays where ml_dtypes is not "
                f"installed, got {dtype}: pip install {error.name}"
            ) from None
        return np.empty(shape, element_type)

    def view(self, name: str, array: Any, *, writable: bool) -> Any:
        import numpy as np
        import tvm_ffi

        if not array.dtype.isnative:
            raise TypeError(f"{name} must have native byte order, got {array.dtype}")
        if writable and not array.flags.writeable:
            raise ValueError(f"{name} must be writable, got a read-only array")
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(
                f"{name} must have strides of whole elements ({array.itemsize} bytes), got "
                f"strides of {array.strides} bytes"
            )
        stored = ELEMENT_TYPES.get(array.dtype.name)
        if stored is not None and stored.storage:
            array = array.view(stored.storage)
        elif array.dtype in (np.uint16, np.uint8):
            raise TypeError(f"{name} must have a floating-point type, got {array.dtype}")
        if not array.flags.writeable:
            array = _writable_alias(array)
        try:
            return tvm_ffi.from_dlpack(array)
        except Exception as error:
            raise TypeError(f"{name} must be a numeric array, got {array.dtype}") from error


def _writable_alias(array: Any) -> Any:
    """Return the same memory without the read-only flag, which old DLPack cannot express.

    Only for inputs, which the module never writes.
    """
    import numpy as np

    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    memory = (ctypes.c_char * (high - low)).from_address(low)
    return np.ndarray(
        array.shape,
        array.dtype,
        buffer=memory,  # type: ignore[arg-type]  # any buffer will do
        offset=array.__array_interface__["data"][0] - low,
        strides=array.strides,
    )


class TorchAdapter(Adapter):
    """torch tensors: tvm-ffi takes them as they are, with torch's current stream."""

    def fast_call(self, function: Call, general: Call, spec: KernelSpec) -> Call:
        torch = sys.modules["torch"]
        from .torch_autograd import count_writes, forward_ad

        # Views of complex tensors may be negated only when read (`is_neg`), which DLPack cannot
        # say. There is no complex type of bfloat16.
        negatable = [
            f"{tensor.name}.is_neg()"
            for tensor in spec.tensors
            if spec.dtype_of(tensor) in ("float16", "float32")
        ]
        derived = " or ".join(f"{tensor.name}.requires_grad" for tensor in spec.tensors)
        conditions = [f"not {negated}" for negated in negatable]
        # Under forward-mode AD a tensor may have a tangent, for which the long way looks.
        conditions += ["forward_ad._current_level < 0", f"not (grad_enabled() and ({derived}))"]
        names = {"function": function, "general": general, "forward_ad": forward_ad}
        names |= {"grad_enabled": torch.is_grad_enabled, "count_writes": count_writes}
        # Whatever could not be counted has been written all the same: never a second call.
        names["adapter_of"] = adapter_of
        outputs = ", ".join(tensor.name for tensor in spec.tensors if tensor.is_output)
        after = f"""try:
            count_writes(({outputs},))
        except TypeError:  # an output of another framework
            for output in ({outputs},):
                adapter_of("output", output).count_write(output)"""
        return _spelt_out(spec, " and ".join(conditions), {}, after, names)

    def refuse_derivative(self, name: str, array: Any) -> None:
        from .torch_autograd import refuse_derivative

        refuse_derivative(name, array)

    def count_write(self, array: Any) -> None:
        from .torch_autograd import count_writes

        count_writes((array,))

    def target(self, array: Any) -> str:
        if array.device.type == "cpu":
            return host_cpu_target()
        if array.device.type == "cuda":
            return cuda_target(array.device.index)
        raise ValueError(f"q must be on the CPU or a CUDA device, got {array.device}")

    def check_metadata(self, name: str, array: Any) -> None:
        if array.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got nested")

    def device_index(self, array: Any) -> int:
        return int(array.device.index or 0)

    def empty(
        self, like: Any, shape: tuple[int, int], dtype: str, *, name: str = "q_out and k_out"
    ) -> Any:
        torch = sys.modules["torch"]
        # Not empty_like: that keeps a slice's row stride, the parent's.
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def view(self, name: str, array: Any, *, writable: bool) -> Any:
        torch = sys.modules["torch"]
        if array.layout is not torch.strided or array.is_quantized or array.is_nested:
            kind = "quantized" if array.is_quantized else "nested" if array.is_nested else None
            raise TypeError(f"{name} must be a dense tensor, got {kind or array.layout}")
        if array.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} must be on the CPU or a CUDA device, got {array.device}")
        from .torch_autograd import is_wrapped

        if is_wrapped(array):
            raise TypeError(
                f"{name} must be a tensor in memory, got one that a transform of torch.func wraps: "
                "call qknorm_tvm.torch_ops there"
            )
        if array.is_neg():
            raise ValueError(
                f"{name} must hold its values as they are, got a view that negates them when read "
                "(torch's is_neg()): pass resolve_neg() of it"
            )
        return array.detach()


_ADAPTERS = {"numpy": NumpyAdapter(), "torch": TorchAdapter(), "": Adapter()}


@functools.lru_cache(maxsize=256)
def _adapter_of_type(kind: type) -> Adapter | None:
    for base in kind.__mro__:
        module = base.__module__.partition(".")[0]
        if module == "torch" and base.__name__ == "Tensor":
            return _ADAPTERS["torch"]
        if module == "numpy" and base.__name__ == "ndarray":
            return _ADAPTERS["numpy"]
    return _ADAPTERS[""] if hasattr(kind, "__dlpack__") else None


def adapter_of(name: str, array: Any) -> Adapter:
    """Return the adapter for an argument; a ``TypeError`` naming it when it is no array."""
    adapter = _adapter_of_type(type(array))  # type: ignore[arg-type]
    if adapter is None:
        raise TypeError(
            f"{name} must be a NumPy array, a torch tensor or an object with DLPack, got "
            f"{type(array).__name__}"
        )
    return adapter


@functools.lru_cache(maxsize=64)
def cuda_target(index: int) -> str:
    """Return the spec target for one CUDA device of this machine, such as ``"cuda:sm_90"``."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index)
        return f"cuda:sm_{major}{minor}"
    driver = ctypes.CDLL("libcuda.so.1")
    values = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetAttribute(
            ctypes.byref(value), attribute, ctypes.c_int(index)
        ):
            raise RuntimeError(f"the CUDA driver does not answer for device {index}")
        values.append(value.value)
    return f"cuda:sm_{values[0]}{values[1]}"
