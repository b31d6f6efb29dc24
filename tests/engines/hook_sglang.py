"""QK-norm of the real SGLang without a GPU: a rank of a test, which torchrun starts.

    TORCHDYNAMO_DISABLE=1 torchrun --nproc-per-node 2 hook_sglang.py OUT

SGLang itself loads the plugin, through its entry point, unless QKNORM_TVM_ENGINES=0 leaves it off.
Attention layers of MiniMax-M2 and OLMo-2 are made by SGLang's classes, in its own groups of ranks,
which gloo connects, and get weights by its loaders. Each rank writes ``OUT-RANK.json``: what each
layer answers for each type, as lists of numbers.

MiniMax-M2's own kernels for both norms need a GPU. Without the plugin its norms are called one by
one, which SGLang computes in torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

#: SGLang imports them; nothing that is run here needs them. They may not be installable.
STAND_INS = {"torchvision", "gguf"}
Q_HEADS, KV_HEADS, HEAD_DIM, ROWS = 8, 2, 32, 7
DTYPES = ("bfloat16", "float32")


class _Class(type):
    """Classes whose every attribute is such a class too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        return getattr(_Class, name) if name.startswith("__") else _Class(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of which every attribute is an empty class."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def minimax_m2(hooked: bool) -> tuple[Any, Any, Any, Any]:
    """Return SGLang's norms of Q and K, with a loader each, and what calls both."""
    from sglang.srt.models import minimax_m2 as model

    q_norm, k_norm = (
        model.MiniMaxM2RMSNormTP(heads * HEAD_DIM, heads, 1e-6) for heads in (Q_HEADS, KV_HEADS)
    )
    both = model.MiniMaxM2QKRMSNorm(q_norm, k_norm)
    call = both.forward if hooked else lambda q, k: (q_norm(q), k_norm(k))
    loaders = [lambda x, norm=norm: norm.weight.weight_loader(norm.weight, x)
               for norm in (q_norm, k_norm)]  # fmt: skip
    return (*loaders, call, getattr(both, "_qknorm_tvm", None))


def olmo2(hooked: bool) -> tuple[Any, Any, Any, Any]:
    """Return the same of SGLang's attention layer, whose norms have the weights of all ranks."""
    from sglang.srt.models.olmo2 import Olmo2Attention
    from transformers import Olmo2Config

    config = Olmo2Config(
        hidden_size=Q_HEADS * HEAD_DIM, num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    layer = Olmo2Attention(config)
    loaders = [norm.weight.data.copy_ for norm in (layer.q_norm, layer.k_norm)]
    return (*loaders, layer._apply_qk_norm, getattr(layer, "_qknorm_tvm", None))


def main(out: str) -> None:
    """Write what each layer answers."""
    import transformers.image_utils  # noqa: F401  # asks for torchvision, and does without

    sys.meta_path.insert(0, _StandIn())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context, get_parallel

    load_plugins()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hooked = os.environ.get("QKNORM_TVM_ENGINES") != "0"
    get_context().override_server_args(tp_size=ranks, device="cpu").install()
    parallel_state.init_distributed_environment(ranks, rank, backend="gloo")
    parallel_state.initialize_model_parallel("gloo")
    get_parallel().override_permanently(tp_rank=rank, attn_tp_rank=rank)
    generator = torch.Generator().manual_seed(0)
    answers: dict[str, Any] = {}
    for dtype in DTYPES:
        torch.set_default_dtype(getattr(torch, dtype))
        widths = [Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        whole = [torch.randn(ROWS, cols, generator=generator).to(dtype=torch.get_default_dtype())
                 for cols in widths]  # fmt: skip
        gammas = [(0.5 + torch.rand(cols, generator=generator)).to(torch.get_default_dtype())
                  for cols in widths]  # fmt: skip
        q, k = (x.chunk(ranks, dim=-1)[rank] for x in whole)
        for make in (minimax_m2, olmo2):
            load_q, load_k, call, norm = make(hooked)
            with torch.no_grad():
                load_q(gammas[0])
                load_k(gammas[1])
                result = call(q, k)
            assert (norm is not None) is hooked, make.__name__
            answers[f"{make.__name__} {dtype}"] = [x.float().tolist() for x in result]
    Path(f"{out}-{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
