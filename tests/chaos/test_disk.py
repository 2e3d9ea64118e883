"""Full disks and slow ones: nothing corrupt is committed, and the training goes on to the same bits."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import MountDisk, Require, submit
from tests.chaos.home import Home
from tests.chaos.outcome import Outcome, outcome, problems

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

FULL_S = 12.0
"""How long the disk stays full: longer than services that end without space rest for the first time."""


def fill(folder: Path) -> Path:
    """Take all space that is left."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass
    return ballast


def wait_for_round(home: Home, project: str, number: int, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(event["round"] >= number for event in home.events(project, "round.finished")):
        assert not home.over(project), home.state(project)
        assert time.monotonic() < deadline, home.state(project)
        time.sleep(0.05)


def test_a_training_waits_for_space_on_the_disk_of_its_state(
    tmp_path: Path, mount_disk: MountDisk, repository: Path, environments: Path, undisturbed: Outcome
) -> None:
    home = Home(tmp_path / "home")
    projects = mount_disk(home.settings.projects_dir, "6m")
    home.settings.environments_dir.symlink_to(environments)
    try:
        project = submit(home, repository)
        wait_for_round(home, project, 3)
        ballast = fill(projects)
        time.sleep(FULL_S)
        before = len(home.events(project, "round.finished"))
        time.sleep(1.0)
        assert len(home.events(project, "round.finished")) == before < len(undisturbed.rounds)
        assert home.state(project)[0] == "training"
        (told, *_) = [event["message"] for event in home.events(project, "warning")]
        assert f"no space is left in {home.project_folder(project) / 'state'} - free some there" in told
        ballast.unlink()
        assert home.wait(project, 240) == "finished", home.state(project)
        assert undisturbed.differences(outcome(home, project)) == []
        assert problems(home, project) == []
    finally:
        home.end()


def test_everything_goes_on_after_the_disk_of_the_whole_home_was_full(
    tmp_path: Path, mount_disk: MountDisk, repository: Path, environments: Path, undisturbed: Outcome
) -> None:
    """The manager's database, its spool, the tracking store and the logs are on it as well."""
    home = Home(tmp_path / "home")
    disk = mount_disk(home.settings.home, "320m")  # the data server keeps 256 MiB free
    home.settings.environments_dir.symlink_to(environments)
    try:
        project = submit(home, repository)
        wait_for_round(home, project, 3)
        ballast = fill(disk)
        time.sleep(FULL_S)
        assert home.state(project)[0] == "training"
        ballast.unlink()
        assert home.wait(project, 240) == "finished", home.state(project)
        assert undisturbed.differences(outcome(home, project)) == []
        assert problems(home, project) == []
    finally:
        home.end()


SLOW = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* Delays what changes files below SLOW_FOLDER by SLOW_MS milliseconds. */

static int below(const char *path) {
    const char *folder = getenv("SLOW_FOLDER");
    return folder && !strncmp(path, folder, strlen(folder));
}
static void rest(void) {
    const char *text = getenv("SLOW_MS");
    long ms = text ? atol(text) : 0;
    struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
    nanosleep(&pause, NULL);
}
static void rest_for(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        if (below(path)) rest();
    }
}
#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t); rest_for(fd); return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t); rest_for(fd); return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off_t); rest_for(fd); return real(fd, data, size, at);
}
int fsync(int fd) { REAL(int, fsync, int); rest_for(fd); return real(fd); }
int fdatasync(int fd) { REAL(int, fdatasync, int); rest_for(fd); return real(fd); }
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *); if (below(to)) rest(); return real(from, to);
}
"""


@pytest.fixture(scope="session")
def slow_library(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.c").write_text(SLOW)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", "slow.so", "slow.c", "-ldl"]
    made: Any = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    require(made.returncode == 0, f"a C compiler ({made.stderr[-300:]})")
    return folder / "slow.so"


def test_a_slow_disk_changes_nothing_but_the_time(
    tmp_path: Path, slow_library: Path, repository: Path, environments: Path, undisturbed: Outcome
) -> None:
    """Every write, fsync and rename of every process takes 20 ms more."""
    home = Home(
        tmp_path / "home",
        {"LD_PRELOAD": str(slow_library), "SLOW_FOLDER": str(tmp_path / "home"), "SLOW_MS": "20"},
    )
    home.settings.home.mkdir()
    home.settings.environments_dir.symlink_to(environments)
    try:
        project = submit(home, repository)
        assert home.wait(project, 400) == "finished", home.state(project)
        assert undisturbed.differences(outcome(home, project)) == []
        assert problems(home, project) == []
    finally:
        home.end()
