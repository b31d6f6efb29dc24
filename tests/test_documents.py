"""The documents: what they show runs, and the files and names they speak of exist.

Fenced ``python`` and ``bash`` blocks of one document run in order, in one fresh process and one
folder: a document may export a module in one block and load it in the next. Python blocks share
their names. C++ blocks are compiled, with the arguments of the operations declared. A comment on
the line before a block says otherwise:

* ``<!-- not run: reason -->``
* ``<!-- needs: torch, transformers -->``: skipped, saying so, where one cannot be imported. What a
  Python block imports itself need not be said.
* ``<!-- file: NAME -->``: written to that file, for a later block
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_IDS = [path.name for path in DOCUMENTS]
#: What may be missing where the tests run, without that being a mistake.
OPTIONAL = ("torch", "transformers", "jax", "xgboost", "tornado")
#: Blocks of README.md that are not run here, by document and by what they hold.
SKIPPED = {
    ("README.md", "pip install -q '.[compile]' &&"): "test_cli: qknorm-tvm run",
    ("README.md", "'.[test,tune]' &&"): "it is the command that runs these tests, see .ci/run",
}
LANGUAGES = ("python", "bash", "cpp")
#: Seconds that one document may take; most of them import torch and TVM, or wait for a compiler.
SECONDS = 120

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^<!-- (not run|needs|file):(.*) -->\n\Z", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Parameters
    ----------
    document : str
        The file's name.
    line : int
        Of its first line of code.
    language : str
    text : str
    mark, value : str
        What the comment before it says, if there is one.
    """

    document: str
    line: int
    language: str
    text: str
    mark: str = ""
    value: str = ""

    def reason(self) -> str | None:
        """Return why it is not run, or None."""
        if self.mark == "not run":
            return self.value
        for (document, part), reason in SKIPPED.items():
            if document == self.document and part in self.text:
                return reason
        missing = [name for name in self.needs() if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(missing)}, not installed" if missing else None

    def needs(self) -> set[str]:
        """Return which of the optional packages it needs."""
        named = (
            {package.strip() for package in self.value.split(",")}
            if self.mark == "needs"
            else set()
        )
        assert named <= set(OPTIONAL), f"{self.document}:{self.line}: {named} are not in OPTIONAL"
        if self.language != "python":
            return named
        for node in ast.walk(ast.parse(self.text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.startswith(("qknorm_tvm.torch_ops", "qknorm_tvm.integrations")):
                    named.add("torch")
                if name.startswith("qknorm_tvm.integrations.transformers"):
                    named.add("transformers")
                named |= {name.partition(".")[0]} & set(OPTIONAL)
        return named


def blocks_of(path: Path) -> Iterator[Block]:
    """Yield a document's fenced blocks."""
    text = path.read_text()
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        mark = _MARK.search(text[: match.start()])
        said = (mark[1], mark[2].strip()) if mark else ("", "")
        yield Block(path.name, line, match[1], match[2], *said)


# ---- what is said about blocks --------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=_IDS)
def test_blocks_say_what_they_are(path: Path) -> None:
    """A block in a language that nobody runs; a reason left empty; a mark beside its block."""
    blocks = list(blocks_of(path))
    for block in blocks:
        assert block.language in LANGUAGES, f"{path.name}:{block.line}: {block.language!r}"
        assert not block.mark or block.value, f"{path.name}:{block.line}: {block.mark}: of nothing"
    text = path.read_text()
    assert text.count("```") == 2 * len(blocks), "a fence that is not closed, or is indented"
    assert text.count("<!--") == sum(bool(block.mark) for block in blocks)


def test_skipped_blocks_are_there() -> None:
    """A reason that outlives its block, or names several."""
    blocks = list(itertools.chain.from_iterable(map(blocks_of, DOCUMENTS)))
    for (document, part), reason in SKIPPED.items():
        matching = [block for block in blocks if block.document == document and part in block.text]
        assert reason
        assert len(matching) == 1, (document, part, len(matching))


# ---- running them ---------------------------------------------------------------------------

_DRIVER = """
import json, subprocess, sys

names = {"__name__": "__main__"}
for document, line, language, text, file in json.load(sys.stdin):
    print(f"---- {document}:{line}", flush=True)
    if file:
        with open(file, "w") as written:
            written.write(text)
    elif language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", text]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    else:
        exec(compile("\\n" * (line - 1) + text, document, "exec"), names)
"""


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.name == "README.md" else pytest.mark.slow)
        for path in DOCUMENTS
    ],
    ids=_IDS,
)
def test_blocks_run(path: Path, tmp_path: Path) -> None:
    """An example that fails for whoever copies it."""
    to_run = []
    skipped = []
    for block in blocks_of(path):
        if block.language == "cpp":
            continue
        reason = block.reason()
        if reason is not None:
            skipped.append(f"{path.name}:{block.line}: {reason}")
            continue
        file = block.value if block.mark == "file" else ""
        to_run.append((path.name, block.line, block.language, block.text, file))
    print("\n".join(["not run:", *skipped] if skipped else []))
    if not to_run:
        pytest.skip("; ".join(skipped) or f"{path.name} has nothing to run")
    environment = {
        **os.environ,
        # `qknorm-tvm` and `torchrun` of the environment that runs the tests.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(to_run),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


_CPP_HEAD = """
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
using TensorView = tvm::ffi::TensorView;
void block(TensorView q_out, TensorView k_out, TensorView gamma_q, TensorView gamma_k,
           TensorView qk_var, TensorView q, TensorView k) {
"""


@pytest.mark.parametrize("path", DOCUMENTS, ids=_IDS)
def test_cpp_blocks_compile(path: Path, tmp_path: Path) -> None:
    blocks = [
        block for block in blocks_of(path) if block.language == "cpp" and block.reason() is None
    ]
    if not blocks:
        pytest.skip(f"{path.name} has no C++")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles with g++, which is not installed")
    from tvm_ffi import libinfo

    for block in blocks:
        source = tmp_path / f"line-{block.line}.cpp"
        source.write_text(_CPP_HEAD + block.text + "}\n")
        command = [compiler, "-fsyntax-only", "-std=c++17", "-Wall", "-Wextra", str(source)]
        command += ["-isystem", libinfo.find_include_path()]
        command += ["-isystem", libinfo.find_dlpack_include_path()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{path.name}:{block.line}\n{done.stderr}"


# ---- what they speak of ---------------------------------------------------------------------

_PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*/?")
_SUFFIXES = (".py", ".md", ".c", ".h", ".cpp", ".toml")
#: Where a path is looked for: names of files are often said without their folder.
_FOLDERS = ("", "qknorm_tvm", "qknorm_tvm/*", "schedules", "tests", "docs")


def _paths(text: str) -> Iterator[str]:
    """Yield what is in backticks and looks like a path of this repository."""
    tops = {path.name for path in ROOT.iterdir()} - {".git"}
    for quoted in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)):
        # `tests/test_x.py::test_y` is a path, too.
        for word in quoted.split():
            name = word.partition("::")[0].rstrip(",")
            if not _PATH.fullmatch(name):
                continue
            if name.endswith(_SUFFIXES) or ("/" in name and name.partition("/")[0] in tops):
                yield name


