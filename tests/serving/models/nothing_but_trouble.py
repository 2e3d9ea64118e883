"""Cannot be loaded."""

# mypy: ignore-errors

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Trouble(PythonModel):
    def load_context(self, context):
        raise RuntimeError("the weights are gone")

    def predict(self, context, model_input, params=None):
        return model_input


set_model(Trouble())
