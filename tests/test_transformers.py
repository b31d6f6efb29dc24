"""`qknorm_tvm.integrations.transformers` in transformers' own models, whole and sharded."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

_REASON = "patches models of transformers, and {} is not installed"
torch = pytest.importorskip("torch", reason=_REASON.format("torch"))
transformers = pytest.importorskip("transformers", reason=_REASON.format("transformers"))
MODULES = ("olmo2", "olmo3", "minimax_m2")
for _name in MODULES:
    pytest.importorskip(f"transformers.models.{_name}", reason=_REASON.format(_name))

import qknorm_tvm  # noqa: E402
from qknorm_tvm.integrations.transformers import patch, unpatch  # noqa: E402
from qknorm_tvm.tensor_parallel import HeadLayout  # noqa: E402

pytestmark = pytest.mark.frameworks
MODELS = ("Olmo2", "Olmo3", "MiniMaxM2")
Q_HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
#: How far logits may be from the unpatched model's, as a part of the largest, where means of
#: squares are summed in another order. float32: a few roundings of a mean, of 2^-24 each, through
#: two layers. bfloat16: such a mean moves single elements to the neighbouring number, 2^-8 away.
BOUND = {"float32": 5e-6, "bfloat16": 2e-2}
#: The same for a sharded model, in which every output projection is a sum of partial results that
#: are rounded first, to 2^-9 of each in bfloat16.
SHARDED_BOUND = {"float32": 5e-6, "bfloat16": 3e-2}


def make_model(
    kind: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    *,
    heads: tuple[int, int] = (Q_HEADS, KV_HEADS),
    experts_per_token: int = 2,
) -> Any:
    """Return a random model of two layers whose scales are no ones."""
    options = {
        "vocab_size": 128,
        "hidden_size": heads[0] * HEAD_DIM,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": attention,
    }
    if kind == "MiniMaxM2":
        options |= {
            "head_dim": HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": experts_per_token,
        }
    if kind == "Olmo3":
        options["sliding_window"] = 4
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**options)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return model.to(getattr(torch, dtype)).eval()


def token_ids(rows: int = 2, length: int = 9) -> Any:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def distance(got: Any, wanted: Any) -> float:
    """Return the largest difference as a part of the largest wanted value."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind", MODELS)
def test_logits(kind: str, dtype: str, attention: str) -> None:
    model, ids = make_model(kind, dtype, attention), token_ids()
    wanted = model(ids).logits
    assert torch.equal(patch(model, statistics="torch")(ids).logits, wanted)
    assert distance(patch(unpatch(model))(ids).logits, wanted) <= BOUND[dtype]
    assert torch.equal(unpatch(model)(ids).logits, wanted)


@pytest.mark.parametrize("statistics", ["fused", "torch"])
@pytest.mark.parametrize("kind", MODELS)
def test_generate(kind: str, statistics: str) -> None:
    """With a cache, one token a step, and left padding; generate turns gradients off itself."""
    model, ids = make_model(kind), token_ids()
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(ids, **options)
    with torch.enable_grad():
        got = patch(model, statistics=statistics).generate(ids, **options)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_scales_of_another_type(kind: str) -> None:
    """Checkpoints whose norms are float32 in a bfloat16 model: the type of the result follows."""
    model = make_model(kind, "bfloat16")
    for attention in attentions(model):
        attention.q_norm.float(), attention.k_norm.float()
    hidden = torch.randn(2, 3, Q_HEADS * HEAD_DIM).bfloat16()

    def outputs() -> tuple[Any, Any]:
        attention = attentions(model)[0]
        q = attention.q_norm(attention.q_proj(hidden))
        return q, attention.k_norm(attention.k_proj(hidden))

    wanted = outputs()
    patch(model, statistics="torch")
    for got, expected in zip(outputs(), wanted, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_no_rows() -> None:
    attention = attentions(patch(make_model("Olmo2")))[0]
    hidden = torch.zeros(2, 0, Q_HEADS * HEAD_DIM)
    assert attention.q_norm(attention.q_proj(hidden)).shape == (2, 0, Q_HEADS * HEAD_DIM)
    assert attention.k_norm(attention.k_proj(hidden)).shape == (2, 0, KV_HEADS * HEAD_DIM)


def test_compiled() -> None:
    model, ids = make_model("Olmo2"), token_ids()
    patch(model, statistics="torch")
    wanted = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids, use_cache=False).logits, wanted)


