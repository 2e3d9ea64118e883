"""A network with one hidden layer in numpy; a learner whose data mark it as an attacker returns noise."""

from typing import Any

import numpy as np
from data_manager import DataManager

from flops_utils.ml_repo_templates import ModelManagerTemplate

PIXELS, HIDDEN, CLASSES = 28 * 28, 64, 10
BATCH, LEARNING_RATE = 20, 0.1
Arrays = list[np.ndarray[Any, Any]]


class ModelManager(ModelManagerTemplate):
    """One epoch of stochastic gradient descent a round."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.parameters: Arrays = [
            random.normal(0, np.sqrt(2 / PIXELS), (PIXELS, HIDDEN)).astype(np.float32),
            np.zeros(HIDDEN, np.float32),
            random.normal(0, np.sqrt(2 / HIDDEN), (HIDDEN, CLASSES)).astype(np.float32),
            np.zeros(CLASSES, np.float32),
        ]
        self.sigma = 0.0

    def set_model_data(self) -> None:
        data = DataManager()
        (self.x_train, self.y_train), (self.x_test, self.y_test) = data.get_data()
        self.sigma = data.sigma

    def get_model(self) -> Any:
        return self

    def get_model_parameters(self) -> Arrays:
        return self.parameters

    def set_model_parameters(self, parameters: Arrays) -> None:
        self.parameters = [np.array(array) for array in parameters]

    def fit_model(self) -> int:
        if self.sigma:
            self.parameters = [
                np.asarray(np.random.normal(0, self.sigma, array.shape), np.float32)
                for array in self.parameters
            ]
            return len(self.y_train)
        order = np.random.permutation(len(self.y_train))
        for start in range(0, len(order), BATCH):
            self._step(order[start : start + BATCH])
        return len(self.y_train)

    def _step(self, batch: np.ndarray[Any, Any]) -> None:
        x = self.x_train[batch]
        hidden, probabilities = self._forward(x)
        error = probabilities
        error[np.arange(len(batch)), self.y_train[batch]] -= 1
        error /= len(batch)
        back = (error @ self.parameters[2].T) * (hidden > 0)
        gradients = (x.T @ back, back.sum(0), hidden.T @ error, error.sum(0))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter -= LEARNING_RATE * gradient

    def _forward(self, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        w1, b1, w2, b2 = self.parameters
        hidden = np.maximum(x @ w1 + b1, 0)
        scores = hidden @ w2 + b2
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return hidden, scores / scores.sum(1, keepdims=True)

    def evaluate_model(self) -> tuple[float, float, int]:
        _, probabilities = self._forward(self.x_test)
        right = probabilities[np.arange(len(self.y_test)), self.y_test]
        accuracy = (probabilities.argmax(1) == self.y_test).mean()
        return float(-np.log(right + 1e-9).mean()), float(accuracy), len(self.y_test)
