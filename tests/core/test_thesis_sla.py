from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.core.spec import parse_spec, spec_from_mapping
from flops.core.thesis_sla import THESIS_KEYS, to_thesis_sla

SLA = """{
  // as in the thesis
  "customerID": "Admin",
  "verbose": true,
  "use_devel_base_images": true,
  "supported_platforms": ["linux/amd64", "linux/arm64"],
  "ml_model_flavor": "sklearn",
  "ml_repo_url": "https://host/flops_ml_repo_mnist_sklearn",
  "training_configuration": {
    "mode": "hierarchical",
    "data_tags": ["mnist"], /* any of them */
    "training_cycles": 3,
    "training_rounds": 5,
    "min_available_clients": 2,
    "min_fit_clients": 2,
    "min_evaluate_clients": 1
  },
  "post_training_steps": ["build_image_for_trained_model"],
  "resource_constraints": {"memory": 100, "vcpus": 1, "storage": 0}
}"""


def value_at(mapping: dict[str, Any], dotted: str) -> Any:
    value: Any = mapping
    for part in dotted.split("."):
        value = value[part]
    return value


def test_the_sla_is_read_as_it_is() -> None:
    spec = parse_spec(SLA, source="sla.json")
    assert spec.repo == "https://host/flops_ml_repo_mnist_sklearn"
    assert spec.model.flavor == "sklearn"
    assert (spec.training.mode, spec.training.cycles, spec.training.rounds) == ("hierarchical", 3, 5)
    assert spec.data.tags == ["mnist"]
    assert (spec.resources.memory_mb, spec.resources.vcpus, spec.resources.storage_mb) == (100, 1, 0)


_COUNT = st.integers(1, 10)
_SLAS = st.fixed_dictionaries(
    {
        "ml_repo_url": st.sampled_from(["https://host/x", "git@host:x.git", "/data/x"]),
        "training_configuration": st.fixed_dictionaries(
            {
                "mode": st.just("hierarchical"),
                "data_tags": st.lists(st.sampled_from("abcdef"), unique=True),
                "min_available_clients": st.integers(10, 20),
            },
            optional={
                "training_cycles": _COUNT,
                "training_rounds": _COUNT,
                "min_fit_clients": _COUNT,
                "min_evaluate_clients": _COUNT,
            },
        ),
    },
    optional={
        "customerID": st.sampled_from(["Admin", "a b", "7"]),
        "ml_model_flavor": st.sampled_from(["sklearn", "pytorch", "tensorflow", "keras"]),
        "verbose": st.booleans(),
        "use_devel_base_images": st.booleans(),
        "supported_platforms": st.lists(
            st.sampled_from(["linux/amd64", "linux/arm64"]), min_size=1, unique=True
        ),
        "post_training_steps": st.sampled_from(
            [
                [],
                ["build_image_for_trained_model"],
                ["build_image_for_trained_model", "deploy_trained_model_image"],
            ]
        ),
        "resource_constraints": st.fixed_dictionaries(
            {}, optional={"memory": _COUNT, "vcpus": _COUNT, "storage": _COUNT}
        ),
    },
)


@given(_SLAS)
def test_every_value_of_an_sla_is_found_back_in_the_spec(sla: dict[str, Any]) -> None:
    spec = spec_from_mapping(sla)
    own, again = spec.to_json(), to_thesis_sla(spec)
    for thesis, place in THESIS_KEYS.items():
        try:
            value = value_at(sla, thesis)
        except KeyError:
            continue
        assert value_at(own, place) == value
        assert value_at(again, thesis) == value
    assert spec_from_mapping(again) == spec


def test_every_place_of_the_table_exists_in_the_spec() -> None:
    own = spec_from_mapping({"ml_repo_url": "x"}).to_json()
    for place in THESIS_KEYS.values():
        value_at(own, place)


def test_problems_are_told_in_the_words_of_the_sla() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(
            '{"ml_repo_url": "x", "ml_model_flavour": "sklearn", "rounds": 2, '
            '"training_configuration": {"training_cycles": 3, "min_fit_client": 2, '
            '"training_rounds": 0}, "resource_constraints": 7}',
            source="sla.json",
        )
    message = str(caught.value)
    assert message.startswith("spec 'sla.json': ")
    assert "ml_model_flavour is unknown - did you mean 'ml_model_flavor'?" in message
    assert "training_configuration.min_fit_client is unknown - did you mean 'min_fit_clients'?" in message
    assert "training_configuration.training_rounds must be at least 1 (is 0)" in message
    assert "resource_constraints must be a mapping" in message
    assert "rounds is unknown - known are" in message


def test_cycles_need_the_hierarchical_mode() -> None:
    with pytest.raises(InvalidInputError) as caught:
        spec_from_mapping({"ml_repo_url": "x", "training_configuration": {"training_cycles": 3}})
    assert str(caught.value) == (
        "spec: training_configuration.training_cycles is 3 but training_configuration.mode is 'classic' - "
        "only 'hierarchical' has cycles: set that mode, or use training_configuration.training_rounds"
    )


def test_the_two_forms_cannot_be_mixed() -> None:
    with pytest.raises(InvalidInputError, match="repo is unknown - known are customerID"):
        spec_from_mapping({"repo": "x", "ml_repo_url": "x"})