# ---- the model around it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "operation", "why"),
    [
        ("Olmo2", "bfloat16", "qk_rms_norm_rope", ""),
        ("MiniMaxM2", "float32", "qk_rms_norm_rope", ""),
        ("MiniMaxM2", "bfloat16", "qk_rms_norm",
         "model.layers.0.self_attn: rotation is left to the model: MiniMaxM2Attention rounds each "
         "operation of it to torch.bfloat16"),
    ],
)  # fmt: skip
def test_one_launch(
    kind: str,
    dtype: str,
    operation: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Norms one by one, a rotation once more, or one that is left out without a word."""
    from qknorm_tvm import torch_ops

    calls, rotations = [], []
    norm = getattr(torch_ops, operation)
    monkeypatch.setattr(
        torch_ops, operation, lambda *args, **more: calls.append(1) or norm(*args, **more)
    )
    model = make_model(kind, dtype)
    module = sys.modules[type(model).__module__]
    rotary = module.apply_rotary_pos_emb
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda *args: rotations.append(1) or rotary(*args)
    )
    with caplog.at_level("INFO", "qknorm_tvm.integrations.transformers"):
        patch(model)
    assert caplog.messages[:1] == [why][: len(why)]
    model(token_ids())
    assert len(calls) == 2  # layers
    assert len(rotations) == (2 if why else 0)


def test_modules_and_parameters_stay() -> None:
    """A checkpoint that a patched model cannot load, or another cannot load from it."""
    model, other, ids = make_model("Olmo2"), make_model("Olmo2"), token_ids()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    modules, keys = list(model.modules()), list(model.state_dict())
    attributes = [set(vars(module)) for module in modules]
    patch(model, statistics="torch")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids).logits, other(ids).logits)
    for attention in attentions(model):  # in a way of which no version counter knows
        attention.q_norm.weight.data.mul_(0.5)
    for attention in attentions(other):
        attention.q_norm.weight.data.mul_(0.5)
    assert torch.equal(model(ids).logits, other(ids).logits)
    other.load_state_dict(model.state_dict())
    unpatch(model)
    assert [set(vars(module)) for module in modules] == attributes


@pytest.mark.filterwarnings("ignore:attention computes its norms one by one:RuntimeWarning")
def test_hooks_see_what_they_saw() -> None:
    model, ids = make_model("Olmo2"), token_ids()
    seen: list[tuple[str, Any, Any]] = []

    def hook(name: str) -> Any:
        return lambda module, inputs, output: seen.append((name, inputs[0], output))

    for name in ("q_proj", "q_norm", "k_proj", "k_norm"):
        getattr(attentions(model)[1], name).register_forward_hook(hook(name))
    model(ids)
    wanted, seen = seen, []
    patch(model, statistics="torch")(ids)
    for got, expected in zip(seen, wanted, strict=True):
        assert got[0] == expected[0]
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2])


def _double(module: Any, inputs: Any, output: Any = None) -> None:
    """Change in place what goes in, or what comes out: no other tensor shows it."""
    (inputs[0] if output is None else output).mul_(2)


def _double_unseen(module: Any, inputs: Any, output: Any) -> None:
    """As `_double`, in a way of which no version counter knows."""
    output.data.mul_(2)


def _next_scales(module: Any, inputs: Any) -> None:
    """Replace weights before each call, as torch's old `weight_norm` and `spectral_norm` do."""
    module.weight = torch.nn.Parameter(module.weight * 2)


HOOKS = {
    "K in place": ("k_proj", "forward", _double),
    "K in place, unseen": ("k_proj", "forward", _double_unseen),
    "another K": ("k_proj", "forward", lambda module, inputs, output: output * 2),
    "input of k_proj": ("k_proj", "forward_pre", lambda module, inputs: (inputs[0] * 2,)),
    "weight of k_proj": ("k_proj", "forward_pre", _next_scales),
    "input of k_norm": ("k_norm", "forward_pre", _double),
    "scales of k_norm": ("k_norm", "forward_pre", _next_scales),
    "output of k_norm": ("k_norm", "forward", _double),
    "scales of q_norm": ("q_norm", "forward_pre", _next_scales),
}


@pytest.mark.filterwarnings("ignore:attention computes its norms one by one:RuntimeWarning")
@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_do_what_they_did(name: str, patched_first: bool) -> None:
    """A hook that comes too late for a K that was normalised before it ran."""
    module, kind, hook = HOOKS[name]
    models, ids = [make_model("Olmo2") for _ in range(2)], token_ids()
    if patched_first:
        patch(models[1], statistics="torch")
    for model in models:
        for attention in attentions(model):
            getattr(getattr(attention, module), f"register_{kind}_hook")(hook)
    if not patched_first:
        patch(models[1], statistics="torch")
    for _ in range(2):  # what a hook has changed stays changed
        assert torch.equal(models[1](ids).logits, models[0](ids).logits)


@pytest.mark.filterwarnings("ignore:attention computes its norms one by one:RuntimeWarning")
def test_weight_norm() -> None:
    """The weight that a call uses is made by a hook before it: another one would be the last."""
    model, ids = make_model("Olmo2"), token_ids()
    patch(model, statistics="torch")
    for attention in attentions(model):
        with pytest.warns(FutureWarning, match="weight_norm"):
            torch.nn.utils.weight_norm(attention.k_proj)
    before = model(ids).logits
    for attention in attentions(model):
        attention.k_proj.weight_g.mul_(-3)
    after = model(ids).logits
    assert distance(after, before) > 0.01
    assert torch.equal(unpatch(model)(ids).logits, after)


def test_hooks_are_told_of() -> None:
    """Modules that run one by one are slower: nobody would know why."""
    model, ids = patch(make_model("Olmo2"), statistics="torch"), token_ids()
    model(ids)
    handle = attentions(model)[0].k_norm.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="norms one by one, .* a hook on k_norm"):
        model(ids)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="hook on all modules"):
        model(ids)
    handle.remove()


