"""Wrong arguments launch nothing; empty calls, the Python API, memory over many calls."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
from gpu_calls import Call, check, make_call, torch

import qknorm_tvm
from qknorm_tvm import Module

GetModule = Callable[[str], Module]


def _refused(module: Module, call: Call, kind: type[Exception], message: str) -> None:
    """Check the error, and that the outputs are as they were."""
    before = [out.clone() for out in (call.q_out, call.k_out)]
    with pytest.raises(kind, match=re.escape(message)):
        call.run(module)
    torch.cuda.synchronize()
    for out, was in zip((call.q_out, call.k_out), before, strict=True):
        assert torch.equal(out.view(torch.int16), was.view(torch.int16))


@pytest.mark.parametrize("name", ["q_out", "k_out", "gamma_q", "gamma_k", "qk_var", "q", "k"])
def test_one_tensor_on_the_host(get_module: GetModule, name: str) -> None:
    call = make_call(5)
    setattr(call, name, getattr(call, name).cpu())
    message = f"{name} must be on a CUDA device, got a tensor on the CPU"
    _refused(get_module("single"), call, ValueError, message)


def test_pinned_host_memory_is_not_a_device(get_module: GetModule) -> None:
    call = make_call(5)
    call.gamma_q = call.gamma_q.cpu().pin_memory()
    _refused(get_module("single"), call, ValueError, "gamma_q must be on a CUDA device")


def test_cuda_tensors_for_the_api_with_numpy_among_them(get_module: GetModule) -> None:
    qknorm_tvm.use(get_module("fixed"))
    call = make_call(5)
    with pytest.raises(ValueError, match="gamma_q must be on a CUDA device"):
        qknorm_tvm.apply_qk_rms_norm(
            call.q, call.k, call.qk_var, call.gamma_q.cpu().numpy(), call.gamma_k
        )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda c: {"k": c.k[:-1]}, ValueError, "k must have 5 rows like q, got 4"),
        (lambda c: {"q": c.q[:, :-8]}, ValueError, "q must have 1536 columns, got 1528"),
        (lambda c: {"gamma_k": c.gamma_k[1:]}, ValueError, "gamma_k must have 256 elements"),
        (lambda c: {"qk_var": c.qk_var.double()}, TypeError, "qk_var must be float32"),
        (lambda c: {"k": c.k.float()}, TypeError, "k must be bfloat16, got float32"),
        (lambda c: {"k_out": c.k}, ValueError, None),
        (lambda c: {"q_out": c.k_out.new_empty(1536, 5).t()}, ValueError, "contiguous in its last"),
        (lambda c: {"epsilon": float("nan")}, ValueError, "epsilon must be a number, got nan"),
    ],
)
def test_wrong_arguments(
    get_module: GetModule, change: Callable[[Call], dict], kind: type[Exception], message: str
) -> None:
    call = make_call(5)
    for name, value in change(call).items():
        setattr(call, name, value)
    if message is None:  # k_out is k: the one overlap that is allowed
        call.run(get_module("single"))
        return
    _refused(get_module("single"), call, kind, message)


def test_outputs_that_overlap(get_module: GetModule) -> None:
    call = make_call(5)
    call.k_out = call.q_out[:, :256]
    _refused(get_module("single"), call, ValueError, "k_out must not overlap q_out")


def test_address_that_is_no_elements(get_module: GetModule) -> None:
    """A misaligned access, which ends the CUDA context."""
    import tvm_ffi

    call = make_call(5)
    memory = torch.zeros(5 * 1536 * 2 + 16, dtype=torch.uint8, device="cuda")

    class Odd:
        """q with an address off by one byte, which torch itself cannot make."""

        def __init__(self) -> None:
            from support import _DLManagedTensor, _DLTensor

            self.shape = (ctypes.c_int64 * 2)(5, 1536)
            self.managed = _DLManagedTensor(
                _DLTensor(memory.data_ptr() + 1, 2, 0, 2, 4, 16, 1, self.shape, None, 0)
            )

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, **_: Any) -> Any:
            new = ctypes.pythonapi.PyCapsule_New
            new.restype = ctypes.py_object
            new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
            return new(ctypes.addressof(self.managed), b"dltensor", None)

    odd = Odd()
    call.q = tvm_ffi.from_dlpack(odd)
    _refused(get_module("single"), call, ValueError, "q must be aligned to its 2-byte elements")
    check(get_module("single"), make_call(5))  # the context is alive


def test_gpu_older_than_the_file(get_module: GetModule) -> None:
    major, minor = torch.cuda.get_device_capability()
    if major >= 12:
        pytest.skip(f"this GPU (sm_{major}{minor}) runs code for sm_120")
    message = (
        "cuda:0 must be a GPU that this module holds code for (sm_120 or newer), got one of "
        f"sm_{major}{minor}"
    )
    _refused(get_module("newer_gpu"), make_call(5), RuntimeError, message)
    check(get_module("single"), make_call(5))


def _launches(function: Callable[[], Any]) -> int:
    """Count the nodes of a graph that captures a function."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function()
    count = ctypes.c_size_t()
    nodes = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
    assert nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)) == 0
    return count.value


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("name", ["single", "open"])
def test_no_rows_launch_nothing(get_module: GetModule, name: str) -> None:
    """One block that reads out of bounds and ends the context."""
    module, call = get_module(name), make_call(0)
    call.run(module)
    torch.cuda.synchronize()
    assert _launches(lambda: call.run(module)) == 0


