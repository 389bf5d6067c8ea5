from __future__ import annotations

import pytest

from pipeline.errors import QuantizeError
from pipeline.quantization.expert_coverage import check

TOKENS = {"model.layers.0.mlp.experts": (300, 12, 800, 912), "model.layers.1.mlp.experts": (500, 506, 505, 513)}
NAME = "model.layers.0.mlp.experts.1"


def test_too_few_tokens_are_refused_and_the_samples_that_would_do_are_named() -> None:
    with pytest.raises(QuantizeError) as caught:
        check(TOKENS, 8, 100, print)
    # 12 tokens of 8 samples: 100 take 8 * 100 / 12.
    assert str(caught.value) == (
        "`calibration.min_expert_tokens` is 100, but 1 of 8 experts were reached by fewer than 100 calibration tokens, "
        f"`{NAME}` by 12: about 67 `calibration.samples` like these 8 would be enough"
    )


@pytest.mark.parametrize("wanted", [None, 12])
def test_enough_tokens_are_said_and_nothing_more(wanted: int | None) -> None:
    lines: list[str] = []
    check(TOKENS, 8, wanted, lines.append)
    assert lines == ["experts: 8 in 2 layers, reached by 12 to 912 tokens each"]


def test_an_expert_that_no_token_reached_is_a_warning_and_with_a_minimum_an_error() -> None:
    unused, lines = {**TOKENS, "model.layers.0.mlp.experts": (300, 0, 800, 912)}, list[str]()
    check(unused, 8, None, lines.append)
    assert lines[1] == (
        f"warning: 1 of 8 experts were reached by fewer than 1 calibration tokens, `{NAME}` by 0: "
        "none of 8 samples reached it, so use other text or many more `calibration.samples`"
    )
    with pytest.raises(QuantizeError, match="use other text or many more"):
        check(unused, 8, 1, lines.append)


def test_a_dense_model_has_nothing_to_say() -> None:
    check({}, 8, 100, pytest.fail)


def test_a_minimum_that_nothing_was_counted_for_is_not_met() -> None:
    with pytest.raises(QuantizeError, match="min_expert_tokens` is 100, but the backend counted no tokens of this"):
        check({}, 8, 100, pytest.fail, has_experts=True)
    check({}, 8, None, pytest.fail, has_experts=True)
