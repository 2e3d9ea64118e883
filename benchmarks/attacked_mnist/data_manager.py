"""The learner's images, and whether this learner is a Gaussian attacker: its data say so."""

from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_dataset
from flops_utils.ml_repo_templates import DataManagerTemplate


class DataManager(DataManagerTemplate):
    """Rows of column ``split`` "train" to learn from, "test" to judge; ``sigma`` above 0: an attacker."""

    def __init__(self) -> None:
        self.sigma = 0.0
        self.training_data, self.testing_data = self._prepare_data()

    def _prepare_data(self) -> Any:
        dataset = load_dataset()
        dataset.set_format("numpy")
        columns = dataset[:]
        images = np.stack(columns["image"]).astype(np.float32) / 255
        labels = np.asarray(columns["label"], np.int64)
        test = np.asarray(columns["split"]) == "test"
        self.sigma = float(columns["sigma"][0])
        return (images[~test], labels[~test]), (images[test], labels[test])

    def get_data(self) -> tuple[Any, Any]:
        return self.training_data, self.testing_data
