import io
from typing import TYPE_CHECKING

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.api.conftest import ManagerProcess


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


def test_data_owners_see_and_change_their_own_data_only(
    manager: "ManagerProcess", client: httpx.Client
) -> None:
    def sign_in(name: str) -> httpx.Client:
        client.post("/v1/users", json={"name": name, "role": "data-owner"}).raise_for_status()
        made = client.post("/v1/tokens", json={"user": name, "name": "test"}).raise_for_status()
        return manager.client(made.json()["token"])

    def put(person: httpx.Client, site: str) -> httpx.Response:
        return person.post("/v1/data/fragments", params={"tag": "owned", "site": site}, content=parquet())

    def seen_by(person: httpx.Client) -> list[str]:
        found = person.get("/v1/data/fragments", params={"tag": "owned"}).json()["fragments"]
        return sorted(fragment["site"] for fragment in found)

    dora, carl = sign_in("dora"), sign_in("carl")
    ours = put(client, "of-nobody").json()
    hers = put(dora, "of-dora").json()
    assert put(dora, "of-dora").status_code == 201
    for site in ("of-dora", "of-nobody"):
        refused = put(carl, site)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert f"site '{site}' is not yours" in refused.json()["detail"]
    assert carl.post("/v1/data/mock", json={"tags": ["owned"], "sites": ["of-dora"]}).status_code == 403
    assert (seen_by(dora), seen_by(carl)) == (["of-dora"], [])
    assert seen_by(client) == ["of-dora", "of-nobody"]
    assert carl.get("/v1/data/tags").json() == {"tags": []}
    for fragment in (ours, hers):
        assert carl.delete(f"/v1/data/fragments/{fragment['id']}").status_code == 404
    assert dora.delete(f"/v1/data/fragments/{hers['id']}").status_code == 204
    assert put(client, "of-dora").status_code == 201  # an admin may, and takes nothing away by it
    assert seen_by(dora) == ["of-dora"]
