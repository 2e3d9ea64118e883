"""Strategies under attack: 20 % of the learners flip labels, or (separately) return Gaussian noise, on MNIST.

Fifteen learners, three of them attackers: the fewest with which Bulyan tolerates 20 % (n >= 4 f + 3).
Attackers are learners like all others, with the same code; what they are is written in their data. Label
flipping: the training labels are y -> 9 - y. Gaussian: instead of a trained model they return N(0, sigma^2)
for every parameter. The test images lie at the honest learners (an attacker has one), so the reported
accuracy is that on MNIST's test set whoever is ejected.

The limit beside it, measured in the same run: the same code trained in one place on all honest data for as
many epochs as there are rounds.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.robustness --virtual --json -
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import report
from benchmarks.federated import Flops, Images, Labels, flops, load_mnist, say
from flops.data import DataClient

REPOSITORY = Path(__file__).resolve().parent / "attacked_mnist"
LEARNERS, ATTACKERS = 15, 3
SIGMA = 1.0
HONEST_TAG = "robust-honest"
SCENARIOS = {"none": "robust-none", "label-flipping": "robust-flip", "gaussian": "robust-gauss"}


def strategies(norm: float) -> dict[str, dict[str, Any]]:
    """What is compared, as parts of the specification.

    Args:
        norm: how far an honest learner moves in its first round; the norm gate stands at twice that.
    """
    return {
        "FedAvg": {"strategy": "FedAvg"},
        "FedMedian": {"strategy": "FedMedian"},
        "FedTrimmedAvg": {
            "strategy": {"name": "FedTrimmedAvg", "parameters": {"beta": ATTACKERS / LEARNERS}}
        },
        "Krum": {"strategy": {"name": "Krum", "parameters": {"num_malicious_nodes": ATTACKERS}}},
        "MultiKrum": {
            "strategy": {
                "name": "MultiKrum",
                "parameters": {
                    "num_malicious_nodes": ATTACKERS,
                    "num_nodes_to_select": LEARNERS - ATTACKERS,
                },
            }
        },
        "Bulyan": {"strategy": {"name": "Bulyan", "parameters": {"num_malicious_nodes": ATTACKERS}}},
        "FedAvg + max_update_norm": {"strategy": "FedAvg", "max_update_norm": round(2 * norm, 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.robustness", description=__doc__.split("\n")[0])
    parser.add_argument("--home", type=Path, help="a FLOPS_HOME to use and leave; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", help="strategies; default: all")
    parser.add_argument("--virtual", action="store_true", help="learners in a few processes")
    report.add_json_option(parser)
    options = parser.parse_args()
    with flops(options.home) as flops_:
        data = (
            load_mnist(flops_.settings.datasets_dir, "train"),
            load_mnist(flops_.settings.datasets_dir, "test"),
        )
        limit, norm = central(*data, options.rounds)
        say(f"in one place: {limit:.4f}; an honest first update is {norm:.3f} long")
        with flops_.data() as client:
            put(client, *data)
        chosen = {
            name: part for name, part in strategies(norm).items() if not options.only or name in options.only
        }
        result = {
            name: {attack: run(flops_, name, attack, part, options) for attack in SCENARIOS}
            for name, part in chosen.items()
        }
    report.write(
        {
            "benchmark": "robustness",
            "learners": LEARNERS,
            "attackers": ATTACKERS,
            "rounds": options.rounds,
            "sigma": SIGMA,
            "virtual": options.virtual,
            "accuracy": result,
            "limit_accuracy": limit,
            "limit": "the same code in one place, all honest data, as many epochs as rounds",
            "honest_update_norm": norm,
        },
        options.json,
    )


def run(
    flops_: Flops, name: str, attack: str, part: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One training; its accuracy after the last round, over MNIST's whole test set."""
    outcome = flops_.train(
        {
            "repo": str(REPOSITORY),
            "name": f"{attack}-{''.join(letter for letter in name if letter.isalnum())}",
            "training": {
                "rounds": options.rounds,
                "learners": LEARNERS,
                "min_available_learners": LEARNERS - ATTACKERS,  # attackers may be ejected
                "min_fit_learners": LEARNERS - ATTACKERS,
                **({"virtual": True} if options.virtual else {}),
                **part,
            },
            "data": {"tags": [HONEST_TAG, SCENARIOS[attack]]},
        },
        quiet=True,
    )
    say(f"{name}, {attack}: {outcome.accuracies[-1] if outcome.accuracies else outcome.reason}")
    return {
        "final": outcome.accuracies[-1] if outcome.accuracies else None,
        "best": max(outcome.accuracies, default=None),
        "rounds": len(outcome.accuracies),
        "state": outcome.state,
        "ejected": len(outcome.ejected),
        **({"reason": outcome.reason} if outcome.reason else {}),
    }


