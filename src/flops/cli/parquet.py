"""Files of tables as Parquet, which is what the manager takes."""

from pathlib import Path
from typing import BinaryIO

from flops.core.errors import InvalidInputError


def parquet_file(path: Path) -> BinaryIO:
    """The file, open, if it is Parquet; a CSV file is turned into Parquet in memory.

    Raises:
        InvalidInputError: it cannot be read as either.
    """
    if path.suffix.lower() == ".csv":
        return _csv_as_parquet(path)
    file = path.open("rb")
    start = file.read(4)
    file.seek(0)
    if start != b"PAR1":
        file.close()
        raise InvalidInputError(f"'{path}' is no Parquet file - give a .parquet or a .csv file")
    return file


def _csv_as_parquet(path: Path) -> BinaryIO:
    import io

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pyarrow.csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"'{path}' cannot be read as CSV: {error}") from error
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    buffer.seek(0)
    return buffer