def test_hooks_where_heads_are_sharded(tmp_path: Path) -> None:
    """The model's own norms, which the hook would need, are wrong there: the means are local."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", world_size=1, rank=0
    )
    try:
        model = patch(make_model("Olmo2"), group=torch.distributed.group.WORLD)
        attentions(model)[0].k_proj.register_forward_hook(_double)
        with pytest.raises(RuntimeError, match="k_proj must have no hook where the heads are shar"):
            model(token_ids())
    finally:
        torch.distributed.destroy_process_group()


def test_another_forward_of_a_norm() -> None:
    """The norm's own forward is not called: what replaced it would be dropped without a word."""
    model = make_model("Olmo2")
    attentions(model)[1].k_norm.forward = lambda x: x
    with pytest.raises(ValueError, match=r"\.k_norm must have its class's forward, got one"):
        patch(model)


def test_copies_are_their_own() -> None:
    """A copy whose norms are the first model's: training one would change the other."""
    model, ids = patch(make_model("Olmo2")), token_ids()
    twin = copy.deepcopy(model)
    wanted = model(ids).logits
    assert torch.equal(twin(ids).logits, wanted)
    with torch.no_grad():
        for attention in attentions(twin):
            attention.q_norm.weight.mul_(2)
            attention.k_proj.weight.mul_(-1)
    assert torch.equal(model(ids).logits, wanted)
    changed = twin(ids).logits
    assert distance(changed, wanted) > 0.01
    assert distance(unpatch(twin)(ids).logits, changed) <= BOUND["float32"]


