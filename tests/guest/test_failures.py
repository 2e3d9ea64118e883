"""Whatever user code does, the caller gets an error that says where, what and why, and lives on."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from flops.core.errors import NotFoundError, UnavailableError
from flops.guest import GuestClosed, GuestDied, GuestError, GuestTimeout

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guest.conftest import Ready, Repository, Start

T = 30.0


def test_an_exception_is_reported_and_the_guest_lives_on(ready: Ready, model_fd: int, tmp_path: Path) -> None:
    guest = ready(
        "def fit_model(self):\n    return self.deeper()\ndef deeper(self):\n    raise ValueError('too cold')"
    )
    for _ in range(2):
        with pytest.raises(GuestError) as caught:
            guest.fit(model_fd, 1, timeout_s=T)
        error = caught.value
        assert str(error).startswith("fit_model raised ValueError: too cold (model_manager.py:")
        assert str(error).endswith(") - mend the repository's code")
        assert (error.where, error.type, error.message) == ("fit_model", "ValueError", "too cold")
        assert error.traceback[-1] == "ValueError: too cold"
        assert "in deeper" in "".join(error.traceback)
        assert "flops_worker" not in "".join(error.traceback)
    assert guest.evaluate(model_fd, 1, timeout_s=T).num_examples == 4
    assert (tmp_path / "guest.log").read_text().count("ValueError: too cold") == 2


def test_tracebacks_are_cut_to_their_last_lines(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    raise RuntimeError('x\\n' * 500)")
    with pytest.raises(GuestError) as caught:
        guest.fit(model_fd, 1, timeout_s=T)
    assert len(caught.value.traceback) == 20
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("statement", "kind", "message"),
    [
        ("import sys; sys.exit(3)", "SystemExit", r"the code called sys.exit\(3\)"),
        ("exit()", "SystemExit", r"the code called sys.exit\(\)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
        ("self.fit_model()", "RecursionError", "maximum recursion depth exceeded"),
        ("[0] * (1 << 60)", "MemoryError", ""),
    ],
)
def test_nothing_that_can_be_raised_ends_the_guest(
    ready: Ready, model_fd: int, statement: str, kind: str, message: str
) -> None:
    guest = ready(f"def fit_model(self):\n    {statement}\n    return 1")
    with pytest.raises(GuestError, match=f"fit_model raised {kind}: {message}") as caught:
        guest.fit(model_fd, 1, timeout_s=T)
    assert not isinstance(caught.value, GuestDied)
    assert guest.evaluate(model_fd, 1, timeout_s=T).num_examples == 4


def test_an_error_without_a_text_is_an_error(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    class Odd(Exception):\n        def __str__(self):\n            raise ValueError\n"
        "    raise Odd"
    )
    with pytest.raises(GuestError, match=r"fit_model raised Odd: \(its text cannot be made: ValueError\)"):
        guest.fit(model_fd, 1, timeout_s=T)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "def broken(:\n",
            r"model_manager.py raised SyntaxError: .* \(model_manager.py:1\) - mend the repository's code",
        ),
        (
            "import not_there\n",
            r"model_manager.py raised ModuleNotFoundError: No module named 'not_there' \(model_manager.py:1\)"
            " - add the package to conda.yaml or requirements.txt",
        ),
        ("import sys\nsys.exit('no')", "model_manager.py raised SystemExit: the code called sys.exit"),
        (
            "X = 1\n",
            "model_manager.py has no class ModelManager - define it there, a child of"
            " flops_utils.ml_repo_templates.ModelManagerTemplate",
        ),
        (
            "class ModelManager:\n    def fit_model(self): pass\n    def get_model(self): pass\n",
            "ModelManager lacks set_model_data, get_model_parameters, set_model_parameters, evaluate_model"
            " - add what is missing",
        ),
        (
            "from flops_utils.ml_repo_templates import ModelManagerTemplate\n"
            "class ModelManager(ModelManagerTemplate): pass\n",
            r"ModelManager\(\) raised TypeError: Can't instantiate abstract class ModelManager",
        ),
    ],
)
def test_a_broken_repository_is_named(repository: Repository, start: Start, module: str, text: str) -> None:
    guest = start(repository(module=module))
    with pytest.raises(GuestError, match=text):
        guest.load(T)


def test_a_missing_model_manager_is_named(repository: Repository, start: Start) -> None:
    code = repository()
    (code / "model_manager.py").unlink()
    with pytest.raises(GuestError) as caught:
        start(code).load(T)
    assert str(caught.value) == (
        "model_manager.py is missing at the root of the repository - add it, with a class ModelManager"
    )


def test_a_constructor_that_raises_is_named(repository: Repository, start: Start) -> None:
    guest = start(repository("def __init__(self):\n    1 / 0"))
    with pytest.raises(GuestError, match=r"ModelManager\(\) raised ZeroDivisionError: division by zero"):
        guest.load(T)


LOADING = "\n    from flops_utils.ml_repo_building_blocks import load_dataset\n    "


@pytest.mark.parametrize(
    "statement",
    [
        "load_dataset()",
        "try: load_dataset()\n    except Exception: self.parameters = [np.zeros(1)]",
        "try: load_dataset()\n    except Exception: raise RuntimeError('no data')",
    ],
)
def test_a_constructor_that_loads_data_is_refused(
    repository: Repository, start: Start, statement: str
) -> None:
    guest = start(repository(f"def __init__(self):{LOADING}{statement}"), dataset=list)
    with pytest.raises(GuestError) as caught:
        guest.load(T)
    assert str(caught.value) == (
        "the constructor of ModelManager loads data - move the loading to set_model_data(),"
        " which runs on learners only"
    )
    assert caught.value.where == "ModelManager()"


def test_parameters_that_need_data_are_refused(repository: Repository, start: Start) -> None:
    guest = start(repository(f"def get_model_parameters(self):{LOADING}load_dataset()"))
    guest.load(T)
    with pytest.raises(GuestError, match=r"^get_model_parameters loads data - move the loading to set_model"):
        guest.describe(T)


def test_loading_data_while_importing_is_refused(repository: Repository, start: Start) -> None:
    module = "from flops_utils.ml_repo_building_blocks import load_dataset\nDATA = load_dataset()\n"
    with pytest.raises(
        GuestError, match=r"^importing model_manager.py loads data - move the loading to set_"
    ):
        start(repository(module=module)).load(T)


def test_an_agent_without_data_is_heard(repository: Repository, start: Start) -> None:
    def away() -> list[int]:
        raise UnavailableError("the data server is away - try again")

    code = repository(f"def set_model_data(self):{LOADING}load_dataset()")
    guest = start(code, dataset=away)
    guest.load(T)
    with pytest.raises(UnavailableError, match="the data server is away"):
        guest.load_data(T)
    guest = start(code)
    guest.load(T)
    with pytest.raises(LookupError, match="no data were given to this guest"):
        guest.load_data(T)
    guest = start(code, dataset=list)
    guest.load(T)
    with pytest.raises(
        GuestError, match="set_model_data raised LookupError: no local data match the project's"
    ):
        guest.load_data(T)


def test_a_process_that_exits_is_dead(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    import os\n    print('last words')\n    os._exit(7)")
    with pytest.raises(GuestDied) as caught:
        guest.fit(model_fd, 1, timeout_s=T)
    error = caught.value
    assert (error.exit_code, error.signal, error.where) == (7, None, "fit_model")
    assert error.log[-1] == "last words"
    assert str(error) == (
        "the process of the repository's code ended with exit code 7 during fit_model"
        " - see the log and mend the code; its last log line: last words"
    )
    with pytest.raises(GuestError):
        guest.evaluate(model_fd, 1, timeout_s=T)


def test_a_segmentation_fault_is_named(ready: Ready, model_fd: int) -> None:
    guest = ready("def evaluate_model(self):\n    import ctypes\n    ctypes.string_at(0)")
    with pytest.raises(GuestDied, match="ended by SIGSEGV during evaluate_model") as caught:
        guest.evaluate(model_fd, 1, timeout_s=T)
    assert caught.value.signal == "SIGSEGV"
    assert any("Segmentation fault" in line for line in caught.value.log)


def test_a_fork_that_returns_does_not_answer_twice(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    import os\n    return 5 if os.fork() else 6")
    assert [guest.fit(model_fd, number, timeout_s=T).num_examples for number in range(3)] == [5, 5, 5]


def test_too_little_memory_is_an_error_of_user_code(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    return len(np.ones(400 << 17))", memory_mb=300)
    with pytest.raises(GuestError, match=r"fit_model raised .*MemoryError"):
        guest.fit(model_fd, 1, timeout_s=T)
    assert guest.evaluate(model_fd, 1, timeout_s=T).num_examples == 4


def test_a_step_that_hangs_is_ended(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    import threading\n    threading.Event().wait()")
    begin = time.monotonic()
    with pytest.raises(GuestTimeout) as caught:
        guest.fit(model_fd, 1, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert str(caught.value) == (
        "fit_model of the repository gave no answer within 0.3 s - speed it up or allow more"
    )


def test_closing_from_another_thread_ends_a_request(ready: Ready, model_fd: int, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    guest = ready(f"def fit_model(self):\n    open({str(inside)!r}, 'w').close()\n    while True: pass")

    def close() -> None:
        deadline = time.monotonic() + T
        while not inside.exists() and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        guest.close(grace_s=0.2)

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(GuestClosed):
        guest.fit(model_fd, 1)
    closer.join(T)
    with pytest.raises(GuestClosed):
        guest.evaluate(model_fd, 1)
    guest.close()


def test_closing_waits_for_what_user_code_does_at_its_end(
    repository: Repository, start: Start, tmp_path: Path
) -> None:
    code = repository("", module=None)
    with (code / "model_manager.py").open("a") as file:
        file.write("\nimport atexit\natexit.register(print, 'tidied up')\n")
    guest = start(code)
    guest.load(T)
    guest.close(grace_s=T)
    assert (tmp_path / "guest.log").read_text() == "tidied up\n"


def test_a_room_that_is_not_there_is_named(repository: Repository, start: Start, tmp_path: Path) -> None:
    with pytest.raises(
        NotFoundError, match=r"interpreter .*/nowhere cannot be run - make the environment again"
    ):
        start(repository(), python=tmp_path / "nowhere")
    with pytest.raises(
        NotFoundError, match=r"checkout .*/nowhere is not a folder - fetch the repository again"
    ):
        start(tmp_path / "nowhere")


def test_an_interpreter_that_cannot_start_is_dead(
    repository: Repository, start: Start, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such thing\nexit 5\n")
    python.chmod(0o700)
    with pytest.raises(GuestDied, match=r"exit code 5 during model_manager.py .*: no such thing"):
        start(repository(), python=python).load(T)
