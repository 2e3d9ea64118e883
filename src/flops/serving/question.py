"""What one request asks of the model, and what the model answered: checked values, no protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Part = tuple[str, Array | list[Any]]
"""A name, and its numbers (an array) or its texts and whatever else JSON can say (a list)."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request.

    Attributes:
        form: ``tensor``, ``tensors`` or ``frame`` as in `Signature`; ``body``: MLflow reads the body itself.
        parts: the inputs, by name.
        rows: how many there are; 0 where nobody counted.
        params: the model's parameters of this request.
        key: questions with the same key may be asked together; None: this one goes alone.
        body: only with form ``body``, with its `content_type`.
    """

    form: str
    parts: tuple[Part, ...] = ()
    rows: int = 0
    params: Mapping[str, Any] | None = None
    key: tuple[Any, ...] | None = None
    body: bytes = field(default=b"", repr=False)
    content_type: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model returned.

    Attributes:
        form: ``array`` one array; ``records`` a data frame by columns; ``dict`` arrays by name; ``rows`` a
            list; ``value`` anything else.
        parts: the values; one without a name but for ``records`` and ``dict``.
    """

    form: str
    parts: tuple[Part, ...]

    def split(self, rows: Sequence[int]) -> "list[Answer] | None":
        """The answers to questions that were asked together; None: it has not one row for each of theirs."""
        total = sum(rows)
        for _, values in self.parts:
            if self.form == "value" or (isinstance(values, np.ndarray) and not values.ndim):
                return None
            if len(values) != total:
                return None
        answers, start = [], 0
        for count in rows:
            end = start + count
            parts = tuple((name, values[start:end]) for name, values in self.parts)
            answers.append(Answer(self.form, parts))
            start = end
        return answers
