"""The plugins of serving engines, without an engine: switches, versions, log lines, the norm.

`test_engines_vllm` runs them in the real vLLM.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import run_python

from qknorm_tvm.call import cache
from qknorm_tvm.call import compiled as compiled_module
from qknorm_tvm.integrations import engines

ENGINES = ("vllm", "sglang")


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process of an engine: nothing said, nothing hooked, the usual settings."""
    monkeypatch.setattr(engines, "_said", set())
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in (engines.SWITCH, engines.STATISTICS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install an engine of a version, in name only."""

    def install(engine: str, version: str) -> None:
        module = types.ModuleType(engine)
        module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, engine, module)

    return install


def register(engine: str) -> int:
    """Run an engine's plugin, and return how many finders of modules it has added."""
    before = len(sys.meta_path)
    importlib.import_module(f"qknorm_tvm.integrations.{engine}").register()
    return len(sys.meta_path) - before


# ---- whether an engine is changed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "known", "tested"),
    [
        ("vllm", "0.32.0", True),
        ("vllm", "0.32.1.post1+cpu", True),
        ("vllm", "0.33.0", True),
        ("vllm", "0.31.9", False),
        ("vllm", "0.34.0.dev12+g0123456", False),
        ("vllm", "1.0", False),
        ("vllm", "dev", False),
        ("sglang", "0.5.23", True),
        ("sglang", "0.5.23.post1", True),
        ("sglang", "0.5.22", False),
        ("sglang", "0.5.24", False),
        ("sglang", "0.6.0", False),
    ],
)
def test_only_tested_versions_are_changed(
    engine: str, known: str, tested: bool, version: Any, caplog: pytest.LogCaptureFixture
) -> None:
    version(engine, known)
    with caplog.at_level(logging.INFO):
        assert register(engine) == int(tested)
        register(engine)
    lines = [record for record in caplog.records if record.name == f"{engine}.qknorm_tvm"]
    assert len(lines) == int(not tested), "one line, however often the plugin is loaded"
    if not tested:
        assert known in lines[0].getMessage()
        assert lines[0].levelno == logging.WARNING


