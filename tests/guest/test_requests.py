"""What a guest answers when the repository keeps to its contract."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from flops.guest import EvaluateResult, Loaded
from flops_worker import models

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guest.conftest import Body, ModelFile, Ready, Repository, Start

T = 30.0


def test_initial_parameters_are_described_without_data(
    repository: Repository, start: Start, body: Body
) -> None:
    guest = start(repository())
    assert guest.load(T) == Loaded(flavor=None, python_version=platform.python_version(), contract="flops")
    layout, fd = guest.describe(T)
    try:
        assert [(tensor.dtype, tensor.shape) for tensor in layout.tensors] == [("F32", (2, 3)), ("F64", (3,))]
        assert body(fd) == np.arange(6, dtype="<f4").tobytes() + np.ones(3, dtype="<f8").tobytes()
    finally:
        os.close(fd)


def test_parameters_come_back_to_the_bit(ready: Ready, model_fd: int, body: Body) -> None:
    guest = ready()
    result = guest.fit(model_fd, 1, seed=5, config={"proximal_mu": 0.1}, timeout_s=T)
    assert body(result.update_fd) == body(model_fd)
    assert (result.num_examples, result.metrics) == (3, {})
    assert 0 <= result.fit_s < T
    assert guest.evaluate(model_fd, 1, timeout_s=T) == EvaluateResult(0.25, 0.75, 4, {})


def test_update_file_is_reused_by_every_fit(ready: Ready, model_file: ModelFile, body: Body) -> None:
    guest = ready()
    updates = []
    for number in range(3):
        model = model_file(np.full((2, 3), number, np.float32), np.full(3, number, np.float64))
        result = guest.fit(model, number, timeout_s=T)
        assert body(result.update_fd) == body(model)
        updates.append(result.update_fd)
    assert len(set(updates)) == 1


def test_update_of_another_size_is_described_as_it_is(ready: Ready, model_fd: int, body: Body) -> None:
    guest = ready(
        "def fit_model(self):\n    self.parameters = [np.zeros(self.seen.append(1) or len(self.seen))]\n"
        "    return 1"
    )
    sizes = [guest.fit(model_fd, number, timeout_s=T).layout.nbytes for number in range(3)]
    assert sizes == [8, 16, 24]


def test_arrays_are_writable_and_stay_valid_over_rounds(ready: Ready, model_file: ModelFile) -> None:
    guest = ready(
        "def fit_model(self):\n    self.parameters[0] += 100\n"
        "    self.seen.append(self.parameters[0])\n"
        "    return 1\n"
        "def evaluate_model(self):\n    return float(sum(a.sum() for a in self.seen)), 0.0, len(self.seen)"
    )
    for number in range(20):
        model = model_file(np.full(1000, number, dtype=np.float64))
        guest.fit(model, number, timeout_s=T)
        assert os.pread(model, 8, os.fstat(model).st_size - 8) == np.float64(number).tobytes(), "was changed"
    total = 1000 * (sum(range(20)) + 20 * 100)
    assert guest.evaluate(model, 20, timeout_s=T).loss == total


def test_unaligned_arrays_are_aligned_for_user_code(ready: Ready, model_file: ModelFile, body: Body) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    assert all(array.flags.aligned and array.flags.writeable for array in self.parameters)\n"
        "    return 1"
    )
    model = model_file(np.ones(3, dtype=np.int8), np.full(5, 0.1), np.ones((), dtype=np.int64))
    assert body(guest.fit(model, 1, timeout_s=T).update_fd) == body(model)


def test_a_model_of_50_mb_makes_the_round_trip(ready: Ready, model_file: ModelFile, body: Body) -> None:
    guest = ready()
    values = np.random.default_rng(0).standard_normal(50 << 17)
    model = model_file(values, np.array([True, False]), np.array([1.5], np.float16))
    for number in range(2):
        assert body(guest.fit(model, number, timeout_s=T).update_fd) == body(model)


def test_numpy_numbers_and_named_metrics_are_accepted(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def fit_model(self):\n    return np.int32(7), {'loss': np.float32(0.5)}\n"
        "def evaluate_model(self):\n    return np.float32(0.5), np.array(1), np.int64(9), {'f1': 1}"
    )
    fitted = guest.fit(model_fd, 1, timeout_s=T)
    assert (fitted.num_examples, fitted.metrics) == (7, {"loss": 0.5})
    assert guest.evaluate(model_fd, 1, timeout_s=T) == EvaluateResult(0.5, 1.0, 9, {"f1": 1.0})


def test_loss_may_be_infinite(ready: Ready, model_fd: int) -> None:
    guest = ready("def evaluate_model(self):\n    return float('inf'), float('nan'), 1")
    result = guest.evaluate(model_fd, 1, timeout_s=T)
    assert np.isinf(result.loss)
    assert np.isnan(result.accuracy)


def test_array_likes_are_parameters_too(repository: Repository, start: Start, body: Body) -> None:
    guest = start(
        repository(
            "def get_model_parameters(self):\n"
            "    class Like:\n"
            "        def __array__(self, dtype=None, copy=None):\n"
            "            return np.arange(4, dtype=np.int16)\n"
            "    return (Like(), np.float64(3), np.arange(6).reshape(2, 3).T)"
        )
    )
    guest.load(T)
    layout, fd = guest.describe(T)
    assert [(tensor.dtype, tensor.shape) for tensor in layout.tensors] == [
        ("I16", (4,)),
        ("F64", ()),
        ("I64", (3, 2)),
    ]
    assert body(fd)[16:] == np.arange(6).reshape(2, 3).T.tobytes()
    os.close(fd)


def test_random_numbers_depend_on_seed_and_round_only(ready: Ready, model_fd: int, body: Body) -> None:
    methods = (
        "def fit_model(self):\n"
        "    import random\n"
        "    self.parameters = [np.random.rand(3), np.array([random.random()])]\n"
        "    return 1"
    )
    guest = ready(methods)

    def draw(round_number: int, seed: int) -> bytes:
        return body(guest.fit(model_fd, round_number, seed=seed, timeout_s=T).update_fd)

    first = draw(1, 5)
    assert draw(1, 5) == first
    assert draw(2, 5) != first
    assert draw(1, 6) != first
    guest = ready(methods, seed=5)
    assert body(guest.fit(model_fd, 1, timeout_s=T).update_fd) == first


def test_configuration_of_the_round_reaches_its_hook(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def configure_round(self, config):\n    self.config = config\n"
        "def fit_model(self):\n    return self.config['epochs']"
    )
    assert guest.fit(model_fd, 1, config={"epochs": 4}, timeout_s=T).num_examples == 4


def test_prints_go_to_the_log_and_never_to_the_channel(ready: Ready, model_fd: int, tmp_path: Path) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import os, sys\n"
        "    print('printed', {'ok': False})\n"
        "    sys.stderr.write('written\\n')\n"
        "    os.write(1, b'raw\\n')\n"
        "    os.system('echo from a child')\n"
        "    return 1"
    )
    assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 1
    log = (tmp_path / "guest.log").read_text()
    assert log == "printed {'ok': False}\nwritten\nraw\nfrom a child\n"


def test_modules_import_each_other_from_the_root_of_the_checkout(
    repository: Repository, start: Start, model_fd: int
) -> None:
    code = repository(
        "def fit_model(self):\n"
        "    import os, models\n"
        "    assert os.getcwd() == models.HERE\n"
        "    return models.NUMBER",
        # Names that FLOps uses itself are the user's here.
        models="import os\nfrom channel import NUMBER\nHERE = os.path.dirname(__file__)",
        channel="NUMBER = 12",
        numpy="raise ImportError('a file of the repository must not hide numpy from FLOps')",
    )
    guest = start(code)
    guest.load(T)
    assert guest.fit(model_fd, 1, timeout_s=T).num_examples == 12


def test_the_checkout_stays_clean(repository: Repository, start: Start) -> None:
    code = repository("def get_model(self):\n    import other\n    return other", other="X = 1")
    start(code).load(T)
    assert sorted(path.name for path in code.iterdir()) == ["model_manager.py", "other.py"]


def test_a_request_adds_little_to_user_code(ready: Ready, model_file: ModelFile) -> None:
    guest = ready()
    model = model_file(np.zeros((10, 120)), np.zeros(10))
    times = []
    for number in range(300):
        begin = time.perf_counter()
        guest.fit(model, number, timeout_s=T)
        times.append(time.perf_counter() - begin)
    # The fastest of many tells the cost of our code; the rest is the machine's other work.
    assert min(times) < 0.001


def test_layouts_are_read_anew_when_only_their_header_changed(model_file: ModelFile) -> None:
    reader = models.LayoutReader()
    assert reader.read(model_file(np.zeros((2, 3))))[0].tensors[0].shape == (2, 3)
    assert reader.read(model_file(np.zeros((3, 2))))[0].tensors[0].shape == (3, 2)


def test_importing_the_guest_is_light() -> None:
    code = "import sys, flops.guest; print({'pydantic', 'pyarrow', 'mlflow', 'flwr'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
