"""Logistic regression on handwritten digits."""

import warnings
from typing import Any

import numpy as np
from data_manager import DataManager
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from flops_utils.ml_repo_templates import ModelManagerTemplate

PIXELS = 28 * 28
CLASSES = np.arange(10)


class ModelManager(ModelManagerTemplate):
    """Ten steps of L-BFGS a round, each round from where the last one ended."""

    def __init__(self) -> None:
        self.model = LogisticRegression(solver="lbfgs", warm_start=True, max_iter=10)
        # What fitting would set, so that the model has its shapes (and can predict) before it saw any data.
        self.model.classes_ = CLASSES
        self.model.n_features_in_ = PIXELS
        self.model.coef_ = np.zeros((len(CLASSES), PIXELS))
        self.model.intercept_ = np.zeros(len(CLASSES))

    def set_model_data(self) -> None:
        (images, labels), (self.x_test, self.y_test) = DataManager().get_data()
        self.num_examples = len(labels)
        # A learner may lack some digits. One blank image of each, with no weight, keeps all ten in the model.
        self.x_train = np.concatenate([images, np.zeros((len(CLASSES), PIXELS))])
        self.y_train = np.concatenate([labels, CLASSES])
        self.weights = np.concatenate([np.ones(len(labels)), np.zeros(len(CLASSES))])

    def get_model(self) -> Any:
        return self.model

    def get_model_parameters(self) -> list[np.ndarray]:
        return [self.model.coef_, self.model.intercept_]

    def set_model_parameters(self, parameters: list[np.ndarray]) -> None:
        self.model.coef_, self.model.intercept_ = parameters

    def fit_model(self) -> int:
        with warnings.catch_warnings():
            # Ten steps are not meant to converge: the next round goes on.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(self.x_train, self.y_train, sample_weight=self.weights)
        return self.num_examples

    def evaluate_model(self) -> tuple[float, float, int]:
        probabilities = self.model.predict_proba(self.x_test)
        loss = log_loss(self.y_test, probabilities, labels=CLASSES)
        accuracy = accuracy_score(self.y_test, probabilities.argmax(axis=1))
        return float(loss), float(accuracy), len(self.y_test)
