"""Promotion into a real MLflow, as the last stage does it."""

from __future__ import annotations

from pathlib import Path

from release_evidence import Made, settings_of

from pipeline.stages import promotion


def test_the_first_promotion_says_promoted_and_the_same_again_up_to_date(tmp_path: Path) -> None:
    made = Made(settings_of(tmp_path / "home"))
    release = promotion.sealed(made.bench, *made.artifacts().values())
    first = promotion.promoted(made.bench, release)["release"]
    assert (first["outcome"], first["version"], first["aliases"]) == ("promoted", "1", ["candidate", "champion"])
    again = promotion.promoted(made.bench, release)["release"]
    assert again == {**first, "outcome": "up-to-date"}
    newer = promotion.sealed(made.bench, *made.artifacts(weights=b"other").values())
    second = promotion.promoted(made.bench, newer)["release"]
    assert (second["outcome"], second["version"]) == ("promoted", "2")
    # What was champion before becomes so again, and that is told.
    back = promotion.promoted(made.bench, release)["release"]
    assert (back["outcome"], back["version"]) == ("promoted", "1")
