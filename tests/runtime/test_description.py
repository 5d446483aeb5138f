"""What an agent may say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.description import (
    MAX_CONCURRENCY,
    MAX_ENTRIES,
    MAX_TEXT_BYTES,
    AgentDescription,
    check_capability,
)
from parallax.security.errors import InvalidRequest


def test_says_nothing_by_default() -> None:
    assert AgentDescription() == AgentDescription("", (), {}, {}, 1)


def test_bounds_themselves_are_allowed() -> None:
    full = "ü" * (MAX_TEXT_BYTES // 2)
    pairs = {f"{number:02}{full[2:]}": full for number in range(MAX_ENTRIES)}
    AgentDescription(
        display_name=full,
        capabilities=tuple(f"{number:063}" for number in range(MAX_ENTRIES)),
        labels=pairs,
        metadata=pairs,
        max_concurrency=MAX_CONCURRENCY,
    )


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"display_name": "x" * (MAX_TEXT_BYTES + 1)}, "display_name has 257 bytes"),
        ({"display_name": "ü" * (MAX_TEXT_BYTES // 2 + 1)}, "display_name has 258 bytes"),
        ({"display_name": "two\nlines"}, "display_name has characters that cannot be shown"),
        ({"display_name": "\x1b[31mred"}, "cannot be shown"),
        ({"display_name": "nul\x00"}, "cannot be shown"),
        ({"display_name": "\u202egnirts"}, "cannot be shown"),
        ({"display_name": "\ud800"}, "cannot be shown"),
        ({"capabilities": ("Echo",)}, "not a capability: 'Echo'"),
        ({"capabilities": ("",)}, "not a capability"),
        ({"capabilities": tuple(f"c{n}" for n in range(MAX_ENTRIES + 1))}, "capabilities has 65 entries"),
        ({"labels": {str(n): "" for n in range(MAX_ENTRIES + 1)}}, "labels has 65 entries"),
        ({"metadata": {str(n): "" for n in range(MAX_ENTRIES + 1)}}, "metadata has 65 entries"),
        ({"labels": {"x" * (MAX_TEXT_BYTES + 1): ""}}, "a key of labels has 257 bytes"),
        ({"labels": {"zone": "x" * (MAX_TEXT_BYTES + 1)}}, r"labels\['zone'\] has 257 bytes"),
        ({"metadata": {"note": "a\nb"}}, r"metadata\['note'\] has characters"),
        ({"metadata": {"a\nb": ""}}, "a key of metadata has characters"),
        ({"max_concurrency": 0}, "max_concurrency must be from 1 to 4096, not 0"),
        ({"max_concurrency": -1}, "max_concurrency"),
        ({"max_concurrency": MAX_CONCURRENCY + 1}, "max_concurrency"),
    ],
)
def test_a_broken_bound_is_named(said: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        AgentDescription(**said)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_capability_stated_twice_counts_once_and_keeps_its_place() -> None:
    stated = ("b", "a", "b", "c", "a")
    assert AgentDescription(capabilities=stated).capabilities == ("b", "a", "c")
    assert AgentDescription(capabilities=("a",) * 1_000).capabilities == ("a",)


@pytest.mark.parametrize("name", ["a", "0", "sentiment", "a.b-c_d", "a" * 63, "a..b", "x-"])
def test_capability_names(name: str) -> None:
    assert check_capability(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "_a", "A", "a b", "a/b", "a:b", "ä", "a\n", "a\x00", "a" * 64, "²"]
)
def test_what_is_no_capability_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="not a capability"):
        check_capability(name)


@given(st.text(max_size=300))
def test_a_text_is_kept_as_it_is_or_refused(text: str) -> None:
    """Never cut, never an exception of another kind."""
    try:
        assert AgentDescription(display_name=text).display_name == text
    except InvalidRequest:
        assert not text.isprintable() or len(text.encode()) > MAX_TEXT_BYTES