@pytest.mark.parametrize("name", ["fixed", "open"])
def test_one_launch_a_call(get_module: GetModule, name: str) -> None:
    """Two launches, or a copy beside the kernel."""
    module = get_module(name)
    for rows in (1, 300, 2000, 6000):
        arguments = make_call(rows).arguments()
        assert _launches(functools.partial(module.apply_qk_rms_norm, *arguments)) == 1, rows


def test_api_allocates_outputs_on_the_device(get_module: GetModule) -> None:
    qknorm_tvm.use(get_module("fixed"))
    qknorm_tvm.use(get_module("open"))
    qknorm_tvm.use(get_module("fixed"))
    qkv = torch.randn(65, 1536 + 256 + 256, device="cuda").to(torch.bfloat16)
    q, k = qkv[:, :1536], qkv[:, 1536:1792]
    call = make_call(65)
    call.q, call.k = q, k
    inputs = (q, k, call.qk_var, call.gamma_q, call.gamma_k)
    call.q_out, call.k_out = qknorm_tvm.apply_qk_rms_norm(*inputs)
    assert call.q_out.device == q.device
    assert call.q_out.is_contiguous()
    assert call.is_exact(call.expected())


def test_several_specs_in_one_file(get_module: GetModule) -> None:
    """Another spec's code for a call."""
    module = get_module("fixed")
    for spec in module.specs:
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        call = make_call(19, spec.q_cols, spec.k_cols, spec.in_dtype, spec.out_dtype)
        check(module, call, spec.text)
    wrong = make_call(3, 24, 8)
    _refused(module, wrong, ValueError, "columns of one of this module's specs, got 24 and 8")


def test_memory_does_not_grow(get_module: GetModule) -> None:
    """A leak of device or host memory in each call."""
    import resource

    module, call = get_module("single"), make_call(16)
    arguments = call.arguments()

    def calls(count: int) -> tuple[int, int]:
        for _ in range(count):
            module.apply_qk_rms_norm(*arguments)
        torch.cuda.synchronize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return torch.cuda.mem_get_info()[0], peak

    calls(1000)
    free, peak = calls(1000)
    free_after, peak_after = calls(10_000)
    assert free - free_after <= 2 << 20
    assert peak_after - peak <= 2048  # KiB


def test_command_line_verifies_a_file(module_path: Callable[[str], Any], capsys: Any) -> None:
    from qknorm_tvm.cli import main

    assert main(["verify", str(module_path("single")), "--device", "cuda"]) == 0
    assert "EXACT: every output equals" in capsys.readouterr().out
    assert main(["verify", str(module_path("single"))]) == 2
    assert "not for --device cpu" in capsys.readouterr().err


def test_command_line_times_a_file(module_path: Callable[[str], Any], tmp_path: Any) -> None:
    import csv

    from qknorm_tvm.cli import main

    out = tmp_path / "b.csv"
    arguments = ["--shapes", "1536/256", "--rows", "1,64", "--no-torch-compile", "--no-host"]
    arguments += ["--module", str(module_path("single")), "--min-time", "0.01", "--csv", str(out)]
    assert main(["bench", "--device", "cuda", *arguments]) == 0
    lines = list(csv.DictReader(out.open()))
    assert {line["candidate"] for line in lines} >= {"ours", "empty kernel", "copy", "torch"}
    ours = next(line for line in lines if line["candidate"] == "ours")
    assert ours["exact"] == "True"
    assert 0.1 < float(ours["median_us"]) < 100
