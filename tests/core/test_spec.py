import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flops.core.errors import InvalidInputError
from flops.core.spec import ProjectSpec, merge, parse_spec, spec_from_mapping


def problems_of(text: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        parse_spec(text, source="x.yaml")
    return str(caught.value)


def test_a_repository_alone_is_a_spec() -> None:
    spec = parse_spec("repo: https://host/x@v1", source="x.yaml")
    assert (spec.repo, spec.ref) == ("https://host/x", "v1")
    assert spec.training.strategy.name == "FedAvg"
    assert spec.training.rounds == 3
    assert spec.selection.best == "min"


def test_an_explicit_ref_wins_over_splitting() -> None:
    spec = spec_from_mapping({"repo": "https://host/a@b/x", "ref": "v1"})
    assert (spec.repo, spec.ref) == ("https://host/a@b/x", "v1")


def test_all_problems_are_listed_at_once_with_place_value_and_nearest_name() -> None:
    assert problems_of("repo: x\ntraining: {rounds: 0, stratgy: FedAvg}") == (
        "spec 'x.yaml': training.rounds must be at least 1 (is 0); "
        "training.stratgy is unknown - did you mean 'strategy'?"
    )


def test_an_unknown_key_without_a_near_one_lists_what_is_known() -> None:
    assert problems_of("repo: x\nselection: {zzz: 1}") == (
        "spec 'x.yaml': selection.zzz is unknown - known are best, metric"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training: {}", "repo is missing"),
        ("repo: 3", "repo must be text"),
        ("repo: x\ntraining: {rounds: 100001}", "training.rounds must be at most 100000"),
        ("repo: x\ntraining: {rounds: 2.0}", "training.rounds must be a whole number (is 2.0)"),
        ("repo: x\ntraining: {rounds: '2'}", 'training.rounds must be a whole number (is "2")'),
        ("repo: x\ntraining: {rounds: true}", "training.rounds must be a whole number (is true)"),
        ("repo: x\ntraining: {fraction_fit: 0}", "training.fraction_fit must be more than 0"),
        ("repo: x\ntraining: {fraction_fit: .nan}", "training.fraction_fit must be"),
        (
            "repo: x\ntraining: {mode: ring}",
            "training.mode must be 'classic', 'hierarchical' or 'asynchronous'",
        ),
        ("repo: x\ntraining: [1]", "training must be a mapping (is [1])"),
        ("repo: x\ntraining: {seed: -1}", "training.seed must be at least 0"),
        ("repo: x\ntraining: {start_deadline_s: 0}", "training.start_deadline_s must be more"),
        ("repo: x\nname: a/b", "name must be made of letters"),
        ("repo: x\nname: ../b", "name must be made of letters"),
        ("repo: x\ndata: {tags: [no]}", "data.tags[0] must be text (is false)"),
        ("repo: x\ndata: {tags: ['']}", "data.tags[0] must be one line of visible text"),
        ("repo: x\ndata: {mock: cifar}", "data.mock.dataset must be 'mnist' or 'digits'"),
        ("repo: x\ndata: {mock: {alpha: 1.0}}", "data.mock.dataset is missing"),
        ("repo: x\nplatforms: []", "platforms must have at least 1 entry"),
        ("repo: x\nplatforms: [linux/arm]", "platforms[0] must be 'linux/amd64' or 'linux/arm64'"),
        ("repo: x\nverbose: 1", "verbose must be true or false (is 1)"),
        (
            "repo: x\ntraining: {strategy: {parameters: {a: [1]}}}",
            "training.strategy.parameters.a must be text, a number, true or false (is [1])",
        ),
        (
            "repo: x\ntraining: {strategy: {parameters: {'a b': 1}}}",
            "training.strategy.parameters.a b must be made of letters",
        ),
        ("repo: 'ext::sh -c x'", "repo is an option or a remote helper of git"),
        ("repo: https://host/x@a..b", "ref is not the name of a branch, a tag or a commit"),
    ],
)
def test_values_out_of_bounds_are_refused(text: str, problem: str) -> None:
    message = problems_of(text)
    assert problem in message
    assert ";" not in message


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"training": {"cycles": 2}},
            "training.cycles is 2 but training.mode is 'classic'",
        ),
        (
            {"training": {"min_fit_learners": 3, "min_available_learners": 2}},
            "training.min_fit_learners (3) must not be more than training.min_available_learners (2)",
        ),
        (
            {"training": {"min_evaluate_learners": 3, "min_available_learners": 2}},
            "training.min_evaluate_learners (3) must not be more than",
        ),
        (
            {"training": {"min_fit_learners": 3, "learners": 2}},
            "training.learners (2) must not be less than training.min_available_learners (3)",
        ),
        (
            {"training": {"quorum": 3, "learners": 2}},
            "training.quorum (3) can never be reached: 2 of 2 learners",
        ),
        (
            {"training": {"quorum": 3, "learners": 10, "fraction_fit": 0.2}},
            "training.quorum (3) can never be reached: 2 of 10 learners",
        ),
        (
            {"data": {"mock": {"dataset": "mnist", "partition": "iid", "alpha": 0.1}}},
            "data.mock.alpha (0.1) says nothing about data.mock.partition 'iid'",
        ),
        (
            {"data": {"mock": {"dataset": "digits", "num_examples": 2}}},
            "data.mock.num_examples (2) must be at least training.learners (3)",
        ),
        (
            {"selection": {"metric": "accuracy", "best": "min"}},
            "selection.best is 'min', which would keep the worst round",
        ),
    ],
)
def test_contradictions_between_fields_are_refused(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        spec_from_mapping({"repo": "x", **section})
    assert problem in str(caught.value)


def test_minimum_of_available_learners_follows_from_the_others_when_unset() -> None:
    spec = spec_from_mapping({"repo": "x", "training": {"min_fit_learners": 3, "min_evaluate_learners": 2}})
    assert spec.training.min_available_learners == 3
    assert spec.training.updates_needed == 3


def test_mocked_data_bring_learners_and_a_tag_when_unset() -> None:
    spec = spec_from_mapping({"repo": "x", "data": {"mock": "digits"}})
    assert spec.training.learners == 3
    assert spec.data.tags == ["digits"]
    spec = spec_from_mapping(
        {"repo": "x", "data": {"mock": "mnist", "tags": ["a"]}, "training": {"min_fit_learners": 5}}
    )
    assert spec.training.learners == 5
    assert spec.data.tags == ["a"]
    assert spec_from_mapping({"repo": "x"}).training.learners is None


def test_an_alpha_asks_for_a_dirichlet_partition() -> None:
    spec = spec_from_mapping({"repo": "x", "data": {"mock": {"dataset": "mnist", "alpha": 0.1}}})
    assert spec.data.mock is not None
    assert spec.data.mock.partition == "dirichlet"


def test_deploying_the_model_image_implies_building_it() -> None:
    spec = spec_from_mapping({"repo": "x", "post_training_steps": ["deploy_trained_model_image"]})
    assert spec.post_training_steps == [
        "build_image_for_trained_model",
        "deploy_trained_model_image",
    ]


def test_strategy_parameters_keep_their_types() -> None:
    spec = parse_spec(
        "repo: x\ntraining: {strategy: {name: FedAdam, parameters: "
        "{eta: 1e-3, n: 2, flag: true, mode: fast}}}",
        source="x.yaml",
    )
    parameters = spec.training.strategy.parameters
    assert parameters == {"eta": 0.001, "n": 2, "flag": True, "mode": "fast"}
    assert [type(value) for value in parameters.values()] == [float, int, bool, str]


def test_merge_replaces_by_dotted_name_and_derives_anew() -> None:
    spec = spec_from_mapping({"repo": "https://host/x@v1", "data": {"mock": "mnist"}})
    merged = merge(
        spec,
        {
            "training.min_fit_learners": 5,
            "training.strategy.name": "FedAdam",
            "training.strategy.parameters.eta": 0.1,
            "data.mock.alpha": 0.2,
            "selection.metric": "accuracy",
        },
    )
    assert merged.training.learners == 5
    assert merged.training.min_available_learners == 5
    assert merged.training.strategy.parameters == {"eta": 0.1}
    assert merged.data.mock is not None
    assert merged.data.mock.partition == "dirichlet"
    assert merged.selection.best == "max"
    assert (merged.repo, merged.ref) == ("https://host/x", "v1")
    assert merge(merged, {"repo": "/other"}).ref is None
    with pytest.raises(InvalidInputError, match=r"training\.round is unknown"):
        merge(spec, {"training.round": 5})


def test_overrides_can_complete_a_spec_file() -> None:
    spec = parse_spec("training: {strategy: FedProx}", source="x.yaml", overrides={"repo": "/data/x@main"})
    assert (spec.repo, spec.ref) == ("/data/x", "main")
    assert spec.training.strategy.name == "FedProx"


def test_credentials_stay_out_of_the_shown_forms() -> None:
    spec = parse_spec("repo: https://me:secret@host/x@v1", source="x.yaml")
    assert spec.repo == "https://me:secret@host/x"
    assert spec.redacted_repo == "https://***@host/x"
    assert "secret" not in json.dumps(spec.to_json(redacted=True))
    assert "secret" not in problems_of("repo: 'ftp://me:secret@host/x'")
    assert "secret" not in problems_of("repo: ['https://me:secret@host/x']")


def test_a_spec_cannot_be_changed() -> None:
    spec = spec_from_mapping({"repo": "x"})
    with pytest.raises(ValidationError, match="frozen"):
        spec.training.rounds = 4


@given(
    rounds=st.integers(1, 100_000),
    minimums=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    learners=st.none() | st.integers(1, 100),
    tags=st.lists(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8)),
    mock=st.none() | st.sampled_from(["mnist", "digits"]),
    alpha=st.none() | st.floats(0.01, 100),
    parameters=st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True),
        st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=4,
    ),
)
def test_every_valid_spec_survives_json_and_an_empty_merge(
    rounds: int,
    minimums: list[int],
    learners: int | None,
    tags: list[str],
    mock: str | None,
    alpha: float | None,
    parameters: dict[str, Any],
) -> None:
    mapping: dict[str, Any] = {
        "repo": "https://host/x@v1",
        "training": {
            "rounds": rounds,
            "min_fit_learners": minimums[0],
            "min_evaluate_learners": minimums[1],
            "learners": None if learners is None else max(*minimums[:2], learners),
            "strategy": {"name": "FedAvg", "parameters": parameters},
        },
        "data": {"tags": tags},
    }
    if mock:
        mapping["data"]["mock"] = {"dataset": mock} | ({} if alpha is None else {"alpha": alpha})
    spec = spec_from_mapping(mapping)
    assert spec_from_mapping(json.loads(json.dumps(spec.to_json()))) == spec
    assert merge(spec, {}) == spec
    assert ProjectSpec.model_validate_json(json.dumps(spec.to_json())) == spec


