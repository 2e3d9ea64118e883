"""The learner's images, as scikit-learn wants them."""

from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_dataset
from flops_utils.ml_repo_templates import DataManagerTemplate


class DataManager(DataManagerTemplate):
    """Four fifths of the local images to learn from, one fifth to judge the model."""

    def __init__(self) -> None:
        self.training_data, self.testing_data = self._prepare_data()

    def _prepare_data(self) -> Any:
        dataset = load_dataset()
        dataset.set_format("numpy")
        parts = dataset.train_test_split(test_size=0.2, seed=42)
        return self._flatten(parts["train"]), self._flatten(parts["test"])

    def get_data(self) -> tuple[Any, Any]:
        return self.training_data, self.testing_data

    @staticmethod
    def _flatten(part: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 28, 28) of 0..255 as rows (N, 784) of 0..1, and labels (N,)."""
        columns = part[:]  # both in one pass
        images = columns["image"]
        return images.reshape(len(images), -1) / 255.0, columns["label"]
