"""``qknorm-tvm logs``: list, validate, dedupe, prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import debug_option


def _logs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--logs",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of logs, or one device's.  [default: where `qknorm-tvm tune` writes]",
    )(function)


def _folders(logs: Path | None) -> list[Path]:
    from ..build.tuned import default_logs
    from ..tuning.maintenance import device_folders

    return device_folders(logs or default_logs())


@click.group(short_help="List, check and trim tuning logs.")
def logs() -> None:
    """Look after tuning logs: a folder for each device, with a MetaSchedule database.

    \b
    Examples:
      qknorm-tvm logs list
      qknorm-tvm logs validate --fix
      qknorm-tvm logs prune --keep 3
    """


@logs.command("list", short_help="Say what there is.")
@_logs_option
@debug_option
def list_logs(logs: Path | None) -> int:
    """Say what each device's folder holds."""
    from ..tuning.maintenance import overview
    from .output import console, size, table

    made = table("device", "workloads", "records", "kept", "sessions", "last", "size", "damaged")
    made.columns[0].no_wrap = True
    for folder in _folders(logs):
        one = overview(folder)
        made.add_row(
            folder.name,
            str(one.workloads),
            str(one.records),
            f"{one.kept} of {one.tuned}",
            str(one.sessions),
            one.last,
            size(one.size),
            str(one.problems) if one.problems else "",
        )
    console().print(made)
    return 0


@logs.command(short_help="Check every line.")
@_logs_option
@click.option("--fix", is_flag=True, help="Put unusable lines aside, in FILE.rejected.")
@click.option("--shallow", is_flag=True, help="Without TVM: only the files themselves.")
@debug_option
def validate(logs: Path | None, fix: bool, shallow: bool) -> int:
    """Check logs line by line; the exit status is 1 when something is wrong.

    With TVM it also checks that kept configs are those of their records, and that the workloads
    are today's.
    """
    from ..tuning.maintenance import mend
    from ..tuning.maintenance import validate as check

    status = 0
    for folder in _folders(logs):
        if fix:
            for problem in mend(folder):
                click.echo(f"put aside: {problem}")
        problems = check(folder, deep=not shallow)
        for text in problems:
            click.echo(text)
        click.echo(f"{folder.name}: {f'{len(problems)} problems' if problems else 'good'}")
        status = status or int(bool(problems))
    return status


@logs.command(short_help="Drop repeated records.")
@_logs_option
@debug_option
def dedupe(logs: Path | None) -> int:
    """Keep one record of each candidate, the latest."""
    from ..tuning.maintenance import deduplicate

    for folder in _folders(logs):
        click.echo(f"{folder.name}: {deduplicate(folder)} repeated records dropped")
    return 0


@logs.command(short_help="Drop slow records.")
@_logs_option
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True,
              help="Fastest records to keep of each shape and row count.")  # fmt: skip
@click.option("--in-use", is_flag=True,
              help="Drop all records of shapes and row counts that keep the default.")  # fmt: skip
@debug_option
def prune(logs: Path | None, keep: int, in_use: bool) -> int:
    """Keep the fastest records, the default's and those in use.

    What was decided stays, in tuned.json; tuning again measures again what was dropped.
    """
    from ..tuning.maintenance import prune as trim

    for folder in _folders(logs):
        click.echo(f"{folder.name}: {trim(folder, keep, in_use=in_use)} records dropped")
    return 0
