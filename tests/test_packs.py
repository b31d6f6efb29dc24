"""Module packs: which file serves a call, what is refused, and that nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support import compiled, environment, run_python, smallest

import qknorm_tvm
from qknorm_tvm import BuildError, KernelSpec, packing
from qknorm_tvm.call import cache, packs
from qknorm_tvm.call import compiled as compiled_module
from qknorm_tvm.check import reference
from qknorm_tvm.models import MODELS
from qknorm_tvm.targets import X86_LEVELS, host_cpu_target, runs_on_gpu

#: What `smallest` holds.
SPEC = KernelSpec(in_dtype="float32", q_cols=33, k_cols=7)


@pytest.fixture(autouse=True)
def _new_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process: no module in memory, no pack known, nothing warned of yet."""
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_given", [])
    monkeypatch.setattr(packs, "_refused", set())
    cache.forget_entries()
    packs._modules.cache_clear()
    packs._installed.cache_clear()
    yield
    cache.forget_entries()
    packs._modules.cache_clear()
    packs._installed.cache_clear()


@pytest.fixture
def never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM is not installed; what the tests use is built before."""
    smallest()

    def version(name: str) -> str:
        if name == "apache-tvm":
            raise compiled_module.importlib.metadata.PackageNotFoundError(name)
        return "0.1.11"

    monkeypatch.setattr(compiled_module.importlib.metadata, "version", version)


def make_pack(folder: Path, *files: Path) -> Path:
    """Make a pack of module files, as `packing.build` does."""
    folder.mkdir()
    copies = {path.name: Path(shutil.copy(path, folder / path.name)) for path in files}
    (folder / packs.INDEX).write_text(json.dumps(packs.index_of(copies, [])))
    return folder


def call(q_cols: int = 33, k_cols: int = 7) -> None:
    """Call the API with float32 arrays and check the result."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((3, cols), np.float32) for cols in (q_cols, k_cols))
    gammas = [rng.standard_normal(cols, np.float32) for cols in (q_cols, k_cols)]
    arguments = q, k, np.full((3, 2), 0.5, np.float32), *gammas
    outputs = qknorm_tvm.apply_qk_rms_norm(*arguments)
    for got, want in zip(outputs, reference.apply_qk_rms_norm(*arguments), strict=True):
        assert reference.differing(got, want) == 0


def served_by() -> Path:
    """Return the file that serves calls with the columns of `smallest`."""
    return cache.module_for(SPEC.replace(target=host_cpu_target())).path


# ---- finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pack", "folder", "file"])
@pytest.mark.usefixtures("never_compiles")
def test_each_kind_of_source_serves(kind: str, tmp_path: Path) -> None:
    folder = make_pack(tmp_path / "pack", smallest())
    if kind != "pack":
        (folder / packs.INDEX).unlink()
    source = folder / smallest().name if kind == "file" else folder
    with environment(QKNORM_TVM_MODULES=f"{tmp_path / 'nowhere'}:{source}"):
        with pytest.warns(RuntimeWarning, match=r"nowhere") as caught:
            call()
        assert len(caught) == 1
        assert caught[0].filename == __file__, "a warning that names a line of this package"
        assert served_by() == folder / smallest().name


def test_first_call_leaves_nothing_connects_to_nothing_imports_no_compiler(tmp_path: Path) -> None:
    """A read-only container without a network; a first token that waits for a compiler."""
    folder = make_pack(tmp_path / "pack", smallest())
    code = """
    import os, sys
    import tempfile
    import numpy as np
    import qknorm_tvm, tvm_ffi
    # The loader's private folder, which holds a link to memory and is gone after the call.
    scratch = tempfile.mkdtemp()
    tempfile.tempdir = scratch
    done = []
    def private(path):
        return str(path).startswith(scratch) or str(path) == "module.so"
    def hook(event, args):
        if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove")):
            if not private(args[0]):
                done.append((event, args))
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            if not (isinstance(args[0], int) or private(args[0])):
                done.append((event, args))
    sys.addaudithook(hook)
    q, k, var = np.ones((2, 33), "f4"), np.ones((2, 7), "f4"), np.ones((2, 2), "f4")
    q_out, _ = qknorm_tvm.apply_qk_rms_norm(q, k, var, q[0], k[0], 0.0)
    assert (q_out == 1).all()
    assert qknorm_tvm.get_num_threads() >= 1
    assert not done, done
    assert not os.listdir(scratch)
    names = {"tvm", "click", "rich", "filelock", "platformdirs"} & set(sys.modules)
    assert not names, names
    """
    cache_folder = tmp_path / "cache"
    run_python(
        code, env={"QKNORM_TVM_MODULES": str(folder), "QKNORM_TVM_CACHE_DIR": str(cache_folder)}
    )
    assert not cache_folder.exists()


