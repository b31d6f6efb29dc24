"""``provenance.json``: where a folder's records come from, and what its workloads are."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..build.tuned import write_json
from .target import Device, TunableTarget

FILE_NAME = "provenance.json"
FORMAT = 1


def versions(target: TunableTarget) -> dict[str, Any]:
    """Return the versions under which times may be compared."""
    return {
        "apache-tvm": importlib.metadata.version("apache-tvm"),
        "schedule": target.schedule_version,
    }


def session_versions() -> dict[str, str]:
    """Return all versions that a session tells of itself."""
    return {
        "qknorm-tvm": __version__,
        **{name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
    }


class Provenance:
    """A folder's provenance, read, added to and written.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    content : dict
        ``device``, ``versions``, ``workloads`` (spec and rows by hash) and ``sessions``.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.content: dict[str, Any] = {
            "format": FORMAT, "device": {}, "versions": {}, "workloads": {}, "sessions": [],
        }  # fmt: skip
        self.damage = ""
        try:
            content = json.loads(self.path.read_text())
            if not isinstance(content, dict) or content["format"] != FORMAT:
                raise ValueError("it is of another format")
            if not all(isinstance(content[name], type(self.content[name])) for name in content):
                raise ValueError("its fields are of other types")
            self.content.update(content)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError) as error:
            self.damage = f"{self.path}: damaged ({error})"

    def put_aside(self) -> None:
        """Keep a damaged file, under another name."""
        if self.damage and self.path.exists():
            self.path.replace(self.path.with_name(FILE_NAME + ".rejected"))

    def describe(self, device: Device, versions: Mapping[str, Any]) -> None:
        """Set what holds for the whole folder."""
        self.content["device"] = {"folder": device.folder, **device.details}
        self.content["versions"] = dict(versions)

    def workload(self, name: str, spec: str, rows: int) -> None:
        """Say what a workload's hash stands for."""
        self.content["workloads"][name] = {"spec": spec, "rows": rows}

    def session(self, about: Mapping[str, Any]) -> None:
        """Add a session, or replace it where it is known by its date already."""
        sessions = [
            session for session in self.content["sessions"] if session.get("date") != about["date"]
        ]
        self.content["sessions"] = [*sessions, dict(about)]

    def write(self) -> None:
        """Write the file, atomically."""
        write_json(self.path, self.content)
