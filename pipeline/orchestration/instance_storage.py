"""Where the Dagster instance keeps runs and events: SQLite under the home, or the PostgreSQL that is configured."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dagster import EventLogEntry, StringSource
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from sqlalchemy import Connection, Engine, QueuePool, create_engine, make_url
from sqlalchemy import event as hooks
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import SettingsError

# How long another process may write, as Dagster has it; and how many runs' files stay open.
_BUSY_SECONDS, _MOST_OPEN = 30, 8


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
            return _Sqlite(config_value["folder"], inst_data)
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


class _Sqlite(DagsterSqliteStorage):
    """Dagster's own, but for its log of events."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = _EventLog(self._event_log_storage._base_dir)  # noqa: SLF001 - the base class's own


class _EventLog(SqliteEventLogStorage):
    """Keeps each file open that it has used lately.

    Dagster opens one anew for every event, and so compiles its queries anew, and empties SQLite's journal into the file
    behind each. Who follows a run, as its page does, watches for that: the file is touched instead.
    """

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self._engines: dict[str, Engine] = {}

    def store_event(self, event: EventLogEntry) -> None:
        """Store an event, and let those who watch its run's file know."""
        super().store_event(event)
        os.utime(self.path_for_shard(event.run_id))

    def dispose(self) -> None:
        """Close the files."""
        super().dispose()
        while self._engines:
            self._engines.popitem()[1].dispose()

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            engine = self._engine(shard)
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.begin() as connection:
                yield connection

    def _engine(self, shard: str) -> Engine:
        engine = self._engines.pop(shard, None)
        if engine is None:
            arguments = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
            engine = create_engine(
                self.conn_string_for_shard(shard), poolclass=QueuePool, pool_size=1, connect_args=arguments
            )
            hooks.listen(engine, "connect", _trust_the_journal)
        self._engines[shard] = engine
        if len(self._engines) > _MOST_OPEN:
            self._engines.pop(next(iter(self._engines))).dispose()
        return engine


def _trust_the_journal(connection: sqlite3.Connection, _record: object) -> None:
    """Wait for the disk where the journal is emptied, not at each event: a power cut costs the last ones, no more."""
    connection.execute("PRAGMA synchronous=NORMAL")