def put(client: DataClient, train: tuple[Images, Labels], test: tuple[Images, Labels]) -> None:
    """One fragment for each learner; for each attacker one for every scenario, under its own tag."""
    random = np.random.default_rng(0)
    parts = np.array_split(random.permutation(len(train[1])), LEARNERS)
    honest = LEARNERS - ATTACKERS
    test_order = random.permutation(len(test[1]))
    test_parts = [
        *np.array_split(test_order[:-ATTACKERS], honest),
        *np.array_split(test_order[-ATTACKERS:], ATTACKERS),
    ]
    for number, (part, test_part) in enumerate(zip(parts, test_parts, strict=True)):
        images, labels = train[0][part], train[1][part]
        judged = test[0][test_part], test[1][test_part]
        site = f"site-{number + 1:02}"
        if number < honest:
            client.put(table(images, labels, judged, 0.0), [HONEST_TAG], site, allow_metrics=True)
            continue
        for attack, tag in SCENARIOS.items():
            given = 9 - labels if attack == "label-flipping" else labels
            sigma = SIGMA if attack == "gaussian" else 0.0
            client.put(table(images, given, judged, sigma), [tag], site, allow_metrics=True)


def table(images: Images, labels: Labels, test: tuple[Images, Labels], sigma: float) -> pa.Table:
    """One learner's rows: to train on, then to judge."""
    pixels = np.concatenate([images, test[0]]).reshape(-1)
    return pa.table(
        {
            # Not as PNG files: decoding them would be most of the work of these short trainings.
            "image": pa.FixedSizeListArray.from_arrays(pa.array(pixels), 28 * 28),
            "label": np.concatenate([labels, test[1]]),
            "split": ["train"] * len(labels) + ["test"] * len(test[1]),
            "sigma": [sigma] * (len(labels) + len(test[1])),
        }
    )


def central(train: tuple[Images, Labels], test: tuple[Images, Labels], epochs: int) -> tuple[float, float]:
    """Accuracy of the repository's code in one place, and how far an honest learner moves in a round."""
    sys.path.insert(0, str(REPOSITORY))
    from model_manager import ModelManager

    np.random.seed(0)
    manager = ModelManager()
    manager.x_test, manager.y_test = _rows(test[0]), test[1]
    start = [array.copy() for array in manager.get_model_parameters()]
    order = np.random.default_rng(0).permutation(len(train[1]))
    share = order[: len(order) // LEARNERS]
    manager.x_train, manager.y_train = _rows(train[0][share]), train[1][share]
    manager.fit_model()
    moved = zip(manager.get_model_parameters(), start, strict=True)
    norm = float(np.sqrt(sum(float(((after - before) ** 2).sum()) for after, before in moved)))
    manager.set_model_parameters(start)
    honest = order[: len(order) * (LEARNERS - ATTACKERS) // LEARNERS]
    manager.x_train, manager.y_train = _rows(train[0][honest]), train[1][honest]
    for _ in range(epochs):
        manager.fit_model()
    return float(manager.evaluate_model()[1]), norm


def _rows(images: Images) -> np.ndarray[Any, Any]:
    return images.reshape(len(images), -1).astype(np.float32) / 255


if __name__ == "__main__":
    main()
