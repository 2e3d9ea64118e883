"""Adds up each row, unless the first number of one tells it to do something else."""

# mypy: ignore-errors

import os
import time

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Moody(PythonModel):
    def predict(self, context, model_input, params=None):
        x = model_input["x"]
        for first, second in x:
            if first == -1:
                raise ValueError("minus one is more than this model can take")
            if first == -2:
                os._exit(7)
            if first == -3:
                time.sleep(600)
            if first == -4:
                time.sleep(second)
        return x.sum(axis=1) if not (x[:, 0] == -5).any() else np.full(len(x), np.nan)


set_model(Moody())
