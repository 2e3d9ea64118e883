from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.clock import ManualClock
from flops.core.errors import (
    ConflictError,
    FailedError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.data import Fragment
from flops.data.store import FragmentStore
from flops.data.writing import FragmentWriter, Limits


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FragmentStore]:
    opened = FragmentStore(tmp_path / "data")
    yield opened
    opened.close()


def put(store: FragmentStore, table: pa.Table, *tags: str, site: str = "s", **more: Any) -> Fragment:
    def batches(writer: FragmentWriter) -> None:
        for batch in table.to_batches():
            writer.write(batch)

    return store.put(table.schema, batches, tags=tags or ("t",), site=site, **more)


def read(store: FragmentStore, fragment: Fragment) -> pa.Table:
    schema, batches = store.read(fragment.id)
    return pa.Table.from_batches(batches, schema)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "data" / "fragments").iterdir())


def test_a_table_comes_back_as_it_was_put(store: FragmentStore) -> None:
    schema = pa.schema(
        [
            pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            pa.field("when", pa.timestamp("s", tz="Europe/Berlin")),
            pa.field("label", pa.int64(), nullable=False, metadata={"unit": "1"}),
            pa.field("vector", pa.list_(pa.float32(), 2)),
        ],
        metadata={"zeta": "ü", "huggingface": '{"info": {}}', "alpha": b"\xff"},
    )
    rows = [
        {"image": {"bytes": b"x", "path": None}, "when": 1, "label": 2, "vector": [1.0, 2.0]},
        {"image": None, "when": None, "label": 3, "vector": [3.0, 4.0]},
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    back = read(store, put(store, table))
    assert back.equals(table, check_metadata=True)
    assert list(back.schema.metadata.items()) == list(schema.metadata.items())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.none() | st.integers(-5, 5), st.text(max_size=3)), min_size=1),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_the_id_does_not_depend_on_how_rows_were_cut_into_batches(
    new_home: Callable[[], Path], rows: list[tuple[int | None, str]], cuts: list[int]
) -> None:
    table = pa.table({"a": [row[0] for row in rows], "b": [row[1] for row in rows]})
    pieces: list[pa.Table] = []
    start = 0
    while start < table.num_rows:
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(table.slice(start, size))
        start += size
    store = FragmentStore(new_home())
    assert put(store, table).id == put(store, pa.concat_tables(pieces)).id
    assert len(store.list()) == 1
    store.close()


def test_row_groups_are_cut_at_the_same_rows_whatever_the_batches(store: FragmentStore) -> None:
    table = pa.table({"a": pa.array(range(200_000))})
    odd = pa.Table.from_batches(table.to_batches(max_chunksize=7_777))
    fragment = put(store, table)
    assert put(store, odd).id == fragment.id
    assert fragment.num_examples == 200_000
    assert read(store, fragment).equals(table)


def test_equal_puts_are_one_fragment(tmp_path: Path, store: FragmentStore, table: pa.Table) -> None:
    first = put(store, table, "a", "b")
    assert put(store, table, "b", "a", "b") == first
    assert put(store, table, "a").id != first.id
    assert put(store, table, "a", "b", site="z").id != first.id
    assert put(store, table.slice(1), "a", "b").id != first.id
    assert put(store, table.replace_schema_metadata({"k": "v"}), "a", "b").id != first.id
    assert len(store.list()) == len(files(tmp_path)) == 5


def test_the_last_put_decides_whether_metrics_may_be_shown(
    tmp_path: Path, store: FragmentStore, table: pa.Table
) -> None:
    assert put(store, table, allow_metrics=True).allow_metrics
    assert not put(store, table).allow_metrics
    store.close()
    again = FragmentStore(tmp_path / "data")
    assert [fragment.allow_metrics for fragment in again.list()] == [False]
    again.close()


def test_the_last_put_decides_which_labels_a_fragment_has(
    tmp_path: Path, store: FragmentStore, table: pa.Table
) -> None:
    first = put(store, table, labels={"region": "north"})
    assert put(store, table, labels={"region": "south"}).id == first.id
    store.close()
    again = FragmentStore(tmp_path / "data")
    assert [fragment.labels for fragment in again.list()] == [{"region": "south"}]
    again.close()