@pytest.mark.slow
def test_first_call_takes_a_few_milliseconds(tmp_path: Path) -> None:
    """Of processor time, the best of some processes: what other programs take is not ours."""
    other = compiled("packs-open", KernelSpec(in_dtype="float32", target=host_cpu_target()))
    folder = make_pack(tmp_path / "pack", smallest(), other)
    code = """
    import time
    import numpy as np
    import qknorm_tvm, tvm_ffi
    q, k, var = np.ones((2, 33), "f4"), np.ones((2, 7), "f4"), np.ones((2, 2), "f4")
    start = time.process_time()
    qknorm_tvm.apply_qk_rms_norm(q, k, var, q[0], k[0], 0.0)
    print(time.process_time() - start)
    """
    env = {"QKNORM_TVM_MODULES": str(folder)}
    taken = []
    while len(taken) < 8 and min(taken, default=1.0) >= 5e-3:
        taken.append(float(run_python(code, env=env).stdout))
    # On some machines and versions of Python it is 6; a compiler's import would be hundreds.
    assert min(taken) < 10e-3, taken


def test_earlier_packs_and_fixed_columns_come_first(tmp_path: Path) -> None:
    open_file = compiled("packs-open", KernelSpec(in_dtype="float32", target=host_cpu_target()))
    both = make_pack(tmp_path / "both", open_file, smallest())
    only_open = make_pack(tmp_path / "only_open", open_file)
    with environment(QKNORM_TVM_MODULES=f"{both}:{only_open}"):
        assert served_by() == both / smallest().name
        call(5, 3)
    cache._loaded.clear()
    with environment(QKNORM_TVM_MODULES=f"{only_open}:{both}"):
        assert served_by() == only_open / open_file.name


def test_use_comes_before_packs_and_packs_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pack(tmp_path / "pack", smallest())
    monkeypatch.setattr(cache, "_load_or_build", lambda spec: pytest.fail("went to the cache"))
    with environment(QKNORM_TVM_MODULES=str(folder)):
        assert served_by().parent == folder
        given = qknorm_tvm.load(smallest())
        qknorm_tvm.use(given)
        assert served_by() == given.path


@pytest.mark.parametrize("field", ["reproducible", "cast_before_gamma"])
def test_another_form_of_the_operation_is_not_served(field: str, tmp_path: Path) -> None:
    """Other bits than were asked for."""
    folder = make_pack(tmp_path / "pack", smallest())
    spec = SPEC.replace(target=host_cpu_target(), **{field: True})
    with environment(QKNORM_TVM_MODULES=str(folder)):
        assert packs.module_for(spec) is None
        assert packs.module_for(spec.replace(**{field: False})) is not None


@pytest.mark.usefixtures("never_compiles")
def test_without_tvm_what_is_missing_is_named(tmp_path: Path) -> None:
    """`PackageNotFoundError: No package metadata was found for apache-tvm`."""
    folder = make_pack(tmp_path / "pack", smallest())
    expected = (
        rf"there is no module for apply_qk_rms_norm\[float32->float32, q=34, k=7\]@.*"
        rf"QKNORM_TVM_MODULES is '{folder}', no pack is installed.* needs TVM, which is not "
        r"installed: pip install 'qknorm-tvm\[compile\]'; or build it elsewhere, "
        r"`qknorm-tvm export qk.so --spec 'apply_qk_rms_norm\[.*'`, and name its folder"
    )
    with (
        environment(QKNORM_TVM_MODULES=str(folder)),
        pytest.raises(BuildError, match=expected),
    ):
        call(34, 7)
    with pytest.raises(BuildError, match=r"compiling needs TVM.*qknorm-tvm\[compile\]"):
        qknorm_tvm.compile(SPEC)


