"""Targets: what their text may be, and what this machine is taken for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LEVELS, load_at_level, of_every_level

from qknorm_tvm import targets
from qknorm_tvm.targets import CUDA_ARCHS, X86_FEATURES, X86_LEVELS, parse_target


def test_cpu_means_every_level_best_first() -> None:
    assert parse_target("cpu").variants == ("x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2")
    assert parse_target("cpu").kind == "cpu"


def test_cuda_means_every_architecture() -> None:
    assert parse_target("cuda").variants == CUDA_ARCHS


@given(
    st.lists(
        st.sampled_from(["sm_75", "sm_80", "sm_90", "sm_90a", "sm_100", "sm_120f"]), min_size=1
    )
)
def test_order_and_repetition_of_architectures_do_not_matter(archs: list[str]) -> None:
    """The same machine code under two names."""
    target = parse_target("cuda:" + ",".join(archs))
    assert target == parse_target("cuda:" + ",".join(reversed(archs)))
    assert set(target.variants) == set(archs)
    assert parse_target(target.text) == target


def test_architectures_are_sorted_by_number() -> None:
    assert parse_target("cuda:sm_100,sm_90").text == "cuda:sm_90,sm_100"


@pytest.mark.parametrize("name", [*LEVELS, "znver4", "sapphirerapids", "skylake-avx512"])
def test_single_cpu(name: str) -> None:
    target = parse_target(name)
    assert (target.kind, target.variants) == ("cpu", (name,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "CPU",
        "native",
        "llvm",
        "x86-64",
        "arm64",
        "cpu\n",
        "-mcpu=znver4",
        "znver4;rm",
        "a b",
        "../x",
    ],
)
def test_text_that_is_no_cpu(text: str) -> None:
    """Text that reaches LLVM unchecked."""
    with pytest.raises(ValueError, match=r"^target must be 'cpu', a level such as"):
        parse_target(text)


@pytest.mark.parametrize(
    "text",
    [
        "cuda:",
        "cuda:90",
        "cuda:sm_9",
        "cuda:sm_90,",
        "cuda:sm_90, sm_80",
        "cuda:sm_90b",
        "cuda:all",
    ],
)
def test_text_that_is_no_architecture(text: str) -> None:
    """Text that reaches nvcc's command line unchecked."""
    with pytest.raises(ValueError, match=r"^target must be 'cpu', a level such as"):
        parse_target(text)


@pytest.mark.parametrize("value", [None, 3, b"cpu", ["cpu"]])
def test_target_that_is_no_string(value: Any) -> None:
    with pytest.raises(TypeError, match=r"target must be a str, got|unhashable type"):
        parse_target(value)


def test_each_level_holds_the_one_below() -> None:
    """A choice at load that skips a level."""
    bf16, v4, v3, v2 = map(set, X86_LEVELS.values())
    assert v2 < v3 < v4 < bf16 <= set(X86_FEATURES)


def test_aarch64_is_a_cpu_target_of_its_own_machine() -> None:
    target = parse_target("aarch64")
    assert (target.kind, target.variants, target.machine) == ("cpu", ("aarch64",), "aarch64")
    assert {parse_target(name).machine for name in ("cpu", "znver4", *LEVELS)} == {"x86_64"}


def _levels_for(
    monkeypatch: pytest.MonkeyPatch, features: set[str], machine: str = "x86_64"
) -> str:
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "host_features", lambda: frozenset(features))
    targets.host_cpu_target.cache_clear()
    try:
        return targets.host_cpu_target()
    finally:
        targets.host_cpu_target.cache_clear()


@pytest.mark.parametrize("level", LEVELS)
def test_host_level_is_the_best_that_is_whole(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    assert _levels_for(monkeypatch, set(X86_LEVELS[level])) == level


def test_host_without_one_feature_gets_the_level_below(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _levels_for(monkeypatch, set(X86_LEVELS["x86-64-v4"]) - {"avx512vl"}) == "x86-64-v3"


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_host_that_is_aarch64(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """A machine without x86 features that is taken for an old x86."""
    assert _levels_for(monkeypatch, set(), machine) == "aarch64"


def test_too_old_a_host_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"is not x86-64-v2 or better"):
        _levels_for(monkeypatch, {"sse3"})


def test_proc_words_of_this_machine_agree_with_cpuid() -> None:
    """A level chosen from /proc/cpuinfo that the module, which asks cpuid, then refuses."""
    best = targets.host_cpu_target()
    assert load_at_level(of_every_level(), best).active_level == best


def test_which_code_adds_squares_in_one_rounding() -> None:
    """A reference that rounds twice where the code rounds once: AArch64 names no sets."""
    fused = {level: targets.adds_fused(level, features) for level, features in X86_LEVELS.items()}
    assert fused == {
        "x86-64-v2": False,
        "x86-64-v3": True,
        "x86-64-v4": True,
        "x86-64-v4-bf16": True,
    }
    assert targets.adds_fused("aarch64", ())
