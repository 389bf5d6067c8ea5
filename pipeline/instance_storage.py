"""Where the Dagster instance keeps runs and events: SQLite under the home, or the PostgreSQL that is configured."""

from __future__ import annotations

from collections.abc import Mapping

from dagster import StringSource
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import SettingsError


class InstanceStorage(DagsterStorage, ConfigurableClass):
    """What dagster.yaml names: reads its two values and gives Dagster's own storage; it has no instances itself."""

    @classmethod
    def config_type(cls) -> Mapping[str, object]:
        """``folder`` for SQLite's files; ``postgres`` an address, or empty for SQLite."""
        return {"folder": StringSource, "postgres": StringSource}

    @classmethod
    def from_config_value(  # type: ignore[override]  # it gives one of two others
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, str]
    ) -> DagsterStorage:
        """Open the storage; its tables are made where there are none.

        Raises:
            SettingsError: PostgreSQL can't be reached.
        """
        address = config_value["postgres"]
        if not address:
            return DagsterSqliteStorage(config_value["folder"], inst_data)
        from dagster_postgres import DagsterPostgresStorage  # noqa: PLC0415 - for those who have one
        from dagster_postgres.utils import DagsterPostgresException  # noqa: PLC0415

        # SQLAlchemy's own choice of a driver is one that Dagster does not bring.
        url = make_url(address).set(drivername="postgresql+psycopg2")
        try:
            return DagsterPostgresStorage(url.render_as_string(hide_password=False), inst_data=inst_data)
        except (DagsterPostgresException, SQLAlchemyError) as error:
            cause = error.__cause__ or error
            raise SettingsError(
                f"Dagster's PostgreSQL can't be used: {url!r}: {str(cause).splitlines()[0]}; "
                "see `SLIPWAY_DAGSTER_POSTGRES`"
            ) from error