# ---- refusing -----------------------------------------------------------------------------------


def _edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / packs.INDEX).read_text())
    change(index)
    (folder / packs.INDEX).write_text(json.dumps(index))


def _replace_module(folder: Path, with_hash: bool) -> None:
    """Put another whole module into the place of the one that the index describes."""
    path = folder / smallest().name
    other = compiled("packs-open", KernelSpec(in_dtype="float32", target=host_cpu_target()))
    shutil.copy(other, path)
    if with_hash:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        _edit_index(folder, lambda index: index["modules"][0].update(sha256=sha256))


def _truncate(folder: Path) -> None:
    path = folder / smallest().name
    path.write_bytes(path.read_bytes()[:5000])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_index(folder, lambda index: index["modules"][0].update(sha256=sha256))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "version": (
        lambda f: _edit_index(f, lambda index: index.update({"qknorm-tvm": "0.0.1"})),
        r"is a pack of qknorm-tvm 0\.0\.1 .* and this is",
    ),
    "format": (
        lambda f: _edit_index(f, lambda index: index.update(format=99)),
        r"is a pack of .*\(formats 99,",
    ),
    "module format": (
        lambda f: _edit_index(f, lambda index: index.update(module_format=1)),
        r"is a pack of ",
    ),
    "no JSON": (lambda f: (f / packs.INDEX).write_text("{"), r"index\.json is damaged"),
    "no object": (lambda f: (f / packs.INDEX).write_text("[]"), r"index\.json is damaged"),
    "a path": (
        lambda f: _edit_index(f, lambda i: i["modules"][0].update(file="../pack2/a.so")),
        r"index\.json is damaged",
    ),
    "a spec": (
        lambda f: _edit_index(f, lambda i: i["modules"][0].update(specs=["x"])),
        r"index\.json is damaged",
    ),
    "missing": (lambda f: (f / smallest().name).unlink(), "No such file"),
    "truncated": (_truncate, "is damaged"),
    "another file": (lambda f: _replace_module(f, False), "not the file that the pack's index"),
    "other specs": (lambda f: _replace_module(f, True), "does not hold the specs"),
    "open folder": (lambda f: f.chmod(0o777), r"others may write to .*pack, so"),
    "open index": (lambda f: (f / packs.INDEX).chmod(0o666), r"others may write to .*index"),
    "open file": (lambda f: (f / smallest().name).chmod(0o777), r"others may write to .*\.so"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_serve_is_refused_once_and_the_next_source_serves(
    kind: str, tmp_path: Path
) -> None:
    damage, message = REFUSED[kind]
    bad, good = (make_pack(tmp_path / name, smallest()) for name in ("pack", "good"))
    damage(bad)
    with environment(QKNORM_TVM_MODULES=f"{bad}:{good}"):
        with pytest.warns(RuntimeWarning, match=message) as caught:
            call()
        assert len(caught) == 1
        assert served_by() == good / smallest().name
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the same is not said again
            cache._loaded.clear()
            assert served_by() == good / smallest().name


def test_pack_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("gives a file to another user, which only root may")
    bad = make_pack(tmp_path / "pack", smallest())
    os.chown(bad, 65534, -1)
    with (
        environment(QKNORM_TVM_MODULES=str(bad)),
        pytest.warns(RuntimeWarning, match=r"belongs to another user \(uid 65534\)"),
    ):
        assert packs.module_for(SPEC) is None


def test_module_of_another_version_without_index_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "__version__", "9.9.9")
    with (
        environment(QKNORM_TVM_MODULES=str(smallest())),
        pytest.warns(RuntimeWarning, match=r"was built by qknorm-tvm .*, and this is 9\.9\.9"),
    ):
        assert packs.module_for(SPEC) is None


