"""MetaSchedule's side of a search: sampled schedules, the search strategy, the cost model."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from .records import sampled_fields
from .targets import TunableTarget


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
            [math.log2(1 + value) for value in _fields_of(candidate).values()]
            for candidate in candidates
        ]
        return [tvm.runtime.tensor(np.array([row], np.float64)) for row in rows]


class Search:
    """A search over one space, which learns from what its candidates took.

    Parameters
    ----------
    mod : IRModule
        The workload.
    choices : mapping
        Values by field.
    database : Database
        Where the strategy finds the best records.
    cost_model : str
        ``"xgb"`` or ``"random"``.
    budget, batch : int
        Candidates in all, and proposed at a time.
    """

    def __init__(
        self,
        target: TunableTarget,
        mod: tvm.IRModule,
        choices: Mapping[str, Sequence[int]],
        database: Any,
        cost_model: str,
        *,
        seed: int,
        budget: int,
        batch: int,
    ):
        self._target, self._mod, self._choices = target, mod, choices
        self._random = random.Random(seed)
        self._cost_model: Any = ms.cost_model.RandomModel(seed=seed)
        if cost_model == "xgb":
            self._cost_model = ms.cost_model.XGBModel(
                extractor=_FieldFeatures(),
                config=ms.cost_model.xgb_model.XGBConfig(seed=seed, nthread=1),
                num_warmup_samples=16,
            )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=max(64, 2 * batch),
            init_min_unmeasured=batch,
            genetic_num_iters=1,
            eps_greedy=0.1,
        )
        space = ms.space_generator.ScheduleFn(
            lambda sch: target.sample(sch, choices), sch_rules=[], postprocs=[], mutator_probs={}
        )
        # TVM wants a random state from 1 on.
        self._context = _Context(mod, target.tvm_target(), space, strategy, seed % (2**31 - 2) + 1)
        self._limits = {"max_trials": max(4 * budget, 64), "num_trials_per_iter": batch}
        self._database = database
        self._started = False
        self._proposed: list[Any] = []

    def candidate(self, config: Any) -> Any:
        """Return the candidate of a config."""
        fields = self._target.encode(config)
        (sch,) = self._target.sample(Schedule(self._mod), self._choices, fields)
        args = ms.arg_info.ArgInfo.from_entry_func(self._mod, remove_preproc=False)
        return ms.MeasureCandidate(sch, args)

    def config_of(self, candidate: Any) -> Any:
        """Return the config of a candidate."""
        return self._target.decode(_fields_of(candidate))

    def propose(self, tried: Collection[Any], count: int) -> dict[Any, Any]:
        """Return candidates by config that were not tried; none when the space is exhausted.

        The strategy may propose again what was tried; the rest is drawn at random.
        """
        if not self._started:
            self._started = True
            self._context.pre_tuning(
                **self._limits, database=self._database, cost_model=self._cost_model
            )
        self._proposed = list(self._context.generate_measure_candidates() or ())
        new: dict[Any, Any] = {}
        for candidate in self._proposed:
            config = self.config_of(candidate)
            if config not in tried and len(new) < count:
                new[config] = candidate
        size = math.prod(len(values) for values in self._choices.values())
        for index in self._random.sample(range(size), min(size, count + len(tried))):
            fields = {}
            for name, values in self._choices.items():
                index, place = divmod(index, len(values))
                fields[name] = values[place]
            config = self._target.decode(fields)
            if config not in tried and config not in new and len(new) < count:
                new[config] = self.candidate(config)
        return new

    def learn(self, seconds: Mapping[Any, Sequence[float]]) -> None:
        """Tell strategy and cost model what the proposed candidates took; the others failed."""
        if not self._proposed:
            return
        results = []
        for candidate in self._proposed:
            times = seconds.get(self.config_of(candidate))
            result = (None, "failed") if times is None else (list(times), None)
            results.append(ms.runner.RunnerResult(*result))
        self._context.notify_runner_results(self._proposed, results)
        self._cost_model.update(self._context, self._proposed, results)

    def close(self) -> None:
        """End the search."""
        if self._started:
            self._context.post_tuning()


def _fields_of(candidate: Any) -> dict[str, int]:
    """Return the sampled fields of a candidate."""
    return sampled_fields(_plain(candidate.sch.trace.as_json()))


def _plain(value: Any) -> Any:
    """Return TVM's containers and constants as Python's."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "value"):
        return value.value
    return [_plain(part) for part in value]
