"""The rescan in Dagster: a check of what is released, from the UI, by a schedule, or reported by the command line.

It is no part of a release: the release has its own scan, and the job leaves this check out. It is of all champions
together: Dagster keeps one evaluation that no run made for a partition, for ever.
"""

from collections.abc import Mapping, Sequence

from dagster import (
    AssetCheckEvaluation,
    AssetCheckExecutionContext,
    AssetCheckKey,
    AssetCheckResult,
    AssetKey,
    Config,
    DagsterInstance,
    MetadataValue,
    ResourceParam,
    asset_check,
)

from pipeline.operations.rescan import TAG, Mark, RescanError, Rescanned
from pipeline.operations.rescan import rescan as look_again
from pipeline.orchestration.previews import known_previews
from pipeline.settings import Settings
from registry.catalog import lines

RESCAN = AssetCheckKey(AssetKey("release"), "rescan")


class Champions(Config):
    """Which release lines' champions to look at; all, where none is named."""

    lines: list[str] = []  # noqa: RUF012 - a Config copies it


with known_previews():

    @asset_check(asset="release", name="rescan")
    def rescan(
        context: AssetCheckExecutionContext, config: Champions, settings: ResourceParam[Settings]
    ) -> AssetCheckResult:
        """Is every champion still free of what the policy forbids, by today's database?"""
        try:
            champions: Sequence[Rescanned] = look_again(settings, config.lines, context.log.info)
            failure = None
        except RescanError as error:
            champions, failure = error.found, error
        for found in champions:
            if found.verdict.blocks:
                context.log.error("%s version %s is refused: %s", found.name, found.version, found.verdict.reason)
        passed, description, metadata = _standing(settings)
        if failure is not None:
            passed, description = False, f"{failure}; {description}"
        return AssetCheckResult(passed=passed, description=description, metadata=metadata)


def report(instance: DagsterInstance, settings: Settings) -> None:
    """Let the check show what the command line found."""
    passed, description, metadata = _standing(settings)
    evaluation = AssetCheckEvaluation(
        RESCAN.asset_key, RESCAN.name, passed=passed, description=description, metadata=metadata
    )
    instance.report_runless_asset_event(evaluation)


def _standing(settings: Settings) -> tuple[bool, str, Mapping[str, MetadataValue]]:
    """How the champions stand, by the marks of their latest rescans: whether none is refused, in words, one by one."""
    champions = [version for version in lines(settings.tracking_uri) if "champion" in version.aliases]
    marks = [(version, Mark.read(version.tags[TAG])) for version in champions if TAG in version.tags]
    refused = [f"{version.name} version {version.version}" for version, mark in marks if mark.blocks]
    metadata = {
        f"{version.name} version {version.version}": MetadataValue.text(f"{mark.status}: {mark.reason}")
        for version, mark in marks
    }
    words = f"refused: {', '.join(refused)}" if refused else f"{len(marks)} champions are free of what is forbidden"
    return not refused, words, metadata