def test_module_for_a_better_cpu_is_refused(tmp_path: Path) -> None:
    """SIGILL in the first call."""
    target = host_cpu_target()
    if target not in X86_LEVELS:
        pytest.skip("switches off instruction sets of x86")
    path = compiled("packs-level", SPEC.replace(target=target))
    better, good = make_pack(tmp_path / "better", path), make_pack(tmp_path / "good", smallest())
    disabled = {"x86-64-v4": "avx512f", "x86-64-v3": "avx2", "x86-64-v2": "sse4.2"}[target]
    code = """
    import warnings, sys
    import numpy as np, qknorm_tvm
    q, k, var = np.ones((2, 33), "f4"), np.ones((2, 7), "f4"), np.ones((2, 2), "f4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q_out, _ = qknorm_tvm.apply_qk_rms_norm(q, k, var, q[0], k[0], 0.0)
    assert (q_out == 1).all()
    print(*[str(one.message) for one in caught])
    assert "tvm" not in sys.modules
    """
    env = {
        "QKNORM_TVM_DISABLE_CPU_FEATURES": disabled,
        "QKNORM_TVM_MODULES": f"{better}:{good}",
    }
    said = run_python(code, env=env).stdout
    assert said.count("a pack of modules is not used") == 1
    assert "which this CPU cannot run" in said


