from flops.api.problems import STATUS, status_of
from flops.core import errors
from flops.core.errors import FlopsError
from flops.guest import GuestTimeout


def test_every_error_class_has_its_status() -> None:
    classes = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FlopsError)
    }
    assert set(STATUS) == classes


def test_a_rooms_own_error_has_the_status_of_the_class_it_is_a_kind_of() -> None:
    assert status_of(GuestTimeout(where="fit_model", timeout_s=1.0)) == 500
