import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.core.spec_text import read_mapping, strip_comments


def read(text: str) -> object:
    return read_mapping(text, prefix="spec 'x'")


def test_yaml_json_and_json_with_comments_read_the_same() -> None:
    expected = {"repo": "https://host/x", "training": {"rounds": 3}}
    assert read("repo: https://host/x\ntraining:\n  rounds: 3\n") == expected
    assert read(json.dumps(expected)) == expected
    commented = """// a spec
    /* of two
       lines */ {"repo": "https://host/x", // the code
    "training": {"rounds": /* few */ 3}}"""
    assert read(commented) == expected
    assert read("{repo: https://host/x, training: {rounds: 3}}") == expected


def test_a_byte_order_mark_is_no_problem() -> None:
    assert read('\ufeff{"repo": "x"}') == {"repo": "x"}


@given(st.dictionaries(st.text(max_size=5), st.text(st.sampled_from('/*"\\ a\n'), max_size=12)))
def test_text_inside_strings_is_never_taken_for_a_comment(mapping: dict[str, str]) -> None:
    assert json.loads(strip_comments(json.dumps(mapping))) == mapping


def test_comments_leave_lines_and_columns_in_place() -> None:
    text = '{/* a\nb */ "x": 1}'
    assert strip_comments(text) == '{    \n     "x": 1}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1,, "b": 2}', "is not valid JSON: expecting property name.* in line 1, column 9"),
        ("a: [", "is not valid YAML: .* in line 1, column 5"),
        ("a: \x00", "is not valid YAML: "),
        ("a: &x 1\nb: *x", "aliases are not allowed - write the value out in line 2, column 4"),
        ("a: 1\na: 2", "a is given twice"),
        ('{"a": 1, "a": 2}', "a is given twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ("a: 2023-99-99", "holds a value that cannot be read"),
        ("a: !!python/object:os.system {}", "is not valid YAML: could not determine a constructor"),
        ("- a", "must be a mapping of names to values"),
        ("", "must be a mapping of names to values"),
        ("[" * 100_000, "is nested too deeply"),
        ("x" * 1_000_001, "is larger than 1,000,000 characters"),
    ],
)
def test_unreadable_text_is_refused_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem) as caught:
        read(text)
    assert str(caught.value).startswith("spec 'x'")
