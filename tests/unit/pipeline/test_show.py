"""What a person sees while it goes: live on a terminal, plain lines elsewhere; the terminal is whole afterwards."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.commands.show import FAILED, INTERRUPTED

CHECKOUT = Path(__file__).parents[3]
COUNTS = [f"cloze: {done} of 200 items after 9 s, 13/s, 2 min left" for done in (20, 120)]
SCRIPT = """
import sys, time
import click
from pipeline import cli; from pipeline.commands import show
from pipeline.orchestration.release_events import RunEnded, StageDone, StageProgress, StageStarted
from pipeline.errors import SlipwayError

@click.command()
@click.argument("ending")
def work(ending):
    ticker = show.Ticker()
    ticker("awq", StageStarted(stage="baseline"))
    for line in %r:
        ticker("awq", StageProgress(stage="baseline", text=line))
        show.say(line.replace("cloze", "wheels"))
        time.sleep(0.1)
    show.say("all wheels are here")
    if ending == "interrupt":
        raise KeyboardInterrupt
    if ending == "fail":
        raise SlipwayError("it failed")
    ticker("awq", StageDone(name="baseline", cached=False, seconds=9.0, worker_seconds=8.0))
    ticker("awq", RunEnded(outcome="promoted"))
    show.print_json({"done": True})

cli.main.add_command(work)
cli.main()
"""


def run(ending: str, home: Path, *, terminal: bool, **variables: str) -> tuple[int, str, str]:
    """Run the command with stderr on a terminal, or not; return its status, stderr and stdout."""
    environment = {**os.environ, "SLIPWAY_HOME": str(home), "TERM": "xterm", "COLUMNS": "120", **variables}
    command = [sys.executable, "-c", SCRIPT % COUNTS, "work", ending]
    if not terminal:
        done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, done.stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, env=environment, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    seen = drain(ours)
    os.close(ours)
    told, _ = process.communicate()
    return process.returncode, seen.decode(), told.decode()


def drain(terminal: int) -> bytes:
    """Read what comes until nobody has the terminal's other side any more, which Linux calls an error."""
    seen = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 65536):
            seen += chunk
    return seen


def screen(output: str) -> list[str]:
    """The lines that are left on a terminal: as much of one as the display uses."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] if row == len(lines) else []
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("ending", "status", "last"),
    [
        ("done", 0, "promoted"),
        ("fail", FAILED, "error: it failed"),
        ("interrupt", INTERRUPTED, "error: interrupted: everything that was started has ended"),
    ],
)
def test_on_a_terminal_counts_are_live_and_gone_afterwards(tmp_path: Path, ending: str, status: int, last: str) -> None:
    ended, seen, told = run(ending, tmp_path, terminal=True)
    assert ended == status
    for line in (*COUNTS, *(each.replace("cloze", "wheels") for each in COUNTS)):
        assert line[:40] in seen
    left = screen(seen)
    assert not [line for line in left if " of 200 items" in line]
    assert last in left[-1]
    assert any("all wheels are here" in line for line in left)
    # The cursor is where it belongs: shown, whenever the process may have been killed.
    assert "\x1b[?25l" not in seen or seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert told == ('{\n "done": true\n}\n' if ending == "done" else "")


def test_threads_that_set_drop_and_print_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each takes the display's lock and rich's own, in whichever order."""
    script = """
import threading
from pipeline.commands import show
def work(number):
    for round in range(100):
        show.live.set(number, "row", f"{round} of 100")
        show.say(f"line {round} of {number}")
        show.live.drop(number)
with show.live:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=CHECKOUT, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    drained = threading.Thread(target=drain, args=(ours,))
    drained.start()
    try:
        assert process.wait(timeout=100) == 0
    finally:
        process.kill()
        process.wait()
        drained.join()
        os.close(ours)


def test_a_result_is_a_line_of_its_own_where_both_streams_are_one_terminal(tmp_path: Path) -> None:
    script = f"""
import time
from pipeline.commands import show
with show.live:
    show.say({COUNTS[0]!r})
    time.sleep(0.1)
    show.results.print("the result")
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=CHECKOUT, stdout=theirs, stderr=theirs,
        env={**os.environ, "SLIPWAY_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    seen = drain(ours).decode()
    os.close(ours)
    assert process.wait() == 0
    assert COUNTS[0] in seen
    assert screen(seen) == ["the result"]


def test_without_colours_where_none_are_wanted(tmp_path: Path) -> None:
    _, coloured, _ = run("done", tmp_path, terminal=True, NO_COLOR="")
    _, plain, _ = run("done", tmp_path, terminal=True, NO_COLOR="1")
    colours = re.compile(r"\x1b\[(\d+;)*(3[0-7]|38;\S+?)m")
    assert colours.search(coloured)
    assert not colours.search(plain)
    assert COUNTS[1][:40] in plain


def test_elsewhere_every_count_is_a_plain_line(tmp_path: Path) -> None:
    status, seen, told = run("done", tmp_path, terminal=False)
    assert status == 0
    assert "\x1b" not in seen
    lines = [" ".join(line.split()) for line in seen.splitlines()]
    for line in COUNTS:
        assert any(each.endswith(f"awq baseline {line}") for each in lines)
        assert line.replace("cloze", "wheels") in lines
    assert told == '{\n "done": true\n}\n'
