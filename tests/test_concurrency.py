"""Threads, processes, forks and kills: right results, one compilation, nothing half written.

``QKNORM_TVM_CAMPAIGN=1`` makes it ten times as many calls, forks and kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from support import COMPUTE, COMPUTED, compiled, ffi_tensors, make_case, run_python, smallest
from tvm_ffi import libinfo

import qknorm_tvm
from qknorm_tvm import KernelSpec, load
from qknorm_tvm.call import cache
from qknorm_tvm.check import reference
from qknorm_tvm.load import module_file

_SCALE = 10 if os.environ.get("QKNORM_TVM_CAMPAIGN") else 1
_LARGE = KernelSpec(in_dtype="bfloat16", q_cols=1536, k_cols=256)
_TESTS = str(Path(__file__).parent)


def _start(code: str, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start Python code in a process of its own, without torch, and do not wait for it."""
    environment = {**os.environ, **(env or {})}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [_TESTS, environment.get("PYTHONPATH", "")])
    )
    code = 'import sys\nsys.modules["torch"] = None\n' + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- threads -------------------------------------------------------------------------------------


def test_sixteen_threads_while_the_number_of_threads_changes() -> None:
    """A launch whose tasks are shared out by one setting and drawn by another, or lost.

    Or a call's state that another thread's call overwrites.
    """
    module = load(compiled("large", _LARGE))
    errors: list[str] = []
    done = threading.Event()
    barrier = threading.Barrier(16)

    def work(seed: int) -> None:
        try:
            rows = (1, 3, 40, 300)[seed % 4]
            case = make_case(rows, 1536, 256, seed=seed)
            expected = case.expected()
            tensors, alive = ffi_tensors(case.tensors)
            barrier.wait(timeout=60)
            for _ in range((150 if rows < 40 else 25) * _SCALE):
                case.q_out.view(np.uint8)[...] = 0xA5
                case.k_out.view(np.uint8)[...] = 0xA5
                module.apply_qk_rms_norm(*tensors, case.epsilon)
                wrong = reference.differing(case.q_out, expected[0])
                wrong += reference.differing(case.k_out, expected[1])
                if wrong:
                    errors.append(f"thread {seed}: {wrong} elements differ")
                    return
            del alive
        except Exception as error:
            errors.append(f"thread {seed}: {error!r}")

    def change() -> None:
        numbers = random.Random(0)
        while not done.is_set():
            qknorm_tvm.set_num_threads(numbers.choice((0, 1, 2, 3, 5, 8)))
            time.sleep(numbers.random() / 1000)

    changer = threading.Thread(target=change)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    qknorm_tvm.get_num_threads()
    try:
        for thread in (changer, *threads):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        changer.join()
        qknorm_tvm.set_num_threads(0)
    assert not errors, errors


def test_modules_loaded_and_called_at_once_share_one_pool(tmp_path: Path) -> None:
    """Modules that look for each other at their first calls, from any thread: two pools.

    Sixteen threads load a module each and call it; a pool of their own would start its workers.
    """
    source = compiled("large", _LARGE)
    paths = [tmp_path / f"{i}.so" for i in range(16)]
    for path in paths:
        shutil.copyfile(source, path)
    for _ in range(3 * _SCALE):
        run_python(
            """
            import os, sys, threading
            import tvm_ffi
            from qknorm_tvm import load
            from qknorm_tvm.check import reference
            from support import ffi_tensors, make_case

            cases = [make_case(200, 1536, 256, seed=seed) for seed in range(16)]
            expected = [case.expected() for case in cases]
            prepared = [ffi_tensors(case.tensors) for case in cases]
            modules, errors, barrier = [None] * 16, [], threading.Barrier(16)

            def call(i):
                cases[i].q_out[...], cases[i].k_out[...] = 0, 0
                modules[i].apply_qk_rms_norm(*prepared[i][0], cases[i].epsilon)
                for got, want in zip((cases[i].q_out, cases[i].k_out), expected[i]):
                    assert reference.differing(got, want) == 0, i

            def work(i):
                try:
                    barrier.wait(timeout=60)
                    modules[i] = load(sys.argv[1 + i])
                    call(i)
                except BaseException as error:
                    errors.append((i, error))

            before = len(os.listdir("/proc/self/task"))
            threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert not errors, errors
            for i in range(16):
                call(i)
            workers = len(os.listdir("/proc/self/task")) - before
            assert workers == 3, f"{workers} workers, which one pool of four threads has not"
            modules[7].library.get_function("qknorm_set_num_threads")(2)
            known = {m.library.get_function("qknorm_get_num_threads")() for m in modules}
            assert known == {2}, known
            """,
            *map(str, paths),
            env={"TVM_NUM_THREADS": "4", "QKNORM_TVM_OPENMP": "0"},
        )