def test_a_forward_that_was_there_stays() -> None:
    """Wrappers on the instance, such as accelerate's that fetch weights: called, and given back."""
    model, ids = make_model("Olmo2"), token_ids()
    wanted = model(ids).logits
    k_proj, calls = attentions(model)[0].k_proj, []
    inner = k_proj.forward

    def wrapped(x: Any) -> Any:
        calls.append(x)
        return inner(x)

    k_proj.forward = wrapped
    assert torch.equal(patch(model, statistics="torch")(ids).logits, wanted)
    assert len(calls) == 1
    assert unpatch(model) is model
    assert k_proj.__dict__["forward"] is wrapped


def test_threads() -> None:
    """Two threads in one attention: one normalises the other's K."""
    model = patch(make_model("Olmo2"), statistics="torch")
    inputs = [token_ids(2, length) for length in (9, 9, 13, 7)]
    inputs[1] = inputs[1].flip(0)
    wanted = [model(ids).logits for ids in inputs]

    def equal(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(inputs[i]).logits, wanted[i]) for _ in range(15))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert list(pool.map(equal, range(len(inputs)))) == [True] * len(inputs)


# ---- refused ----------------------------------------------------------------------------------


def test_what_is_no_such_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must have attention of one of .*, got Linear"):
        patch(torch.nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match="statistics must be one of fused, torch, got 'exact'"):
        patch(make_model("Olmo2"), statistics="exact")
    with pytest.raises(ValueError, match="group must be given where layout is, got None"):
        patch(make_model("Olmo2"), layout=HeadLayout(8, 4, 16))


def test_patched_twice_and_never() -> None:
    model = make_model("Olmo2")
    with pytest.raises(ValueError, match="model must be patched, got one that is not"):
        unpatch(model)
    patch(model.model.layers[1])
    with pytest.raises(ValueError, match=r"whose model\.layers\.1\.self_attn is: call unpatch"):
        patch(model)
    assert "forward" not in attentions(model)[0].q_proj.__dict__, "nothing is half patched"
    unpatch(model)
    patch(model)


def test_gradients() -> None:
    """A model that trains without the gradient of its norms."""
    model, ids = make_model("Olmo2"), token_ids()
    with pytest.raises(ValueError, match=r"evaluation mode, got one in training mode.*eval\(\)"):
        patch(model.train())
    patch(model.eval())
    message = r"q must not require grad .*call under torch\.no_grad\(\)"
    with torch.enable_grad(), pytest.raises(ValueError, match=message):
        model(ids)
    assert model(ids).logits.isfinite().all(), "and goes on after an error"


def test_norms_that_differ() -> None:
    model = make_model("Olmo2")
    attentions(model)[1].k_norm.variance_epsilon = 1e-3
    with pytest.raises(ValueError, match=r"self_attn\.k_norm must have the epsilon of q_norm, 1e-"):
        patch(model)


def test_another_order() -> None:
    model, ids = patch(make_model("Olmo2")), token_ids()
    attention = attentions(model)[0]
    hidden = torch.randn(1, 2, Q_HEADS * HEAD_DIM)
    with pytest.raises(RuntimeError, match=r"k_norm must .* got no call of q_proj before"):
        attention.k_norm(hidden)
    attention.q_norm(attention.q_proj(hidden))
    with pytest.raises(RuntimeError, match=r"k_proj must .* got another tensor than q_proj's"):
        attention.k_proj(hidden.clone())
    with pytest.raises(RuntimeError, match=r"q_norm must .* got a second call"):
        attention.q_norm(hidden)
    assert model(ids).logits.isfinite().all(), "and goes on after an error"
    # As an adapter does that was put around the module afterwards.
    k_proj = attention.k_proj
    attention.k_proj = torch.nn.Sequential(k_proj, torch.nn.Softplus())
    with pytest.raises(RuntimeError, match=r"k_norm must .* got another tensor than k_proj's"):
        model(ids)
    attention.k_proj = k_proj
    attention.k_norm.forward = lambda x: x
    with pytest.raises(ValueError, match="k_norm must have the forward that patch gave it"):
        unpatch(model)


