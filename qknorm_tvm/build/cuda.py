"""Building for CUDA: scheduled functions to one CUDA source, and nvcc to machine code.

TVM writes the kernels, and for each a host function with tvm-ffi's calling convention
(``tvm.backend.cuda.export_cuda_host``): it takes the stream from tvm-ffi's environment
(``TVMFFIEnvGetStream``, torch's current stream when torch called) and makes the tensors' device
current while it launches. Two things are as TVM does not do them by itself:

* No pointer is ``__restrict__``. With it nvcc reads q, k and qk_var through the non-coherent path
  (``ld.global.nc``) and may move those loads across the wait for the previous kernel; neither is
  allowed when that kernel wrote them, nor when q_out is q. Without it every access is coherent and
  stays on its side of the wait, and as all loads of a thread come before its first store, nothing
  is lost.
* Kernels go through `_LAUNCHER`, which asks for programmatic dependent launch where the loaded
  machine code waits for the previous kernel, that is, where it was compiled for sm_90 or newer.
  TVM's CUDA host code cannot ask for it.

The host functions are hidden when the module is linked: it exports its entry points only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..declare.norm import declare
from ..errors import BuildError
from ..load.module_file import seal
from ..lower.cuda import join_operands
from ..schedules import cuda, cuda_row
from ..schedules.cuda_config import CudaConfig, CudaVariant
from ..schedules.cuda_device import DEPENDENT_ATTR
from .configs import cuda_buckets
from .native import Level, Variant, compile_entry, exported_symbols, run_compiler, tables

if TYPE_CHECKING:
    from tvm import tirx

    from ..spec import KernelSpec

_INSTALL_NVCC = (
    "nvcc was not found: install the CUDA toolkit 13 and put nvcc on PATH or set CUDA_HOME, or "
    "install nvcc from PyPI with: pip install 'qknorm-tvm[cuda]'"
)

_PRELUDE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
"""

# `kernel` is a template parameter so that each kernel remembers what was loaded for it.
_LAUNCHER = """\
#include <atomic>

/* Whether the code loaded for this device waits for the previous kernel: its PTX was for sm_90. */
template <auto kernel>
static cudaError_t qkn_waits(int device, bool* waits) {
  static std::atomic<signed char> known[64];
  bool memorable = device >= 0 && device < 64;
  signed char value = memorable ? known[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
    value = attributes.ptxVersion >= 90 ? 1 : -1;
    if (memorable) known[device].store(value, std::memory_order_relaxed);
  }
  *waits = value > 0;
  return cudaSuccess;
}

template <auto kernel, bool dependent, typename... P, typename... A>
static cudaError_t qkn_launch_as(void (*)(P...), int device, dim3 grid, dim3 block,
                                 cudaStream_t stream, A... arguments) {
  bool waits = false;
  if (dependent) {
    cudaError_t error = qkn_waits<kernel>(device, &waits);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = waits ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, (P)(arguments)...);
}

template <auto kernel, bool dependent, typename... A>
static cudaError_t qkn_launch(int device, dim3 grid, dim3 block, cudaStream_t stream,
                              A... arguments) {
  return qkn_launch_as<kernel, dependent>(kernel, device, grid, block, stream, arguments...);
}
"""

# For entry.c: how many blocks of a kernel the GPU holds at once; 0 where it cannot say.
_RESIDENT = """
template <auto kernel>
static int64_t qkn_resident(int device) {
  static std::atomic<int64_t> known[64];
  bool memorable = device >= 0 && device < 64;
  int64_t blocks = memorable ? known[device].load(std::memory_order_relaxed) : 0;
  if (blocks) return blocks;
  int before = -1, each = 0, processors = 0;
  cudaFuncAttributes attributes;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess) {
    /* Its launch bounds are the threads that it is launched with. */
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function,
                                                          attributes.maxThreadsPerBlock, 0);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (before >= 0 && before != device) cudaSetDevice(before);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  blocks = (int64_t)each * processors;
  if (memorable) known[device].store(blocks, std::memory_order_relaxed);
  return blocks;
}
"""

# For entry.c: 0, or an error raised that says why the device cannot run this module.
_CHECK_DEVICE = """
extern "C" __attribute__((visibility("hidden"))) int qkn_check_device(int device) {
  static std::atomic<bool> known[64];
  bool memorable = device >= 0 && device < 64;
  if (memorable && known[device].load(std::memory_order_relaxed)) return 0;
  int before = -1;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(@KERNEL@));
  }
  int major = 0, minor = 0;
  if (error != cudaSuccess) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaGetLastError();
  }
  if (before >= 0 && before != device) cudaSetDevice(before);
  if (error == cudaSuccess) {
    if (memorable) known[device].store(true, std::memory_order_relaxed);
    return 0;
  }
  char message[512];
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    snprintf(message, sizeof message,
             "cuda:%d must be a GPU that this module holds code for (@ARCHS@), got one of sm_%d%d",
             device, major, minor);
  } else {
    snprintf(message, sizeof message, "cuda:%d cannot run this module: %s", device,
             cudaGetErrorString(error));
  }
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}
"""


