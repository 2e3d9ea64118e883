"""conda's lines in the words of pip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from flops.core.errors import InvalidInputError
from flops.repo.conda import translate


@pytest.mark.parametrize(
    ("line", "requirement"),
    [
        ("numpy", "numpy"),
        ("numpy=1.26", "numpy==1.26.*"),
        ("numpy=1.26.*", "numpy==1.26.*"),
        ("numpy=1.26.4", "numpy==1.26.4.*"),
        ("numpy==1.26.4", "numpy==1.26.4"),
        ("numpy 1.26.4", "numpy==1.26.4"),
        ("numpy=1.26.4=py311h64a7726_0", "numpy==1.26.4.*"),
        ("numpy 1.26.4 py311h64a7726_0", "numpy==1.26.4"),
        ("numpy >=1.26, <2", "numpy<2,>=1.26"),
        ("numpy[version='>=1.26,<2', build=*mkl]", "numpy<2,>=1.26"),
        ("conda-forge::scikit-learn=1.4", "scikit-learn==1.4.*"),
        ("conda-forge/linux-64::scikit-learn", "scikit-learn"),
        ("https://conda.anaconda.org/conda-forge::scikit-learn", "scikit-learn"),
        ("pytz=2023.3.post1", "pytz==2023.3.post1"),
        ("pytorch=2.1.0=*cpu*", "torch==2.1.0.*"),
        ("pytorch==2.1.0+cpu", "torch==2.1.0+cpu"),
        ("matplotlib-base", "matplotlib"),
        ("scipy~=1.11", "scipy~=1.11"),
        ("scipy!=1.11.*", "scipy!=1.11.*"),
    ],
)
def test_line_is_translated(line: str, requirement: str) -> None:
    assert translate(line).requirement == requirement


@pytest.mark.parametrize("name", ["openssl=1.1.1w", "libgcc-ng", "_openmp_mutex=5.1", "tzdata=2024a"])
def test_what_is_no_python_package_asks_for_nothing(name: str) -> None:
    assert translate(name).requirement is None


@pytest.mark.parametrize(
    ("line", "python"),
    [("python=3.10.14", "==3.10.14.*"), ("python==3.10", "==3.10.*"), ("python>=3.9,<3.12", "<3.12,>=3.9")],
)
def test_python_is_a_wish_of_its_own(line: str, python: str) -> None:
    translated = translate(line)
    assert (translated.requirement, translated.python) == (None, python)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("numpy=newest", "'newest' is no version"),
        ("numpy >=1.26 <2", "a comma is missing between its versions"),
        ("=1.26", "it starts with no name"),
        ("numpy;x", "';' follows the name"),
    ],
)
def test_line_that_cannot_be_used_is_named(line: str, why: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        translate(line, "conda.yml")
    assert str(caught.value) == (
        f"conda.yml: the dependency '{line}' cannot be used: {why} - write it like 'numpy=1.26.4'"
    )


NAMES = st.from_regex(r"[a-z][a-z0-9]{1,8}([-_.][a-z0-9]{1,6})?", fullmatch=True).filter(
    lambda name: name != "python"
)
VERSIONS = st.lists(st.integers(0, 2999), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
FULL = st.lists(st.integers(0, 2999), min_size=3, max_size=3).map(lambda parts: ".".join(map(str, parts)))
BUILDS = st.sampled_from(["", " py311_0", " h6a678d5_1"])
OPERATORS = st.sampled_from(["", " ", "=", "==", ">=", "<=", "<", ">", "!=", "~=", " >= "])
CHANNELS = st.sampled_from(["", "conda-forge::", "pytorch/linux-64::"])


@given(CHANNELS, NAMES, OPERATORS, VERSIONS, st.sampled_from(["", ".*"]), BUILDS)
def test_every_line_of_conda_becomes_a_requirement(
    channel: str, name: str, operator: str, version: str, star: str, build: str
) -> None:
    rest = f"{operator}{version}{star}{build}" if operator else ""
    requirement = translate(f"{channel}{name}{rest}").requirement
    if requirement is not None:
        assert str(Requirement(requirement)) == requirement


@given(NAMES, st.sampled_from(["=", "==", " "]), FULL, BUILDS, st.integers(1, 9))
def test_full_pin_stays_a_full_pin(name: str, operator: str, version: str, build: str, more: int) -> None:
    requirement = translate(f"{name}{operator}{version}{build}").requirement
    if requirement is None:
        return
    specifier = Requirement(requirement).specifier
    assert specifier.contains(version)
    first, second, third = version.split(".")
    assert not specifier.contains(f"{first}.{second}.{int(third) + more}")
    assert not specifier.contains(f"{first}.{int(second) + more}.{third}")
