"""Reading configs back from traces. Imports no TVM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Head of the annotations that say which config a scheduled module is, as in `schedules`.
NOTE = "qknorm."


def plain(value: Any) -> Any:
    """Return TVM's containers and constants as Python's."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "value"):
        return value.value
    return [plain(part) for part in value]


def sampled_fields(trace: Sequence[Any]) -> dict[str, int]:
    """Read a config's fields back from a trace in JSON form: ``[instructions, decisions]``.

    Raises
    ------
    ValueError
        It is no trace of our schedules.
    """
    try:
        instructions, decisions = trace
        taken = {int(index): int(value) for index, value in decisions}
        values, fields = {}, {}
        for index, (kind, inputs, attributes, outputs) in enumerate(instructions):
            if kind == "SampleCategorical":
                values[outputs[0]] = int(attributes[0][taken[index]])
            elif kind == "Annotate" and str(attributes[0]).startswith(NOTE):
                fields[attributes[0].removeprefix(NOTE)] = int(values.get(inputs[1], inputs[1]))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise ValueError("the trace is damaged, or not of this project's schedules") from None
    if not fields:
        raise ValueError("the trace is not of this project's schedules: it names no config")
    return fields
