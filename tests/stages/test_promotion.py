"""Promotion into a real MLflow, as the last stage does it."""

from __future__ import annotations

from pathlib import Path

from pipeline.stages.promotion import promote
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from unit.pipeline.release_evidence import Made, settings_of


def test_the_first_promotion_says_promoted_and_the_same_again_up_to_date(tmp_path: Path) -> None:
    made = Made(settings_of(tmp_path / "home"))
    release = run(RELEASE, made.context, made.artifacts())
    first = promote(made.context, release).version
    assert (first.outcome, first.version, first.aliases) == ("promoted", "1", ("candidate", "champion"))
    again = promote(made.context, release).version
    assert again == first.model_copy(update={"outcome": "up-to-date"})
    newer = run(RELEASE, made.context, made.artifacts(weights=b"other"))
    second = promote(made.context, newer).version
    assert (second.outcome, second.version) == ("promoted", "2")
    # What was champion before becomes so again, and that is told.
    back = promote(made.context, release).version
    assert (back.outcome, back.version) == ("promoted", "1")
