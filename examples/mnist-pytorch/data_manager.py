"""The learner's images, as PyTorch wants them."""

from typing import Any

import numpy as np
import torch

from flops_utils.ml_repo_building_blocks import load_dataset
from flops_utils.ml_repo_templates import DataManagerTemplate


class DataManager(DataManagerTemplate):
    """The local images by their column ``split``; without one, a fifth of them is kept for judging."""

    def __init__(self) -> None:
        self.training_data, self.testing_data = self._prepare_data()

    def _prepare_data(self) -> Any:
        dataset = load_dataset()
        dataset.set_format("numpy")
        columns = dataset[:]
        images = torch.from_numpy(columns["image"].astype(np.float32) / 255.0)
        labels = torch.from_numpy(columns["label"].astype(np.int64))
        if "split" in columns:
            test = torch.from_numpy(np.asarray(columns["split"]) == "test")
        else:
            order = np.random.default_rng(42).permutation(len(labels))
            test = torch.zeros(len(labels), dtype=torch.bool)
            test[order[: max(1, len(labels) // 5)]] = True
        return (images[~test], labels[~test]), (images[test], labels[test])

    def get_data(self) -> tuple[Any, Any]:
        """Pairs of images (N, 28, 28), grey from 0 to 1, and labels (N,)."""
        return self.training_data, self.testing_data
