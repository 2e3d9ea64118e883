"""``python -m flops.manager.restore --home DIR FILE``: a backup becomes the content of an empty FLOPS_HOME.

Offline: a manager that runs holds the lock of its home (and of its database), and is never overwritten. What
holds projects or models is refused, too: going back means another FLOPS_HOME or another database, so the old
one is still there when the backup turns out to be the wrong one. All or nothing: the archive is unpacked
aside and checked to its end, the rows are one transaction, files are renamed to their places before its
commit and taken away again when it fails. Files without rows, of a restore that was killed, are leftovers
that the next one replaces.

Nothing in an archive is trusted: names, kinds and sizes of its members, its sums, tables, columns and types.

The manager that wrote the backup knew of things that no backup holds: checkouts, environments, checkpoints,
services. So projects that had not ended are `failed` afterwards and can be attempted again, from their start.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from flops.core.clock import Clock, SystemClock
from flops.core.disk import disk_full, is_full
from flops.core.errors import ConflictError, FailedError, FlopsError, InvalidInputError
from flops.core.events import EventKind
from flops.core.ids import project_id
from flops.core.settings import Settings
from flops.manager import tables
from flops.manager.backup import RESTORED, model_place, reflected
from flops.manager.databases import open_own_database
from flops.manager.home import claim_home
from flops.manager.states import EXPORT_ENVIRONMENT, TERMINAL, State
from flops.manager.unpacking import MAX_SMALL_BYTES, Refused, parse_json, unpack
from flops.persistence import DatabaseAwayError, metadata, migrate, reading, writing

_ROWS_AT_ONCE = 500
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,199}")
_OF_AN_ATTEMPT = ("steps", "services", "learners", "clusters", "report_sources")
"""Tables that tell how far a project is on the files that a backup leaves out."""


def restore(settings: Settings, archive: Path, clock: Clock | None = None) -> dict[str, Any]:
    """Restore an archive into an empty home; answers what is there now.

    Raises:
        InvalidInputError: the archive is no whole backup, or of a newer version.
        FailedError: it cannot be read, or the home not written.
        ConflictError: a manager runs, or there are projects or models.
        DatabaseAwayError, DiskFullError: try again then.
    """
    home = claim_home(settings)
    try:
        with _aside(settings.home) as folder:
            try:
                manifest = unpack(archive, folder)
                return _take_over(settings, manifest, folder, clock or SystemClock())
            except (Refused, tarfile.TarError, EOFError) as error:
                raise InvalidInputError(
                    f"'{archive}' is no whole backup of FLOps ({error}) - nothing was restored, use another"
                ) from error
            except OSError as error:
                if is_full(error):
                    raise disk_full(settings.home, "the restore") from error
                raise FailedError(
                    f"'{archive}' cannot be restored: {error} - nothing was changed, mend that and try again"
                ) from error
    finally:
        home.leave()


@contextmanager
def _aside(home: Path) -> Iterator[Path]:
    for left in home.glob(".restore-*"):  # of one that was killed; the home is ours
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".restore-", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_over(settings: Settings, manifest: Mapping[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    engine = open_own_database(settings)
    moved: list[Path] = []
    try:
        _check_empty(settings, engine)
        try:
            with writing(engine, patient=True) as connection:
                migrate(connection, "base")
                migrate(connection, manifest["revision"])
                _insert_all(connection, manifest, folder)
                migrate(connection, "head")
                _check_rows(connection, folder)
                counts = _settle(connection, settings, manifest["created"], clock.now())
                _move(folder / "files", settings.home, moved)
        except (sa.exc.StatementError, UnicodeError) as error:
            raise Refused(
                f"its rows do not fit together: {str(getattr(error, 'orig', error))[:200]}"
            ) from error
    except DatabaseAwayError:
        raise  # it may have committed: files without rows do no harm, rows without files do
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        engine.dispose()
    return {**counts, "created": manifest["created"], "flops": manifest.get("flops")}


def _check_empty(settings: Settings, engine: sa.Engine) -> None:
    with reading(engine) as connection:
        counts = {
            name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in (("projects", tables.projects), ("models", tables.models))
        }
    if any(counts.values()):
        raise ConflictError(
            f"{settings.home} holds {counts['projects']} projects and {counts['models']} models, a backup is "
            "restored into an empty home only - choose another FLOPS_HOME (and FLOPS_DATABASE)"
        )


def _insert_all(connection: sa.Connection, manifest: Mapping[str, Any], folder: Path) -> None:
    known = reflected(connection)
    if manifest["rows"].keys() != set(known.tables):
        raise Refused("it has other tables than its version")
    for table in known.sorted_tables:
        count = 0
        for rows in _batches(_rows(folder / "tables" / f"{table.name}.jsonl", table)):
            connection.execute(sa.insert(table), rows)
            count += len(rows)
        if count != manifest["rows"][table.name]:
            raise Refused(f"{count} rows of {table.name} are there")


def _rows(path: Path, table: sa.Table) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise Refused(f"the rows of {table.name} are missing")
    with path.open("rb") as file:
        while line := file.readline(MAX_SMALL_BYTES):
            row = parse_json(line)
            if not isinstance(row, dict) or row.keys() != set(table.columns.keys()):
                raise Refused(f"a row of {table.name} has other columns")
            for column in table.columns:
                if not _fits(column, row[column.name]):
                    raise Refused(f"{table.name}.{column.name} has a value of another type")
            yield row


def _fits(column: "sa.Column[Any]", value: Any) -> bool:
    if value is None:
        return bool(column.nullable)
    kind = column.type
    if isinstance(kind, sa.JSON):
        return True
    if isinstance(kind, sa.Boolean):
        return isinstance(value, bool)
    if isinstance(kind, sa.String):
        return isinstance(value, str) and len(value) <= (kind.length or MAX_SMALL_BYTES)
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 1 << 63):
        return False
    if isinstance(kind, sa.Float):
        return isinstance(value, int | float)
    return isinstance(kind, sa.Integer) and isinstance(value, int)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_rows(connection: sa.Connection, folder: Path) -> None:
    """What in the rows becomes a path of ours."""
    for row in connection.execute(sa.select(tables.projects.c.id)):
        try:
            project_id(row.id)
        except InvalidInputError as error:
            raise Refused(str(error)) from error
    for row in connection.execute(sa.select(tables.models)):
        if not _MODEL_NAME.fullmatch(row.name) or row.version < 1:
            raise Refused(f"'{row.name[:100]}' {row.version} is no version of a model")
        if row.folder is not None and (
            row.folder != model_place(row.name, row.version) or not (folder / "files" / row.folder).is_dir()
        ):
            raise Refused(f"the files of model {row.name} version {row.version} are missing")


def _settle(connection: sa.Connection, settings: Settings, created: float, now: float) -> dict[str, int]:
    """Make the rows true here: nothing runs, and only what was restored is there."""
    models, projects = tables.models, tables.projects
    for row in connection.execute(sa.select(models).where(models.c.folder.is_not(None))).all():
        connection.execute(
            sa.update(models)
            .where(models.c.name == row.name, models.c.version == row.version)
            .values(folder=str(settings.home / row.folder))
        )
    connection.execute(sa.update(tables.deployments).values(stopped=True))
    connection.execute(sa.update(projects).values(cleaned=True))
    unfinished = _fail_unfinished(connection, created, now)
    _forget_attempts(connection)
    _mark_finished(connection)
    return {
        "projects": _count(connection, projects),
        "models": _count(connection, models),
        "unfinished": unfinished,
    }


def _fail_unfinished(connection: sa.Connection, created: float, now: float) -> int:
    """Projects that had not ended have failed, with the event that says so; answers how many."""
    projects = tables.projects
    ended = [state.value for state in TERMINAL]
    unfinished = connection.execute(sa.select(projects).where(projects.c.state.not_in(ended))).all()
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(created))
    for row in unfinished:
        reason = f"the backup of {day}, which it was restored from, found it {row.state}"
        seq = row.last_seq + 1
        connection.execute(
            sa.update(projects)
            .where(projects.c.id == row.id)
            .values(
                state=State.FAILED.value,
                reason=f"{reason} - start it anew with 'flops retry {row.id}'",
                updated=now,
                finished=now,
                last_seq=seq,
            )
        )
        connection.execute(
            sa.insert(tables.events).values(
                project=row.id,
                seq=seq,
                time=now,
                kind=EventKind.PROJECT_STATE.value,
                data={"state": State.FAILED.value, "reason": reason},
            )
        )
    return len(unfinished)


def _forget_attempts(connection: sa.Connection) -> None:
    """Another attempt of a failed or stopped project begins at its first step."""
    projects = tables.projects
    again = projects.c.state != State.FINISHED.value
    for name in _OF_AN_ATTEMPT:
        table = metadata.tables[name]
        connection.execute(sa.delete(table).where(table.c.project.in_(sa.select(projects.c.id).where(again))))
    connection.execute(
        sa.update(projects).where(again).values(training=None, spooled_seq=projects.c.last_seq)
    )


def _mark_finished(connection: sa.Connection) -> None:
    """Finished projects keep their outcome, without checkpoints and without environments of elsewhere."""
    projects, steps = tables.projects, tables.steps
    for row in connection.execute(sa.select(projects).where(projects.c.state == State.FINISHED.value)).all():
        training = {**(row.training or {}), RESTORED: True}
        connection.execute(sa.update(projects).where(projects.c.id == row.id).values(training=training))
    for row in connection.execute(sa.select(steps).where(steps.c.name == EXPORT_ENVIRONMENT)).all():
        if not Path(str((row.result or {}).get("python"))).exists():
            connection.execute(
                sa.delete(steps).where(steps.c.project == row.project, steps.c.name == EXPORT_ENVIRONMENT)
            )


def _count(connection: sa.Connection, table: sa.Table) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def _move(source: Path, home: Path, moved: list[Path]) -> None:
    """Rename what was unpacked to its place; what lies there belongs to no row."""
    for pattern in ("projects/*", "models/*/*"):
        for folder in sorted(source.glob(pattern)):
            target = home / folder.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
            moved.append(target)


def main(arguments: list[str] | None = None) -> int:
    """Restore; prints one JSON object, of what is there or (on standard error) of what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m flops.manager.restore", description="Restore a backup.")
    parser.add_argument("--home", type=Path, help="FLOPS_HOME; default: the variable, else ~/.flops")
    parser.add_argument("archive", type=Path)
    options = parser.parse_args(arguments)
    try:
        try:
            settings = Settings.from_environment()
        except ValueError as error:
            raise InvalidInputError(str(error)) from error
        if options.home is not None:
            settings = dataclasses.replace(settings, home=options.home.expanduser().absolute())
        sys.stdout.write(json.dumps(restore(settings, options.archive)) + "\n")
    except FlopsError as error:
        sys.stderr.write(json.dumps({"code": error.code, "detail": str(error)}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
