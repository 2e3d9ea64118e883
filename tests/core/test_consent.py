"""What a data owner allows, and how a refusal reads."""

import pytest

from flops.core.consent import Consent
from flops.core.errors import InvalidInputError

PROJECT = {
    "owner": "ann",
    "team": "vision",
    "repository": "https://git.example.org/lab/mnist",
    "tags": ("ward-7", "mnist"),
}


@pytest.mark.parametrize(
    "consent",
    [
        Consent(),
        Consent(tags=("mnist", "other")),  # data under 'ward-7' are then not given
        Consent(owners=("ann",)),
        Consent(owners=("bob",), teams=("vision",)),
        Consent(repositories=("https://git.example.org/lab/mnist.git",)),
        Consent(repositories=("https://git.example.org/lab/*",)),
    ],
)
def test_what_is_allowed_runs(consent: Consent) -> None:
    assert consent.refusal(**PROJECT) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("consent", "words"),
    [
        (Consent(tags=("x",)), "data tagged ward-7, mnist are not allowed on this node (allowed: x)"),
        (
            Consent(owners=("bob",), teams=("nlp",)),
            "projects of 'ann' (team 'vision') are not allowed on this node (allowed: bob, team nlp)",
        ),
        (
            Consent(repositories=("https://git.example.org/lab/cifar",)),
            "code of 'https://git.example.org/lab",
        ),
        (Consent(repositories=("https://git.example.org/lab/mnist-evil",)), "is not allowed on this node"),
        (Consent(repositories=("https://git.example.org/laboratory/*",)), "is not allowed on this node"),
    ],
)
def test_a_refusal_names_its_rule(consent: Consent, words: str) -> None:
    assert words in str(consent.refusal(**PROJECT))  # type: ignore[arg-type]


def test_a_project_without_a_team_is_not_of_an_allowed_team() -> None:
    refused = Consent(teams=("vision",)).refusal(owner="ann", team=None, repository="r", tags=())
    assert refused == "projects of 'ann' are not allowed on this node (allowed: team vision)"


def test_only_allowed_tags_are_shown() -> None:
    assert Consent(tags=("b",)).shown(["c", "b", "a"]) == ("b",)
    assert Consent().shown(["c", "b", "a"]) == ("a", "b", "c")


def test_a_consent_survives_its_json() -> None:
    consent = Consent(("a",), ("b", "c"), (), ("d*",))
    assert Consent.from_json(consent.to_json()) == consent


@pytest.mark.parametrize(
    "broken", [{"tags": "all"}, {"owners": [1]}, {"teams": [""]}, {"tags": ["x"] * 1001}]
)
def test_what_is_no_consent_is_refused_by_name(broken: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(broken))):
        Consent.from_json(broken)
