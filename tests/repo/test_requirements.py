"""What is to be installed, from conda.yaml and requirements.txt."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flops.core.errors import InvalidInputError
from flops.repo import Requirements, inspect

if TYPE_CHECKING:
    from tests.repo.conftest import MakeCheckout


def read(folder: Path) -> Requirements:
    return inspect(folder).requirements


def refusal(make: "MakeCheckout", files: dict[str, str | None]) -> str:
    with pytest.raises(InvalidInputError) as caught:
        read(make(files))
    return str(caught.value)


def test_repository_as_seen_in_the_wild_is_understood(checkout: "MakeCheckout") -> None:
    text = """name: mnist
channels: [conda-forge]
dependencies:
- python=3.10.14
- pip<=24.0
- openssl
- numpy=1.26
- pip:
  - mlflow==2.12.1
  - scikit-learn==1.4.2
  - torch==2.1.0+cpu
"""
    assert read(checkout({"conda.yaml": text})) == Requirements(
        "==3.10.14.*",
        ("numpy==1.26.*", "scikit-learn==1.4.2", "torch==2.1.0+cpu"),
        (
            "conda.yaml: left out, as they are no Python packages: openssl",
            "'mlflow' is not installed for learners; FLOps tracks the run itself",
        ),
    )


def test_requirements_may_include_other_files_of_the_repository(checkout: "MakeCheckout") -> None:
    needs = read(
        checkout(
            {
                "conda.yaml": None,
                "requirements.txt": "# what we need\n-r parts/all.txt\npandas \\\n  >=2  # tables\n",
                "parts/all.txt": "-r ../base.txt\n--requirement=more.txt\n",
                "parts/more.txt": "scipy==1.11.4 --hash=sha256:00\n",
                "base.txt": "numpy==1.26.4\r\n",
            }
        )
    )
    assert needs == Requirements(None, ("numpy==1.26.4", "scipy==1.11.4", "pandas>=2"))


def test_options_about_indexes_are_told_and_left_out(checkout: "MakeCheckout") -> None:
    lines = "--index-url https://elsewhere/simple\n--pre\nscipy; python_version >= '3.8'\n"
    needs = read(checkout({"conda.yaml": None, "requirements.txt": lines}))
    assert needs.packages == ('scipy; python_version >= "3.8"', "numpy")
    assert needs.warnings == (
        "requirements.txt: '--index-url' is ignored; "
        "package indexes are those of the pip configuration of the machine",
        "requirements.txt: the option '--pre' is ignored",
    )


def test_conda_file_wins_where_both_name_a_package(checkout: "MakeCheckout") -> None:
    files: dict[str, str | None] = {
        "conda.yaml": "dependencies:\n- numpy=1.26\n",
        "requirements.txt": "numpy==1.25.0\nscipy\n",
    }
    needs = read(checkout(files))
    assert needs.packages == ("numpy==1.26.*", "scipy")
    assert needs.warnings == (
        "requirements.txt asks for 'numpy==1.25.0', conda.yaml for 'numpy==1.26.*'; that one is taken",
    )


def test_broken_yaml_is_said_with_its_line(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"conda.yaml": "dependencies:\n- numpy\n- [\n"}) == (
        "conda.yaml is no YAML in line 4: expected the node content, but found '<stream end>' - mend it"
    )


def test_yaml_that_cannot_be_built_is_said(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"conda.yaml": "dependencies:\n- foo: 2024-13-45\n"}) == (
        "conda.yaml is no YAML: month must be in 1..12 - mend it"
    )


def test_conda_file_without_dependencies_is_said(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"conda.yaml": "- numpy\n"}) == (
        "conda.yaml has no list 'dependencies' - write one entry a line, such as '- numpy=1.26.4'"
    )


def test_entry_that_is_no_text_is_shown_short(checkout: "MakeCheckout") -> None:
    bomb = "x0: &a0 [lol, lol]\n" + "".join(
        f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    message = refusal(checkout, {"conda.yaml": f"{bomb}dependencies:\n- *a29\n"})
    assert message.startswith("conda.yaml: the entry '[[[")
    assert len(message) < 300


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("numpy=>1", "Expected end or semicolon (after name and no valid version specifier)"),
        ("./wheels/mine.whl", "it is a path"),
        ("-e .", "it is a folder to install from"),
        ("mine @ file:///etc", "its address is none of https, git+https, git+ssh"),
        ("mine @ https://host/${SECRET}/x.whl", "it asks for an environment variable"),
    ],
)
def test_unusable_line_of_pip_is_named(checkout: "MakeCheckout", line: str, why: str) -> None:
    assert refusal(checkout, {"conda.yaml": None, "requirements.txt": f"scipy\n{line}\n"}) == (
        f"requirements.txt: the dependency '{line}' cannot be used: {why} - write it like 'numpy==1.26.4'"
    )


def test_address_cannot_smuggle_a_second_line_to_the_installer(checkout: "MakeCheckout") -> None:
    entry = '"a @ https://host/a.whl\\n--index-url=https://elsewhere"'
    assert refusal(checkout, {"conda.yaml": f"dependencies:\n- pip:\n  - {entry}\n"}) == (
        "conda.yaml: the dependency 'a @ https://host/a.whl --index-url=https://elsewhere' cannot be used: "
        "it holds characters that cannot be seen - write it like 'numpy==1.26.4'"
    )


def test_included_file_outside_the_repository_is_refused(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"requirements.txt": "-r ../../etc/passwd\n"}) == (
        "the requirements file '../../etc/passwd' lies outside the repository - move it in"
    )


def test_included_file_that_is_missing_is_said(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"requirements.txt": "-r more.txt\n"}) == (
        "the repository has no file more.txt - add it, or remove what names it"
    )


def test_files_that_include_each_other_are_refused(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"requirements.txt": "-r requirements.txt\n"}) == (
        "the requirements file 'requirements.txt' includes itself - remove the circle"
    )
