"""FederatedAveraging in one loop, without FLOps: the oracle of `benchmarks.convergence`.

Runs in the environment of the repository (PyTorch and numpy), over the repository's own ModelManager, and
prints the test accuracy after each round as a JSON list. Of FLOps it imports the two base classes only.

    PYTHON -m benchmarks.plain_fedavg CODE DATA.npz --rounds 100 --cohort 10 --target 0.97

Source:
    McMahan et al. 2017, arXiv:1602.05629, Algorithm 1.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.plain_fedavg", description=__doc__.split("\n")[0])
    parser.add_argument("code", type=Path, help="the repository")
    parser.add_argument("data", type=Path, help="images, labels, test_images, test_labels, part_0, ...")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--cohort", type=int, required=True, help="learners in a round")
    parser.add_argument("--target", type=float, default=1.0, help="end when the accuracy reaches it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="replace settings of the repository")
    options = parser.parse_args()
    sys.path.insert(0, str(options.code))
    import model_manager
    import torch

    torch.set_num_threads(1)
    model_manager.SETTINGS.update(options.settings)
    with np.load(options.data) as data:
        arrays = {name: data[name] for name in data.files}
    parts = [arrays[f"part_{number}"] for number in range(sum(name.startswith("part_") for name in arrays))]
    images = torch.from_numpy(arrays["images"].astype(np.float32) / 255.0)
    labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    manager = model_manager.ModelManager()
    test_images = torch.from_numpy(arrays["test_images"].astype(np.float32) / 255.0).split(500)
    test_labels = torch.from_numpy(arrays["test_labels"].astype(np.int64)).split(500)
    model = [array.copy() for array in manager.get_model_parameters()]
    accuracies: list[float] = []
    for _ in range(options.rounds):
        total: list[Any] = [np.zeros(array.shape, np.float64) for array in model]
        weight = 0
        for learner in random.choice(len(parts), options.cohort, replace=False):
            manager.set_model_parameters(model)
            manager.x_train, manager.y_train = images[parts[learner]], labels[parts[learner]]
            examples = manager.fit_model()
            weight += examples
            for sum_, array in zip(total, manager.get_model_parameters(), strict=True):
                sum_ += examples * array.astype(np.float64)
        model = [(sum_ / weight).astype(np.float32) for sum_ in total]
        manager.set_model_parameters(model)
        right = 0.0
        for manager.x_test, manager.y_test in zip(test_images, test_labels, strict=True):
            _, accuracy, examples = manager.evaluate_model()
            right += accuracy * examples
        accuracies.append(right / len(arrays["test_labels"]))
        print(f"oracle: round {len(accuracies)}: {accuracies[-1]:.4f}", file=sys.stderr, flush=True)
        if accuracies[-1] >= options.target:
            break
    print(json.dumps(accuracies))


if __name__ == "__main__":
    main()
