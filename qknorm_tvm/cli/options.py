"""Options and values that several commands share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from ..dtypes import DTYPE_BYTES
from ..errors import printable
from ..operations import OPERATIONS
from ..spec import CHOICES, Choice, KernelSpec

F = TypeVar("F", bound=Callable[..., Any])
_debug = False


def _set_debug(_: click.Context, __: click.Parameter, value: bool) -> None:
    global _debug
    _debug = _debug or value


def wants_traceback() -> bool:
    """Whether ``--debug`` was given."""
    return _debug


def debug_option(function: F) -> F:
    """Add ``--debug``."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )(function)


def echo(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print a text that may hold names of files: no control sequence of theirs is sent."""
    click.echo(printable(text) + end, err=err, nl=False)


def device_option(function: F) -> F:
    """Add ``--device``; see `check_device`."""
    return click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where to run.",
    )(function)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    if device == "cpu":
        return
    from ..check.reference_torch import torch_or_none

    torch = torch_or_none()
    if torch is None:
        raise click.UsageError("--device cuda needs torch with CUDA; torch is not installed")
    if not torch.cuda.is_available():
        raise click.UsageError(
            f"--device cuda needs torch with CUDA and a GPU; torch {torch.__version__} finds none"
        )


dtype_choice = click.Choice(list(DTYPE_BYTES))


class Columns(click.ParamType):
    """A number of columns, or ``any`` for columns known only at the call (None)."""

    name = "number|any"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or value == "any":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"must be a number of columns or 'any', got {value!r}", param, ctx)


class Separated(click.ParamType):
    """Values separated by commas, as a tuple of each once; `item` reads one of them."""

    name = "values"
    expected = ""

    def item(self, text: str) -> Any:
        """Return a value; a ValueError says that the text is none."""
        raise NotImplementedError

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(map(self.item, str(value).split(","))))
        except ValueError:
            self.fail(f"must {self.expected}, got {value!r}", param, ctx)


class Numbers(Separated):
    """Numbers separated by commas, such as ``1,16,512``."""

    name = "numbers"
    expected = "be numbers separated by commas"

    def __init__(self, least: int):
        self.least = least

    def item(self, text: str) -> int:
        return int(text)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        numbers = super().convert(value, param, ctx)
        if any(number < self.least for number in numbers):
            self.fail(f"must be {self.least} or more, got {value!r}", param, ctx)
        return numbers


class Shapes(Separated):
    """Column pairs separated by commas, such as ``1536/256,6144/1024``."""

    name = "shapes"
    expected = "look like 1536/256,6144/1024 (Nq/Nk)"

    def item(self, text: str) -> tuple[int, int]:
        pair = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
        if pair is None:
            raise ValueError(text)
        return int(pair[1]), int(pair[2])


class Names(Separated):
    """Names separated by commas, such as ``minimax-m2,olmo2-7b``."""

    name = "names"
    expected = "be names separated by commas"

    def item(self, text: str) -> str:
        if not text.strip():
            raise ValueError(text)
        return text.strip()


def _choice_help(choice: Choice) -> str:
    """Return what an option of a spec's choice says: the first sentence of the spec's own words."""
    words = inspect.getdoc(KernelSpec) or ""
    said = re.search(rf"^{choice.name} : .*\n((?:    .*\n)+)", words, re.MULTILINE)
    if said is None:
        return ""
    text = re.sub(r"^Of [^:]*: ", "", " ".join(said[1].split()))
    sentence = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    sentence = sentence.replace("in_dtype", "dtype").replace("`", "")
    operations = [OPERATIONS[name] for name in choice.operations]
    if all(operation.has_cache for operation in operations):
        return f"Paged cache: {sentence}"
    if all(operation.rotates for operation in operations):
        return f"Rotation: {sentence}"
    return sentence


def choice_options(function: F) -> F:
    """Add an option for each field of a spec that only some operations have."""
    for choice in reversed(CHOICES):
        declared = f"--{choice.name.replace('_', '-')}"
        shown: dict[str, Any] = {"help": _choice_help(choice)}
        if isinstance(choice.default, bool):
            shown["is_flag"] = True
        elif choice.texts:
            texts = ["dtype" if text == "in_dtype" else text for text in choice.texts]
            shown |= {"type": click.Choice(texts), "default": choice.default or "dtype"}
            shown["show_default"] = True
        else:
            shown |= {"type": int, "default": choice.default}
            shown["show_default"] = choice.default is not None
        function = click.option(declared, choice.name, **shown)(function)
    return function


def spec_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec that the options of `choice_options` say."""
    values = {name: None if value == "dtype" else value for name, value in options.items()}
    return {
        choice.name: values[choice.name]
        for choice in CHOICES
        if values[choice.name] != choice.default
    }


def refuse_unused(ops: Collection[str], fields: Collection[str]) -> None:
    """Refuse a choice that none of the operations has."""
    for choice in CHOICES:
        if choice.name in fields and not set(ops) & set(choice.operations):
            option = "--" + choice.name.replace("_", "-")
            raise click.UsageError(f"{option} is for --op {', '.join(choice.operations)}")


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def check_folder(out: Path) -> None:
    """Refuse a file that cannot be written before time is spent on what goes into it."""
    if not out.parent.is_dir():
        raise click.UsageError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise click.UsageError(f"{out} is a folder; name the .so to write")


def check_module_path(out: Path) -> None:
    """Refuse a module file that cannot be written, or not be loaded, before it is compiled."""
    if out.suffix != ".so":
        raise click.UsageError(f"{out} must be named *.so: a file of another name is not loaded")
    check_folder(out)


def parse_config(pairs: tuple[str, ...], kind: str) -> dict[str, Any] | None:
    """Return fields of a schedule config from ``name=value`` pairs, or None for none.

    Raises
    ------
    click.BadParameter
        A name is unknown or a value has the wrong type; ranges are the config's own to check.
    """
    if not pairs:
        return None
    import dataclasses

    if kind == "cuda":
        from ..schedules.cuda_config import CudaConfig as Config
    else:
        from ..schedules.cpu_config import CpuConfig as Config  # type: ignore[assignment]
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in defaults:
            raise click.BadParameter(
                f"must be NAME=VALUE with NAME one of {', '.join(defaults)}, got {pair!r}",
                param_hint="--config",
            )
        values[name] = _config_value(name, text, defaults[name])
    return values


def _config_value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise click.BadParameter(
                f"{name} must be true or false, got {text!r}", param_hint="--config"
            )
        return text == "true"
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(
            f"{name} must be a number, got {text!r}", param_hint="--config"
        ) from None
