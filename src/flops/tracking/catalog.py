"""The model registry, read: which versions there are, and their files.

A process of its own, because whoever asks (the manager) shall not carry MLflow's 160 MB:

    python -m flops.tracking.catalog --tracking-uri URI list
    python -m flops.tracking.catalog --tracking-uri URI download NAME VERSION DESTINATION

Answers are JSON on standard output: ``{"models": [...]}``, ``{"path"}`` or ``{"error": {"code", "detail"}}``
with exit status 1. Versions of the default store need no process: `RegisteredModel.path` is their folder.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops.core.errors import ConflictError, FlopsError, NotFoundError, UnavailableError
from flops.tracking import naming
from flops.tracking.commands import shown, without_secrets
from flops.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version in the registry; project and round are None for versions that FLOps did not make."""

    name: str
    version: int
    project: str | None
    round: int | None
    metrics: dict[str, float]
    created: float
    uri: str


class ModelCatalog:
    """The read side of a model registry; imports MLflow when made.

    Raises:
        UnavailableError: MLflow does not answer.
    """

    def __init__(self, tracking_uri: str, artifacts: Path | str) -> None:
        self._uri = tracking_uri
        self._client: MlflowClient = self._answer(open_store, tracking_uri, artifacts)

    def list(self) -> list[ModelVersion]:
        """All versions, the newest first."""
        found: list[Any] = []
        page: str | None = None
        while True:
            some = self._answer(self._client.search_model_versions, page_token=page)
            found += some
            page = some.token
            if not page:
                break
        versions = [self._version(version) for version in found]
        return sorted(versions, key=lambda version: version.created, reverse=True)

    def download(self, name: str, version: int, destination: Path) -> Path:
        """Copy a version's folder to ``destination``, which appears when it is complete.

        Raises:
            NotFoundError: no such version.
            ConflictError: the destination exists.
        """
        from mlflow.artifacts import download_artifacts

        if destination.exists():
            raise ConflictError(f"{destination} exists - name another destination")
        source = self._answer(self._client.get_model_version_download_uri, name, str(version))
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=destination.parent) as folder:
            aside = Path(folder, "model")
            aside.mkdir()
            self._answer(
                download_artifacts,
                artifact_uri=source,
                dst_path=str(aside),
                tracking_uri=self._uri,
            )
            # Remote stores put the folder itself below the destination, local ones its contents.
            inner = [aside, *aside.glob("*/")]
            model = next((place for place in inner if (place / "MLmodel").is_file()), aside)
            model.rename(destination)
        return destination

    def _version(self, version: Any) -> ModelVersion:
        metrics: dict[str, float] = {}
        # SQL stores keep the logged model's id in the source alone.
        model_id = version.model_id or version.source.removeprefix("models:/")
        if model_id.startswith("m-"):
            model = self._answer(self._client.get_logged_model, model_id)
            metrics = {metric.key: metric.value for metric in model.metrics or ()}
        number = version.tags.get(naming.ROUND_TAG, "")
        return ModelVersion(
            name=version.name,
            version=int(version.version),
            project=version.tags.get(naming.PROJECT_TAG),
            round=int(number) if number.isdecimal() else None,
            metrics=metrics,
            created=version.creation_timestamp / 1000,
            uri=f"models:/{version.name}/{version.version}",
        )

    def _answer(self, call: Any, *arguments: Any, **options: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return call(*arguments, **options)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFoundError(f"{error.message} - see 'flops models'") from error
            raise UnavailableError(
                f"MLflow at {shown(self._uri)} does not answer: "
                f"{without_secrets(str(error.message))} - try again later"
            ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.tracking.catalog", description=__doc__)
    parser.add_argument("--tracking-uri", default=os.environ.get("FLOPS_TRACKING_URI"))
    parser.add_argument("--artifacts", default="mlartifacts", help="used if the store has to be made")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    download = commands.add_parser("download")
    download.add_argument("name")
    download.add_argument("version", type=int)
    download.add_argument("destination", type=Path)
    options = parser.parse_args(arguments)
    if not options.tracking_uri:
        parser.error("--tracking-uri is missing")
    answer: dict[str, Any]
    try:
        catalog = ModelCatalog(options.tracking_uri, options.artifacts)
        if options.command == "list":
            answer = {"models": [asdict(version) for version in catalog.list()]}
        else:
            path = catalog.download(options.name, options.version, options.destination.absolute())
            answer = {"path": str(path)}
    except FlopsError as error:
        answer = {"error": {"code": error.code, "detail": str(error)}}
    json.dump(answer, sys.stdout)
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
