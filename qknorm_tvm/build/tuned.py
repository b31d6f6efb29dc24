"""The outcome of tuning, ``tuned.json``: what the build reads, without MetaSchedule.

For every spec and row count that was tuned, whether a record was kept or the default, with the
times that decided. A kept record's fields were read back from its trace in the database beside it;
``qknorm-tvm logs validate`` proves that again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import warn_caller
from ..machine import user_folder
from ..spec import KernelSpec
from ..targets import AARCH64, X86_LEVELS, host_cpu_target

FILE_NAME = "tuned.json"
FORMAT = 1
#: Folders to read tuned records from, separated as in PATH; empty: none.
ENVIRONMENT = "QKNORM_TVM_TUNING_LOGS"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What tuning found for one spec and row count.

    Parameters
    ----------
    spec : str
        `KernelSpec.text`, its target the level or architecture that was tuned.
    rows : int
        M.
    workload : str
        Hash of the specialised declaration, as in the database.
    source : str
        ``"record"`` where a record beat the default by more than the noise, else ``"heuristic"``.
    config, default : mapping
        Fields of the config that is to be used, and of the heuristic's.
    default_us, best_us : float
        Medians of calls with the default and with the fastest candidate, microseconds.
    gain : mapping
        ``low``, ``median``, ``high`` of the default's time over the fastest's, paired.
    spread : float
        How far the times that decided spread, relative to their median: of the paired ratios, and
        from process to process.
    trials, failed : int
        Candidates measured, this session's and earlier ones', and how many failed.
    versions : mapping
        ``apache-tvm`` and ``schedule``: both must fit for a record to be used.
    date : str
        When it was measured.
    best : mapping
        The config that was timed against the default; empty in outcomes of earlier versions.
    reason : str
        Why the default was kept; empty for a record, and in outcomes of earlier versions.
    ends : sequence of mapping
        The same comparison at the smallest and the largest row count that a record serves.
    """

    spec: str
    rows: int
    workload: str
    source: str
    config: Mapping[str, Any]
    default: Mapping[str, Any]
    default_us: float
    best_us: float
    gain: Mapping[str, float]
    spread: float
    trials: int
    failed: int
    versions: Mapping[str, Any]
    date: str
    best: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    ends: Sequence[Mapping[str, Any]] = ()


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read a device's outcomes; none when there is no file.

    Raises
    ------
    ValueError
        The file is damaged; the message names it.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); tune again, or delete it") from None
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"{path} has format {content['format']}, expected {FORMAT}")
        return [Outcome(**fields) for fields in content["outcomes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); tune again, or delete it") from None


def write_json(path: Path, content: Any) -> None:
    """Write a file so that nobody, after whatever interruption, sees half of it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_outcomes(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a device's outcomes, in a stable order."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.spec, outcome.rows))
    content = {"format": FORMAT, "outcomes": [dataclasses.asdict(outcome) for outcome in ordered]}
    write_json(folder / FILE_NAME, content)


def package_logs() -> Path | None:
    """Return the folder of the logs that come with the package, if it is one on disk."""
    folder = resources.files("qknorm_tvm.tuning_logs")
    return folder if isinstance(folder, Path) else _first_path(folder)


def _first_path(folder: Any) -> Path | None:
    # An editable installation gives a view of several places.
    for place in getattr(folder, "_paths", ()):
        return Path(place)
    return None


def user_logs() -> Path:
    """Return the folder to which an installed package's user tunes: see `machine.user_folder`."""
    return user_folder("data") / "tuning_logs"


def log_folders() -> list[Path]:
    """Return the folders from which tuned records are read; the first match wins.

    Those that ``$QKNORM_TVM_TUNING_LOGS`` names, with a warning for each that does not exist;
    without the variable the user's own, then the package's.
    """
    given = os.environ.get(ENVIRONMENT)
    if given is not None:
        folders = [Path(text) for text in given.split(os.pathsep) if text]
        for folder in folders:
            if not folder.is_dir():
                _warn_of(folder)
        return folders
    folders = []
    with contextlib.suppress(FileNotFoundError):  # a user without a home
        folders.append(user_logs())
    package = package_logs()
    return [*folders, *([package] if package else [])]


@functools.cache  # a build asks from several places: one warning
def _warn_of(folder: Path) -> None:
    warn_caller(
        f"{ENVIRONMENT} names {folder}, which is no folder: no tuned records are read there"
    )


def default_logs() -> Path:
    """Return where tuning writes unless told: a checkout's ``tuning_logs``, else the user's."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given.split(os.pathsep)[0])
    package = package_logs()
    if package is not None and (package.parent / "pyproject.toml").exists():
        return package
    return user_logs()


def has_outcomes() -> bool:
    """Whether there are any outcomes that a build may read."""
    return any(any(folder.glob(f"*/{FILE_NAME}")) for folder in log_folders())


def digest() -> str:
    """Return a digest of all outcomes that a build may read."""
    state = hashlib.sha256()
    for folder in log_folders():
        for path in sorted(folder.glob(f"*/{FILE_NAME}")):
            state.update(path.parent.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def cpu_device(cpu: str) -> str | None:
    """Return the folder of records for code for a CPU name or level, or None where there is none.

    A CPU name has a folder of its own. A level has this machine's, if it is the level that this
    machine loads. AArch64 is not tuned.
    """
    if cpu == AARCH64:
        return None
    if cpu not in X86_LEVELS:
        return f"x86_64-{cpu}"
    try:
        if cpu != host_cpu_target():
            return None
    except RuntimeError:
        return None
    return host_device()


def cuda_device(spec: KernelSpec) -> str | None:
    """Return the folder that holds outcomes for a spec's one architecture, or None.

    Where several GPUs of one architecture were tuned, the first by name.
    """
    for folder in log_folders():
        for path in sorted(folder.glob(f"nvidia-*/{FILE_NAME}")):
            try:
                if any(outcome.spec == spec.text for outcome in read_outcomes(path.parent)):
                    return path.parent.name
            except ValueError:
                continue  # `tuned` says so when it is read
    return None


def host_device() -> str:
    """Return this machine's folder of records: architecture and LLVM's name of the CPU."""
    import platform

    import tvm

    return f"{platform.machine()}-{tvm.target.codegen.llvm_get_system_cpu()}"


def tuned(
    spec: KernelSpec,
    target: str,
    device: str | None,
    *,
    schedule_version: int,
    default: Callable[[int], Any],
    workload: Callable[[int], str],
) -> dict[int, tuple[Outcome, str]]:
    """Return the outcomes that a build may use, by row count, with the folder of each.

    Parameters
    ----------
    spec : KernelSpec
        What is built.
    target : str
        The level or architecture for which code is generated.
    device : str or None
        Folder name of the device.
    schedule_version : int
        Of the schedule at hand.
    default : callable
        The heuristic's config by row count. Where it is another than the one that was beaten, the
        comparison says nothing.
    workload : callable
        Hash of the specialised declaration by row count.

    Returns
    -------
    dict
        Empty where nothing fits. Outcomes for which the default was kept are there too: a row
        count's neighbour must not speak for it.
    """
    import importlib.metadata

    if device is None:
        return {}
    wanted = spec.replace(target=target).text
    versions = {
        "apache-tvm": importlib.metadata.version("apache-tvm"), "schedule": schedule_version,
    }  # fmt: skip
    usable: dict[int, tuple[Outcome, str]] = {}
    for folder in log_folders():
        try:
            outcomes = read_outcomes(folder / device)
        except ValueError as error:
            warn_caller(f"tuned records are not used: {error}")
            continue
        for outcome in outcomes:
            if (
                outcome.spec != wanted
                or outcome.rows in usable
                or dict(outcome.versions) != versions
            ):
                continue
            if dict(outcome.default) != default(outcome.rows).to_dict():
                continue
            if outcome.workload != workload(outcome.rows):
                continue
            usable[outcome.rows] = (outcome, device)
    return usable
