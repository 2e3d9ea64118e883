"""Environments: made once per lock, whole or not at all, by however many callers."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.errors import FailedError, FlopsError
from flops.images import Environment, Lock, ensure_environment
from flops.images.interpreters import own_interpreter

if TYPE_CHECKING:
    from tests.images.conftest import Index

Make = Callable[..., Environment]
DEADLINE_S = 60.0


def pins(*packages: str) -> Lock:
    return Lock.of(str(own_interpreter().version), packages)


def said(environment: Environment, code: str) -> str:
    """What a process of the environment prints; it may write no bytecode, as guests may not."""
    command = [str(environment.python), "-B", "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "environments"


@pytest.fixture
def make(index: "Index", root: Path, surroundings: dict[str, str]) -> Make:
    index.add("base", "1.0", files={"tests/test_base.py": "pass\n", "template.py": "{{ no python }}\n"})

    def run(lock: Lock, **options: Any) -> Environment:
        options.setdefault("configuration", index.configuration)
        return ensure_environment(lock, root, environment=surroundings, **options)

    return run


def test_environment_holds_the_locked_packages_and_nothing_else(index: "Index", make: Make) -> None:
    index.add("base", "2.0")
    made = make(pins("base==1.0"))
    assert made.created
    assert said(made, "import base; print(base.VERSION)") == "1.0"
    site = made.python.parent.parent / "lib"
    assert [path.name for path in site.rglob("*.dist-info")] == ["base-1.0.dist-info"]


def test_environment_is_made_once(make: Make, index: "Index") -> None:
    first = make(pins("base==1.0"))
    for wheel in index.folder.iterdir():
        wheel.unlink()
    again = make(pins("base==1.0"))
    assert (again.created, again.python) == (False, first.python)


def test_other_lock_gets_an_environment_of_its_own(index: "Index", make: Make) -> None:
    index.add("base", "2.0")
    one, two = make(pins("base==1.0")), make(pins("base==2.0"))
    assert said(one, "import base; print(base.VERSION)") == "1.0"
    assert said(two, "import base; print(base.VERSION)") == "2.0"


def test_modules_are_compiled_for_processes_that_may_not_write(make: Make) -> None:
    made = make(pins("base==1.0"))
    assert Path(said(made, "import base; print(base.__cached__)")).exists()


def test_compiled_modules_of_the_same_file_are_shared(index: "Index", make: Make) -> None:
    index.add("other", "1.0")
    first = make(pins("base==1.0"))
    second = make(pins("base==1.0", "other==1.0"), modules=())
    one, two = (Path(said(made, "import base; print(base.__cached__)")) for made in (first, second))
    assert one != two
    assert one.samefile(two)
    assert not Path(said(second, "import other; print(other.__cached__)")).exists()


def test_compiled_modules_of_another_version_are_not_taken_over(index: "Index", make: Make) -> None:
    index.add("base", "2.0")
    index.add("other", "1.0")
    make(pins("base==1.0", "other==1.0"))
    second = make(pins("base==2.0", "other==1.0"), modules=())
    assert said(second, "import base; print(base.VERSION)") == "2.0"
    assert not Path(said(second, "import base; print(base.__cached__)")).exists()
    assert Path(said(second, "import other; print(other.__cached__)")).exists()


def test_only_what_some_modules_import_is_compiled_on_request(index: "Index", make: Make) -> None:
    package = {
        "top/__init__.py": "from . import one\nfrom .two import (\n    x as y,\n)\n",
        "top/one.py": "import other.deep as deep, sys\n",
        "top/two.py": "x = 1\ndef later():\n    from . import unused\n",
        "top/unused.py": "",
        "top/sub/__init__.py": "from ..inner import name\n",
        "top/inner/__init__.py": "name = 1\n",
        "other/__init__.py": "",
        "other/deep.py": "",
    }
    index.add("top_level", "1.0", files=package)
    made = make(pins("top_level==1.0"), modules=("top.sub",))
    (site,) = (made.python.parent.parent / "lib").glob("python3*/site-packages")
    compiled = {str(path.parent.parent / path.name.split(".")[0]) for path in site.rglob("*.pyc")}
    assert {str(Path(path).relative_to(site)) for path in compiled} == {
        "top/__init__",
        "top/one",
        "top/two",
        "top/sub/__init__",
        "top/inner/__init__",
        "other/__init__",
        "other/deep",
    }


def test_scripts_work_after_the_environment_got_its_name(make: Make) -> None:
    made = make(pins("base==1.0"))
    assert said(made, "import sys; print(sys.prefix)") == str(made.python.parent.parent)


def test_environment_that_lost_a_package_is_made_again(make: Make) -> None:
    made = make(pins("base==1.0"))
    (info,) = made.python.parent.parent.rglob("base-1.0.dist-info")
    info.rename(info.with_name("gone"))
    again = make(pins("base==1.0"))
    assert again.created
    assert said(again, "import base; print(base.VERSION)") == "1.0"


def test_python_that_is_gone_is_named(make: Make, root: Path) -> None:
    lock = Lock.of("3.8.99", ["base==1.0"])
    with pytest.raises(FailedError) as caught:
        make(lock)
    assert str(caught.value) == (
        f"Python 3.8.99, which lock {lock.hash[:12]} was made for, is not installed "
        "on this machine any more - run the project again to resolve its requirements anew"
    )
    assert not (root / lock.hash).exists()


def test_package_that_is_gone_leaves_nothing_half_made(make: Make, root: Path) -> None:
    with pytest.raises(FlopsError, match="installing the locked packages failed: "):
        make(pins("base==1.0", "missing==1.0"))
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_cancelled_making_leaves_nothing(make: Make, root: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(FailedError, match="was stopped on request"):
        make(pins("base==1.0"), cancel=cancel)
    assert [path.suffix for path in root.iterdir()] == [".lock"]


# several processes

_CALLER = """
import json, os, signal, sys
from pathlib import Path
from flops.images import Lock, PipConfiguration, ensure_environment
wheels, root, python, die = sys.argv[1:]
def progress(message):
    if message == die:
        os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
