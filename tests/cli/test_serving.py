"""What `flops predict` makes of files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from flops.cli.serving import request_of
from flops.core.errors import InvalidInputError


def test_csv_is_sent_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.CSV"
    file.write_text("a,b\n1,2\n")
    assert request_of(file) == ("text/csv", b"a,b\n1,2\n")


def test_parquet_becomes_columns_and_rows(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"a": [1, 2], "b": ["x", None]}), file)
    kind, body = request_of(file)
    assert kind == "application/json"
    assert json.loads(body) == {"dataframe_split": {"columns": ["a", "b"], "data": [[1, "x"], [2, None]]}}


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ('{"instances": [[1]]}', {"instances": [[1]]}),
        ('[{"a": 1}]', {"dataframe_records": [{"a": 1}]}),
        ("[[1, 2]]", {"inputs": [[1, 2]]}),
    ],
)
def test_json_is_a_request_or_its_rows(tmp_path: Path, text: str, sent: object) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    assert json.loads(request_of(file)[1]) == sent


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b"{", "is no JSON"),
        ("x.txt", b"1", "give a .csv, .parquet or .json file"),
        ("x.parquet", b"nothing", "cannot be read as Parquet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        request_of(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_binary_columns_are_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"image": [b"\x00"]}), file)
    with pytest.raises(InvalidInputError, match="has columns that JSON cannot hold"):
        request_of(file)
