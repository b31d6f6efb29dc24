"""Order on a stream, dependent launch, graphs, threads: right alone and wrong in company."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from gpu_calls import Call, make_call, torch

import qknorm_tvm
from qknorm_tvm import Module

GetModule = Callable[[str], Module]
ROWS = (1, 16, 64, 300, 1100, 2000)


def _capture(function: Callable[[], Any]) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def _link(call: Call, source: Call) -> Call:
    """Return a call that reads what another wrote, as q and as k."""
    made = make_call(call.q.shape[0])
    made.q, made.k, made.qk_var = source.q_out, source.k_out, call.qk_var
    made.gamma_q, made.gamma_k = call.gamma_q, call.gamma_k
    return made


def _chain_is_right(module: Module, rows: int, *, length: int = 40, repeats: int = 5) -> bool:
    """Run a chain in which each call reads what the one before wrote into poisoned buffers."""
    first = make_call(rows)
    chain = [first]
    for _ in range(length - 1):
        chain.append(_link(first, chain[-1]))
    expected: list[tuple[Any, Any]] = []
    while len(expected) < length:
        q, k = expected[-1] if expected else (first.q, first.k)
        reference = make_call(rows)
        reference.q, reference.k, reference.qk_var = q, k, first.qk_var
        reference.gamma_q, reference.gamma_k = first.gamma_q, first.gamma_k
        expected.append(reference.expected())
    graph = _capture(lambda: [call.run(module) for call in chain])
    for _ in range(repeats):
        for call in chain:
            call.poison()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        if not all(call.is_exact(wanted) for call, wanted in zip(chain, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("rows", ROWS)
def test_a_chain_reads_what_the_kernel_before_wrote(get_module: GetModule, rows: int) -> None:
    """A load of q or k before the wait for the previous kernel."""
    assert _chain_is_right(get_module("single"), rows)


def test_the_chain_test_fails_without_the_wait(get_module: GetModule) -> None:
    """The test above would pass whatever the kernel did."""
    module = get_module("without_wait")
    assert not all(_chain_is_right(module, rows) for rows in ROWS)


@pytest.mark.parametrize("rows", [16, 300, 1100])
def test_a_chain_in_place(get_module: GetModule, rows: int) -> None:
    module = get_module("single")
    call = make_call(rows)
    first_q, first_k = call.q.clone(), call.k.clone()
    call.gamma_q, call.gamma_k = call.gamma_q.clamp(0.9, 1.1), call.gamma_k.clamp(0.9, 1.1)
    call.qk_var = torch.rand(rows, 2, device="cuda") * 0.2 + 0.9
    call.q_out, call.k_out = call.q, call.k
    length = 40
    graph = _capture(lambda: [call.run(module) for _ in range(length)])
    wanted = (first_q, first_k)
    for _ in range(length):
        step = make_call(rows)
        step.q, step.k = wanted
        step.qk_var, step.gamma_q, step.gamma_k = call.qk_var, call.gamma_q, call.gamma_k
        wanted = step.expected()
    for _ in range(5):
        call.q.copy_(first_q)
        call.k.copy_(first_k)
        graph.replay()
        torch.cuda.synchronize()
        assert call.is_exact(wanted)


@pytest.mark.parametrize("rows", [1, 64, 1100])
def test_qk_var_of_the_kernel_before(get_module: GetModule, rows: int) -> None:
    """A load of qk_var before the wait; the kernel before is torch's, and long."""
    module = get_module("single")
    call = make_call(rows)
    wanted_var = call.qk_var.clone()
    expected = call.expected()
    slow = torch.randn(4096, 4096, device="cuda")
    zero = torch.zeros((), device="cuda")

    def work() -> None:
        late = (slow @ slow).sum() * zero
        call.qk_var.copy_(wanted_var + late)
        call.run(module)
        call.qk_var.fill_(7.0)  # and the kernel after must not be early either

    work()  # what cuBLAS sets up on first use must not be captured
    for graph in (None, _capture(work)):
        for _ in range(5):
            call.qk_var.fill_(7.0)
            call.poison()
            work() if graph is None else graph.replay()
            torch.cuda.synchronize()
            assert call.is_exact(expected)


def test_kernels_after_read_the_outputs(get_module: GetModule) -> None:
    """Outputs that are not yet written when the next kernel reads them."""
    module = get_module("single")
    call = make_call(1100)
    expected = call.expected()
    for _ in range(50):
        call.poison()
        call.run(module)
        q, k = call.q_out.clone(), call.k_out.clone()
        torch.cuda.synchronize()
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])


def test_first_call_inside_a_capture(module_path: Callable[[str], Any], tmp_path: Any) -> None:
    """Something that the first call does and a capture does not allow."""
    path = tmp_path / "fresh.so"
    path.write_bytes(module_path("single").read_bytes())
    module = qknorm_tvm.load(path)
    call = make_call(17)
    expected = call.expected()
    graph = _capture(lambda: call.run(module))
    call.poison()
    graph.replay()
    torch.cuda.synchronize()
    assert call.is_exact(expected)


def test_graph_reads_new_inputs(get_module: GetModule) -> None:
    module = get_module("single")
    call = make_call(64)
    graph = _capture(lambda: call.run(module))
    for seed in range(3):
        other = make_call(64, seed=seed + 1)
        for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
            getattr(call, name).copy_(getattr(other, name))
        call.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert call.is_exact(other.expected())


def _ordered_on(stream: Any, launch: Callable[[Call], None]) -> None:
    """Check that a launch waits for slow work on a side stream, and for none elsewhere."""
    call = make_call(64)
    right = call.q.clone()
    expected = call.expected()
    slow = torch.randn(6000, 6000, device="cuda")
    call.q.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = slow @ slow @ slow
        call.q.copy_(right + (late.sum() * 0).nan_to_num().to(right.dtype))
    launch(call)
    stream.synchronize()
    assert call.is_exact(expected)
    torch.cuda.synchronize()


def test_torch_stream_is_used(get_module: GetModule) -> None:
    """A launch on the default stream where torch's current one is another."""
    module, stream = get_module("single"), torch.cuda.Stream()

    def launch(call: Call) -> None:
        with torch.cuda.stream(stream):
            call.run(module)

    _ordered_on(stream, launch)


@pytest.mark.parametrize("kind", ["handle", "object"])
def test_stream_argument(get_module: GetModule, kind: str) -> None:
    """``stream=`` that torch's current stream overrides."""
    qknorm_tvm.use(get_module("fixed"))
    stream = torch.cuda.Stream()

    def launch(call: Call) -> None:
        qknorm_tvm.apply_qk_rms_norm(
            call.q,
            call.k,
            call.qk_var,
            call.gamma_q,
            call.gamma_k,
            call.epsilon,
            q_out=call.q_out,
            k_out=call.k_out,
            stream=stream.cuda_stream if kind == "handle" else stream,
        )

    _ordered_on(stream, launch)


def test_eight_threads(get_module: GetModule) -> None:
    """State that calls share."""
    module = get_module("fixed")
    wrong: list[str] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            call = make_call(1 + 37 * seed, seed=seed)
            expected = call.expected()
            for turn in range(100):
                call.poison()
                call.run(module)
                if not call.is_exact(expected):
                    wrong.append(f"thread {seed}, turn {turn}")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_second_device(get_module: GetModule) -> None:
    """A launch on the current device instead of the tensors'."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    call = make_call(64, device="cuda:1")
    expected = call.expected()
    call.run(get_module("single"))
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert call.is_exact(expected)
