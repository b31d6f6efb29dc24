"""The group of commands: loads a command's module when it is called, and words its errors."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from .options import debug_option, echo, wants_traceback

#: Commands: where each is, and its line in the list. ``--help`` imports none of them.
_COMMANDS = {
    "run": ("run:run", "Compile for this machine, prove the result exact, time it."),
    "export": ("export:export", "Compile to a .so that runs with apache-tvm-ffi alone."),
    "pack": ("pack:pack", "Compile a model's modules to a folder, or a wheel."),
    "inspect": ("inspect_file:inspect_file", "Say what a .so holds, without loading it."),
    "verify": ("verify:verify", "Compare with the unfused graph, bit for bit."),
    "bench": ("bench:bench", "Time it against a copy, NumPy, torch and torch.compile."),
    "bench-layer": ("bench:bench_layer", "Time the statistics, and the fused layer."),
    "tune": ("tune:tune", "Search for faster configs on this device, or on a fleet."),
    "logs": ("logs:logs", "List, check and trim tuning logs."),
    "cache": ("cache:cache", "List and clear what was compiled on first use."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(f".{module}", __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from .._version import __version__

        click.echo(f"qknorm-tvm {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Print the version.",
)  # fmt: skip
@debug_option
def commands() -> None:
    """Fused QK-RMSNorm on Apache TVM: bit-exact, one launch, modules that run alone.

    \b
    Start here:
      qknorm-tvm run              compile, prove, time
      qknorm-tvm export qk.so     a file to ship
      qknorm-tvm inspect qk.so    what is in it
      qknorm-tvm verify qk.so     is it exact here?
      qknorm-tvm COMMAND --help   more, with examples

    Exit status: 0, 1 when a result is not exact, 2 when the input is wrong or something cannot be
    built.
    """


def run_command(arguments: Sequence[str] | None) -> int:
    """Run the command line; see `qknorm_tvm.cli.main`."""
    from ..errors import QKNormError

    given = None if arguments is None else list(arguments)
    show = warnings.showwarning
    try:
        warnings.showwarning = _show_warning
        status = commands.main(given, prog_name="qknorm-tvm", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        echo(text.getvalue(), err=True, end="")
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough; Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (QKNormError, ValueError, TypeError, OSError) as error:
        if wants_traceback():
            raise
        echo(f"Error: {error_text(error)}", err=True)
        return 2
    finally:
        if warnings.showwarning is _show_warning:
            warnings.showwarning = show
    return status if isinstance(status, int) else 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without a line of Python's: at a command line the caller has none."""
    echo(f"Warning: {message}", err=True)


def error_text(error: BaseException) -> str:
    """Return an error's message, without the number that ``OSError`` puts before it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
