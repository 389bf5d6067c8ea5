"""A release that is made and run again, against a real MLflow: it follows its file back, and undoes no rollback."""

from __future__ import annotations

from pathlib import Path

from pipeline.stages.promotion import audit_trail, promote
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.store.artifacts import Artifact
from pipeline.trust import signing_key, trust_of
from registry import rollback
from registry.catalog import current
from unit.pipeline.release_evidence import Made, settings_of


def sealed(made: Made, weights: bytes) -> Artifact:
    return run(RELEASE, made.context, made.artifacts(weights))


def by_alias(made: Made) -> dict[str, str]:
    versions = current(made.settings.tracking_uri, "demo-gptq")
    return {alias: version.version for version in versions for alias in version.aliases}


def test_a_cached_run_follows_its_file_back_and_leaves_a_rollback_as_it_is(tmp_path: Path) -> None:
    made = Made(settings_of(tmp_path / "home"))
    first, second = sealed(made, b"packed"), sealed(made, b"packeD")
    for release in (first, second):
        promote(made.context, release)
    assert by_alias(made) == {"candidate": "2", "champion": "2", "previous": "1"}

    rollback("demo-gptq", made.settings.tracking_uri, trust_of(made.settings), key=signing_key(made.settings))
    before = by_alias(made)
    assert before == {"candidate": "2", "champion": "1", "previous": "2"}
    assert promote(made.context, second).version.outcome == "up-to-date"
    assert by_alias(made) == before
    assert "a person has replaced it" in made.told[-1]

    # Its file says the first again, and then the second, which is no rollback's any more.
    promote(made.context, first)
    assert by_alias(made) == {"candidate": "1", "champion": "1", "previous": "2"}
    promote(made.context, second)
    assert by_alias(made) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert [act.entry.action for act in audit_trail(made.context)] == [
        "promote",
        "promote",
        "rollback",
        "promote",
        "promote",
    ]