made = ensure_environment(
    Lock.of(python, ["base==1.0"]),
    Path(root),
    configuration=PipConfiguration(find_links=(wheels,), no_index=True),
    progress=progress,
)
print(json.dumps([made.created, str(made.python)]), flush=True)
"""


def caller(
    index: "Index", root: Path, surroundings: dict[str, str], die: str = ""
) -> "subprocess.Popen[str]":
    python = str(own_interpreter().version)
    return subprocess.Popen(
        [sys.executable, "-c", _CALLER, str(index.folder), str(root), python, die],
        env=surroundings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_ask_at_the_same_time_share_one_making(
    index: "Index", make: Make, root: Path, surroundings: dict[str, str]
) -> None:
    callers = [caller(index, root, surroundings) for _ in range(4)]
    try:
        for process in callers:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        ends = []
        for process in callers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in callers:
            output, _ = process.communicate(timeout=DEADLINE_S)
            ends.append(json.loads(output))
    finally:
        for process in callers:
            process.kill()
            process.communicate()
    assert sorted(created for created, _ in ends) == [False, False, False, True]
    assert len({python for _, python in ends}) == 1
    assert not make(pins("base==1.0")).created


@pytest.mark.parametrize("moment", ["installed 1 packages", "compiling modules"])
def test_environment_whose_maker_was_killed_is_made_by_the_next(
    index: "Index", make: Make, root: Path, surroundings: dict[str, str], moment: str
) -> None:
    killed = caller(index, root, surroundings, moment)
    killed.communicate("go\n", timeout=DEADLINE_S)
    assert killed.returncode == -signal.SIGKILL
    assert not (root / pins("base==1.0").hash).exists()
    made = make(pins("base==1.0"))
    assert made.created
    assert said(made, "import base; print(base.VERSION)") == "1.0"
    assert not [path for path in root.iterdir() if "making" in path.name or "trash" in path.name]