def cuda_source(functions: Sequence[tuple[str, tirx.PrimFunc]]) -> str:
    """Generate one CUDA source for scheduled functions, kernels and host functions.

    Parameters
    ----------
    functions : sequence of (str, tirx.PrimFunc)
        Symbols, and what `schedules.cuda.schedule` returned. ``__tvm_ffi_<symbol>`` launches
        ``<symbol>_kernel``.

    Returns
    -------
    str
        CUDA C++ for every architecture from sm_80 on. It needs tvm-ffi's headers.
    """
    import tvm

    from ..lower.tvm_version import cuda_host_source

    names = [name for name, _ in functions]
    module = tvm.IRModule(
        {
            name: func.with_attrs({"global_symbol": name, "tirx.is_entry_func": False})
            for name, func in functions
        }
    )
    dependent = {name for name, func in functions if func.attrs[DEPENDENT_ATTR]}

    def launch(name: str) -> str:
        return f"::qkn_launch<::{name}_kernel, {'true' if name in dependent else 'false'}>"

    return _PRELUDE + _LAUNCHER + cuda_host_source(module, launch, names)


def device_check_source(symbol: str, archs: Sequence[str]) -> str:
    """Return the function by which the entry point asks whether a device can run the module."""
    text = _CHECK_DEVICE.replace("@KERNEL@", f"{symbol}_kernel")
    return text.replace("@ARCHS@", ", ".join(archs) + " or newer")


def resident_source(symbols: Sequence[str]) -> str:
    """Return the functions that tell the entry point how many blocks of a kernel are resident."""
    if not symbols:
        return ""
    return _RESIDENT + "".join(
        f'extern "C" __attribute__((visibility("hidden"))) int64_t qkn_resident_{symbol}'
        f"(int device) {{ return qkn_resident<{symbol}_kernel>(device); }}\n"
        for symbol in symbols
    )


# ---- nvcc ------------------------------------------------------------------------------------


def find_nvcc() -> Path:
    """Return nvcc: of ``$CUDA_HOME``, on the PATH, or of NVIDIA's PyPI packages.

    Raises
    ------
    BuildError
        There is none; the message says what to install.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    for folder in sys.path:
        for candidate in sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc")):
            return candidate
    raise BuildError(_INSTALL_NVCC)


def ptx_arch(archs: Sequence[str]) -> str | None:
    """Return the architecture whose PTX later GPUs run: the oldest from sm_90 on, or the oldest.

    Code for older ones would run on a new GPU too, but without programmatic dependent launch.
    """
    portable = [arch for arch in archs if arch.removeprefix("sm_").isdecimal()]
    numbers = sorted(int(arch.removeprefix("sm_")) for arch in portable)
    if not numbers:
        return None
    return f"compute_{next((n for n in numbers if n >= 90), numbers[0])}"


def _gencode(archs: Sequence[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removeprefix("sm_")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    ptx = ptx_arch(archs)
    if ptx:
        flags.append(f"-gencode=arch={ptx},code={ptx}")
    return flags


def _nvcc(arguments: Sequence[str], doing: str, folder: Path) -> None:
    nvcc = find_nvcc()
    # The packages from PyPI keep libraries where nvcc does not look.
    folders = [nvcc.parent.parent / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    search = [f"-L{folder}" for folder in folders if folder.is_dir()]
    run_compiler([str(nvcc), *search, *arguments], doing, folder)


def nvcc_compile(source: Path, out: Path, archs: Sequence[str]) -> None:
    """Compile a CUDA source to an object file with machine code for each architecture.

    No fast-math: denormals are kept, divisions and roots are correctly rounded, and so is each
    product and each sum.

    Parameters
    ----------
    source, out : pathlib.Path
        The ``.cu`` and the ``.o``.
    archs : sequence of str
        Such as ``"sm_90"``; PTX of `ptx_arch` is added.

    Raises
    ------
    BuildError
        There is no nvcc, or it refused; the message has what it printed.
    """
    import tvm_ffi.libinfo as ffi

    _nvcc(
        [
            "-c",
            "-O3",
            "-std=c++17",
            "-ftz=false",
            # Products that are added are rounded first; where they are not, the code says fma.
            "-fmad=false",
            "-prec-div=true",
            "-prec-sqrt=true",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-ffunction-sections",
            # Else a header's __FILE__ puts this machine's folders into what is shipped.
            f"-Xcompiler=-fmacro-prefix-map={ffi.find_include_path()}/=",
            # Of TVM's text: statements without effect, variables that are not used.
            "-diag-suppress=174,177",
            "-Xfatbin=-compress-all",
            "--compress-mode=size",
            *_gencode(archs),
            f"-I{ffi.find_include_path()}",
            f"-I{ffi.find_dlpack_include_path()}",
            str(source),
            "-o",
            str(out),
        ],
        "compiling the CUDA source",
        out.parent,
    )


def link_cuda(objects: Sequence[Path], out: Path) -> None:
    """Link objects and CUDA's static runtime to a module that exports its entry points alone."""
    import tvm_ffi.libinfo as ffi

    script = out.with_suffix(".exports")
    script.write_text(exported_symbols())
    options = ["-s", "-z,nodelete", "-z,noexecstack", "-z,relro", "-z,now", "--gc-sections"]
    options += [f"--version-script={script}", "--build-id=none", "--no-undefined"]
    library = Path(ffi.find_libtvm_ffi())
    _nvcc(
        [
            "-shared",
            "-cudart=static",
            *map(str, objects),
            *(f"-Xlinker={option}" for option in options),
            f"-L{library.parent}",
            "-ltvm_ffi",
            "-o",
            str(out),
        ],
        "linking",
        out.parent,
    )
    seal(out)


