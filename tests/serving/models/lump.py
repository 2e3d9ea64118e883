"""Answers any number of rows with one number."""

# mypy: ignore-errors

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Lump(PythonModel):
    def predict(self, context, model_input, params=None):
        return {"sum": model_input["x"].sum(), "rows": len(model_input["x"])}


set_model(Lump())
