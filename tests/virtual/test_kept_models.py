"""What many members of one process receive is kept once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flops.federation.kept_models import KeptModels, written
from flops_worker.tensors import Layout, read_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYOUT = Layout.of([np.zeros((3, 4), np.float32)])


def body(number: int) -> bytes:
    return np.full(12, number, np.float32).tobytes()


def of_body(kept: KeptModels, number: int) -> int:
    return kept.of_body(LAYOUT, memoryview(body(number)))


def of_file(kept: KeptModels, number: int) -> int:
    return kept.of_file(written(LAYOUT, body(number)))


@pytest.fixture(params=[of_body, of_file])
def keep(request: pytest.FixtureRequest) -> Iterator[Callable[[int], int]]:
    kept, opened = KeptModels(), []

    def _keep(number: int) -> int:
        fd: int = request.param(kept, number)
        opened.append(fd)
        return fd

    yield _keep
    for fd in opened:
        os.close(fd)


def content(fd: int) -> bytes:
    layout, start = read_layout(fd)
    return os.pread(fd, layout.nbytes, start)


def test_the_same_model_is_one_file_behind_many_descriptors(keep: Callable[[int], int]) -> None:
    files = [keep(1) for _ in range(5)]
    assert len(set(files)) == 5
    assert len({os.fstat(fd).st_ino for fd in files}) == 1
    assert {content(fd) for fd in files} == {body(1)}


def test_another_model_is_another_file_and_the_former_stays_what_it_was(keep: Callable[[int], int]) -> None:
    first, second, third = keep(1), keep(2), keep(1)
    assert [content(fd) for fd in (first, second, third)] == [body(1), body(2), body(1)]
    assert len({os.fstat(fd).st_ino for fd in (first, second, third)}) == 3


def test_the_same_bytes_of_another_layout_are_another_model() -> None:
    kept = KeptModels()
    other = Layout.of([np.zeros((4, 3), np.float32)])
    files = kept.of_body(LAYOUT, body(1)), kept.of_body(other, body(1))
    assert [read_layout(fd)[0] for fd in files] == [LAYOUT, other]
    for fd in files:
        os.close(fd)