# ---- specs to a module -----------------------------------------------------------------------


def scheduled_variant(spec: KernelSpec, variant: CudaVariant) -> tirx.PrimFunc:
    """Declare a spec for a variant, and make its kernel: a function bound to one grid."""
    func = declare(spec, stride_unit=variant.stride_unit, alignment=variant.alignment)
    if spec.op == "apply_qk_rms_norm":
        return join_operands(cuda.schedule(func, variant.config))
    return cuda_row.schedule(func, spec, variant.config)


def build(
    specs: Sequence[KernelSpec],
    configs: Sequence[CudaConfig | None],
    metadata: dict[str, Any],
    directory: Path,
) -> Path:
    """Build one ``.so`` for specs that share a CUDA target; returns its path in `directory`.

    Needs no GPU. `metadata` is completed with the architectures and each spec's kernels.
    """
    archs = specs[0].parsed_target.variants
    functions: list[tuple[str, Any]] = []
    per_spec: list[tuple[Variant, ...]] = []
    described: list[dict[str, Any]] = []
    for index, (spec, given) in enumerate(zip(specs, configs, strict=True)):
        symbols: dict[tuple[Any, ...], str] = {}  # variants may share a kernel
        entries = []
        for variant, source_of_config, record in cuda_buckets(spec, given):
            key = (variant.config, variant.stride_unit, variant.alignment)
            if key not in symbols:
                symbol = f"qkn_cuda_{index}_{variant.name}"
                # Records may give one name several configs.
                symbols[key] = f"{symbol}_{len(symbols)}" if symbol in symbols.values() else symbol
                functions.append((symbols[key], scheduled_variant(spec, variant)))
            entries.append(
                Variant(
                    variant.name,
                    symbols[key],
                    min_rows=variant.min_rows,
                    stride_unit=variant.stride_unit,
                    alignment=variant.alignment or 1,
                    waits_for_ranks=spec.has_peers,
                )
            )
            described.append(
                {
                    "spec": spec.text,
                    "source": source_of_config,
                    **({} if record is None else {"record": dict(record)}),
                    "min_rows": variant.min_rows,
                    "config": variant.config.to_dict(),
                    "variants": [variant.name],
                }
            )
        per_spec.append(tuple(entries))
    source = directory / "module.cu"
    waiting = {v.symbol for variants in per_spec for v in variants if v.waits_for_ranks}
    source.write_text(
        cuda_source(functions)
        + device_check_source(functions[0][0], archs)
        + resident_source(sorted(waiting))
    )
    device_object = directory / "cuda.o"
    nvcc_compile(source, device_object, archs)
    levels = [Level("cuda", (), tuple(per_spec))]
    metadata = {
        **metadata,
        "kind": "cuda",
        "architectures": [*archs, *filter(None, [ptx_arch(archs)])],
        "levels": [{"name": "cuda", "features": [], "code": described}],
    }
    native = compile_entry(directory, tables(specs, levels, metadata, cuda=True), pool=False)
    out = directory / "module.so"
    link_cuda([*native, device_object], out)
    return out
