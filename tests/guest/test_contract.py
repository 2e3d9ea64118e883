"""What the methods of a ModelManager return is checked, and what is wrong is said exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flops.guest import GuestError

if TYPE_CHECKING:
    from tests.guest.conftest import Ready, Repository, Start

T = 30.0


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ("None", "None"),
        ("0", "0"),
        ("-1", "-1"),
        ("True", "True"),
        ("12.0", "12.0"),
        ("'12'", "a value of type str"),
        ("np.ones(2)", "ndarray of shape (2,)"),
        ("(1, 2)", "a tuple of 2"),
        ("float('nan')", "nan"),
    ],
)
def test_fit_model_returns_a_number_of_examples(
    ready: Ready, model_fd: int, value: str, described: str
) -> None:
    guest = ready(f"def fit_model(self):\n    return {value}")
    with pytest.raises(GuestError) as caught:
        guest.fit(model_fd, 1, timeout_s=T)
    assert str(caught.value) == (
        f"fit_model returned {described} instead of the number of training examples (an int above 0)"
    )
    assert (caught.value.where, caught.value.type) == ("fit_model", "ContractError")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("None", "evaluate_model returned None - return (loss, accuracy, number of examples)"),
        ("(1.0, 2.0)", "evaluate_model returned a tuple of 2 - return (loss, accuracy, number of examples)"),
        ("('low', 1.0, 3)", "evaluate_model returned a value of type str as loss - return a number"),
        ("(0.1, None, 3)", "evaluate_model returned None as accuracy - return a number"),
        ("(0.1, True, 3)", "evaluate_model returned True as accuracy - return a number"),
        ("(0.1, 1j, 3)", "evaluate_model returned a value of type complex as accuracy - return a number"),
        ("(np.ones(3), 1, 3)", "evaluate_model returned ndarray of shape (3,) as loss - return a number"),
        (
            "(0.1, 0.2, 0)",
            "evaluate_model returned 0 as its third value - return the number of examples, an int above 0",
        ),
        (
            "(0.1, 0.2, 3, {'a': 'b'})",
            "evaluate_model returned a value of type str as metric 'a' - return a number",
        ),
    ],
)
def test_evaluate_model_returns_three_numbers(ready: Ready, model_fd: int, value: str, text: str) -> None:
    guest = ready(f"def evaluate_model(self):\n    return {value}")
    with pytest.raises(GuestError) as caught:
        guest.evaluate(model_fd, 1, timeout_s=T)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("None", "get_model_parameters returned None - return a list of numpy arrays"),
        (
            "{'a': np.ones(1)}",
            "get_model_parameters returned a value of type dict - return a list of numpy arrays",
        ),
        (
            "np.ones((2, 2))",
            "get_model_parameters returned ndarray of shape (2, 2) - return a list of numpy arrays,"
            " such as [array]",
        ),
        ("[]", "get_model_parameters returned an empty list - return at least one numpy array"),
        (
            "[np.ones(1), [1, 2]]",
            "get_model_parameters returned a list of 2 at position 1 -"
            " make it a numpy array, such as numpy.asarray(it)",
        ),
        (
            "[np.array(['a'])]",
            "get_model_parameters returned an array of dtype <U1 at position 0 -"
            " parameters must be numbers of at most 64 bits",
        ),
        (
            "[np.ones(2, dtype=object)]",
            "get_model_parameters returned an array of dtype object at position 0 -"
            " parameters must be numbers of at most 64 bits",
        ),
        (
            "[np.ones(2, dtype=np.complex128)]",
            "get_model_parameters returned an array of dtype complex128 at position 0 -"
            " parameters must be numbers of at most 64 bits",
        ),
    ],
)
def test_parameters_are_a_list_of_arrays(repository: Repository, start: Start, value: str, text: str) -> None:
    guest = start(repository(f"def get_model_parameters(self):\n    return {value}"))
    guest.load(T)
    with pytest.raises(GuestError) as caught:
        guest.describe(T)
    assert str(caught.value) == text


def test_a_tensor_that_will_not_become_an_array_is_named(repository: Repository, start: Start) -> None:
    guest = start(
        repository(
            "def get_model_parameters(self):\n"
            "    class Tensor:\n"
            "        def __array__(self, *_, **__): raise TypeError('got unsupported ScalarType BFloat16')\n"
            "    return [np.ones(1), Tensor()]"
        )
    )
    guest.load(T)
    with pytest.raises(GuestError) as caught:
        guest.describe(T)
    assert str(caught.value) == (
        "get_model_parameters returned a value of type Tensor at position 1, which cannot become a numpy"
        " array (got unsupported ScalarType BFloat16) - return plain arrays, such as"
        " tensor.detach().cpu().numpy()"
    )


def test_parameters_must_be_taken_back_as_they_were_given(repository: Repository, start: Start) -> None:
    guest = start(
        repository("def set_model_parameters(self, parameters):\n    self.parameters = [parameters[0].T]")
    )
    guest.load(T)
    with pytest.raises(GuestError) as caught:
        guest.describe(T)
    assert str(caught.value) == (
        "get_model_parameters returned 1 arrays instead of 2 after set_model_parameters was given its own"
        " parameters - both must use the same arrays in the same order"
    )


def test_refused_parameters_are_named(ready: Ready, model_fd: int) -> None:
    guest = ready("def set_model_parameters(self, parameters):\n    raise ValueError('wrong shapes')")
    with pytest.raises(GuestError, match="set_model_parameters raised ValueError: wrong shapes"):
        guest.fit(model_fd, 1, timeout_s=T)


@pytest.mark.parametrize(
    ("model", "flavor"),
    [
        ("import sklearn.linear_model as m; model = m.LogisticRegression()", "sklearn"),
        (
            "import sklearn.pipeline as m; model = m.make_pipeline('passthrough')",
            "sklearn",
        ),
        (
            "model = type('Net', (type('Module', (), {'__module__': 'torch.nn.modules.module'}),), {})()",
            "pytorch",
        ),
        ("model = type('Model', (), {'__module__': 'keras.src.models.model'})()", "keras"),
        ("model = type('Model', (), {'__module__': 'tensorflow.python.x'})()", "tensorflow"),
        (
            "import sklearn.base as b\n"
            "    model = type('XGB', (b.BaseEstimator,), {'__module__': 'xgboost.sklearn'})()",
            "xgboost",
        ),
        ("model = {}", None),
    ],
)
def test_the_flavor_is_seen_from_the_model(
    repository: Repository, start: Start, model: str, flavor: str | None
) -> None:
    guest = start(repository(f"def get_model(self):\n    {model}\n    return model"))
    assert guest.load(T).flavor == flavor