@pytest.mark.slow
@pytest.mark.parametrize("modules", [2, 7])
def test_first_calls_at_the_same_moment_find_one_pool(modules: int, tmp_path: Path) -> None:
    """The same, thousands of times, and closer together than Python's threads ever are."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("compiles a driver with gcc, which is not installed")
    program = tmp_path / "first_calls"
    command = [gcc, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += ["-isystem", libinfo.find_include_path()]
    command += ["-isystem", libinfo.find_dlpack_include_path(), "-o", str(program)]
    source = Path(__file__).parent / "native" / "first_calls.c"
    subprocess.run([*command, str(source), "-ldl"], check=True)
    paths = [tmp_path / f"{i}.so" for i in range(modules)]
    for path in paths:
        shutil.copyfile(smallest(), path)
    rounds = 600 * _SCALE
    command = [str(program), libinfo.find_libtvm_ffi(), str(rounds), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "0\n", f"two pools in {done.stdout.strip()} of {rounds} processes"


@pytest.mark.slow
def test_threads_that_ask_for_new_specs_at_once(tmp_path: Path) -> None:
    """A spec compiled once a thread; a module of another spec; a deadlock in the compiler."""
    done = run_python(
        """
        import threading
        import numpy as np
        import qknorm_tvm
        import qknorm_tvm.call.compiled as build
        from qknorm_tvm.check import reference
        from support import make_case

        compile, compilations = build.compile, []

        def counted(spec):
            compilations.append(spec)
            return compile(spec)

        build.compile = counted
        barrier, errors = threading.Barrier(9), []

        def work(number):
            try:
                barrier.wait(timeout=60)
                for turn in range(3):
                    cols = 5 + (number + turn) % 3
                    case = make_case(4, cols, 3, "float32", seed=number)
                    outputs = qknorm_tvm.apply_qk_rms_norm(
                        case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k
                    )
                    for got, want in zip(outputs, case.expected()):
                        assert reference.differing(got, want) == 0, (number, turn)
            except Exception as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(9)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors, errors
        assert sorted(spec.q_cols for spec in compilations) == [5, 6, 7], compilations
        """,
        env={"QKNORM_TVM_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert not done.stderr, done.stderr


# ---- processes -----------------------------------------------------------------------------------


def _only_whole_files(folder: Path) -> None:
    """Check that each file under a module's name is whole, and that others are named otherwise."""
    for path in folder.glob("[!.]*.so"):
        assert module_file.read_metadata(path)["specs"]


def _clean(folder: Path) -> None:
    """Check that a process that comes later is served, whatever was left in the folder."""
    _only_whole_files(folder)
    for path in folder.glob("*.lock"):
        with filelock.FileLock(path, timeout=10):
            pass
    env = {"QKNORM_TVM_CACHE_DIR": str(folder)}
    run_python(COMPUTE, env=env)
    assert run_python(COMPUTE, env=env).stdout == "False\n", "compiled again"
    _only_whole_files(folder)


@pytest.mark.slow
def test_sixteen_processes_start_with_an_empty_cache(tmp_path: Path) -> None:
    """Sixteen ranks of one node that each compile, or read what another is writing."""
    folder, go = tmp_path / "cache", tmp_path / "go"
    running = [
        _start(COMPUTE, str(go), env={"QKNORM_TVM_CACHE_DIR": str(folder)}) for _ in range(16)
    ]
    time.sleep(3)
    go.touch()
    ends = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * 16, ends
    assert sum(out == "True\n" for out, _ in ends) == 1, "compiled more than once"
    assert not any(err for _, err in ends), ends
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == [
        cache.cache_key(COMPUTED)
    ]
    _only_whole_files(folder)


# ---- kills ---------------------------------------------------------------------------------------


