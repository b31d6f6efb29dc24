"""``qknorm-tvm logs``: list, validate, prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import debug_option, echo


def _logs_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--logs",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder of logs, or one device's.  [default: {default}]",
    )


def _folders(logs: Path | None) -> list[Path]:
    """Return the devices' folders in a folder, by default in all that are read or written."""
    from ..build.tuned import default_logs, log_folders
    from ..tuning.folders import device_folders

    if logs is not None:
        return device_folders(logs)
    existing = [
        folder for folder in dict.fromkeys([*log_folders(), default_logs()]) if folder.is_dir()
    ]
    return [device for folder in existing or [default_logs()] for device in device_folders(folder)]


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
@_logs_option("all that the build reads, those of the package too")
@debug_option
def list_logs(logs: Path | None) -> int:
    """Say what each device's folder holds."""
    from ..tuning.folders import overview
    from .output import console, facts, size, table

    folders = _folders(logs)
    out = console()
    for parent in dict.fromkeys(folder.parent for folder in folders):
        rows = []
        for folder in (folder for folder in folders if folder.parent == parent):
            about = overview(folder)
            about["size"] = size(about["size"])
            rows.append({name: str(value) for name, value in about.items()})
        out.print(f"{parent}:", soft_wrap=True)
        lines = table(*rows[0])
        for row in rows:
            lines.add_row(*row.values())
        if out.measure(lines, options=out.options.update_width(1000)).maximum <= out.width:
            out.print(lines)
            continue
        # Too narrow for a table: a block for each device.
        for row in rows:
            out.print(facts((name, text) for name, text in row.items() if text))
            out.print()
    return 0


@logs.command(short_help="Check every line.")
@_logs_option("all that the build reads, those of the package too")
@click.option("--fix", is_flag=True, help="Put unusable lines aside, in FILE.rejected.")
@click.option("--measure", is_flag=True,
              help="Also time kept records against the default again, on their own device; with "
              "--fix the default is kept where one does not hold.")  # fmt: skip
@debug_option
def validate(logs: Path | None, fix: bool, measure: bool) -> int:
    """Check logs line by line; the exit status is 1 when something is wrong.

    It also checks that kept configs are those of their records, that the workloads are today's, and
    that TVM loads the database.
    """
    from ..errors import TuningError
    from ..tuning.folders import mend, remeasure
    from ..tuning.folders import validate as check

    status, reasons, measured = 0, [], False
    for folder in _folders(logs):
        if fix:
            for problem in mend(folder):
                echo(f"put aside: {problem}")
        problems = check(folder)
        if measure and not problems:
            try:
                problems = remeasure(folder, fix=fix)
                measured = True
            except TuningError as error:
                reasons.append(f"{folder.name}: not measured: {error}")
        for text in problems:
            echo(text)
        echo(f"{folder.name}: {f'{len(problems)} problems' if problems else 'good'}")
        status = status or int(bool(problems))
    for reason in reasons:
        echo(reason)
    return status or int(measure and not measured)


@logs.command(short_help="Drop slow records.")
@_logs_option("where `qknorm-tvm tune` writes")
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True,
              help="Fastest records to keep of each shape and row count.")  # fmt: skip
@debug_option
def prune(logs: Path | None, keep: int) -> int:
    """Keep the fastest records, the default's and those in use.

    What was decided stays, in tuned.json; tuning again measures again what was dropped.
    """
    from ..build.tuned import default_logs
    from ..tuning.folders import device_folders
    from ..tuning.folders import prune as trim

    for folder in device_folders(logs or default_logs()):
        echo(f"{folder.name}: {trim(folder, keep)} records dropped")
    return 0
