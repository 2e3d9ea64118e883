"""Guests in environments of their own: old Pythons, old pins, the data as a Hugging Face dataset."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flops.guest import GuestError
from flops_worker import models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.guest.conftest import Body, Environment, Repository, Start

pytestmark = [pytest.mark.network, pytest.mark.slow]
T = 120.0
PINS = ("numpy==1.26.4", "scikit-learn==1.4.2", "datasets<4", "pillow")
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"

FEATURES = {"image": {"_type": "Image"}, "label": {"names": list("0123456789"), "_type": "ClassLabel"}}
SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """An image (H, W) of 0..255, enlarged to 28 x 28."""
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize((28, 28)).save(file, "PNG")
    return file.getvalue()


def ipc_file(images: np.ndarray[Any, Any], labels: Sequence[int]) -> int:
    """A fragment as an open Arrow IPC file."""
    rows = pa.array([{"bytes": png(image), "path": None} for image in images], SCHEMA.field("image").type)
    fd = os.memfd_create("fragment")
    with open(fd, "wb", closefd=False) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(pa.table([rows, pa.array(labels, pa.int64())], schema=SCHEMA))
    return fd


def dataset_of(*fragments: tuple[np.ndarray[Any, Any], Sequence[int]]) -> Callable[[], list[int]]:
    return lambda: [ipc_file(images, labels) for images, labels in fragments]


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_old_pythons_can_be_guests(
    environment: Environment,
    repository: Repository,
    start: Start,
    model_fd: int,
    body: Body,
    version: str,
) -> None:
    guest = start(
        repository("def evaluate_model(self):\n    raise ValueError('no')"),
        python=environment(version, "numpy"),
    )
    assert guest.load(T).python_version.startswith(version + ".")
    os.close(guest.describe(T)[1])
    guest.load_data(T)
    result = guest.fit(model_fd, 1, timeout_s=T)
    assert body(result.update_fd) == body(model_fd)
    with pytest.raises(GuestError, match=r"evaluate_model raised ValueError: no \(model_manager.py:\d+\)"):
        guest.evaluate(model_fd, 1, timeout_s=T)


def test_fragments_become_one_dataset_with_their_features(
    environment: Environment, repository: Repository, start: Start, tmp_path: Path
) -> None:
    code = repository(
        "def set_model_data(self):\n"
        "    import pyarrow, datasets\n"
        "    from flops_utils.ml_repo_building_blocks import load_dataset\n"
        "    dataset = load_dataset()\n"
        "    assert pyarrow.total_allocated_bytes() == 0, 'mapped, not copied'\n"
        "    assert isinstance(dataset, datasets.Dataset) and dataset.format['type'] == 'arrow'\n"
        "    assert dataset.features == datasets.Features(\n"
        "        image=datasets.Image(), label=datasets.ClassLabel(names=list('0123456789')))\n"
        "    assert len(dataset) == 7 and dataset[5:6].num_rows == 1\n"
        "    parts = dataset.train_test_split(test_size=2, seed=1)\n"
        "    assert len(parts['train']) == 5\n"
        "    seen = parts['test'].with_transform(lambda rows: {'l': [x + 1 for x in rows['label']]})\n"
        "    assert set(seen[:]['l']) <= set(range(1, 8))\n"
        "    dataset.set_format('numpy')\n"
        "    assert dataset['image'].shape == (7, 28, 28) and dataset['image'].dtype == np.uint8\n"
        "    assert dataset['image'].mean(axis=(1, 2)).tolist() == [0, 10, 20, 30, 40, 50, 60]\n"
        "    assert dataset['label'].tolist() == [0, 1, 2, 3, 4, 5, 6]\n"
    )
    images = np.arange(7)[:, None, None] * np.full((28, 28), 10)
    fragments = dataset_of((images[:4], range(4)), (images[:0], []), (images[4:], range(4, 7)))
    guest = start(code, python=environment("3.10", *PINS), dataset=fragments)
    guest.load(T)
    guest.load_data(T)
    assert (tmp_path / "guest.log").read_text() == ""


def test_many_fragments_become_one_dataset(
    environment: Environment, repository: Repository, start: Start
) -> None:
    code = repository(
        "def set_model_data(self):\n"
        "    from flops_utils.ml_repo_building_blocks import load_dataset\n"
        "    assert load_dataset().to_dict()['label'] == [i % 10 for i in range(150)]\n"
    )
    fragments = dataset_of(*((np.zeros((1, 8, 8)), [number % 10]) for number in range(150)))
    guest = start(code, python=environment("3.10", *PINS), dataset=fragments)
    guest.load(T)
    guest.load_data(T)


def test_fragments_with_other_columns_are_named(
    environment: Environment, repository: Repository, start: Start
) -> None:
    def fragments() -> list[int]:
        other = os.memfd_create("other")
        table = pa.table({"img": [1.0]})
        with open(other, "wb", closefd=False) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return [ipc_file(np.zeros((1, 8, 8)), [0]), other]

    code = repository(
        "def set_model_data(self):\n"
        "    from flops_utils.ml_repo_building_blocks import load_dataset\n    load_dataset()\n"
    )
    guest = start(code, python=environment("3.10", *PINS), dataset=fragments)
    guest.load(T)
    with pytest.raises(
        GuestError, match=r"set_model_data raised ValueError: the fragments have different col"
    ):
        guest.load_data(T)


def test_the_example_learns_federated_even_where_digits_are_missing(
    environment: Environment, start: Start, tmp_path: Path
) -> None:
    digits = load_digits()
    images, labels = digits.images * 255 / 16, digits.target
    guests = []
    for number in range(3):
        mine = np.flatnonzero((np.arange(len(labels)) % 3 == number) & (labels != number))
        guest = start(
            EXAMPLE,
            python=environment("3.10", *PINS),
            dataset=dataset_of((images[mine], labels[mine].tolist())),
        )
        assert guest.load(T).flavor == "sklearn"
        guest.load_data(T)
        guests.append(guest)
    layout, model = guests[0].describe(T)
    assert [tensor.shape for tensor in layout.tensors] == [(10, 784), (10,)]
    for round_number in range(1, 6):
        updates = [guest.fit(model, round_number, timeout_s=T) for guest in guests]
        total = sum(update.num_examples for update in updates)
        average = [np.zeros(tensor.shape) for tensor in layout.tensors]
        for update in updates:
            for mean, array in zip(average, models.ModelMapper().map(update.update_fd)[1], strict=True):
                mean += array * (update.num_examples / total)
        os.close(model)
        model = os.memfd_create("model")
        models.write(model, average)
    results = [guest.evaluate(model, 5, timeout_s=T) for guest in guests]
    os.close(model)
    assert min(result.accuracy for result in results) >= 0.85
    assert max(result.loss for result in results) < 0.6
    assert (tmp_path / "guest.log").read_text() == ""
