"""Files of unknown origin and the terminal: no control sequences, tracebacks or waits."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import smallest

from qknorm_tvm import ModuleFileError, load
from qknorm_tvm.cli import main
from qknorm_tvm.load import module_file


def _with_metadata(path: Path, text: str) -> Path:
    """Write a module with other metadata, and a checksum that fits."""
    data = bytearray(smallest().read_bytes())
    offset, size = module_file._section(bytes(data), path)
    start = offset + len(module_file.MAGIC) + 32
    content = text.encode()
    assert len(content) < offset + size - start
    data[start : offset + size] = content.ljust(offset + size - start, b"\0")
    path.write_bytes(data)
    module_file.seal(path)
    return path


#: Retitles the terminal, clears it, and turns the text round.
_HOSTILE = "\x1b]0;title\x07\x9b2J\u202e"


def _nothing_raw(printed: str) -> None:
    assert "title" in printed
    raw = {c for c in printed if not c.isprintable()} - {"\n"}
    assert not raw, ascii(printed)


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "run --min-time 0 --module", "run --input"]
)
@pytest.mark.parametrize("kind", ["missing", "text", "truncated"])
def test_names_of_files_send_no_control_sequence_to_the_terminal(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of a file that somebody else packed, printed in an error about it."""
    path = tmp_path / f"{_HOSTILE}.so"
    if kind != "missing":
        path.write_bytes(smallest().read_bytes()[:3000] if kind == "truncated" else b"text")
    assert main([*command.split(), str(path)]) == 2
    captured = capsys.readouterr()
    _nothing_raw(captured.out + captured.err)


def test_inspected_name_and_specs_send_no_control_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{_HOSTILE}.so"
    metadata = module_file.read_metadata(smallest())
    metadata["levels"][-1]["name"] = metadata["target"] = "title" + _HOSTILE
    metadata["requires"] = {"title\r" + _HOSTILE: "\x08" * 9}
    _with_metadata(path, json.dumps(metadata, separators=(",", ":")))
    for options in ([], ["--json"]):
        assert main(["inspect", str(path), *options]) == 0
        _nothing_raw(capsys.readouterr().out)


def test_errors_name_files_without_control_sequences(tmp_path: Path) -> None:
    """A traceback on a terminal, of a program that loads what it was given."""
    path = tmp_path / f"{_HOSTILE}.so"
    path.write_text("text")
    with pytest.raises(ModuleFileError) as caught:
        load(path)
    _nothing_raw(str(caught.value))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (ModuleFileError, str(caught.value))


_MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no levels": lambda m: m.pop("levels"),
    "levels that are a number": lambda m: m.update(levels=3),
    "an empty list of levels": lambda m: m.update(levels=[]),
    "a level without features": lambda m: m["levels"][0].pop("features"),
    "features that are a number": lambda m: m["levels"][0].update(features=7),
    "features that are lists": lambda m: m["levels"][0].update(features=[[1]]),
    "a level's name that is a list": lambda m: m["levels"][0].update(name=[1]),
    "code that is a text": lambda m: m["levels"][0].update(code="code"),
    "rows that are a text": lambda m: m["levels"][0]["code"][0].update(min_rows="many"),
    "variants that are numbers": lambda m: m["levels"][0]["code"][0].update(variants=[1]),
    "no kind": lambda m: m.pop("kind"),
    "GPU code without architectures": lambda m: m.update(kind="cuda"),
    "no specs": lambda m: m.pop("specs"),
    "no versions": lambda m: m.pop("versions"),
    "needs that are a list": lambda m: m.update(requires=[1]),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("kind", _MALFORMED)
def test_malformed_metadata_is_no_traceback(
    kind: str, as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = module_file.read_metadata(smallest())
    _MALFORMED[kind](metadata)
    path = _with_metadata(tmp_path / "odd.so", json.dumps(metadata, separators=(",", ":")))
    status = main(["inspect", str(path), *(["--json"] if as_json else [])])
    captured = capsys.readouterr()
    assert status == 2 or (status, captured.err) == (0, "")
    if status == 2:
        assert captured.err.startswith("Error: "), captured.err
        assert "odd.so holds what this qknorm-tvm does not know" in captured.err


@pytest.mark.parametrize("depth", [40, 300, 480, 820])
def test_deep_metadata_that_is_whole_is_refused(
    depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON that the reader takes and that the first look at it does not."""
    metadata = {"format": module_file.FORMAT, "deep": None}
    text = json.dumps(metadata).replace("null", "[" * depth + "]" * depth)
    path = _with_metadata(tmp_path / "deep.so", text)
    for options in ([], ["--json"]):
        assert main(["inspect", str(path), *options]) == 2
        assert "deep.so is damaged: its metadata is " in capsys.readouterr().err
    with pytest.raises(ModuleFileError, match="its metadata is "):
        load(path)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_do_not_wait_for_a_fifo(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "module.so")
    assert main([command, str(tmp_path / "module.so")]) == 2
    assert "it is no regular file" in capsys.readouterr().err
