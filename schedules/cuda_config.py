"""What `schedules.cuda` lets be chosen, and how it is chosen by default. Imports no TVM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

#: Where a kernel lets the next one on its stream start (programmatic dependent launch, sm_90 and
#: newer): never before it ends; when its blocks exit; once its inputs are loaded; at once. A kernel
#: always waits for the previous one to finish before it reads or writes any tensor.
DEPENDENT_LAUNCHES = ("off", "exit", "after_loads", "first")
#: Which blocks of the grid are neighbours.
GRID_ORDERS = ("rows", "columns")

#: Head of the annotations by which a schedule says its config: this and the name of a field.
NOTE = "qknorm."

#: Bytes of the widest memory access.
ACCESS_BYTES = 16
#: Threads of a warp.
WARP = 32
_MAX_THREADS = 1024
_MAX_BLOCK_COLUMNS = 512

# Where one kernel gives way to the next, measured on an H100 (132 multiprocessors, 50 MB of L2):
# vectors of the call from which starting small blocks costs more than it hides,
_BATCH_VECTORS = 40 * 1024
# and from which the chip is so full that the next kernel may as well start at once;
_WAVE_VECTORS = 170 * 1024
# blocks that start no faster than their work is done (823 blocks start in a microsecond);
_MANY_BLOCKS = 1800
# bytes read and written of which L2 keeps nothing for the next kernel.
_STREAM_BYTES = 40_000_000


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaConfig:
    """Choices of the CUDA schedule.

    A thread handles `columns` vectors of `vector` neighbouring columns, in `rows` rows.

    The operations that add up rows have an order of summation that fixes `threads`, `grid_order`
    and a vector of 8 columns: there `vector` only says whether accesses are of one element (1) or
    as wide as alignment allows.

    Parameters
    ----------
    threads : int
        Threads of a block; a multiple of 32 from 32 to 1024. The columns of Q and then those of K
        are partitioned among the threads of as many blocks as a row needs.
    vector : int
        Neighbouring columns that a thread handles together: 1, 2, 4 or 8. They are read and
        written in accesses of up to 16 bytes, as far as the declared alignment allows.
    columns : int
        Vectors that a thread handles in each row, 1 to 16. Where it is more than one, the vectors
        of a warp are neighbours in each.
    rows : int
        Rows that a thread handles, 1 to 16; gamma is read once for all of them.
    dependent_launch : str
        One of `DEPENDENT_LAUNCHES`.
    grid_order : str
        ``"rows"``: neighbouring blocks handle the same columns of neighbouring rows;
        ``"columns"``: neighbouring columns of the same rows.
    streaming_stores : bool
        Mark the outputs as not used again soon (``st.global.cs``), so that L2 keeps other lines.
        Stores of single elements are never marked.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or is out of range; the message names it.
    """

    threads: int = 128
    vector: int = 8
    columns: int = 1
    rows: int = 1
    dependent_launch: str = "first"
    grid_order: str = "columns"
    streaming_stores: bool = False

    def __post_init__(self) -> None:
        _check_int("threads", self.threads, WARP, _MAX_THREADS)
        if self.threads % WARP:
            raise ValueError(f"threads must be a multiple of {WARP}, got {self.threads}")
        _check_int("vector", self.vector, 1, 8)
        if self.vector & (self.vector - 1):
            raise ValueError(f"vector must be 1, 2, 4 or 8, got {self.vector}")
        _check_int("columns", self.columns, 1, 16)
        _check_int("rows", self.rows, 1, 16)
        _check_choice("dependent_launch", self.dependent_launch, DEPENDENT_LAUNCHES)
        _check_choice("grid_order", self.grid_order, GRID_ORDERS)
        if not isinstance(self.streaming_stores, bool):
            raise TypeError(
                f"streaming_stores must be a bool, got {type(self.streaming_stores).__name__}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CudaConfig:
        """Build a config from `to_dict`'s result; an unknown field is a ``TypeError``."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaVariant:
    """One kernel of a module: what its schedule may rely on, and from how many rows it is chosen.

    Parameters
    ----------
    name : str
        What it is for.
    config : CudaConfig
        The schedule's choices.
    min_rows : int
        Rows from which it is chosen.
    stride_unit : int
        Row strides of q, k and the outputs are multiples of this many elements.
    alignment : int or None
        Bytes to which the data of q, k, the outputs and the gammas is aligned; ``None`` promises
        no more than each element's own alignment.
    """

    name: str
    config: CudaConfig
    min_rows: int = 1
    stride_unit: int = 1
    alignment: int | None = None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _whole_warps(threads: int) -> int:
    return _ceil_div(threads, WARP) * WARP


