"""The one run of user code before anything is deployed; this Python is the user's."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flops.core.errors import InvalidInputError
from flops.guest import GuestDied, GuestError, Room
from flops.repo import check
from flops_worker import models

if TYPE_CHECKING:
    from tests.repo.conftest import MakeCheckout

MODULE = "model_manager.py"
TIMEOUT_S = 60.0


def with_constructor(code: Path, body: str) -> Path:
    """Replace the line in which the ModelManager makes its parameters."""
    path = code / MODULE
    text, count = re.subn(r"self\.parameters = \[.*\]", body, path.read_text())
    assert count == 1
    path.write_text(text)
    return code


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "project" / "initial.safetensors"


def test_initial_parameters_are_written(checkout: "MakeCheckout", destination: Path) -> None:
    model = check(Room(Path(sys.executable), checkout()), destination, TIMEOUT_S)
    assert model.path == destination
    assert [tensor.shape for tensor in model.layout.tensors] == [(2, 3)]
    with destination.open("rb") as file:
        _, (array,) = models.ModelMapper().map(file.fileno())
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert [path.name for path in destination.parent.iterdir()] == [destination.name]


def test_constructor_that_touches_data_is_told_where_to_load_them(
    checkout: "MakeCheckout", destination: Path
) -> None:
    body = "from flops_utils.ml_repo_building_blocks import load_dataset; load_dataset()"
    with pytest.raises(GuestError) as caught:
        check(Room(Path(sys.executable), with_constructor(checkout(), body)), destination, TIMEOUT_S)
    assert str(caught.value) == (
        "the constructor of ModelManager loads data - move the loading to set_model_data(),"
        " which runs on learners only"
    )
    assert not destination.exists()


def test_model_without_parameters_is_refused(checkout: "MakeCheckout", destination: Path) -> None:
    code = with_constructor(checkout(), "self.parameters = [np.zeros((0, 3))]")
    with pytest.raises(InvalidInputError) as caught:
        check(Room(Path(sys.executable), code), destination, TIMEOUT_S)
    assert str(caught.value) == (
        "get_model_parameters of the repository returned no numbers - "
        "it must return the model's arrays already before training"
    )
    assert not destination.exists()


def test_code_that_ends_its_process_is_named(checkout: "MakeCheckout", destination: Path) -> None:
    code = with_constructor(checkout(), "import os; os._exit(7)")
    with pytest.raises(GuestDied, match="ended with exit code 7"):
        check(Room(Path(sys.executable), code), destination, TIMEOUT_S)
    assert not destination.exists()
