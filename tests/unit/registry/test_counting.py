"""How far something is, told in time and in words: arithmetic on a clock that the test turns."""

from __future__ import annotations

import pytest

from registry.counting import Count, Counter, duration, is_count


class Clock:
    """Time as the test wants it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(total: float = 100, unit: str = "items", before: float = 0.0) -> tuple[Clock, list[str], Counter]:
    clock, lines = Clock(), list[str]()
    return clock, lines, Counter(lines.append, "cloze", total, unit, before=before, clock=clock)


def test_it_is_told_after_two_seconds_then_every_ten_and_at_its_end() -> None:
    clock, lines, counter = counted()
    told = []
    for second in range(1, 26):
        clock.now = float(second)
        before = len(lines)
        counter.add(4)
        told += [second] if len(lines) > before else []
    assert told == [2, 12, 22, 25]
    assert lines[0] == "cloze: 8 of 100 items after 2 s, 4.0/s, 23 s left"
    assert lines[-1] == "cloze: 100 of 100 items after 25 s, 4.0/s"


def test_it_is_told_while_nothing_comes() -> None:
    clock, lines, counter = counted()
    for second in (1.0, 2.0, 6.0, 12.5, 13.0):
        clock.now = second
        counter.beat()
    assert lines == ["cloze: 0 of 100 items after 2 s", "cloze: 0 of 100 items after 12 s"]


def test_what_is_done_in_a_moment_is_not_worth_a_line() -> None:
    clock, lines, counter = counted(2)
    clock.now = 0.5
    counter.add(2)
    assert lines == []


def test_the_end_is_told_once() -> None:
    clock, lines, counter = counted(2)
    clock.now = 3.0
    counter.add(2)
    clock.now = 30.0
    counter.beat()
    assert len(lines) == 1


def test_what_was_there_before_counts_and_took_no_time() -> None:
    clock, lines, counter = counted(4800, "MB", before=2400)
    clock.now = 10.0
    counter.add(240, "1 of 2 files")
    assert lines == ["cloze: 2,640 of 4,800 MB after 10 s, 24 MB/s, 90 s left (1 of 2 files)"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (Count("layer", 3, 32, "layers", 36), "layer: 3 of 32 layers after 36 s, 12 s each, 6 min left"),
        (Count("a.safetensors", 1.25, 5, "MB", 2), "a.safetensors: 1.2 of 5.0 MB after 2 s, 0.6 MB/s, 6 s left"),
        (Count("cloze", 0, 10, "items", 0), "cloze: 0 of 10 items after 0 s"),
        (Count("a", 2000, 2000, "items", 8000, detail="x"), "a: 2,000 of 2,000 items after 2.2 h, 4 s each (x)"),
    ],
)  # fmt: skip
def test_a_count_in_words(count: Count, text: str) -> None:
    assert str(count) == text


def test_every_count_is_known_again_by_its_text_and_nothing_else_is() -> None:
    for done, total in ((0, 10), (3, 4), (1234.5, 98765.0), (5, 5), (0, 0)):
        share = is_count(str(Count("wheels: of a", done, total, "MB", 2.0)))
        assert share is not None
        assert share[0] == "wheels: of a"
        assert share[1] == pytest.approx(done / total if total else 1.0, abs=0.01)
    for line in ("2 of 3 replicas are well", "cloze: 1 of , items after 2 s", "", "saving"):
        assert is_count(line) is None


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (119, "119 s"), (130, "2 min"), (9000, "2.5 h")])
def test_a_duration_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
