"""``save_models.py FOLDER``: the models that the tests serve, saved by MLflow."""

# mypy: ignore-errors

import sys
from pathlib import Path

import mlflow.pyfunc
import mlflow.sklearn
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

REQUIREMENTS = ["mlflow", "scikit-learn"]
HERE = Path(__file__).parent


def main(folder: Path) -> None:
    random = np.random.default_rng(1)
    pixels = random.random((200, 64))
    digits = LogisticRegression(max_iter=50).fit(pixels, np.arange(200) % 10)
    save(digits, folder / "digits", pixels[:2], digits.predict(pixels[:2]))
    mlflow.sklearn.save_model(digits, folder / "unsigned", pip_requirements=REQUIREMENTS)
    save(digits, folder / "probabilities", pixels[:2], digits.predict_proba(pixels[:2]), "predict_proba")

    people = pd.DataFrame(
        {
            "age": random.normal(40, 10, 60),
            "children": random.integers(0, 5, 60),
            "city": np.array(["Munich", "Vienna", "Zurich"])[np.arange(60) % 3],
            "married": np.arange(60) % 2 == 0,
        }
    )
    numbers = ["age", "children", "married"]
    prepare = ColumnTransformer(
        [("numbers", StandardScaler(), numbers), ("city", OneHotEncoder(handle_unknown="ignore"), ["city"])]
    )
    income = make_pipeline(prepare, LinearRegression()).fit(people, people["age"] * 3 + people["children"])
    save(income, folder / "income", people[:2], income.predict(people[:2]))
    town = make_pipeline(StandardScaler(), LogisticRegression()).fit(people[numbers], people["city"])
    save(town, folder / "town", people[numbers][:2], town.predict(people[numbers][:2]))

    signature = mlflow.models.ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float64"), (-1, 2), "x")]),
        outputs=Schema([TensorSpec(np.dtype("float64"), (-1,), "y")]),
    )
    for name in ("moody", "lump", "nothing_but_trouble"):
        save_code(name, folder, signature)
    scaled = mlflow.models.ModelSignature(
        inputs=Schema([ColSpec("double", "x"), ColSpec("string", "note", required=False)]),
        params=ParamSchema([ParamSpec("factor", "double", 1.0)]),
    )
    save_code("scaled", folder, scaled)


def save(model, path, inputs, outputs, function="predict"):
    mlflow.sklearn.save_model(
        model,
        path,
        signature=infer_signature(inputs, outputs),
        input_example=inputs,
        pip_requirements=REQUIREMENTS,
        pyfunc_predict_fn=function,
    )


def save_code(name, folder, signature):
    mlflow.pyfunc.save_model(
        folder / name,
        python_model=str(HERE / "models" / f"{name}.py"),
        signature=signature,
        pip_requirements=REQUIREMENTS,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