@pytest.mark.parametrize("engine", ENGINES)
def test_switched_off(
    engine: str, version: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version(engine, "0.0.1")
    monkeypatch.setenv(engines.SWITCH, "0")
    with caplog.at_level(logging.DEBUG):
        assert register(engine) == 0
    assert not caplog.records, "nobody who has switched it off wants to hear of it"


@pytest.mark.parametrize(
    ("name", "value"), [(engines.SWITCH, "no"), (engines.STATISTICS, "fussed")]
)
def test_a_setting_with_a_slip_changes_nothing(
    name: str,
    value: str,
    version: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    version("vllm", "0.32.0")
    monkeypatch.setenv(name, value)
    assert register("vllm") == 0
    (record,) = caplog.records
    assert name in record.getMessage()
    assert value in record.getMessage()


def test_entry_points_are_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["entry-points"]
    for group, engine in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
        entry = importlib.metadata.EntryPoint("qknorm_tvm", declared[group]["qknorm_tvm"], group)
        assert entry.load() is importlib.import_module(f"qknorm_tvm.integrations.{engine}").register


def test_loading_a_plugin_is_cheap() -> None:
    """Every process of an engine loads it, also for models that have no such norm."""
    # What an engine that looks for plugins has imported long before. A million squares, for
    # comparison in the same process, take 50 to 60 ms of a CPU of 2024 that has nothing else to do.
    text = """
        import ctypes, dataclasses, email.message, fcntl, hashlib, importlib.metadata
        import importlib.resources, inspect, json, logging, pathlib, platform, shlex, sys, tempfile
        import time
        before = set(sys.modules)
        start = time.process_time()
        from qknorm_tvm.integrations.{} import register
        loaded = time.process_time()
        total = 0
        for i in range(1_000_000):
            total += i * i
        print((loaded - start) / (time.process_time() - loaded))
        print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
    """
    for engine in ENGINES:
        done = [run_python(text.format(engine)).stdout.splitlines() for _ in range(3)]
        assert min(float(ratio) for ratio, _ in done) < 0.9, "under 50 ms"
        imported = set(" ".join(names for _, names in done).split())
        assert imported <= {"qknorm_tvm", *sys.stdlib_module_names}
        assert not {"tvm", "torch", engine} & imported


# ---- modules that are changed when they are imported ---------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module that counts how often it runs."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "model.py").write_text("class Attention:\n    norm = 'own'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stand_in.model"
    for name in ("stand_in", "stand_in.model"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("imported_before", [False, True])
def test_a_module_is_changed_once(package: str, imported_before: bool) -> None:
    changed = []

    def change(module: types.ModuleType) -> None:
        changed.append(module)
        module.Attention.norm = "ours"  # type: ignore[attr-defined]

    if imported_before:
        importlib.import_module(package)
    engines.when_imported("vllm", {package: change, "stand_in.never": changed.append})
    module = importlib.import_module(package)
    importlib.import_module(package)
    assert changed == [module]
    assert module.Attention.norm == "ours"
    # Torch's compiler and debuggers look a module up by these.
    assert inspect.getsource(module.Attention).startswith("class Attention")
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"
    assert module.__spec__.loader is module.__loader__


def test_a_module_that_is_not_as_expected_is_left(
    package: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines.when_imported("vllm", {package: lambda module: module.NoSuchAttention})
    assert importlib.import_module(package).Attention.norm == "own"
    (record,) = caplog.records
    assert "stand_in.model is not as expected" in record.getMessage()


# ---- the norm of a layer -------------------------------------------------------------------------


torch_only = pytest.mark.frameworks
Q_COLS, K_COLS, HEAD_DIM, ROTARY_DIM, ROWS = 64, 32, 16, 8, 5


def layer(dtype: str = "float32", agree: Any = bool) -> Any:
    """Return a small layer of a model on the CPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import Layer

    return Layer(
        "vllm", "StandIn", "its norms", getattr(torch, dtype), torch.device("cpu"),
        Q_COLS, K_COLS, agree,
    )  # fmt: skip


def alone(x: Any) -> Any:
    """Refuse to sum over ranks."""
    raise AssertionError("one rank does not communicate")


def operands(dtype: str, ranks: int = 1) -> tuple[Any, ...]:
    """Return Q, K and float32 scales of all ranks, as slices of a projection."""
    import torch

    generator = torch.Generator().manual_seed(1)
    cols = (Q_COLS + 2 * K_COLS) * ranks
    qkv = torch.randn(ROWS, cols, generator=generator).to(getattr(torch, dtype))
    q, k, _ = qkv.split([Q_COLS * ranks, K_COLS * ranks, K_COLS * ranks], dim=-1)
    gamma_q, gamma_k = (0.5 + torch.rand(x.shape[1], generator=generator) for x in (q, k))
    return q, k, gamma_q, gamma_k


def as_engines_do(x: Any, gamma: Any, epsilon: float, *, cast: bool = False) -> Any:
    """Return vLLM's norm of a whole row: `cast` as its RMSNorm with a weight of 16 bits."""
    wide = x.float()
    y = wide * (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return ((y.to(x.dtype) if cast else y) * gamma).to(x.dtype)


@torch_only
@pytest.mark.parametrize(("dtype", "cast"), [("float32", False), ("bfloat16", True)])
def test_torch_statistics_give_the_bits_of_the_engine(
    dtype: str, cast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import norm_for

    q, k, gamma_q, gamma_k = operands(dtype)
    expected = [as_engines_do(x, g, 1e-5, cast=cast) for x, g in ((q, gamma_q), (k, gamma_k))]
    options: dict[str, Any] = {"epsilon": 1e-5, "cast_before_gamma": cast, "ranks": 1}
    for statistics in ("torch", "fused"):
        monkeypatch.setenv(engines.STATISTICS, statistics)
        with caplog.at_level(logging.INFO):
            norm = norm_for(layer(dtype), all_reduce=alone, group=None, **options)
        got = norm(q, k, gamma_q, gamma_k)
        for one, other in zip(got, expected, strict=True):
            if statistics == "torch":
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1.6e-2 if dtype != "float32" else 1e-6,
                                           atol=1e-6)  # fmt: skip
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "its norms replaced by qknorm_tvm's kernels (1 rank, statistics torch)" in lines[0]


@torch_only
@pytest.mark.parametrize("uncompiled", [False, True])
def test_statistics_that_an_engine_does_not_compile_are_not_compiled(uncompiled: bool) -> None:
    """Compiled sums are in another order: float32 MiniMax-M2 on two ranks had other bits."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import AttentionNorm

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    norm = AttentionNorm(1e-6, False, 2, lambda x: 2 * x, "torch", uncompiled=uncompiled)
    q, k, *_ = operands("float32")
    compiled = torch.compile(norm.mean_squares, backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, k), norm.mean_squares(q, k))
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert ("qknorm_tvm.mean_squares_by_torch" in " ".join(operators)) is uncompiled
    assert any(node.target == "pow" for node in graph.graph.nodes) is not uncompiled


@torch_only
@pytest.mark.parametrize("statistics", ["torch", "fused"])
@pytest.mark.parametrize("gathers", [False, True])
def test_two_ranks_give_the_norm_of_the_whole_row(
    statistics: str, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bytes a row are sent, and no more, but for statistics of whole rows as the engine has."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import norm_for

    monkeypatch.setenv(engines.STATISTICS, statistics)
    whole = operands("float32", ranks=2)
    parts = [[part.contiguous() for part in x.chunk(2, dim=-1)] for x in whole]
    sent: list[Any] = []

    def all_reduce(x: Any) -> Any:
        assert x.dim() == 1
        sent.append(x)
        return x + others.pop()

    def gather(x: Any) -> Any:
        (name,) = (i for i in (0, 1) if torch.equal(parts[i][0], x))
        return whole[name]

    norm = norm_for(
        layer(), epsilon=1e-6, cast_before_gamma=False, ranks=2, all_reduce=all_reduce, group=None,
        gather=gather if gathers else None,
    )  # fmt: skip
    assert norm is not None
    assert not sent, "trying it needs no other rank"
    q, k = parts[0][1], parts[1][1]
    others = [torch.stack([x.pow(2).mean(-1) for x in (q, k)], dim=1).flatten()]
    got = norm(*(part[0] for part in parts))
    for i, one in enumerate(got):
        expected = as_engines_do(whole[i], whole[i + 2], 1e-6).chunk(2, dim=-1)[0]
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
    if gathers and statistics == "torch":
        assert not sent
    else:
        assert [x.numel() * x.element_size() for x in sent] == [8 * ROWS]


@torch_only
@pytest.mark.parametrize("rotates", [False, True])
def test_ranks_on_gpus_exchange_within_the_launch_where_they_can(
    rotates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks meet when the layer is replaced, not in a call that a CUDA graph may capture."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations import engine_norm

    group, made, calls = object(), [], []
    monkeypatch.setattr(
        engine_norm, "automatic_workspace", lambda *where: made.append(where) or object()
    )
    asked_of: list[Any] = []
    monkeypatch.setattr(
        engine_norm, "is_everywhere", lambda workspace, spec: asked_of.append(spec) or True
    )
    monkeypatch.setattr(engine_norm, "_has_module", lambda spec: spec.has_peers)
    monkeypatch.setattr(engine_norm, "_specs", lambda layer, norm, rotary: [specs(norm)])

    def specs(norm: Any) -> Any:
        assert norm.group is group
        return types.SimpleNamespace(has_peers=True)

    for name in ("qk_rms_norm", "qk_rms_norm_rope"):
        monkeypatch.setattr(
            engine_norm.over_ranks, name,
            lambda *args, name=name, **options: calls.append((name, args, options)),
        )  # fmt: skip
    norm = engine_norm.AttentionNorm(1e-6, False, 2, alone, "fused", head_dim=HEAD_DIM * rotates)
    on_cpu = layer()
    on_gpu = dataclasses.replace(on_cpu, device=torch.device("cuda", 0))
    for model, other, can in (
        (on_cpu, {}, False),
        (on_gpu, {"statistics": "torch"}, False),
        (on_gpu, {"ranks": 1}, False),
        (dataclasses.replace(on_gpu, agree=lambda ok: False), {}, False),
        (on_gpu, {}, True),
    ):
        asked = dataclasses.replace(norm, **other)
        assert engine_norm._can_exchange(model, asked, None, group) is can
    assert not engine_norm._can_exchange(on_gpu, norm, None, None)
    assert made == [(group, on_gpu.device)]
    assert len(asked_of) == 1
    dataclasses.replace(norm, group=group)("q", "k", "gamma_q", "gamma_k", "positions", "table")
    ((name, args, options),) = calls
    assert name == ("qk_rms_norm_rope" if rotates else "qk_rms_norm")
    assert args == ("q", "k", "gamma_q", "gamma_k", *["positions", "table"][: 2 * rotates])
    assert (options["group"], options["workspace"]) == (group, "auto")


def contract_rotation(rotary: Any) -> Any:
    """Return the rotation of the contract by torch."""
    import torch

    def rotate(positions: Any, *operands: Any) -> Any:
        cos, sin = (x[:, None] for x in rotary.cos_sin_cache[positions].float().chunk(2, -1))
        rotated = []
        for x in operands:
            heads = x.view(len(x), -1, HEAD_DIM)
            a, b = (half.float() for half in heads[..., :ROTARY_DIM].chunk(2, -1))
            pair = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
            rotated.append(torch.cat([*pair, heads[..., ROTARY_DIM:]], dim=-1).view(x.shape))
        return tuple(rotated)

    return rotate


@torch_only
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rotation_is_fused_where_its_bits_are_the_contracts(
    ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import norm_for

    angles = torch.rand(32, ROTARY_DIM // 2, generator=torch.Generator().manual_seed(2)) * 6
    rotary = types.SimpleNamespace(
        head_size=HEAD_DIM,
        rotary_dim=ROTARY_DIM,
        is_neox_style=True,
        cos_sin_cache=torch.cat([angles.cos(), angles.sin()], dim=-1),
    )
    rotate = contract_rotation(rotary)

    def otherwise(*args: Any) -> Any:
        q, k = rotate(*args)
        return q, torch.nextafter(k, k + 1)

    def norm_with(**options: Any) -> Any:
        return norm_for(
            layer(), epsilon=1e-6, cast_before_gamma=False, ranks=ranks,
            all_reduce=lambda x: 2 * x, group=None, **options,
        )  # fmt: skip

    caplog.set_level(logging.INFO)
    fused, left = (
        norm_with(rotary=rotary, rotate=rotate),
        norm_with(rotary=rotary, rotate=otherwise),
    )
    assert (fused.rotates, left.rotates) == (True, False)
    assert not norm_with(rotary=rotary).rotates
    assert not norm_with().rotates
    q, k, *gammas = operands("float32")
    positions = torch.tensor([0, 31, 7, 7, 1])
    expected = rotate(positions, *left(q, k, *gammas))
    for one, other in zip(
        fused(q, k, *gammas, positions, rotary.cos_sin_cache), expected, strict=True
    ):
        assert torch.equal(one, other)
    first, second, third, fourth = (record.getMessage() for record in caplog.records)
    assert "norms and rotation in one launch" in first
    assert "the bits of SimpleNamespace are not those of the contract" in second
    assert "SimpleNamespace is not the contract's class" in third
    assert "the model rotates" in fourth
    rotary.is_neox_style = False
    assert not norm_with(rotary=rotary, rotate=rotate).rotates, "other pairs"


@torch_only
def test_a_missing_module_is_said_once_with_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As in an engine's container, where TVM is not installed."""
    model = layer()  # skips without torch
    from qknorm_tvm.integrations import engine_norm

    def no_tvm(name: str) -> str:
        raise compiled_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiled_module.importlib.metadata, "version", no_tvm)
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_given", [])
    monkeypatch.setenv("QKNORM_TVM_CACHE_DIR", str(tmp_path))
    engine_norm._has_module.cache_clear()
    try:
        for _ in range(3):
            norm = engine_norm.norm_for(
                model, epsilon=1e-6, cast_before_gamma=False, ranks=2, all_reduce=alone, group=None
            )
            assert norm is None
    finally:
        engine_norm._has_module.cache_clear()
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "the engine's own norms are kept" in text
    command = re.search(r"`qknorm-tvm export qk.so (.*)`", text)
    assert command is not None
    specs = re.findall(r"--spec '(.*?)'", command[1])
    assert [spec.partition("[")[0] for spec in specs] == [
        "apply_qk_rms_norm",
        "row_mean_of_squares_qk",
    ]


@torch_only
def test_ranks_replace_a_layer_together_or_not(caplog: pytest.LogCaptureFixture) -> None:
    """A rank that lacks a module never sends the statistics that the others would wait for."""
    pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import norm_for

    model = layer(agree=lambda ok: False)
    options: dict[str, Any] = {"epsilon": 1e-6, "cast_before_gamma": False, "ranks": 2}
    assert norm_for(model, all_reduce=alone, group=None, **options) is None
    (record,) = caplog.records
    assert "another rank cannot go on" in record.getMessage()


@torch_only
def test_weights_are_widened_before_a_checkpoint_is_loaded() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from qknorm_tvm.integrations.engine_norm import widen

    norm = torch.nn.Module()
    norm.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    norm.weight.weight_loader = loader = object()
    widen(norm)
    assert norm.weight.dtype == torch.float32
    assert norm.weight.weight_loader is loader
    assert not norm.weight.requires_grad
    assert list(norm.state_dict()) == ["weight"]


# ---- vLLM's layers, on stand-ins ----------------------------------------------------------------


@pytest.fixture
def minimax_m2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `vllm_layers` reaches of vLLM's MiniMax-M2: one rank, no projections, no cache."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Norm(torch.nn.Module):
        def __init__(self, cols: int):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(cols), requires_grad=False)
            self.variance_epsilon, self.tp_world = 1e-6, 1

        @staticmethod
        def forward_qkv(q_norm: Any, k_norm: Any, qkv: Any, q_size: int, kv_size: int) -> Any:
            q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
            return as_engines_do(q, q_norm.weight, 1e-6), as_engines_do(k, k_norm.weight, 1e-6), v

    class RotaryEmbedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_size, self.rotary_dim, self.is_neox_style = HEAD_DIM, ROTARY_DIM, True
            angles = torch.rand(32, ROTARY_DIM // 2) * 6
            self.cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=-1)

        def forward_cpu(self, positions: Any, q: Any, k: Any) -> Any:
            return contract_rotation(self)(positions, q, k)

    class MiniMaxM2Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_size, self.kv_size = Q_COLS, K_COLS
            self.q_norm, self.k_norm = Norm(Q_COLS), Norm(K_COLS)
            self.rotary_emb = RotaryEmbedding()
            self.qkv_proj = self.o_proj = lambda x: (x, None)
            self.attn = lambda *parts: torch.cat(parts, dim=-1)

        def forward(self, positions: Any, hidden_states: Any) -> Any:
            qkv, _ = self.qkv_proj(hidden_states)
            q, k, v = Norm.forward_qkv(self.q_norm, self.k_norm, qkv, self.q_size, self.kv_size)
            q, k = self.rotary_emb.forward_cpu(positions, q, k)
            return self.attn(q, k, v)

    config = types.SimpleNamespace(additional_config={})
    group = types.SimpleNamespace(world_size=1, device_group=None)
    modules = {
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.distributed": {
            "get_tp_group": lambda: group,
            "tensor_model_parallel_all_reduce": alone,
        },
        "vllm.model_executor.layers.rotary_embedding.base": {"RotaryEmbedding": RotaryEmbedding},
    }
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        sys.modules[name].__dict__.update(contents)
    model = types.ModuleType("minimax_m2")
    model.__dict__.update(MiniMaxM2Attention=MiniMaxM2Attention, MiniMaxText01RMSNormTP=Norm)
    return types.SimpleNamespace(module=model, config=config, rotary=RotaryEmbedding)


@torch_only
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("has_key", [True, False])
def test_vllm_layers_are_replaced_and_named_in_its_caches(
    rotates: bool, has_key: bool, minimax_m2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph compiled without the kernels that is loaded in place of one with them."""
    import torch

    from qknorm_tvm.integrations import engine_norm, vllm_layers

    calls = []
    own_call = engine_norm.AttentionNorm.__call__

    def counted(self: Any, q: Any, *args: Any) -> Any:
        calls.append(self.rotates)
        return own_call(self, q, *args)

    if not has_key:
        minimax_m2.config.additional_config = object()
    if not rotates:
        monkeypatch.setattr(
            minimax_m2.rotary, "forward_cpu", lambda self, positions, q, k: (q + 1, k + 1)
        )
    attention = minimax_m2.module.MiniMaxM2Attention
    torch.manual_seed(0)
    own = attention()
    for _ in range(2):  # engines may load a plugin again
        vllm_layers.change_minimax_m2(minimax_m2.module)
    torch.manual_seed(0)
    changed = attention()
    monkeypatch.setattr(engine_norm.AttentionNorm, "__call__", counted)
    positions, hidden = torch.tensor([0, 31, 4]), torch.randn(3, Q_COLS + 2 * K_COLS)
    expected, got = own(positions, hidden), changed(positions, hidden)
    assert calls == ([rotates] if has_key else [])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    if has_key:
        (key,) = minimax_m2.config.additional_config.items()
        assert key[0] == "qknorm_tvm MiniMaxM2Attention"
        assert f"statistics fused, rotates {rotates}" in key[1]
    else:
        assert torch.equal(got, expected)
