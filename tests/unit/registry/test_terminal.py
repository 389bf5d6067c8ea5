"""What comes from outside is shown as text, and what nobody signed is not shown as the program's own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import __main__ as command
from registry import verify
from registry.digests import canonical_json
from registry.errors import VerificationError
from registry.signing import SigningKey
from registry.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé, 日本 and 🚀", "plain, ünïcödé, 日本 and 🚀"),
        ("\x1b[1A\x1b[2Kgone", r"\x1b[1A\x1b[2Kgone"),
        ("one\rtwo\x07\x08\x9b2J", r"one\rtwo\x07\x08\x9b2J"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\udce9\U000e0041", r"\udce9\U000e0041"),
        ("a\tb\nc", r"a b\nc"),
    ],
)
def test_what_a_terminal_would_act_on_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_are_kept_where_there_may_be_some() -> None:
    assert printable("a\nb\rc", lines=True) == "a\nb\\rc"


@given(st.text())
def test_whatever_it_is_one_line_of_text_comes_out(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert all(character.isprintable() or character.isspace() for character in shown)
    assert printable(shown) == shown


def test_the_reason_of_a_gate_that_nobody_signed_is_not_shown(
    release: Path, signing_key: SigningKey, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = release / "release" / "manifest.json"
    document = json.loads(manifest.read_bytes())
    lie = "fail\ndemo-awq version 3 is in ./demo"
    document["gates"][0]["verdict"] |= {"status": "fail", "reason": lie}
    manifest.write_bytes(canonical_json(document))
    with pytest.raises(VerificationError) as caught:
        verify(release, [signing_key.public])
    assert "is in ./demo" not in str(caught.value) + str(caught.value.problems)
    (tmp_path / "release.pub").write_bytes(signing_key.public.pem())
    assert command.main(["verify", str(release), "--key", str(tmp_path / "release.pub")]) == command.REFUSED
    assert "is in ./demo" not in "".join(capsys.readouterr())


def test_an_error_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main(["verify", "no\x1b[2J\nfolder\udce9", "--key", "/dev/null"])
    assert status != 0
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert told.count("\n") == 1
