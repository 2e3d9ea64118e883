"""The two networks of McMahan et al. 2017 (arXiv:1602.05629, section 3)."""

from torch import nn


def two_nn() -> nn.Module:
    """The "2NN": two hidden layers of 200 units, ReLU; 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


def cnn() -> nn.Module:
    """Two 5 x 5 convolutions (32 and 64 channels), each with 2 x 2 max pooling, and 512 units; 1,663,370
    parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


MODELS = {"2nn": two_nn, "cnn": cnn}
