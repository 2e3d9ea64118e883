"""Handwritten digits, learned by plain stochastic gradient descent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_manager import DataManager
from models import MODELS
from torch import nn

from flops_utils.ml_repo_templates import ModelManagerTemplate

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text())


class ModelManager(ModelManagerTemplate):
    """E epochs of SGD with batches of B a round, as settings.json says; with FedProx, held near the start."""

    def __init__(self) -> None:
        self.model = MODELS[SETTINGS["model"]]()
        self.proximal_mu = 0.0

    def set_model_data(self) -> None:
        (self.x_train, self.y_train), (self.x_test, self.y_test) = DataManager().get_data()

    def get_model(self) -> nn.Module:
        return self.model

    def get_input_example(self) -> np.ndarray:
        return np.zeros((2, 28, 28), np.float32)  # two: a batch of one would be taken for the only size

    def get_model_parameters(self) -> list[np.ndarray]:
        return [parameter.detach().numpy() for parameter in self.model.parameters()]

    def set_model_parameters(self, parameters: list[np.ndarray]) -> None:
        with torch.no_grad():
            for mine, given in zip(self.model.parameters(), parameters, strict=True):
                mine.copy_(torch.from_numpy(given))

    def configure_round(self, config: dict[str, Any]) -> None:
        """What the strategy tells its learners: FedProx tells how strongly to hold on to the global model."""
        self.proximal_mu = float(config.get("proximal-mu", 0.0))

    def fit_model(self) -> int:
        self.model.train()
        parameters = list(self.model.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        optimiser = torch.optim.SGD(parameters, lr=SETTINGS["learning_rate"])
        for _ in range(SETTINGS["epochs"]):
            for batch in torch.randperm(len(self.y_train)).split(SETTINGS["batch_size"]):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(self.model(self.x_train[batch]), self.y_train[batch])
                loss.backward()
                if self.proximal_mu:
                    # The gradient of mu / 2 * |w - w_start|^2 (Li et al. 2020, arXiv:1812.06127, equation 2).
                    for parameter, origin in zip(parameters, start, strict=True):
                        parameter.grad.add_(parameter.detach() - origin, alpha=self.proximal_mu)
                optimiser.step()
        return len(self.y_train)

    def evaluate_model(self) -> tuple[float, float, int]:
        self.model.eval()
        with torch.no_grad():
            scores = self.model(self.x_test)
        loss = nn.functional.cross_entropy(scores, self.y_test)
        accuracy = (scores.argmax(1) == self.y_test).float().mean()
        return float(loss), float(accuracy), len(self.y_test)
