"""Many learners in one process: own state, own data, own random numbers, own errors."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flops.guest import GuestClosed, GuestDied, GuestError, Seat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flops.guest import Guest
    from tests.guest.conftest import Body, ModelFile, Ready, Repository, Start

T = 30.0
COUNTS_ITS_FITS = "def fit_model(self):\n    self.seen.append(1)\n    return len(self.seen)"


def seated(guest: Guest, key: int, seed: int = 0) -> Seat:
    seat = guest.seat(key, seed=seed)
    seat.load(T)
    seat.load_data(T)
    return seat


def file_of(text: bytes) -> int:
    fd = os.memfd_create("data")
    os.write(fd, text)
    return fd


def test_every_seat_has_its_own_model_manager(ready: Ready, model_fd: int) -> None:
    guest = ready(COUNTS_ITS_FITS)
    first, second = seated(guest, 1), seated(guest, 2)
    fits = [first, guest, first, second, first]
    assert [seat.fit(model_fd, 1, timeout_s=T).num_examples for seat in fits] == [1, 1, 2, 1, 3]


def test_the_repository_is_imported_once(ready: Ready) -> None:
    guest = ready("import os\nos.write(1, b'imported\\n')\ndef get_model(self):\n    print('got')", log=None)
    seated(guest, 1)
    seated(guest, 2)
    assert guest._process.last_lines() == ["imported", "got", "got", "got"]


def test_every_seat_gets_its_own_data(repository: Repository, start: Start, model_fd: int) -> None:
    def dataset(text: bytes) -> Sequence[int]:
        return [file_of(text)]

    guest = start(
        repository(
            "def read(self):\n"
            "    import os\n"
            "    from flops_worker.door import entrance\n"
            "    (fd,) = entrance.request()\n"
            "    return len(os.pread(fd, 100, 0))\n"
            "def set_model_data(self):\n    self.size = self.read()\n"
            "def fit_model(self):\n    return self.size\n"
            "def evaluate_model(self):\n    return 0.0, 0.0, self.read()"
        )
    )
    seats = [guest.seat(key, dataset=lambda key=key: dataset(b"x" * key)) for key in (1, 2, 3)]  # type: ignore[misc]
    for seat in seats:
        seat.load(T)
        seat.load_data(T)
    for _ in range(2):
        assert [seat.fit(model_fd, 1, timeout_s=T).num_examples for seat in seats] == [1, 2, 3]
        assert [seat.evaluate(model_fd, 1, timeout_s=T).num_examples for seat in seats[::-1]] == [3, 2, 1]


def test_the_door_of_one_seat_opens_no_other(repository: Repository, start: Start) -> None:
    guest = start(
        repository(
            "late = False\n"
            "def __init__(self):\n"
            "    if self.late:\n"
            "        from flops_utils.ml_repo_building_blocks import load_dataset\n"
            "        load_dataset()\n"
            "def set_model_data(self):\n    type(self).late = True"
        )
    )
    first, second = guest.seat(1, dataset=list), guest.seat(2, dataset=list)
    first.load(T)
    first.load_data(T)
    with pytest.raises(GuestError, match="the constructor of ModelManager loads data"):
        second.load(T)


def test_random_numbers_are_those_of_a_process_of_its_own(
    repository: Repository, start: Start, model_fd: int, body: Body
) -> None:
    code = repository(
        "NOISE = np.random.rand(2)\n"
        "def __init__(self):\n    self.parameters = [np.random.rand(4)]\n"
        "    self.generator = np.random.default_rng(np.random.randint(1 << 30))\n"
        "def set_model_parameters(self, parameters):\n    pass\n"
        "def fit_model(self):\n"
        "    mine = self.parameters[0] + self.generator.random(4)\n"
        "    self.parameters = [mine, self.NOISE, np.random.rand(3)]\n"
        "    return 1"
    )

    def updates(seat: Seat, rounds: range) -> list[bytes]:
        return [body(seat.fit(model_fd, number, seed=number, timeout_s=T).update_fd) for number in rounds]

    alone = []
    for seed in (7, 8):
        guest = start(code, seed=seed)
        guest.load(T)
        guest.load_data(T)
        alone.append(updates(guest, range(1, 4)))
    guest = start(code, seed=123)
    seats = [guest.seat(key, seed=seed) for key, seed in enumerate((7, 8), start=1)]
    for seat in seats:
        seat.load(T)
    for seat in seats:
        seat.load_data(T)
    together: list[list[bytes]] = [[], []]
    for number in range(1, 4):
        for place in (number % 2, 1 - number % 2):
            together[place] += updates(seats[place], range(number, number + 1))
    assert together == alone


def test_an_error_of_one_learner_leaves_the_others_alone(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def configure_round(self, config):\n    self.config = config\n"
        "def fit_model(self):\n"
        "    if self.config.get('fail'):\n        raise ValueError('mine')\n"
        "    return 5"
    )
    first, second = seated(guest, 1), seated(guest, 2)
    with pytest.raises(GuestError, match="fit_model raised ValueError: mine"):
        first.fit(model_fd, 1, config={"fail": True}, timeout_s=T)
    assert second.fit(model_fd, 1, timeout_s=T).num_examples == 5
    assert first.fit(model_fd, 1, timeout_s=T).num_examples == 5


def test_updates_of_two_seats_lie_in_two_files(ready: Ready, model_file: ModelFile, body: Body) -> None:
    guest = ready()
    first, second = seated(guest, 1), seated(guest, 2)
    models = [model_file(np.full((2, 3), number, np.float32), np.zeros(3)) for number in range(2)]
    results = [seat.fit(model, 1, timeout_s=T) for seat, model in zip((first, second), models, strict=True)]
    assert [body(result.update_fd) for result in results] == [body(model) for model in models]
    first.drop_update()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(results[0].update_fd)
    assert body(first.fit(models[1], 2, timeout_s=T).update_fd) == body(models[1])


def test_a_seat_that_was_given_back_starts_anew(ready: Ready, model_fd: int) -> None:
    guest = ready(COUNTS_ITS_FITS)
    seat = seated(guest, 1)
    assert seat.fit(model_fd, 1, timeout_s=T).num_examples == 1
    seat.leave(T)
    with pytest.raises(GuestError, match="ModelManager was not constructed - load the repository first"):
        seat.fit(model_fd, 1, timeout_s=T)
    assert seated(guest, 1).fit(model_fd, 1, timeout_s=T).num_examples == 1


def test_all_seats_end_with_their_process(ready: Ready, model_fd: int) -> None:
    guest = ready("def fit_model(self):\n    import os\n    os._exit(5)")
    first, second = seated(guest, 1), seated(guest, 2)
    with pytest.raises(GuestDied):
        first.fit(model_fd, 1, timeout_s=T)
    with pytest.raises(GuestClosed):
        second.fit(model_fd, 1, timeout_s=T)
    second.leave(T)


def test_requests_of_many_threads_take_turns(ready: Ready, model_fd: int) -> None:
    guest = ready(
        "def fit_model(self):\n"
        "    import time\n"
        "    cls = type(self)\n"
        "    assert not getattr(cls, 'busy', False)\n"
        "    cls.busy = True\n    time.sleep(0.005)\n    cls.busy = False\n"
        "    self.seen.append(1)\n    return len(self.seen)"
    )
    seats = [seated(guest, key) for key in range(1, 9)]
    counts: list[list[int]] = [[] for _ in seats]

    def fit(place: int) -> None:
        counts[place] += [seats[place].fit(model_fd, 1, timeout_s=T).num_examples for _ in range(5)]

    threads = [threading.Thread(target=fit, args=(place,)) for place in range(len(seats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(T)
    assert counts == [[1, 2, 3, 4, 5]] * len(seats)
