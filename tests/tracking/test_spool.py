import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from flops.core.errors import FailedError, InvalidInputError, UnavailableError
from flops.core.ids import ProjectId
from flops.tracking import RoundMetrics, RunEnded, Spool
from flops.tracking.spool import MAX_LINE_BYTES

PROJECT = ProjectId("p-aaaa")


def metrics(step: int) -> RoundMetrics:
    return RoundMetrics(time=float(step), step=step, metrics={"loss": 1.0 / (step + 1)})


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def steps(spool: Spool, offset: int = 0) -> list[int]:
    found = [entry.record for entry in spool.read(PROJECT, offset)]
    assert all(isinstance(record, RoundMetrics) for record in found)
    return [record.step for record in found if isinstance(record, RoundMetrics)]


def test_records_are_read_back_in_order_from_any_record_on(spool: Spool) -> None:
    ends = [spool.append(PROJECT, metrics(0)), spool.append(PROJECT, metrics(1), metrics(2))]
    assert steps(spool) == [0, 1, 2]
    assert steps(spool, ends[0]) == [1, 2]
    assert ends[1] == spool.size_bytes(PROJECT) == list(spool.read(PROJECT))[-1].end


def test_projects_are_apart_and_files_are_for_their_owner_only(spool: Spool) -> None:
    other = ProjectId("p-bbbb")
    spool.append(PROJECT, metrics(0))
    spool.append(other, RunEnded(time=1.0, status="FINISHED"))
    assert spool.projects() == [PROJECT, other]
    assert [entry.record for entry in spool.read(other)] == [RunEnded(time=1.0, status="FINISHED")]
    assert spool.directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in spool.directory.iterdir())
    spool.remove(PROJECT)
    assert spool.projects() == [other]


def test_a_project_name_cannot_leave_the_spool(spool: Spool) -> None:
    with pytest.raises(InvalidInputError, match="is not a project id"):
        spool.append(ProjectId("../p-aaaa"), metrics(0))


def test_a_torn_last_line_is_not_read_and_gone_after_the_next_append(spool: Spool) -> None:
    end = spool.append(PROJECT, metrics(0))
    with (spool.directory / "p-aaaa.jsonl").open("ab") as file:
        file.write(b'{"time":1.0,"step":1,"met')
    assert steps(spool) == [0]
    spool.append(PROJECT, metrics(2))
    assert steps(spool) == [0, 2]
    assert steps(spool, end) == [2]


def test_a_damaged_line_is_reported_and_its_neighbours_are_read(spool: Spool) -> None:
    spool.append(PROJECT, metrics(0))
    with (spool.directory / "p-aaaa.jsonl").open("ab") as file:
        file.write(b"\xff\xfe not JSON\n" + b"x" * (2 * MAX_LINE_BYTES + 5) + b"\n")
    end = spool.append(PROJECT, metrics(3))
    entries = list(spool.read(PROJECT))
    assert [entry.record is None for entry in entries] == [False, True, True, False]
    assert "a line is no tracking record" in entries[1].problem
    assert [entry.offset for entry in entries[1:]] == [entry.end for entry in entries[:-1]]
    assert entries[-1].end == end


def test_an_endless_torn_line_is_ended_instead_of_cut(spool: Spool) -> None:
    spool.append(PROJECT, metrics(0))
    with (spool.directory / "p-aaaa.jsonl").open("ab") as file:
        file.write(b"x" * (MAX_LINE_BYTES + 5))
    spool.append(PROJECT, metrics(1))
    assert [entry.record for entry in spool.read(PROJECT)] == [metrics(0), None, metrics(1)]


def test_a_record_over_the_limit_is_refused(spool: Spool) -> None:
    huge = RunEnded(time=1.0, status="FAILED", reason="x" * MAX_LINE_BYTES)
    with pytest.raises(InvalidInputError, match="'end' record of project p-aaaa has 1048"):
        spool.append(PROJECT, huge)
    assert spool.projects() == []


@contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """No file may grow over the size; Python ignores the signal, so writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_leaves_complete_lines_only(spool: Spool) -> None:
    end = spool.append(PROJECT, metrics(0))
    with full_disk(end + 10), pytest.raises(UnavailableError) as caught:
        spool.append(PROJECT, metrics(1))
    assert str(caught.value).startswith("tracking records of project p-aaaa cannot be written to")
    assert str(caught.value).endswith("free space there, then try again")
    assert spool.size_bytes(PROJECT) == end
    spool.append(PROJECT, metrics(1))
    assert steps(spool) == [0, 1]


def test_many_writers_never_mix_their_lines(spool: Spool) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: spool.append(PROJECT, metrics(step)), range(200)))
    assert sorted(steps(spool)) == list(range(200))


def test_what_append_promised_is_there_after_kill_9(spool: Spool) -> None:
    code = (
        "import sys, pathlib; from flops.tracking import Spool, RoundMetrics\n"
        "spool = Spool(pathlib.Path(sys.argv[1]))\n"
        "for step in range(100_000):\n"
        "    spool.append('p-aaaa', RoundMetrics(time=1.0, step=step, metrics={'x' * 3000: 1.0}))\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(spool.directory)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(50):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    promised = 49 + len(writer.stdout.read().split())
    writer.stdout.close()
    writer.wait()
    found = steps(spool)
    assert found == list(range(len(found)))
    assert len(found) > promised


def test_a_result_that_cannot_be_read_says_what_to_do(spool: Spool) -> None:
    assert spool.result(PROJECT) is None
    spool.result_file(PROJECT).write_text("{")
    with pytest.raises(FailedError, match="delete it, the recorder makes it again"):
        spool.result(PROJECT)


def test_the_room_is_light_to_import() -> None:
    code = "import flops.tracking, json, sys; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"mlflow", "numpy", "pandas", "pyarrow", "sqlalchemy"} & set(json.loads(ran.stdout))
