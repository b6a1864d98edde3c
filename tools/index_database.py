"""The SQLite database of an index: in memory, or a file that several threads and processes share."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

APPLICATION = 0x74686C69  # "thli": tells our files from other SQLite files
BUSY_SECONDS = 60.0  # how long an update waits for one by another process
QUERY_SECONDS = 2.0
_KEPT = 4  # idle connections
_TRIES = 40
_STEPS = 5000  # virtual machine instructions between two looks at the clock


class Damaged(sqlite3.DatabaseError):
    """The file isn't an index of this kind, or its content makes no sense: it must be built again."""


class Busy(sqlite3.OperationalError):
    """Another process has been writing all the time that was waited for."""


class Database:
    """One writer at a time, any number of readers, each on the last committed state (WAL).

    `path` None keeps it in memory: then readers take turns. `kind` is what must match in a file that exists: another
    means `Damaged`. Raises `OSError` or `sqlite3.OperationalError` when the file can't be made.
    """

    def __init__(self, path: Path | None, kind: str, schema: Sequence[str]) -> None:
        self.path, self._kind, self._schema = path, kind, schema
        self._writing = threading.RLock()
        self._guard = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        if path is None:
            self._only = _connect(":memory:")
            _create(self._only, schema)
        else:
            _private(path)
            self._prepare(path)

    @contextmanager
    def reading(self, seconds: float = QUERY_SECONDS) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state; statements are interrupted `seconds` after the start."""
        if self.path is None:
            with self._writing:
                try:
                    yield self._limited(self._only, seconds)
                finally:
                    self._only.set_progress_handler(None, 0)
            return
        connection = self._borrow(self.path)
        try:
            connection.execute("BEGIN")
            yield self._limited(connection, seconds)
        finally:
            self._give_back(connection)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction: committed at the end, rolled back on an error or a crash."""
        with self._writing:
            connection = self._only if self.path is None else _connect(self.path)
            connection.set_progress_handler(None, 0)
            try:
                connection.execute("PRAGMA cache_size = -65536")
                _begin(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            finally:
                if self.path is not None:
                    _close_writer(connection)

    def close(self) -> None:
        """Close every connection; one that is in use, when it is given back."""
        with self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        if self.path is None:
            with self._writing:
                self._only.close()

    def _prepare(self, path: Path) -> None:
        try:
            with closing(_connect(path)) as connection:
                if not _filled(connection):
                    self._fill(connection)
                _check(connection, self._kind)
        except sqlite3.Error as error:
            if is_damage(error):
                raise Damaged(str(error)) from error
            raise

    def _fill(self, connection: sqlite3.Connection) -> None:
        _use_log(connection)
        connection.execute("BEGIN IMMEDIATE")
        if not _filled(connection):  # another process may have been faster
            _create(connection, self._schema)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute("INSERT INTO meta VALUES ('kind', ?)", (self._kind,))
        connection.execute("COMMIT")

    def _borrow(self, path: Path) -> sqlite3.Connection:
        with self._guard:
            if self._closed:
                raise sqlite3.ProgrammingError("the index is closed")
            if self._idle:
                return self._idle.pop()
        connection = _connect(path)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cache_size = -16384")
        return connection

    def _give_back(self, connection: sqlite3.Connection) -> None:
        connection.set_progress_handler(None, 0)
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            connection.close()
            return
        with self._guard:
            if not self._closed and len(self._idle) < _KEPT:
                self._idle.append(connection)
                return
        connection.close()

    def _limited(self, connection: sqlite3.Connection, seconds: float) -> sqlite3.Connection:
        end = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        return connection


def remove(path: Path) -> None:
    """Delete an index file and what SQLite keeps beside it."""
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        name.unlink(missing_ok=True)


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        for setting in ("synchronous = NORMAL", "secure_delete = OFF", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {setting}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection, schema: Sequence[str]) -> None:
    for statement in schema:
        connection.execute(statement)


def _close_writer(connection: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):  # a reader on an older state keeps the log for now
        connection.execute("PRAGMA busy_timeout = 0")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _private(path: Path) -> None:
    """Make the folder and the file for their owner alone: they hold the text of what was indexed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    owners = {os.fstat(descriptor).st_uid, path.parent.stat().st_uid}
    os.close(descriptor)
    if hasattr(os, "geteuid") and owners != {os.geteuid()}:
        raise PermissionError(errno.EPERM, "the file or its folder belongs to somebody else")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error tells of wrong content rather than of a file that can't be used now."""
    if isinstance(error, sqlite3.OperationalError):
        return any(sign in str(error) for sign in ("no such", "malformed", "not a database", "already exists"))
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.ProgrammingError)


def _filled(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])


def _check(connection: sqlite3.Connection, kind: str) -> None:
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    row = connection.execute("SELECT value FROM meta WHERE key = 'kind'").fetchone()
    if found != APPLICATION or row is None or row[0] != kind:
        raise Damaged("not an index, or one of other folders or of another version")


def _begin(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise Busy(str(error)) from error
        raise


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite doesn't wait here when another process does the same."""
    for _ in range(_TRIES):
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            return
        time.sleep(0.05)
    raise sqlite3.OperationalError("the file stays locked")