# ---- sharded ----------------------------------------------------------------------------------


def shard(model: Any, world_size: int, rank: int, group: Any = None) -> None:
    """Leave one rank's heads in every attention, and sum what its output projections give.

    KV heads are copied where there are more ranks than heads. The rest of the model is whole.
    """
    config = model.config
    for attention in attentions(model):
        layout = HeadLayout(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            world_size,
            rank,
        )
        q, k = layout.q_slice, layout.k_slice
        for name, part in (
            ("q_proj", (q,)),
            ("k_proj", (k,)),
            ("v_proj", (k,)),
            ("o_proj", (slice(None), q)),
            ("q_norm", (q,)),
            ("k_norm", (k,)),
        ):
            module = getattr(attention, name)
            module.weight = torch.nn.Parameter(module.weight[part].clone())
        attention.num_key_value_groups = layout.q_heads_local // layout.kv_heads_local

        def summed(module: Any, inputs: Any, output: Any) -> Any:
            torch.distributed.all_reduce(output, group=group)
            return output

        attention.o_proj.register_forward_hook(summed)


@torch.no_grad()
def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", world_size=4, rank=rank
    )
    pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    for kind in ("Olmo2", "MiniMaxM2"):
        _check_sharded(kind, torch.distributed.group.WORLD, heads=(8, 2))
        _check_sharded(kind, pairs[rank // 2], heads=(4, 2))
    torch.distributed.destroy_process_group()


def _check_sharded(kind: str, group: Any, heads: tuple[int, int]) -> None:
    """Compare this rank's logits, and what it generates, with the unsharded model's."""
    ids = token_ids()
    world_size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    for dtype, bound in SHARDED_BOUND.items():
        # All experts for every token: the choice of some is a step, and the sums over the ranks
        # alone, rounded otherwise than one sum, take a token that is close to it to the other side.
        unsharded = make_model(kind, dtype, heads=heads, experts_per_token=4)
        with pytest.raises(ValueError, match=r"q_norm must have the 32 scales of rank \d .* got "):
            patch(unsharded, group=group)
        sharded = copy.deepcopy(unsharded)
        shard(sharded, world_size, rank, group)
        wanted = unsharded(ids).logits
        for statistics in ("fused", "torch"):
            patch(sharded, statistics=statistics, group=group, validate=True)
            off = distance(sharded(ids).logits, wanted)
            assert off <= bound, (kind, world_size, dtype, statistics, off)
            if dtype == "float32":
                options = {"max_new_tokens": 6, "do_sample": False}
                got = sharded.generate(ids, **options)
                assert torch.equal(got, unsharded.generate(ids, **options))
            unpatch(sharded)
        # The transformers code by itself: statistics of this rank's heads alone.
        off = distance(sharded(ids).logits, wanted)
        assert off > 2 * bound, (kind, world_size, dtype, off)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without gloo")
def test_sharded_model(tmp_path: Path) -> None:
    """Four real processes: all four, with each KV head on two of them, and two groups of two."""
    for dtype in (torch.float32, torch.bfloat16):  # compiled once here, not by all four
        q, k = torch.zeros(1, 2 * HEAD_DIM, dtype=dtype), torch.zeros(1, HEAD_DIM, dtype=dtype)
        qk_var = qknorm_tvm.row_mean_of_squares_qk(q, k)
        for cast_before_gamma in (False, True):
            qknorm_tvm.apply_qk_rms_norm(
                q, k, qk_var, torch.ones(2 * HEAD_DIM), torch.ones(HEAD_DIM),
                cast_before_gamma=cast_before_gamma,
            )  # fmt: skip
    # The server imports what takes seconds once for all four, which are forked from it.
    multiprocessing.set_forkserver_preload(
        ["torch", "tvm_ffi", *(f"transformers.models.{name}.modeling_{name}" for name in MODULES)]
    )
    torch.multiprocessing.start_processes(
        _rank, args=(str(tmp_path),), nprocs=4, start_method="forkserver"
    )
