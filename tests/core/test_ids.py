import pytest

from flops.core.errors import InvalidInputError
from flops.core.ids import ProjectId, new_project_id, project_id, service_name


def test_fresh_project_ids_are_valid_and_differ() -> None:
    ids = {new_project_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(project_id(text) == text for text in ids)


@pytest.mark.parametrize(
    "text", ["", "p-", "p-abc", "../etc", "p-7k2mqd/..", "P-7K2MQD", "p-7k2mqd\n", "x" * 500]
)
def test_text_that_is_no_project_id_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInputError, match="ids look like p-7k2mqd, see 'flops ls'"):
        project_id(text)


def test_service_names_carry_project_role_and_number() -> None:
    project = ProjectId("p-7k2mqd")
    assert service_name(project, "aggregator") == "p-7k2mqd-aggregator"
    assert service_name(project, "learner", 12) == "p-7k2mqd-learner-12"


@pytest.mark.parametrize("role", ["Learner", "a b", "x" * 60, "a/b", "a-"])
def test_a_role_that_fits_no_platform_is_refused(role: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot name a service"):
        service_name(ProjectId("p-7k2mqd"), role)