def test_module_for_other_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fails on the GPU although another pack has the code."""
    held = {"a.so": ["sm_80"], "b.so": ["sm_80", "compute_80"], "c.so": ["sm_90"]}
    spec = KernelSpec(q_cols=8, k_cols=8, target="cuda:sm_90")
    loaded: list[str] = []

    class Loaded:
        specs = (spec,)

    def load(path: Path) -> Loaded:
        loaded.append(path.name)
        return Loaded()

    def modules(folder: Path) -> tuple[packs.PackedModule, ...]:
        names = folder.name.split("+")
        return tuple(packs.PackedModule(tmp_path / f"{name}.so", (spec,)) for name in names)

    monkeypatch.setattr(packs, "read_metadata", lambda path: {"architectures": held[path.name]})
    monkeypatch.setattr(packs, "load", load)
    monkeypatch.setattr(packs, "_modules", modules)
    monkeypatch.setattr(packs._modules, "cache_clear", lambda: None, raising=False)
    for name in held:
        (tmp_path / name).touch(mode=0o644)
    with (
        environment(QKNORM_TVM_MODULES=f"{tmp_path / 'a'}:{tmp_path / 'a+c'}"),
        pytest.warns(RuntimeWarning, match=r"a\.so holds code for sm_80, and the GPU is sm_90"),
    ):
        assert packs.module_for(spec) is not None
    with environment(QKNORM_TVM_MODULES=f"{tmp_path / 'b'}"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packs.module_for(spec) is not None  # by its PTX
    assert loaded == ["c.so", "b.so"]


@pytest.mark.parametrize(
    ("held", "gpu", "runs"),
    [
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("compute_80", "sm_90", True),
        ("compute_90", "sm_80", False),
        ("sm_90a", "sm_90", True),
        ("sm_100", "sm_120", False),
    ],
)
def test_code_that_runs_on_a_gpu(held: str, gpu: str, runs: bool) -> None:
    assert runs_on_gpu(held, gpu) is runs


# ---- building -----------------------------------------------------------------------------------


def test_plan_has_what_layers_call() -> None:
    """A shape, a form or an operation that a rank asks for, and the pack lacks."""
    plan = packing.plan(["minimax-m2", "olmo2-13b"], [1, 8, 16], ["cpu", "cuda:sm_90"])
    specs = {spec for module in plan.modules for spec in module}
    minimax = {
        (spec.op, spec.q_cols, spec.k_cols, spec.cast_before_gamma)
        for spec in specs
        if spec.q_cols != spec.k_cols and spec.target == "cpu"
    }
    apply, statistics = "apply_qk_rms_norm", "row_mean_of_squares_qk"
    assert minimax == {
        *(("qk_rms_norm", 6144, 1024, cast) for cast in (True, False)),
        *((apply, 6144, 1024, cast) for cast in (True, False)),
        (statistics, 768, 128, False),
        *((apply, 768, 128, cast) for cast in (True, False)),
        # Sixteen ranks share eight KV heads.
        (statistics, 384, 128, False),
        *((apply, 384, 128, cast) for cast in (True, False)),
    }
    assert {spec.target for spec in specs} == {"cpu", "cuda:sm_90"}
    # On GPUs ranks exchange statistics within the launch.
    assert {
        (spec.op, spec.q_cols, spec.target, spec.cast_before_gamma)
        for spec in specs
        if spec.statistics == "peers"
    } == {
        ("qk_rms_norm", cols, "cuda:sm_90", cast)
        for cols in (768, 384, 640)
        for cast in (True, False)
    }
    assert len(plan.impossible) == 1
    assert "olmo2-13b has no layer for 16 ranks" in plan.impossible[0]
    assert len(plan.layers) == 5
    names = [packing.file_name(module) for module in plan.modules]
    assert len(set(names)) == len(names)


def test_a_model_without_rotation_has_its_cache_all_the_same() -> None:
    """OLMo-Hybrid, whose 30 heads do not divide over four ranks."""
    plan = packing.plan(["olmo-hybrid-7b"], [1, 2, 4], ["cpu"], ["rope-cache"])
    specs = [spec for module in plan.modules for spec in module]
    assert [(spec.op, spec.q_cols, spec.rotary_dim, spec.statistics) for spec in specs] == [
        ("qk_rms_norm_rope_cache", 3840, 0, "local"),
        ("qk_rms_norm_rope_cache", 1920, 0, "given"),
    ]
    assert len(plan.impossible) == 1


def test_specs_that_a_call_cannot_tell_apart_are_in_two_files() -> None:
    for module in packing.plan(MODELS, [1, 2, 4], ["cpu"]).modules:
        seen = [
            (spec.op, spec.in_dtype, spec.out_dtype, spec.q_cols, spec.k_cols) for spec in module
        ]
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("models", "ranks", "targets", "message"),
    [
        (["gpt-2"], [1], ["cpu"], r"models must be of minimax-m2, .*, got 'gpt-2'"),
        (["olmo2-13b"], [16], ["cpu"], r"olmo2-13b has no layer for 16 ranks: q_heads must"),
        (["olmoe"], [1], ["sm_90"], r"target must be 'cpu'|LLVM"),
    ],
)
def test_wrong_plans_are_refused(
    models: list[str], ranks: list[int], targets: list[str], message: str
) -> None:
    if targets == ["sm_90"]:
        targets = ["native"]
    with pytest.raises(ValueError, match=message):
        packing.plan(models, ranks, targets)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, packing.Plan]:
    """A pack of one small model, built by the product."""
    folder = tmp_path_factory.mktemp("packs") / "olmoe"
    plan = packing.plan(["olmoe"], [16], [host_cpu_target()])
    return packing.build(plan, folder), plan


def test_built_pack_serves_what_it_lists(built: tuple[Path, packing.Plan]) -> None:
    folder, plan = built
    index = json.loads((folder / packs.INDEX).read_text())
    assert index["layers"] == [
        {"model": "olmoe", "ranks": 16, "q_cols": 128, "k_cols": 128, "epsilon": 1e-5}
    ]
    for entry in index["modules"]:
        content = (folder / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    with environment(QKNORM_TVM_MODULES=str(folder)):
        for module in plan.modules:
            for spec in module:
                served = packs.module_for(spec.replace(target=host_cpu_target()))
                assert served is not None
                assert served.path.parent == folder
    with pytest.raises(ValueError, match="OUT must be a new or an empty folder"):
        packing.build(plan, folder)


def test_wheel_is_found_by_its_entry_point(
    built: tuple[Path, packing.Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel that installs and is never used; a pack whose package has to be imported."""
    folder, plan = built
    wheel = packing.write_wheel(folder, plan, tmp_path / "dist")
    again = packing.write_wheel(folder, plan, tmp_path / "again")
    assert wheel.read_bytes() == again.read_bytes()
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delenv("QKNORM_TVM_MODULES", raising=False)
    served = packs.module_for(plan.modules[0][0].replace(target=host_cpu_target()))
    assert served is not None
    assert served.path.parent == site / packing.PACKAGE
    assert packing.PACKAGE not in sys.modules


def test_no_wheel_is_for_two_machines() -> None:
    plan = packing.plan(["olmoe"], [16], ["cpu", "aarch64"])
    with pytest.raises(ValueError, match="targets must be of one machine for a wheel"):
        packing.machine_of(plan)