def _kill(process: subprocess.Popen[str], after: float) -> None:
    """Kill a process by SIGKILL after some seconds; one that fails before that is an error."""
    try:
        _, err = process.communicate(timeout=after)
        assert process.returncode == 0, err
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_killed_while_compiling(tmp_path: Path) -> None:
    """A lock that stays, a temporary file taken for a module: nobody can compute any more."""
    folder = tmp_path / "cache"
    env = {"QKNORM_TVM_CACHE_DIR": str(folder), "TMPDIR": str(tmp_path)}
    delays = random.Random(1)
    for _ in range(5 * _SCALE):
        # Importing TVM and compiling take two to four seconds.
        _kill(_start(COMPUTE, env=env), 0.3 + 3.2 * delays.random())
        if folder.exists():
            _only_whole_files(folder)
            for path in folder.glob("*.so"):  # it was fast: let the next one compile too
                path.unlink()
    folder.mkdir(mode=0o700, exist_ok=True)
    _clean(folder)


@pytest.mark.slow
def test_who_waits_for_a_killed_compilation_compiles(tmp_path: Path) -> None:
    """A process that waits for ever for one that is no more."""
    folder = tmp_path / "cache"
    env = {"QKNORM_TVM_CACHE_DIR": str(folder), "TMPDIR": str(tmp_path)}
    never_ends = """
        import time
        import qknorm_tvm.call.compiled as build
        def compile(spec):
            print("compiling", flush=True)
            time.sleep(600)
        build.compile = compile
        """
    first = _start(textwrap.dedent(never_ends) + COMPUTE, env=env)
    assert first.stdout is not None
    assert first.stdout.readline() == "compiling\n"
    second = _start(COMPUTE, env=env)
    time.sleep(2)
    assert second.poll() is None, "it did not wait"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "True\n"), err
    _clean(folder)


_WRITING = """
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import qknorm_tvm.call.compiled as build
from qknorm_tvm.call import cache
from qknorm_tvm import KernelSpec
spec = KernelSpec.from_text(sys.argv[2])
build.compile = lambda spec: nullcontext(SimpleNamespace(path=Path(sys.argv[1])))
key = cache.cache_directory() / cache.cache_key(spec)
cache.load_file = lambda file: None
print("ready", flush=True)
while True:
    key.unlink(missing_ok=True)
    cache._load_or_build(spec)
"""

_EXPORTING = """
import sys
from pathlib import Path
from qknorm_tvm.call.compiled import place
place(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
while True:
    place(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def _kill_when_ready(process: subprocess.Popen[str], after: float) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert line == "ready\n", err


@pytest.mark.slow
def test_killed_while_writing_to_the_cache(tmp_path: Path) -> None:
    """Half a module under the name of a whole one; thousands of writes, cut off anywhere."""
    folder = tmp_path / "cache"
    env = {"QKNORM_TVM_CACHE_DIR": str(folder)}
    # What is written is the module that belongs there, compiled once.
    run_python(COMPUTE, env=env)
    source = tmp_path / "source.so"
    (built,) = folder.glob("*.so")
    source.write_bytes(built.read_bytes())
    delays = random.Random(2)
    for _ in range(8 * _SCALE):
        _kill_when_ready(
            _start(_WRITING, str(source), COMPUTED.text, env=env), 0.15 * delays.random()
        )
        _only_whole_files(folder)
    _clean(folder)
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert len(left) <= 8 * _SCALE


def test_killed_while_exporting(tmp_path: Path) -> None:
    """Half an export; the file that was there before is lost."""
    target = tmp_path / "module.so"
    wanted = smallest().read_bytes()
    delays = random.Random(3)
    for _ in range(8 * _SCALE):
        process = _start(_EXPORTING, str(smallest()), str(target))
        _kill_when_ready(process, 0.15 * delays.random())
        assert target.read_bytes() == wanted
    assert load(target).specs
    others = [path.name for path in tmp_path.iterdir() if path != target]
    assert all(name.startswith(".module.so.") for name in others), others


# ---- forks ---------------------------------------------------------------------------------------

_FORKS = """
import os, signal, sys, threading
import numpy as np
import qknorm_tvm
from qknorm_tvm.check import reference
from qknorm_tvm import load
from support import ffi_tensors, make_case

module = load(sys.argv[1])
module.library.get_function("qknorm_set_num_threads")(4)
case = make_case(600, 1536, 256)
expected = case.expected()

def right(case=case, expected=expected):
    case.q_out[...], case.k_out[...] = 0, 0
    tensors, alive = ffi_tensors(case.tensors)
    module.apply_qk_rms_norm(*tensors, case.epsilon)
    return not any(
        reference.differing(a, b) for a, b in zip((case.q_out, case.k_out), expected)
    )

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs is killed by it
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(2)
    return child

