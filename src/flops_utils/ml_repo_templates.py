"""The two classes that a FLOps repository fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, List, Tuple

import numpy as np


class DataManagerTemplate(ABC):
    """Loads a learner's data with `load_dataset` and gives it to the model."""

    @abstractmethod
    def _prepare_data(self, *args: Any, **kwargs: Any) -> Any:
        """Load, clean, scale and split the data."""

    @abstractmethod
    def get_data(self) -> Tuple[Any, Any]:
        """Training data and test data, in any form that the ModelManager understands."""


class ModelManagerTemplate(ABC):
    """The model of the repository: what it is, and how it is trained and judged.

    The constructor takes no arguments and touches no data: it also runs where there are none.
    """

    @abstractmethod
    def set_model_data(self) -> None:
        """Load the data through the DataManager. Runs on learners only, once."""

    @abstractmethod
    def get_model(self) -> Any:
        """The model object itself."""

    @abstractmethod
    def get_model_parameters(self) -> List[np.ndarray[Any, Any]]:
        """All parameters that are learned together, always in the same order, shapes and dtypes."""

    @abstractmethod
    def set_model_parameters(self, parameters: List[np.ndarray[Any, Any]]) -> None:
        """Take over parameters as `get_model_parameters` gives them."""

    @abstractmethod
    def fit_model(self) -> int:
        """Train on the learner's training data; returns the number of training examples."""

    @abstractmethod
    def evaluate_model(self) -> Tuple[float, float, int]:
        """Judge the model on the learner's test data; returns loss, accuracy, number of test examples."""
