from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.data import Fragment, check_labels, check_site, check_tags, fragment_id, read_token
from flops.data.fragments import derived_id, no_match

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256)
TAGS = st.frozensets(UNICODE, min_size=1, max_size=20)


LABELS = st.dictionaries(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"), UNICODE, max_size=5)


@given(TAGS, UNICODE.filter(lambda text: len(text) <= 100), LABELS)
def test_a_fragment_survives_its_json_whatever_its_tags(
    tags: frozenset[str], site: str, labels: dict[str, str]
) -> None:
    labels = {name: value[:200] for name, value in labels.items()}
    fragment = Fragment(
        derived_id("0" * 64, tags, site), site, tags, 3, 9, {"x": "int64"}, True, 1.5, "0" * 64, labels
    )
    assert Fragment.from_json(fragment.to_json()) == fragment


def test_a_fragment_from_before_there_were_labels_has_none() -> None:
    fragment = Fragment(
        derived_id("0" * 64, ["t"], "s"), "s", frozenset({"t"}), 3, 9, {}, True, 1.5, "0" * 64, {"a": "b"}
    )
    old = {key: value for key, value in fragment.to_json().items() if key != "labels"}
    assert Fragment.from_json(old).labels == {}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({str(number): "x" for number in range(21)}, "21 labels were given - use at most 20"),
        ({"a b": "x"}, "'a b' cannot be the name of a label"),
        ({"": "x"}, "cannot be the name of a label"),
        ({7: "x"}, "'7' cannot be the name of a label"),
        ({"a": 7}, "a value of label a is a int - it must be text"),
        ({"a": ""}, "the value of label a '' has 0 characters"),
        ({"a": "x" * 201}, "has 201 characters - use 1 to 200"),
        ([("a", "b")], "labels are names and values"),
        ("a=b", "labels are names and values"),
    ],
)
def test_labels_that_cannot_be_are_named(labels: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_labels(labels)


@given(st.lists(UNICODE, min_size=1, max_size=5), st.lists(UNICODE, min_size=1, max_size=5))
def test_ids_are_equal_exactly_when_the_tags_are(one: list[str], other: list[str]) -> None:
    same = derived_id("c", set(one), "s") == derived_id("c", set(other), "s")
    assert same == (set(one) == set(other))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "no data tag was given"),
        ("mnist", "tags are a list of texts"),
        (None, "tags are a list of texts"),
        ([""], "has 0 characters - use 1 to 256"),
        (["a" * 257], "has 257 characters - use 1 to 256"),
        ([7], "a data tag is a int - it must be text"),
        (["\ud800"], "half a surrogate pair"),
        ([str(number) for number in range(101)], "101 data tags were given - use at most 100"),
    ],
)
def test_tags_that_cannot_be_are_named(tags: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_tags(tags)


def test_a_site_has_at_most_100_characters() -> None:
    assert check_site("ü" * 100) == "ü" * 100
    with pytest.raises(InvalidInputError, match="has 101 characters - use 1 to 100"):
        check_site("ü" * 101)


@pytest.mark.parametrize(
    "text",
    ["", "f-", "../../etc/passwd", "f-" + "0" * 31, "f-" + "0" * 32 + "\n", "F-" + "0" * 32, 7],
)
def test_an_id_is_checked_before_it_can_become_a_path(text: object) -> None:
    with pytest.raises(InvalidInputError, match="is not a fragment id"):
        fragment_id(text)


def test_the_message_for_no_match_says_what_to_do() -> None:
    assert no_match({"b", "a"}, "x") == (
        "no fragment at site 'x' carries any of the tags 'a', 'b' - "
        "see 'flops data ls', or put data with 'flops data put FILE --tag a'"
    )


def test_messages_stay_on_one_short_line_whatever_the_tags() -> None:
    message = no_match({f"{number}\n\x1b[31m{'x' * 200}" for number in range(50)}, "\x00")
    assert message.isprintable()
    assert "and 45 more" in message
    assert len(message) < 1000


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    assert read_token(path) == "0123456789abcdef0123456789abcdef"
    path.chmod(0o640)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        read_token(path)


@pytest.mark.parametrize("content", [b"", b"short", b"0123456789abcde\xff", b"0123456789\n0123456789"])
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidInputError, match="holds no token"):
        read_token(path)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nowhere' cannot be read \(No such file"):
        read_token(tmp_path / "nowhere")