def check(child):
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"child: {status} (14 is a hang)"
"""


def test_fork_while_other_threads_are_in_the_pool() -> None:
    """A child in which the pool stays busy for ever, with tasks that nobody will run."""
    run_python(
        _FORKS
        + """
stop = threading.Event()
errors = []

def work(seed):
    mine = make_case(600, 1536, 256, seed=seed)
    wanted = mine.expected()
    while not stop.is_set():
        if not right(mine, wanted):
            errors.append(seed)
            return

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
[thread.start() for thread in threads]
for _ in range(int(sys.argv[2])):
    own = make_case(600, 1536, 256, seed=9)
    wanted = own.expected()
    children = [in_child(lambda: all(right(own, wanted) for _ in range(4))) for _ in range(3)]
    [check(child) for child in children]
stop.set()
[thread.join() for thread in threads]
assert not errors and right()
""",
        str(compiled("large", _LARGE)),
        str(4 * _SCALE),
        timeout=600,
    )


@pytest.mark.frameworks
def test_fork_after_torch_lent_its_threads() -> None:
    """A child that waits for OpenMP's threads, which did not come with it."""
    pytest.importorskip("torch", reason="needs torch, whose OpenMP threads the pool uses")
    code = (
        'del sys.modules["torch"]\nimport torch\n'
        + _FORKS
        + """
torch.set_num_threads(2)
x = torch.randn(512, 512)
assert right() and (x @ x).sum() is not None and right()
for _ in range(3):
    children = [in_child(lambda: all(right() for _ in range(10))) for _ in range(2)]
    assert right()
    [check(child) for child in children]
assert right() and (x @ x).sum() is not None
"""
    )
    run_python(code, str(compiled("large", _LARGE)))


_API_FORKS = """
def compute(cols):
    mine = make_case(4, cols, 3, "float32")
    outputs = qknorm_tvm.apply_qk_rms_norm(
        mine.q, mine.k, mine.qk_var, mine.gamma_q, mine.gamma_k
    )
    return not any(reference.differing(a, b) for a, b in zip(outputs, mine.expected()))
"""


@pytest.mark.slow
def test_child_of_a_fork_compiles(tmp_path: Path) -> None:
    """The compiler's threads and locks, which did not come with the child."""
    run_python(
        _FORKS
        + _API_FORKS
        + """
assert compute(5)
children = [in_child(lambda: compute(5) and compute(6) and right()) for _ in range(2)]
[check(child) for child in children]
assert compute(6) and compute(7)
""",
        str(compiled("large", _LARGE)),
        env={"QKNORM_TVM_CACHE_DIR": str(tmp_path / "cache")},
    )


def test_a_lock_dies_with_its_process_and_not_with_its_forks(tmp_path: Path) -> None:
    """A child that holds, unknowingly, the lock of its dead parent, and waits for itself."""
    done = run_python(
        """
        import os, signal, sys, threading, time
        from pathlib import Path
        from qknorm_tvm.call import cache
        path, held = Path(sys.argv[1]), threading.Event()
        def hold():
            with cache._lock_file(path):
                held.set()
                time.sleep(600)
        threading.Thread(target=hold, daemon=True).start()
        assert held.wait(60)
        end, parent = os.pipe()
        if os.fork() == 0:
            os.close(parent)
            os.read(end, 1)  # until the parent is gone
            signal.alarm(20)
            with cache._lock_file(path) as refusal:
                os.write(1, f"locked {refusal}".encode())
        os._exit(0)
        """,
        str(tmp_path / "lock"),
    )
    assert done.stdout == "locked None"


@pytest.mark.slow
def test_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    """A child that waits for ever for a thread that only its parent has."""
    run_python(
        _FORKS.replace("signal.alarm(30)", "signal.alarm(8)")
        + _API_FORKS
        + """
import time
import qknorm_tvm.call.compiled as build
assert compute(5)
qknorm_tvm.call.cache._loaded.clear()
qknorm_tvm.call.cache.forget_entries()
compile, begun, go_on = build.compile, threading.Event(), threading.Event()

def slow(spec):
    begun.set()
    go_on.wait()
    return compile(spec)

build.compile = slow
thread = threading.Thread(target=compute, args=(6,))
thread.start()
begun.wait()
child = in_child(lambda: compute(5))  # on disk already
status = os.waitpid(child, 0)[1]
go_on.set()
thread.join()
assert status == 0, f"child: {status} (14 is a hang)"
""",
        str(compiled("large", _LARGE)),
        env={"QKNORM_TVM_CACHE_DIR": str(tmp_path / "cache")},
    )
