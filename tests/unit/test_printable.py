"""What others wrote, made fit for a log."""

from __future__ import annotations

import pytest

from tars_mqtt.printable import printable


@pytest.mark.parametrize("text", ["", "a/b", "Küche/Öfen", "温度", "a\\b 'c'"])
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb", r"a\r\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\u2028\x9b", r"\u2028\x9b"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_could_forge_or_hide_a_line_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_long_is_shortened() -> None:
    assert printable("x" * 500) == "x" * 500
    assert printable("x" * 501) == "x" * 499 + "…"
