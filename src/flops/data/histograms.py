"""Histograms of labels that a site gives out: with noise, by its owner's leave, within a budget.

What leaves is differentially private in the examples of the site (see `Histograms.ask`). Noise must not
average out: the same question about the same data has one answer, kept on disk, and every other question
spends from the budget of the data it is about. Both outlive the server and the fragments: data that are
dropped and put again have spent what they spent.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flops.core.errors import ConflictError, FailedError, InvalidInputError
from flops.data.fragments import Fragment, check_site, check_tags, quoted
from flops.data.images import SPLIT
from flops.data.noise import discrete_laplace
from flops.data.schemas import class_labels
from flops.data.store import FragmentStore

DEFAULT_BUDGET = 10.0
"""The epsilon that all different questions about one fragment may cost together."""

MAX_CLASSES = 1000
_ONE_EXAMPLE = 2
"""How much the histogram changes, added up over its classes, when one example becomes another."""


class Histograms:
    """Answers of one store. Thread-safe; one process at a time, as the store's lock has it."""

    def __init__(self, store: FragmentStore, ledger: Path, budget: float = DEFAULT_BUDGET) -> None:
        """Open (or begin) the ledger.

        Raises:
            FailedError: the ledger is damaged; nothing is answered without it.
        """
        self._store = store
        self._path = ledger
        self._budget = budget
        self._mutex = threading.Lock()
        self._spent: dict[str, float] = {}
        self._answers: dict[str, dict[str, int]] = {}
        try:
            content = json.loads(ledger.read_bytes())
            self._spent = {str(key): float(value) for key, value in content["spent"].items()}
            self._answers = {
                str(key): {str(name): int(count) for name, count in answer.items()}
                for key, answer in content["answers"].items()
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FailedError(
                f"the ledger of histograms '{ledger}' is damaged ({error}) - restore it; without it, what "
                "was already given out about these data is not known"
            ) from error

    def ask(self, tags: object, site: object, epsilon: object) -> dict[str, int]:
        """How many examples of each class a site holds under any of the tags, with noise; never below zero.

        Epsilon-differentially private for an example that becomes another one (the number of examples is no
        secret, fragments tell it): that moves two counts by one each, so every count gets discrete Laplace
        noise of scale 2 / epsilon (L1 sensitivity 2). Its standard deviation is about 2.8 / epsilon. Rows
        whose column ``split`` says "test" do not count, nor rows of no known class. The classes are those
        that the column's ClassLabel feature names, so that what is listed says nothing about the data.

        Args:
            epsilon: privacy budget of this question, above 0 and at most 100.
        Returns: counts by name of the class, in the order of the feature.

        Raises:
            InvalidInputError: an epsilon out of bounds, no matching fragment, or no column of classes.
            ConflictError: an owner did not allow metrics of the data, or their budget is spent.
        Source:
            Dwork, Roth 2014, The Algorithmic Foundations of Differential Privacy, section 3.3 (histograms)
            and theorem 3.16 (budgets add up); noise: `flops.data.noise`.
        """
        tags, site = check_tags(tags), check_site(site)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 100:
            raise InvalidInputError(f"epsilon is {epsilon!r:.40} - use a number above 0, at most 100")
        found = self._store.matching(tags, site)
        closed = [fragment.id for fragment, _, _ in found if not fragment.allow_metrics]
        if closed:
            raise ConflictError(
                f"the owner of {', '.join(closed[:3])} at site {quoted([site])} does not allow metrics of "
                "these data, and a histogram is one - leave the site out, or put them with --allow-metrics"
            )
        # An example that lies there twice, under other tags, counts once: else it would weigh twice.
        contents = {fragment.content_hash: (fragment, schema, path) for fragment, schema, path in found}
        column, classes = _classes(schema for _, schema, _ in contents.values())
        question = _digest("answer", site, sorted(contents), column, classes, float(epsilon))
        purses = [_digest("spent", site, content) for content in sorted(contents)]
        with self._mutex:
            if question in self._answers:
                return dict(self._answers[question])
            left = self._budget - max(self._spent.get(purse, 0.0) for purse in purses)
            if epsilon > left * (1 + 1e-9):
                raise ConflictError(
                    f"a histogram of site {quoted([site])} with epsilon {epsilon:g} is more than the "
                    f"{max(left, 0):g} left of its privacy budget of {self._budget:g} - ask what was asked "
                    "before, which is answered as before, or ask with a smaller epsilon"
                )
            exact = _count(contents.values(), column, classes)
            scale = Fraction(_ONE_EXAMPLE) / Fraction(epsilon)
            answer = {name: max(0, exact[name] + discrete_laplace(scale)) for name in classes}
            spent = self._spent | {purse: self._spent.get(purse, 0.0) + epsilon for purse in purses}
            answers = self._answers | {question: answer}
            _write(self._path, {"spent": spent, "answers": answers})  # before anybody sees it
            self._spent, self._answers = spent, answers
        return dict(answer)


def _classes(schemas: Iterable[pa.Schema]) -> tuple[str, list[str]]:
    found = [class_labels(schema) for schema in schemas]
    if any(one is None or one != found[0] for one in found) or found[0] is None:
        raise InvalidInputError(
            "the data do not say which classes there are, or not all the same - put them with a column of "
            "Hugging Face's feature ClassLabel"
        )
    column, classes = found[0]
    if not 0 < len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
        raise InvalidInputError(
            f"column {quoted([column])} has {len(classes)} classes - a histogram is made of 1 to "
            f"{MAX_CLASSES}, each with a name of its own"
        )
    return column, classes


def _count(
    found: Iterable[tuple[Fragment, pa.Schema, Path]], column: str, classes: list[str]
) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    for fragment, schema, path in found:
        columns = [column, SPLIT] if SPLIT in schema.names else [column]
        try:
            with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as parquet:
                for batch in parquet.iter_batches(columns=columns):
                    values = batch.column(column)
                    if SPLIT in columns:
                        test = pc.fill_null(pc.equal(batch.column(SPLIT).cast(pa.string()), "test"), False)
                        values = values.filter(pc.invert(test))
                    for pair in pc.value_counts(values).to_pylist():
                        if pair["values"] is not None and 0 <= pair["values"] < len(classes):
                            counts[classes[int(pair["values"])]] += pair["counts"]
        except FileNotFoundError as error:
            raise ConflictError(f"fragment {fragment.id} was dropped meanwhile - ask again") from error
        except (OSError, pa.ArrowException) as error:
            raise FailedError(
                f"fragment {fragment.id} is damaged on the data server's disk - "
                f"drop it with 'flops data rm {fragment.id}' and put it again"
            ) from error
    return counts


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="ascii") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
