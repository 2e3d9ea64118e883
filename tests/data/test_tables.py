from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops.core.errors import InvalidInputError
from flops.data import read_table


def test_parquet_and_arrow_files_keep_their_metadata(tmp_path: Path, table: pa.Table) -> None:
    table = table.replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "t.parquet")
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(tmp_path / "s.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("t.parquet", "t.arrow", "s.arrow"):
        assert read_table(tmp_path / name).equals(table, check_metadata=True), name


def test_text_files_are_read_with_types(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,x\n2,y\n")
    (tmp_path / "t.TSV").write_text("a\tb\n1\tx\n2\ty\n")
    (tmp_path / "t.jsonl").write_text('{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n')
    expected = pa.table({"a": [1, 2], "b": ["x", "y"]})
    for name in ("t.csv", "t.TSV", "t.jsonl"):
        assert read_table(tmp_path / name).equals(expected), name


def test_numpy_archives_become_columns(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    np.savez(tmp_path / "t.npz", x=x, y=np.arange(4))
    table = read_table(tmp_path / "t.npz")
    assert str(table.schema.field("x").type) == ("fixed_size_list<item: fixed_size_list<item: float>[2]>[3]")
    assert table["x"].to_pylist() == x.tolist()
    assert table["y"].to_pylist() == [0, 1, 2, 3]


def test_pickled_arrays_are_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InvalidInputError, match=r"t.npz' cannot be read as npz: Object arrays"):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"hello", "cannot be read as parquet"),
        ("t.arrow", b"hello", "cannot be read as arrow"),
        ("t.csv", b"a,b\n1\n", "cannot be read as csv: .*Expected 2 columns, got 1"),
        ("t.jsonl", b"{", "cannot be read as jsonl"),
        ("t.npz", b"PK", "cannot be read as npz"),
        ("t.feather", b"FEA1....", "Feather's first version"),
        ("t.xlsx", b"", r"is of no kind that can be put - use one of \.arrow, \.csv"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"'{tmp_path / name}' {message}|{message}"):
        read_table(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"there is no file '.*nothing.csv' - check its path"):
        read_table(tmp_path / "nothing.csv")


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.arange(3), y=np.arange(4))
    with pytest.raises(InvalidInputError, match=r"its arrays have different lengths: {'x': 3, 'y': 4}"):
        read_table(tmp_path / "t.npz")
