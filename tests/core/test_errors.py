import inspect

from flops.core import errors


def test_every_error_has_its_own_stable_code() -> None:
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.FlopsError)
    ]
    codes = {kind.code for kind in kinds}
    assert len(codes) == len(kinds)
    assert codes == {
        "error",
        "invalid-input",
        "not-found",
        "conflict",
        "unauthorized",
        "forbidden",
        "too-many-requests",
        "unavailable",
        "failed",
    }


def test_an_error_reads_as_its_message() -> None:
    assert str(errors.NotFoundError("no project p-7k2mqd - see 'flops ls'")) == (
        "no project p-7k2mqd - see 'flops ls'"
    )
