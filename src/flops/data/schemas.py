"""Schemas: which tables can be stored, and which of them can be read as one."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from flops.core.errors import InvalidInputError
from flops.data.fragments import quoted

MAX_COLUMNS = 20_000
MAX_SCHEMA_BYTES = 16 << 20

HUGGING_FACE = b"huggingface"
"""Schema metadata key under which the `datasets` library keeps a table's features."""


def storable(schema: pa.Schema) -> pa.Schema:
    """The schema under which a table is kept: the same, with dictionary encoding and views taken off.

    Dictionaries may change from batch to batch, which an Arrow IPC file cannot hold.

    Raises:
        InvalidInputError: no columns, too many, two of one name, or too much metadata.
    """
    names = schema.names
    if not names or len(names) > MAX_COLUMNS:
        raise InvalidInputError(f"the table has {len(names)} columns - a fragment has 1 to {MAX_COLUMNS}")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidInputError(f"the table has {quoted(twice)} more than once - rename columns")
    if schema.serialize().size > MAX_SCHEMA_BYTES:
        raise InvalidInputError(
            f"the table's schema and metadata exceed {MAX_SCHEMA_BYTES >> 20} MiB - shorten them"
        )
    fields = [field.with_type(_plain(field.type)) for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch with exactly this schema, metadata included: columns reordered and cast where needed.

    Raises:
        pyarrow.ArrowException: a column cannot be cast, or is missing (KeyError).
    """
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    columns = []
    for field in schema:
        column = batch.column(field.name)
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def shared(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The one schema under which several fragments can be read, one after the other.

    Columns must agree in name, type and Hugging Face feature; their order may differ, and is the first
    one's, as is the metadata (but features that only a later fragment carries are taken over).

    Args:
        schemas: fragment ids and their schemas, at least one.
    Raises:
        InvalidInputError: they differ; names the columns.
    """
    first_id, first = schemas[0]
    problems: list[str] = []
    nullable = {field.name: field.nullable for field in first}
    features = _features(first)
    metadata = dict(first.metadata or {})
    for other_id, other in schemas[1:]:
        problems += _differences(first_id, first, other_id, other)
        for field in other:
            nullable[field.name] = nullable.get(field.name, True) or field.nullable
        theirs = _features(other)
        if not features and theirs:
            features = theirs
            metadata[HUGGING_FACE] = other.metadata[HUGGING_FACE]
        elif theirs and theirs != features:
            differing = sorted(name for name in features | theirs if features.get(name) != theirs.get(name))
            problems.append(f"the features of {quoted(differing)} differ in {other_id}")
    if problems:
        raise InvalidInputError(
            f"fragments of one site cannot be read together: {'; '.join(problems[:5])} - "
            "give them different tags, or drop one (see 'flops data ls')"
        )
    fields = [field.with_nullable(nullable[field.name]) for field in first]
    return pa.schema(fields, metadata=metadata or None)


def class_labels(schema: pa.Schema) -> tuple[str, list[str]] | None:
    """The column of classes, by Hugging Face's ClassLabel feature, and the names of all classes.

    With several such columns it is ``label``, or else the first. None: there is none.
    """
    found = {
        name: feature["names"]
        for name, feature in _features(schema).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        if name in schema.names and pa.types.is_integer(schema.field(name).type)
        if isinstance(feature.get("names"), list)
    }
    if not found:
        return None
    column = "label" if "label" in found else next(name for name in schema.names if name in found)
    return column, [str(name) for name in found[column]]


def _differences(first_id: str, first: pa.Schema, other_id: str, other: pa.Schema) -> list[str]:
    problems = []
    mine = {field.name: field.type for field in first}
    theirs = {field.name: field.type for field in other}
    for name in mine.keys() | theirs.keys():
        if name not in theirs:
            problems.append(f"column {quoted([name])} of {first_id} is missing in {other_id}")
        elif name not in mine:
            problems.append(f"column {quoted([name])} of {other_id} is missing in {first_id}")
        elif mine[name] != theirs[name]:
            problems.append(
                f"column {quoted([name])} is {mine[name]} in {first_id} and {theirs[name]} in {other_id}"
            )
    return sorted(problems)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's features by column; metadata that does not parse is left to its reader."""
    text = (schema.metadata or {}).get(HUGGING_FACE)
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _plain(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        fields = [kind.field(position) for position in range(kind.num_fields)]
        return pa.struct([field.with_type(_plain(field.type)) for field in fields])
    if types.is_fixed_size_list(kind):
        field = kind.value_field
        return pa.list_(field.with_type(_plain(field.type)), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind
