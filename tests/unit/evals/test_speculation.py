"""Speculation against the same image without it: equal answers, the noise of batches, acceptance and speed."""

from __future__ import annotations

import pytest

from evals.load.speculation import Asked, Speculation, compare, equality

ANSWERS = [[number, 7, 8, 9] for number in range(24)]


def other(answers: list[list[int]], count: int) -> list[list[int]]:
    """The same answers, ``count`` of which have another third token."""
    return [[*answer[:2], 99, *answer[3:]] if number < count else answer for number, answer in enumerate(answers)]


def asked(
    single: list[list[int]] = ANSWERS, batches: tuple[list[list[int]], list[list[int]]] = (ANSWERS, ANSWERS),
    *, seconds: float = 2.0, drafted: int = 0, accepted: int = 0,
) -> Asked:  # fmt: skip
    return Asked(single, batches, seconds, 2 * seconds, drafted, accepted)


def speculation(speculating: Asked, plain: Asked | None = None) -> Speculation:
    return compare("ngram", 4, speculating, plain or asked(seconds=3.0))


def test_equal_answers_are_in_order_and_faster() -> None:
    found = speculation(asked(drafted=200, accepted=150))
    assert found.wrong is None
    assert (found.drafted, found.accepted, found.acceptance_rate) == (200, 150, 0.75)
    assert found.single_speed_up == found.batched_speed_up == pytest.approx(1.5)
    assert found.single_tokens_per_second == pytest.approx(48.0)
    assert "75.0% of 200 drafted tokens accepted; 1.50 times as fast" in str(found)


def test_one_other_answer_to_a_single_request_is_wrong() -> None:
    found = speculation(asked(other(ANSWERS, 1)))
    assert found.wrong == "one request at a time, 1 of 24 answers differ, the first at token 2 of prompt 0"
    difference = found.single.first_difference
    assert difference is not None
    assert (difference.first, difference.second) == (99, 8)


def test_batches_may_differ_as_much_as_equal_batches_do() -> None:
    noisy = asked(batches=(ANSWERS, other(ANSWERS, 4)))
    assert speculation(asked(batches=(other(ANSWERS, 5), ANSWERS)), noisy).wrong is None
    damaged = speculation(asked(batches=(other(ANSWERS, 20), ANSWERS)), noisy)
    assert damaged.wrong is not None
    assert damaged.wrong.startswith("in a batch, 20 of 24 answers differ")
    assert "twice the same batch: 4 of 24 answers differ" in damaged.wrong


def test_an_answer_that_ends_early_differs_where_it_ends() -> None:
    found = equality([[1, 2, 3]], [[1, 2]])
    assert found.first_difference is not None
    assert (found.first_difference.token, found.first_difference.second) == (2, None)


def test_a_server_that_drafted_nothing_has_no_acceptance_rate() -> None:
    found = speculation(asked())
    assert found.acceptance_rate is None
    assert "nothing was drafted" in str(found)


def test_it_is_read_back_as_it_was_written() -> None:
    found = speculation(asked(other(ANSWERS, 2), drafted=10, accepted=3))
    assert Speculation.model_validate_json(found.model_dump_json()) == found
