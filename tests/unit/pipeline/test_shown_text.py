"""What the command line shows of text from outside: journal entries, reasons, names, errors."""

from __future__ import annotations

import pytest

from pipeline.commands import show

HIDING = "\x1b[1A\x1b[2K\x1b]0;title\x07\rdone\u202e"


def test_nothing_that_is_printed_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_table(["number", "why"], [["1", "by hand"], ["2", f"{HIDING}\nline"], ["3", "by hand"]])
    show.results.print(f"demo-awq: {HIDING}")
    show.say(f"asked: {HIDING}\nline")
    show.progress.print(f"[red]error:[/] {HIDING}")
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\r\u202e")
    assert [line.split()[0] for line in out.splitlines()] == ["number", "1", "2", "3", "demo-awq:"]
    assert len(err.splitlines()) == 2
    assert out.count(r"\x1b[1A\x1b[2K") == 2
