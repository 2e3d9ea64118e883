import io

import httpx
import pyarrow as pa
import pyarrow.parquet as pq


def parquet() -> bytes:
    table = pa.table({"x": [1.0, 2.0, 3.0], "label": [0, 1, 0]})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"huggingface": b"{}"}), buffer)
    return buffer.getvalue()


def test_a_fragment_is_put_listed_and_dropped(client: httpx.Client) -> None:
    put = client.post(
        "/v1/data/fragments", params={"tag": ["ward 7", "ü"], "site": "north"}, content=parquet()
    )
    assert put.status_code == 201, put.text
    fragment = put.json()
    assert (fragment["tags"], fragment["site"], fragment["num_examples"]) == (["ward 7", "ü"], "north", 3)
    listed = client.get("/v1/data/fragments", params={"tag": "ward 7"}).json()["fragments"]
    assert listed == [fragment]
    assert client.get("/v1/data/fragments", params={"site": "south"}).json() == {"fragments": []}
    assert client.delete(f"/v1/data/fragments/{fragment['id']}").status_code == 204
    assert client.get("/v1/data/fragments", params={"tag": "ward 7"}).json() == {"fragments": []}
    assert client.delete(f"/v1/data/fragments/{fragment['id']}").status_code == 404


def test_labels_of_a_place_are_put_and_listed(client: httpx.Client) -> None:
    params = {"tag": "labelled", "label": ["region=north", "speed=a=b"]}
    put = client.post("/v1/data/fragments", params=params, content=parquet())
    assert put.status_code == 201, put.text
    listed = client.get("/v1/data/fragments", params={"tag": "labelled"}).json()["fragments"]
    assert [fragment["labels"] for fragment in listed] == [{"region": "north", "speed": "a=b"}]
    for wrong in (["region"], ["a=1", "a=2"], ["=x"], ["a="]):
        answer = client.post("/v1/data/fragments", params={"tag": "x", "label": wrong}, content=parquet())
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")


def test_what_is_not_parquet_is_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/data/fragments", params={"tag": "x"}, content=b"hello")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")
    untagged = client.post("/v1/data/fragments", content=parquet())
    assert untagged.json()["detail"] == "a fragment needs a tag - send at least one, as ?tag=NAME"


def test_a_known_data_set_is_spread_over_sites(client: httpx.Client) -> None:
    request = {"dataset": "digits", "tags": ["digits"], "sites": 3, "num_examples": 90}
    fragments = client.post("/v1/data/mock", json=request).json()["fragments"]
    assert [fragment["site"] for fragment in fragments] == ["site-1", "site-2", "site-3"]
    assert sum(fragment["num_examples"] for fragment in fragments) == 90
    assert client.post("/v1/data/mock", json=request).json()["fragments"] == fragments