@pytest.mark.parametrize(
    ("training", "mode"),
    [
        ("{strategy: FedBuff}", "asynchronous"),
        ("{strategy: {name: FedAsync, parameters: {alpha: 0.5}}}", "asynchronous"),
        ("{clusters: {count: 4}}", "hierarchical"),
        ("{clusters: {groups: {north: [a], europe/south: [b]}}}", "hierarchical"),
        ("{clusters: {label: region}}", "hierarchical"),
        ("{rounds: 2}", "classic"),
    ],
)
def test_the_mode_follows_from_strategy_and_clusters(training: str, mode: str) -> None:
    spec = parse_spec(f"repo: https://h/r\ntraining: {training}", source="s")
    assert spec.training.mode == mode
    assert spec_from_mapping(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("training", "problem"),
    [
        (
            "{mode: asynchronous}",
            "training.strategy FedAvg and training.mode 'asynchronous' do not go together",
        ),
        ("{mode: classic, strategy: FedAT}", "training.mode 'classic' do not go together"),
        ("{mode: classic, clusters: {count: 2}}", "training.clusters are for training.mode 'hierarchical'"),
        ("{clusters: {count: 2, size: 3}}", "count and training.clusters.size say the same thing"),
        (
            "{clusters: {by: label}}",
            "training.clusters.label is needed where training.clusters.by is 'label'",
        ),
        ("{clusters: {by: size, groups: {a: [b]}}}", "training.clusters.groups is needed where"),
        ("{clusters: {label: region, count: 2}}", "count and size say nothing where"),
        ("{clusters: {count: 2, epsilon: 2.0}}", "training.clusters.epsilon is for training.clusters.by"),
        ("{clusters: {groups: {North Sea: [a]}}}", "training.clusters.groups"),
        ("{virtual_workers: 2}", "training.virtual_workers are for training.virtual"),
        ("{strategy: FedBuff, over_sample: 2.0}", "training.over_sample says nothing"),
        ("{over_sample: 0.5}", "training.over_sample"),
        ("{cohort: best}", "training.cohort"),
        ("{eject_after: 0}", "training.eject_after"),
        ("{max_update_norm: 0.0}", "training.max_update_norm"),
    ],
)
def test_contradictions_of_topology_are_refused(training: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(problem)):
        parse_spec(f"repo: https://h/r\ntraining: {training}", source="s")


@pytest.mark.parametrize(
    ("mock", "partition"),
    [("digits", "iid"), ("{dataset: digits, shards_per_learner: 3}", "shards")],
)
def test_the_partition_follows_from_its_parameters(mock: str, partition: str) -> None:
    spec = parse_spec(f"repo: https://h/r\ndata: {{mock: {mock}}}", source="s")
    assert spec.data.mock is not None
    assert spec.data.mock.partition == partition


@pytest.mark.parametrize("name", ["mnist", "mnist/0", "/1", "a/b/1", "../x/1", "mnist/1.5"])
def test_a_warm_start_names_a_model_and_a_version(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"model\.initial"):
        parse_spec(f"repo: https://h/r\nmodel: {{initial: {name}}}", source="s")