def _even_blocks(threads: int, most: int) -> int:
    """Return the threads of a block, at most `most`, so that a row's threads fill blocks evenly."""
    return _whole_warps(_ceil_div(threads, _ceil_div(threads, most)))


def vector_width(spec: KernelSpec) -> int | None:
    """Return the columns of a vector whose wider side is one access; None if columns do not fit."""
    vector = ACCESS_BYTES // max(spec.in_bytes, spec.out_bytes)
    if spec.q_cols is None or spec.k_cols is None:
        return None
    return None if spec.q_cols % vector or spec.k_cols % vector else vector


def _stream_rows(spec: KernelSpec) -> int:
    cols = (spec.q_cols or 4096) + (spec.k_cols or 4096)
    return _ceil_div(_STREAM_BYTES, cols * (spec.in_bytes + spec.out_bytes))


def _aligned_variants(spec: KernelSpec, vector: int) -> list[CudaVariant]:
    vectors = ((spec.q_cols or 0) + (spec.k_cols or 0)) // vector
    block = _even_blocks(vectors, _MAX_BLOCK_COLUMNS)

    def variant(name: str, min_rows: int, **choices: Any) -> CudaVariant:
        config = CudaConfig(vector=vector, **choices)
        return CudaVariant(
            name=name, config=config, min_rows=min_rows, stride_unit=vector, alignment=ACCESS_BYTES
        )

    batch = variant(
        "batch",
        _ceil_div(_BATCH_VECTORS, vectors),
        threads=block,
        dependent_launch="after_loads",
        streaming_stores=True,
    )
    if vectors > 256:
        return [
            variant("prefill", _stream_rows(spec), threads=block),
            batch,
            variant("decode", 1, threads=min(block, 224 if vectors <= 1024 else 448)),
        ]
    # A block a row is a small block: many rows need several in one.
    rows = 2 if vectors >= 96 else 4
    variants = [
        variant(
            "prefill",
            max(_stream_rows(spec), _MANY_BLOCKS),
            threads=block,
            rows=1 if vectors >= 160 else rows,
        ),
        variant("resident", _MANY_BLOCKS, threads=block, rows=rows, streaming_stores=True),
    ]
    if vectors > 128:
        variants += [variant("wave", _ceil_div(_WAVE_VECTORS, vectors), threads=block), batch]
    return [*variants, variant("decode", 1, threads=min(block, 128))]


def _general_variants(spec: KernelSpec) -> list[CudaVariant]:
    columns = 4
    if spec.q_cols is None or spec.k_cols is None:
        threads = 256
    else:
        warps = sum(_ceil_div(cols, columns * WARP) for cols in (spec.q_cols, spec.k_cols))
        threads = _even_blocks(warps * WARP, _MAX_BLOCK_COLUMNS)
    config = CudaConfig(
        threads=threads,
        vector=1,
        columns=columns,
        dependent_launch="after_loads",
        grid_order="rows",
    )
    tall = dataclasses.replace(config, rows=2)
    return [
        CudaVariant(name="general_prefill", config=tall, min_rows=_stream_rows(spec)),
        CudaVariant(name="general", config=config),
    ]


def reachable(variants: list[CudaVariant]) -> list[CudaVariant]:
    """Drop variants that no call reaches, as one before them always fits."""
    kept: list[CudaVariant] = []
    for variant in variants:
        if not any(
            other.min_rows <= variant.min_rows and other.alignment == variant.alignment
            for other in kept
        ):
            kept.append(variant)
    return kept


def apply_variants(spec: KernelSpec, config: CudaConfig | None) -> list[CudaVariant]:
    """Choose the kernels of ``apply_qk_rms_norm``; see `cuda_variants.default_variants`."""
    general = _general_variants(spec)
    if config is None:
        vector = vector_width(spec)
        return reachable((_aligned_variants(spec, vector) if vector else []) + general)
    if config.vector == 1:
        return [CudaVariant(name="given", config=config)]
    for name in ("q_cols", "k_cols"):
        cols = getattr(spec, name)
        if cols is None or cols % config.vector:
            raise ValueError(
                f"{name} must be a multiple of the config's vector of {config.vector}, got {cols}"
            )
    given = CudaVariant(
        name="given", config=config, stride_unit=config.vector, alignment=ACCESS_BYTES
    )
    return [given, *general]
