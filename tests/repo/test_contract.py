"""Which contract a repository keeps, and what is said when it keeps none."""

from typing import TYPE_CHECKING

import pytest

from flops.core.errors import InvalidInputError
from flops.repo import inspect

if TYPE_CHECKING:
    from tests.repo.conftest import MakeCheckout

MODULE = "model_manager.py"


def refusal(make: "MakeCheckout", files: dict[str, str | None]) -> str:
    with pytest.raises(InvalidInputError) as caught:
        inspect(make(files))
    return str(caught.value)


def test_repository_in_the_contract_is_found(checkout: "MakeCheckout") -> None:
    found = inspect(checkout())
    assert (found.kind, found.requirements.packages) == ("flops", ("numpy",))


def test_missing_model_manager_is_said(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {MODULE: None}) == (
        "the repository has no model_manager.py at its root - add one with a class ModelManager"
    )


def test_model_manager_in_a_folder_below_is_pointed_at(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {MODULE: None, "src/model_manager.py": ""}) == (
        "the repository has no model_manager.py at its root (there is src/model_manager.py) - "
        "add one with a class ModelManager"
    )


def test_flower_app_is_told_from_nothing(checkout: "MakeCheckout") -> None:
    pyproject = "[tool.flwr.app.components]\nserverapp = 'a:b'\n"
    assert refusal(checkout, {MODULE: None, "pyproject.toml": pyproject}) == (
        "the repository is a Flower app, which this version does not run yet - "
        "give it a model_manager.py with a class ModelManager, or run it with Flower"
    )


def test_missing_class_is_said(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {MODULE: "x = 1\n"}) == (
        "model_manager.py of the repository has no class ModelManager - add it"
    )


def test_class_with_a_name_close_to_the_right_one_is_named(checkout: "MakeCheckout") -> None:
    module = "from flops_utils.ml_repo_templates import ModelManagerTemplate\nclass Modelmanager:\n    pass\n"
    assert refusal(checkout, {MODULE: module}) == (
        "model_manager.py of the repository has no class ModelManager - rename Modelmanager"
    )


def test_syntax_error_is_said_with_its_line(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {MODULE: "class ModelManager:\n    def x(self:\n        pass\n"}) == (
        "model_manager.py of the repository has a syntax error in line 2: '(' was never closed - mend it"
    )


@pytest.mark.parametrize(
    "module",
    [
        "from inside import *\n",
        "from inside import Other as ModelManager\n",
        "class A: pass\nModelManager = A\n",
        "try:\n    import torch\nexcept ImportError:\n    class ModelManager: pass\n",
        "import re\nclass ModelManager:\n    pattern = re.compile('\\d')\n",  # Python warns of the backslash
    ],
)
def test_class_may_come_about_in_any_way(checkout: "MakeCheckout", module: str) -> None:
    assert inspect(checkout({MODULE: module})).kind == "flops"


def test_grammar_of_a_newer_python_is_left_to_that_python(checkout: "MakeCheckout") -> None:
    module = "type Pair[T] = tuple[T, T]\nclass ModelManager[T]:\n    pass\n"
    conda = "dependencies:\n- python>=3.13\n"
    assert inspect(checkout({MODULE: module, "conda.yaml": conda})).requirements.python == ">=3.13"


def test_repository_without_dependency_files_is_refused(checkout: "MakeCheckout") -> None:
    assert refusal(checkout, {"conda.yaml": None}) == (
        "the repository has neither conda.yaml nor requirements.txt - add one that lists its dependencies"
    )


@pytest.mark.parametrize(
    "line",
    [
        "from flops_utils.ml_repo_building_blocks import load_dataset",
        "import flops_utils.ml_repo_building_blocks as blocks",
        "from flops_utils import ml_repo_building_blocks",
        "def load():\n    from flops_utils.ml_repo_building_blocks import load_dataset",
    ],
)
def test_building_blocks_bring_what_they_need(checkout: "MakeCheckout", line: str) -> None:
    needs = inspect(checkout({"inner/data_manager.py": line + "\n"})).requirements
    assert needs.building_blocks
    assert needs.packages == ("numpy", "datasets<4", "pillow")


def test_building_blocks_that_are_only_spoken_of_bring_nothing(checkout: "MakeCheckout") -> None:
    comment = "# once used flops_utils.ml_repo_building_blocks\n"
    files: dict[str, str | None] = {"data_manager.py": comment, "folder.py/x.txt": ""}
    assert inspect(checkout(files)).requirements.packages == ("numpy",)