@pytest.mark.parametrize("path", DOCUMENTS, ids=_IDS)
def test_paths_and_links_exist(path: Path) -> None:
    """A file that was moved, or that was never written."""
    text = path.read_text()
    written = {block.value for block in blocks_of(path) if block.mark == "file"}
    for name in set(_paths(text)) - written:
        assert any(list(ROOT.glob(f"{folder}/{name}".strip("/"))) for folder in _FOLDERS), name
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            target, _, anchor = link.partition("#")
            linked = path.parent / target if target else path
            assert linked.exists(), link
            assert not anchor or anchor in _anchors(linked), link


def _anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_names_exist() -> None:
    """A function that was renamed."""
    pattern = re.compile(r"`(qknorm_tvm(?:\.\w+)+)[^`\n]*`")
    text = "".join(_FENCE.sub("", path.read_text()) for path in DOCUMENTS)
    code = """
    import importlib, json, sys

    def look_up(name):
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError as error:
                if not error.name.startswith("qknorm_tvm"):
                    raise
                continue
            for part in parts[count:]:
                found = getattr(found, part)
            return

    for name in json.load(sys.stdin):
        try:
            look_up(name)
        except ImportError as error:
            # A package's attribute that needs torch says so with an error of its own.
            missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            if not isinstance(missing, ModuleNotFoundError):
                raise
            if missing.name.partition(".")[0] not in ("torch", "transformers"):
                raise
            print(f"not looked up: {name}, which needs {missing.name}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=json.dumps(sorted(set(pattern.findall(text)))),
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