def test_the_index_is_read_back_from_disk(tmp_path: Path, table: pa.Table) -> None:
    clock = ManualClock()
    store = FragmentStore(tmp_path / "data", clock=clock)
    first = put(store, table, "ä/../\x00", site="Żółć")
    clock.advance(1)
    second = put(store, table, "b")
    store.close()
    again = FragmentStore(tmp_path / "data")
    assert again.list() == [first, second]
    assert read(again, first).equals(table)
    again.close()


def test_leftovers_of_a_crash_are_cleaned_and_foreign_files_are_left(
    tmp_path: Path, store: FragmentStore, table: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    whole = put(store, table)
    broken = put(store, table, "broken")
    store.close()
    path = tmp_path / "data" / "fragments" / f"{broken.id}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "data" / "fragments" / f"f-{'0' * 32}.parquet").write_bytes(b"")
    (tmp_path / "data" / "incoming" / "half.parquet").write_bytes(b"PAR1")
    again = FragmentStore(tmp_path / "data")
    assert again.list() == [whole]
    assert not list((tmp_path / "data" / "incoming").iterdir())
    assert len(files(tmp_path)) == 3
    assert f"{broken.id}.parquet' is not a readable fragment and is ignored" in caplog.text
    assert put(again, table, "broken").id == broken.id, "putting it again mends it"
    assert read(again, broken).equals(table)
    again.close()


def test_a_damaged_fragment_is_named_when_it_is_read(tmp_path: Path, store: FragmentStore) -> None:
    fragment = put(store, pa.table({"a": [bytes([n % 251]) * 999 for n in range(500)]}))
    path = tmp_path / "data" / "fragments" / f"{fragment.id}.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(FailedError, match=f"fragment {fragment.id} is damaged .* 'flops data rm"):
        read(store, fragment)


def test_a_store_belongs_to_one_process(tmp_path: Path, store: FragmentStore) -> None:
    with pytest.raises(ConflictError, match=r"another data server has '.*' open - stop it"):
        FragmentStore(tmp_path / "data")


def test_a_put_that_fails_leaves_nothing(tmp_path: Path, store: FragmentStore) -> None:
    def batches(writer: FragmentWriter) -> None:
        writer.write(pa.record_batch({"a": [1]}))
        raise RuntimeError("the client is gone")

    with pytest.raises(RuntimeError, match="the client is gone"):
        store.put(pa.schema([("a", pa.int64())]), batches, tags=["t"], site="s")
    assert store.list() == []
    assert not files(tmp_path)
    assert not list((tmp_path / "data" / "incoming").iterdir())


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (Limits(max_fragment_bytes=500), InvalidInputError, "the table has more than 500 bytes"),
        (Limits(max_batch_bytes=500), InvalidInputError, "one batch of the table has .* limit is 500"),
        (Limits(reserve_bytes=1 << 60), UnavailableError, "the data server's disk has .* make room"),
    ],
)
def test_limits_are_kept(
    tmp_path: Path, table: pa.Table, limits: Limits, error: type[Exception], message: str
) -> None:
    store = FragmentStore(tmp_path / "data", limits)
    with pytest.raises(error, match=message):
        put(store, table)
    assert not list((tmp_path / "data" / "incoming").iterdir())
    store.close()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"a": pa.array([], pa.int64())}), "the table has no rows"),
        (pa.table([[1], [2]], names=["a", "a"]), "the table has 'a' more than once"),
        (pa.table({}), "the table has 0 columns"),
        (pa.table({"a": [pa.MonthDayNano([1, 2, 3])]}), "the table cannot be stored"),
        (pa.table({"a": pa.array([None], pa.list_(pa.int8(), 2))}), "Expected all lists to be of"),
    ],
)
def test_tables_that_cannot_be_stored_are_refused(
    store: FragmentStore, table: pa.Table, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        put(store, table)


def test_dictionaries_are_stored_as_their_values(store: FragmentStore) -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    nested = pa.StructArray.from_arrays([words], names=["word"])
    fragment = put(store, pa.table({"word": words, "nested": nested}))
    assert fragment.columns == {"word": "string", "nested": "struct<word: string>"}
    assert read(store, fragment).column("word").to_pylist() == ["a", "b", "a"]


def test_tags_select_any_and_sites_exactly(store: FragmentStore, table: pa.Table) -> None:
    one = put(store, table, "a", "b", site="x")
    two = put(store, table, "b", "c", site="x")
    put(store, table, "a", site="y")
    assert {f.id for f in store.list(["a", "c"], "x")} == {one.id, two.id}
    assert [f.site for f in store.list(["a"], "y")] == ["y"]
    assert store.list(["nowhere"]) == []
    assert len(store.list()) == 3


def test_matching_fragments_are_one_table_in_the_order_of_their_ids(store: FragmentStore) -> None:
    fragments = [put(store, pa.table({"a": [number]}), "t") for number in range(5)]
    schema, batches = store.read_matching(["t", "other"], "s")
    expected = [read(store, f)["a"][0].as_py() for f in sorted(fragments, key=lambda f: f.id)]
    assert pa.Table.from_batches(batches, schema)["a"].to_pylist() == expected


def test_fragments_whose_columns_differ_are_not_read_together(store: FragmentStore) -> None:
    put(store, pa.table({"a": [1], "b": [1], "c": [1]}))
    put(store, pa.table({"a": [1], "b": ["1"]}))
    with pytest.raises(InvalidInputError, match="fragments of one site") as caught:
        store.read_matching(["t"], "s")
    assert "column 'b' is " in str(caught.value)
    assert "column 'c' of f-" in str(caught.value)
    assert "'a'" not in str(caught.value)


def test_columns_in_another_order_are_brought_into_one(store: FragmentStore) -> None:
    put(store, pa.table({"a": [1], "b": ["x"]}))
    put(store, pa.table({"b": ["y"], "a": [2]}))
    schema, batches = store.read_matching(["t"], "s")
    rows = pa.Table.from_batches(batches, schema).to_pylist()
    assert sorted((row["a"], row["b"]) for row in rows) == [(1, "x"), (2, "y")]


def test_hugging_face_features_must_agree_or_be_absent(store: FragmentStore) -> None:
    def features(*names: str) -> dict[str, str]:
        listed = ", ".join(f'"{name}"' for name in names)
        label = f'{{"names": [{listed}], "_type": "ClassLabel"}}'
        return {"huggingface": f'{{"info": {{"features": {{"label": {label}}}}}}}'}

    plain = pa.table({"label": [0, 1]})
    put(store, plain, "plain", "any")
    put(store, plain.replace_schema_metadata(features("cat", "dog")), "pets", "any")
    put(store, plain.replace_schema_metadata(features("dog", "cat")), "pets")
    schema, _ = store.read_matching(["any"], "s")
    assert schema.metadata[b"huggingface"] == features("cat", "dog")["huggingface"].encode()
    with pytest.raises(InvalidInputError, match="the features of 'label' differ in f-"):
        store.read_matching(["pets"], "s")


def test_a_drop_does_not_disturb_a_reader(store: FragmentStore) -> None:
    table = pa.table({"a": pa.array(range(3_000_000))})
    fragment = put(store, table)
    schema, batches = store.read(fragment.id)
    first = next(batches)
    assert store.drop(fragment.id) == [fragment]
    rest = pa.Table.from_batches([first, *batches], schema)
    assert rest.equals(table)
    with pytest.raises(NotFoundError, match=f"there is no fragment {fragment.id} - see 'flops data"):
        store.read(fragment.id)


def test_a_fragment_dropped_before_its_turn_is_named(store: FragmentStore, table: pa.Table) -> None:
    fragments = [put(store, table.slice(number), "t") for number in range(2)]
    _, batches = store.read_matching(["t"], "s")
    next(batches)
    last = max(fragment.id for fragment in fragments)
    store.drop(last)
    with pytest.raises(ConflictError, match=f"fragment {last} was dropped while it was being read"):
        list(batches)


def test_drop_takes_an_id_or_tags_or_a_site_but_not_nothing(
    tmp_path: Path, store: FragmentStore, table: pa.Table
) -> None:
    put(store, table, "a", site="x")
    put(store, table, "b", site="x")
    keep = put(store, table, "a", site="y")
    with pytest.raises(InvalidInputError, match="nothing says which fragments to drop"):
        store.drop()
    assert [f.site for f in store.drop(tags=["a"], site="x")] == ["x"]
    assert len(store.drop(site="x")) == 1
    assert store.drop(tags=["a", "b"], site="x") == []
    store.close()
    again = FragmentStore(tmp_path / "data")
    assert again.list() == [keep]
    again.close()
