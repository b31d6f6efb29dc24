"""The example of a paged cache filled by prefill and decode: it runs, and checks its own bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="runs an example with torch, and torch is not installed")

pytestmark = pytest.mark.frameworks
_SOURCE = Path(__file__).parent.parent / "examples" / "attention_input.py"


def test_prefill_and_decode(tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    sizes = ["--sequences", "2", "--prompt", "20", "--steps", "3", "--heads", "2", "1"]
    done = subprocess.run(
        [sys.executable, _SOURCE, *sizes, "--picture", picture],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefill and 3 decode steps equal the unfused graph, bit for bit" in done.stdout
    assert picture.stat().st_size > 1000
