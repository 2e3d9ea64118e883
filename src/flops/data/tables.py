"""Tables from the user's files: Parquet, Arrow, CSV, JSON lines and numpy archives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flops.core.errors import InvalidInputError


def read_table(path: Path) -> pa.Table:
    """Read a file of the user's; its format follows from its name, its metadata are kept.

    Numpy archives (``.npz``) hold one array per column, all with the same first dimension; further
    dimensions become lists of fixed size.

    Raises:
        InvalidInputError: no such file, an unknown kind of file, or broken content.
    """
    if not path.is_file():
        raise InvalidInputError(f"there is no file '{path}' - check its path")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidInputError(
            f"'{path}' is of no kind that can be put - use one of {', '.join(sorted(_READERS))}"
        )
    try:
        return reader(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InvalidInputError(
            f"'{path}' cannot be read as {path.suffix.lower()[1:]}: {reason} - "
            "mend the file, or give it the ending of what it is"
        ) from error


def _parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read()


def _arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            return pa.ipc.open_file(source).read_all()
        if magic[:4] == b"FEA1":
            raise ValueError("it is in Feather's first version; write it again with a newer one")
        return pa.ipc.open_stream(source).read_all()


def _csv(path: Path) -> pa.Table:
    from pyarrow import csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter))


def _json_lines(path: Path) -> pa.Table:
    from pyarrow import json

    return json.read_json(path)


def _npz(path: Path) -> pa.Table:
    # Pickled arrays run code when they are read.
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) != 1:
        raise ValueError(f"its arrays have different lengths: {lengths}")
    return pa.table({name: _column(array) for name, array in arrays.items()})


def _column(array: np.ndarray[Any, Any]) -> pa.Array:
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".parquet": _parquet,
    ".pq": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".ipc": _arrow,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".npz": _npz,
}
