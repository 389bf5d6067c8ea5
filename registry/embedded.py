"""A store that MLflow opens in this process: SQLite, or another database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from registry.backend import EXPERIMENT, Line, Version, aliases_by_version
from registry.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST_ENTRIES = 100_000


class Embedded:
    """A store that MLflow opens in this process."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def artifact_root(self) -> str | None:
        """Where the experiment `EXPERIMENT` keeps its files."""
        found = self._client.get_experiment_by_name(EXPERIMENT)
        return None if found is None else str(found.artifact_location)

    def names(self) -> list[str]:
        """Every registered model's name, sorted."""
        return sorted(model.name for model in pages(self._client.search_registered_models, max_results=1000))

    def line(self, name: str) -> Line | None:
        """The line, or None."""
        if not self._client.search_registered_models(f"name = '{name}'"):
            return None
        found = self._client.get_registered_model(name)
        return Line(name, {alias: str(number) for alias, number in found.aliases.items()}, dict(found.tags))

    def versions(self, name: str) -> list[Version]:
        """Its versions, newest first."""
        line = self.line(name)
        if line is None:
            return []
        aliases = aliases_by_version(line)
        search = self._client.search_model_versions
        listed = pages(search, filter_string=f"name = '{name}'", max_results=1000)
        versions = [
            Version(
                name=name,
                version=str(item.version),
                aliases=aliases[str(item.version)],
                tags=dict(item.tags),
                location=self._client.get_model_version_download_uri(name, item.version),
                created=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
            )
            for item in listed
        ]
        return sorted(versions, key=lambda version: -int(version.version))

    def version(self, name: str, number: str) -> Version | None:
        """One version, or None."""
        return next((version for version in self.versions(name) if version.version == number), None)

    def create_line(self, name: str, tags: Mapping[str, str]) -> None:
        """Make a registered model; do nothing if it exists."""
        with _unless("RESOURCE_ALREADY_EXISTS"):
            self._client.create_registered_model(name, tags=dict(tags))

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> str:
        """Make a version; its number is unique and larger than all before."""
        with _unless():
            return str(self._client.create_model_version(name, source=source, tags=dict(tags)).version)

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version; do nothing if it does not exist."""
        with _unless("RESOURCE_DOES_NOT_EXIST"):
            self._client.delete_model_version(name, version)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point the alias at the version."""
        with _unless():
            self._client.set_registered_model_alias(name, alias, version)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias."""
        with _unless("RESOURCE_DOES_NOT_EXIST"):
            self._client.delete_registered_model_alias(name, alias)

    def set_line_tag(self, name: str, key: str, value: str) -> None:
        """Set a tag of the line."""
        with _unless():
            self._client.set_registered_model_tag(name, key, value)

    def set_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        with _unless():
            self._client.set_model_version_tag(name, version, key, value)


def pages(search: Any, **options: Any) -> list[Any]:  # noqa: ANN401 - MLflow ships no types to us
    """Return everything that one of MLflow's searches finds, page after page.

    Raises:
        TrackingError: The pages have no end.
    """
    found: list[Any] = []
    token, seen = None, set[str]()
    while True:
        page = search(page_token=token, **options)
        found += page
        token = page.token
        if not token:
            return found
        if token in seen or len(found) > _MOST_ENTRIES:
            raise TrackingError(f"MLflow lists without end: stopped after {len(found)}")
        seen.add(token)


@contextmanager
def _unless(code: str = "") -> Iterator[None]:
    """Let an ``MlflowException`` with this error code pass as done; any other is a ``TrackingError``."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - slow, and imported by `connected` already

    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise TrackingError(f"MLflow: {str(error).partition(chr(10))[0]}") from error
