"""A data frame in, a data frame out, with a parameter."""

# mypy: ignore-errors

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Scaled(PythonModel):
    def predict(self, context, model_input, params=None):
        factor = (params or {}).get("factor", 1.0)
        note = model_input["note"] if "note" in model_input else ["none"] * len(model_input)
        return pd.DataFrame({"y": model_input["x"] * factor, "note": note, "big": model_input["x"] > 10})


set_model(Scaled())
