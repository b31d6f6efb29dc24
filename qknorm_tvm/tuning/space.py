"""MetaSchedule's side of a search: static workloads, sampled schedules, the search strategy."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from .target import TunableTarget
from .trace import plain, sampled_fields


class _Context(ms.TuneContext):
    """A tuning context without the import of all tensor intrinsics, which takes half a minute."""

    def __init__(self, mod: Any, target: Any, space: Any, strategy: Any, seed: int):
        from tvm.s_tir.meta_schedule import _ffi_api
        from tvm.s_tir.meta_schedule.logging import get_logger, get_logging_func

        logger = get_logging_func(get_logger(__name__))
        self.__init_handle_by_constructor__(
            _ffi_api.TuneContext, mod, target, space, strategy, "main", 1, seed, logger
        )
        _ffi_api.TuneContextInitialize(self)


@derived_object
class _FieldFeatures(ms.feature_extractor.PyFeatureExtractor):
    """Features of a candidate: the sampled fields themselves, on a logarithmic scale.

    TVM's own features are counted on the lowered loops, where several fields leave no mark.
    """

    def extract_from(self, context: Any, candidates: Any) -> list[Any]:
        rows = [
            [math.log2(1 + value) for value in fields_of(candidate).values()]
            for candidate in candidates
        ]
        return [tvm.runtime.tensor(np.array([row], np.float64)) for row in rows]


def make_cost_model(name: str, seed: int) -> Any:
    """Return MetaSchedule's ``"xgb"`` or ``"random"`` cost model."""
    if name == "xgb":
        return ms.cost_model.XGBModel(
            extractor=_FieldFeatures(),
            config=ms.cost_model.xgb_model.XGBConfig(seed=seed, nthread=1),
            num_warmup_samples=16,
        )
    return ms.cost_model.RandomModel(seed=seed)


class Search:
    """A search over one space: batches of candidates, whose results it learns from.

    Parameters
    ----------
    target : TunableTarget
    mod : IRModule
        The workload.
    choices : mapping
        Values by field.
    database : JSONDatabase
        Where records go, and are found again.
    cost_model : CostModel
    seed, budget, batch : int
    """

    def __init__(
        self,
        target: TunableTarget,
        mod: tvm.IRModule,
        choices: Mapping[str, Sequence[int]],
        database: Any,
        cost_model: Any,
        *,
        seed: int,
        budget: int,
        batch: int,
    ):
        self.target, self.mod, self.choices = target, mod, choices
        self.tvm_target = target.tvm_target()
        self._cost_model = cost_model
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=max(64, 2 * batch),
            init_min_unmeasured=batch,
            genetic_num_iters=1,
            eps_greedy=0.1,
        )
        space = ms.space_generator.ScheduleFn(
            lambda sch: target.sample(sch, choices), sch_rules=[], postprocs=[], mutator_probs={}
        )
        self._random = random.Random(seed)
        # TVM wants a random state from 1 on.
        self._context = _Context(mod, self.tvm_target, space, strategy, seed % (2**31 - 2) + 1)
        self._started = False
        self._limits = (max(4 * budget, 64), batch)
        self._database = database

    def candidate(self, fields: Mapping[str, int]) -> Any:
        """Return the candidate of given fields."""
        sch = Schedule(self.mod)
        # Schedules of several structures come as a list: here there is one.
        (sch,) = self.target.sample(sch, self.choices, fields) or [sch]
        args = ms.arg_info.ArgInfo.from_entry_func(self.mod, remove_preproc=False)
        return ms.MeasureCandidate(sch, args)

    def draw(self, known: Collection[tuple[tuple[str, int], ...]], count: int) -> list[Any]:
        """Return candidates drawn at random that are not known, as long as there are some.

        Parameters
        ----------
        known : collection
            Sorted items of the fields that are known.
        count : int
        """
        if count < 1:
            return []
        size = math.prod(len(values) for values in self.choices.values())
        picked = self._random.sample(range(size), min(size, count + len(known)))
        drawn = []
        for index in picked:
            fields = {}
            for name, values in self.choices.items():
                index, place = divmod(index, len(values))
                fields[name] = values[place]
            if tuple(sorted(fields.items())) not in known:
                drawn.append(self.candidate(fields))
            if len(drawn) == count:
                break
        return drawn

    def batches(self) -> Iterator[list[Any]]:
        """Propose candidates until the space is exhausted; `learn` is to follow each batch."""
        if not self._started:
            self._started = True
            self._context.pre_tuning(
                *self._limits, database=self._database, cost_model=self._cost_model
            )
        while True:
            candidates = self._context.generate_measure_candidates()
            if not candidates:
                return
            yield list(candidates)

    def learn(self, candidates: Sequence[Any], seconds: Sequence[Sequence[float] | None]) -> None:
        """Tell strategy and cost model what candidates took; None for one that failed."""
        results = [
            ms.runner.RunnerResult(None, "failed") if times is None
            else ms.runner.RunnerResult(list(times), None)
            for times in seconds
        ]  # fmt: skip
        self._context.notify_runner_results(candidates, results)
        self._cost_model.update(self._context, candidates, results)

    def close(self) -> None:
        """End the search."""
        if self._started:
            self._context.post_tuning()


def fields_of(candidate: Any) -> dict[str, int]:
    """Return the sampled fields of a candidate."""
    return sampled_fields(plain(candidate.sch.trace.as_json()))
