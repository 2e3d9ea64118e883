"""What the steps of a project do, in the words of the rooms below: the one place where the manager calls
them.

Each step takes and gives plain JSON, may be repeated after a crash at any point, and runs in a process of its
own (`flops.manager.step_process`); so the rooms' imports are heavy here and nowhere else in the manager.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops.core.disk import is_full
from flops.core.errors import ConflictError, FailedError, FlopsError, InvalidInputError
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.core.spec import ClustersSpec, ProjectSpec, spec_from_mapping
from flops.manager import choosing, clustering, image_steps
from flops.manager.choosing import OFFERS
from flops.manager.paths import ProjectPaths, data_token_file
from flops.manager.sources import SOURCES, Source, Sources
from flops.manager.states import (
    AGGREGATOR_IMAGE,
    CLUSTERS,
    DATA,
    DATASET,
    IMAGES,
    MODEL_IMAGE,
    ONNX,
    post_training_steps,
)
from flops.manager.step_process import Progress

if TYPE_CHECKING:
    from flops.data import Fragment
    from flops.images import Lock
    from flops.repo import Contract, InitialModel

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 300.0
EXPORT_TIMEOUT_S = 300.0
_ATTEMPTS = 3
"""Of a step under which processes are killed."""
# What the user's environment needs in addition so that a model can be written in MLflow's format. Its flavors
# import pandas, which the skinny package leaves out; skops saves scikit-learn models without pickle.
_EXPORT_EXTRA = ("mlflow-skinny", "pandas")
_EXPORT_EXTRA_OF_FLAVOR = {"sklearn": ("skops",), "pytorch": ("scipy",)}
# Of what was added: what loading the model takes too. MLflow names itself.
_NEEDED_TO_LOAD = ("cloudpickle==", "pandas==", "skops==")


@dataclass(frozen=True)
class Work:
    """One step's surroundings: the project, its folder, and the results of earlier steps by name."""

    settings: Settings
    project: ProjectId
    spec: ProjectSpec
    results: Mapping[str, Mapping[str, Any]]
    arguments: Mapping[str, Any]
    progress: Progress

    @property
    def paths(self) -> ProjectPaths:
        return ProjectPaths.of(self.settings, self.project)


def run_step(step: str, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run one step by name.

    Raises:
        FlopsError: whatever goes wrong, other errors included (their traceback is in the log).
        OSError: no space is left on the disk.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _run(step, request, progress)
        except FlopsError as error:
            # Of uv, or of the process of the user's code: for lack of memory, or by somebody.
            if getattr(error, "signal", None) != "SIGKILL" or attempt == _ATTEMPTS:
                raise
            progress(f"a process of step '{step}' was killed, the step is begun again")
    raise AssertionError("unreachable")


def _run(step: str, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    settings = Settings(home=Path(request["home"]))
    try:
        if step in OWN_STEPS:
            return OWN_STEPS[step](settings, request.get("arguments", {}), progress)
        work = Work(
            settings,
            ProjectId(request["project"]),
            spec_from_mapping(request["spec"]),
            request.get("results", {}),
            request.get("arguments", {}),
            progress,
        )
        return PROJECT_STEPS[step](work)
    except FlopsError:
        raise
    except Exception as error:
        if is_full(error):
            raise
        log.exception("step '%s' failed", step)
        raise FailedError(f"step '{step}' failed: {type(error).__name__}: {error}") from error


def fetch(work: Work) -> dict[str, Any]:
    """The repository at one commit."""
    from flops import repo

    if work.paths.checkout.exists():  # of an attempt that was cut off
        shutil.rmtree(work.paths.checkout)
    checkout = repo.fetch(work.spec.repo, work.spec.ref, work.paths.checkout, work.progress)
    return {
        "path": str(checkout.path),
        "commit": checkout.commit,
        "warnings": list(checkout.warnings),
    }


def check_contract(work: Work) -> dict[str, Any]:
    """Which contract the repository keeps, and what it says it needs."""
    contract = inspect_repository(work)
    if contract.kind != "flops":
        raise InvalidInputError(
            f"'{work.spec.redacted_repo}' is a {contract.kind} app - this version runs repositories with a "
            "model_manager.py only"
        )
    return {"kind": contract.kind, "warnings": list(contract.requirements.warnings)}


def lock(work: Work) -> dict[str, Any]:
    """The repository's dependencies with every version decided."""
    found = resolve(work)
    return {"hash": found.hash, "python": found.python, "warnings": list(found.warnings)}


def environment(work: Work) -> dict[str, Any]:
    """An environment with exactly the lock's packages."""
    modules = None
    if work.arguments.get("runs_images"):  # it serves the check of the code alone: learners have images
        from flops.images import bytecode

        modules = bytecode.imports_of(bytecode.python_files(Path(work.results["fetch"]["path"])))
    return _environment(work, modules=modules)


def initial_model(work: Work) -> dict[str, Any]:
    """Initial parameters, from one run of the user's code without data, or those of a registered model."""
    from flops import repo
    from flops.guest import Room

    model = repo.check(
        Room(Path(work.results["environment"]["python"]), Path(work.results["fetch"]["path"])),
        work.paths.initial_model,
        CHECK_TIMEOUT_S,
    )
    initial = work.spec.model.initial
    if initial is not None:
        _start_from(Path(work.arguments["parameters"]), initial, model)
    result = {
        "path": str(model.path),
        "flavor": model.flavor,
        "num_parameters": model.layout.num_parameters,
        "size_bytes": model.layout.nbytes,
    }
    return result if initial is None else {**result, "initial": initial}


def _start_from(parameters: Path, name: str, model: "InitialModel") -> None:
    """Replace the code's own initial parameters by a registered model's, which must be the same arrays.

    Raises:
        InvalidInputError: they are not.
    """
    from flops_worker.tensors import read_layout

    with parameters.open("rb") as source:
        layout, start = read_layout(source.fileno())
        difference = model.layout.difference(layout)
        if difference:
            raise InvalidInputError(
                f"model {name} does not fit this repository's model: {difference} - name a model with the "
                "same arrays in model.initial, or leave it out"
            )
        aside = model.path.with_name(f".{model.path.name}.initial")
        source.seek(start)
        with aside.open("wb") as target:
            target.write(model.layout.file_header())
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
    aside.replace(model.path)


def dataset(work: Work) -> dict[str, Any]:
    """The data set that mock data are made of: fetched once for all projects."""
    from flops.data import known_dataset

    mock = work.spec.data.mock
    assert mock is not None
    known_dataset(mock.dataset, work.settings.datasets_dir, work.progress)
    return {}


def data(work: Work) -> dict[str, Any]:
    """Mock data where asked for; then who learns: one learner for each site with matching fragments."""
    tags: list[str] = list(work.spec.data.tags)
    wanted = work.spec.training.learners
    mock = work.spec.data.mock
    if mock is not None:
        # A tag of its own, so that no other project trains on these sites by accident.
        tags = [choosing.mock_tag(work.project)]
        _mock(
            work.settings,
            dataset=mock.dataset,
            tags=tags,
            sites=[f"{work.project}-{number}" for number in range(1, (wanted or 1) + 1)],
            partition=mock.partition,
            alpha=mock.alpha,
            shards_per_site=mock.shards_per_learner,
            test_split=mock.test_split,
            seed=mock.seed,
            num_examples=mock.num_examples,
            progress=work.progress,
            sources=work.arguments.get(SOURCES),
        )
    with _sources(work.settings, work.arguments) as sources:
        found: list[tuple[str, choosing.Fragment]] = [*sources.list(tags)]
    offers, warnings = choosing.Offers.of(work.arguments.get(OFFERS)).beside(
        fragment.site for _, fragment in found
    )
    found += [(one.node, one) for one in offers.tagged(tags)]
    sites = choosing.sites(found, tags, wanted, offers.refusals)
    if mock is not None and mock.test_split:
        from flops.data import tags_of_test_split

        tags += tags_of_test_split(tags)  # learners see them, but they are no examples to train on
    return {"tags": tags, "sites": sites, "warnings": [*warnings, *offers.refusals]}


def clusters(work: Work) -> dict[str, Any]:
    """Which learners train together, in a hierarchy."""
    training = work.spec.training
    wanted = training.clusters or ClustersSpec()
    sites = [str(site["site"]) for site in work.results["data"]["sites"]]
    tags = [choosing.mock_tag(work.project)] if work.spec.data.mock else list(work.spec.data.tags)
    warnings: list[str] = []
    joined = {one.node for one in choosing.Offers.of(work.arguments.get(OFFERS)).offered}
    far = {
        str(site["site"]): site["node"]
        for site in work.results["data"]["sites"]
        if site.get("node") in joined
    }
    labels: dict[str, dict[str, set[str]]] = {site: {} for site in sites}
    histograms: dict[str, Mapping[str, int]] = {}
    with _sources(work.settings, work.arguments) as sources:
        if wanted.by == "label":
            for _, fragment in sources.list(tags):
                for name, value in fragment.labels.items():
                    labels.get(fragment.site, {}).setdefault(name, set()).add(value)
            for one in choosing.Offers.of(work.arguments.get(OFFERS)).tagged(tags):
                for name, value in one.labels.items():
                    labels.get(one.site, {}).setdefault(name, set()).add(value)
        if wanted.by == "distribution":
            for site in sites:
                if site in far:
                    warnings.append(
                        f"site '{site}' is put into a cluster by size alone: node {far[site]} has joined, "
                        "and tells no histogram"
                    )
                    continue
                try:
                    histograms[site] = sources.histogram(tags, site, wanted.epsilon)
                except (ConflictError, InvalidInputError) as error:
                    warnings.append(f"site '{site}' is put into a cluster by size alone: {error}")
    formed = clustering.form(
        wanted,
        [
            clustering.Candidate(
                f"learner-{number}",
                site,
                {name: frozenset(values) for name, values in labels[site].items()},
                histograms.get(site),
            )
            for number, site in enumerate(sites, start=1)
        ],
    )
    clustering.check_minimums(formed, training, len(sites))
    return {"clusters": formed, "warnings": warnings}


def export_environment(work: Work) -> dict[str, Any]:
    """The user's environment plus what writing a model in MLflow's format takes."""
    os.nice(10)  # learners start at the same time, and nobody waits for this yet
    made = _environment(work, export_extra(work), _modules_of_export(work))
    if MODEL_IMAGE in post_training_steps(work.spec.post_training_steps):
        try:
            image_steps.prepare_model_image(work)
        except FlopsError as error:  # the step that builds the image tells of it again
            work.progress(f"the model's image cannot be prepared: {error}")
    return made


def export(work: Work) -> dict[str, Any]:
    """The best model as a folder in MLflow's format."""
    from flops.guest import Guest, Room

    directory = Path(work.arguments["directory"])
    if directory.exists():  # of an attempt that was cut off
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    room = Room(Path(work.results["export-environment"]["python"]), Path(work.results["fetch"]["path"]))
    fd = os.open(work.arguments["model_file"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Guest.start(room, log=work.paths.logs / "export.log") as guest:
            guest.load(EXPORT_TIMEOUT_S)
            exported = guest.export(
                fd,
                directory,
                _flavor(work),
                work.arguments["name"],
                _model_requirements(work),
                EXPORT_TIMEOUT_S,
            )
    finally:
        os.close(fd)
    # Without a flavor there is no model in MLflow's format: the warnings say so, the parameters are kept.
    made = (directory / "MLmodel").exists()
    return {
        "directory": str(directory) if made else None,
        "flavor": exported.flavor,
        "warnings": list(exported.warnings),
    }


def onnx(work: Work) -> dict[str, Any]:
    """The registered model in ONNX, once it has answered as the original does."""
    from flops.serving.onnx import CONVERSION_REQUIREMENTS, convert

    target = Path(work.arguments["target"])
    if target.exists():  # of an attempt that was cut off, or of an earlier version
        shutil.rmtree(target)
    made = _environment(work, (*export_extra(work), *CONVERSION_REQUIREMENTS), _modules_of_export(work))
    work.progress("converting the model, and comparing the outcome with it")
    found = convert(Path(work.arguments["model"]), target, python=Path(made["python"]))
    return {
        "folder": str(found.folder),
        "python": made["python"],
        "rows": found.rows,
        "largest_difference": found.largest_difference,
    }


def data_put(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Put one Parquet file as a fragment."""
    from flops.data import read_table

    with _sources(settings, arguments) as sources:
        node, fragment = sources.put_on(
            arguments.get("node"),
            read_table(Path(arguments["file"])),
            arguments["tags"],
            arguments["site"],
            allow_metrics=arguments["allow_metrics"],
            labels=arguments.get("labels"),
        )
    return {"fragment": {**fragment.to_json(), "node": node}}


def data_list(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """List fragments with any of the tags."""
    with _sources(settings, arguments) as sources:
        found = sources.list(arguments["tags"], arguments["site"])
    return {"fragments": [{**fragment.to_json(), "node": node} for node, fragment in found]}


def data_drop(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Drop fragments, by id or by tag."""
    with _sources(settings, arguments) as sources:
        if "id" in arguments:
            sources.drop(arguments["id"])
        else:
            from flops.data import tags_of_test_split

            sources.drop(tags=[arguments["tag"], *tags_of_test_split([arguments["tag"]])])
    return {}


def data_mock(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Partition a known data set over sites."""
    return {
        "fragments": [
            {**fragment.to_json(), "node": node}
            for node, fragment in _mock(settings, **arguments, progress=progress)
        ]
    }


PROJECT_STEPS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "fetch": fetch,
    "check-contract": check_contract,
    "lock": lock,
    "environment": environment,
    "initial-model": initial_model,
    DATASET: dataset,
    DATA: data,
    CLUSTERS: clusters,
    "export-environment": export_environment,
    "export": export,
    IMAGES: image_steps.images,
    AGGREGATOR_IMAGE: image_steps.aggregator_image,
    MODEL_IMAGE: image_steps.model_image,
    ONNX: onnx,
}
OWN_STEPS: dict[str, Callable[[Settings, Mapping[str, Any], Progress], dict[str, Any]]] = {
    **image_steps.IMAGE_STEPS,
    "data-put": data_put,
    "data-list": data_list,
    "data-drop": data_drop,
    "data-mock": data_mock,
}


def _flavor(work: Work) -> str | None:
    return work.spec.model.flavor or work.results["initial-model"].get("flavor")


def export_extra(work: Work) -> tuple[str, ...]:
    return _EXPORT_EXTRA + _EXPORT_EXTRA_OF_FLAVOR.get(_flavor(work) or "", ())


def _model_requirements(work: Work) -> list[str]:
    """The lock of the learners, and what the saved model needs to be loaded with it."""
    own = resolve(work).packages
    added = resolve(work, export_extra(work)).packages
    return sorted({*own, *(pin for pin in added if pin.startswith(_NEEDED_TO_LOAD))})


def inspect_repository(work: Work) -> "Contract":
    from flops import repo

    return repo.inspect(Path(work.results["fetch"]["path"]))


def resolve(work: Work, extra: tuple[str, ...] = ()) -> "Lock":
    """Resolved once for the same requirements; then read from the cache of locks."""
    from flops import images

    wanted = inspect_repository(work).requirements
    return images.resolve(
        wanted.packages,
        cache=work.settings.locks_dir,
        python=wanted.python,
        extra=extra,
        progress=work.progress,
    )


def _environment(
    work: Work, extra: tuple[str, ...] = (), modules: Sequence[str] | None = None
) -> dict[str, Any]:
    from flops import images

    found = resolve(work, extra)
    made = images.ensure_environment(
        found,
        work.settings.environments_dir,
        modules=modules,
        progress=work.progress,
    )
    return {
        "python": str(made.python),
        "hash": made.hash,
        "created": made.created,
        "warnings": list(found.warnings) if extra else [],
    }


def modules_of_serving(work: Work) -> tuple[str, ...]:
    """What a predictor imports before it answers."""
    loads = f"mlflow.{_flavor(work) or 'pyfunc'}"
    return (loads, "mlflow.pyfunc", "mlflow.pyfunc.scoring_server", "pandas", "cloudpickle", "skops.io")


def _modules_of_export(work: Work) -> tuple[str, ...]:
    """What an export imports: compiling only that is a tenth of the work."""
    return (f"mlflow.{_flavor(work) or 'pyfunc'}", "mlflow.models", "pandas", "cloudpickle", "skops.io")


def _sources(settings: Settings, arguments: Mapping[str, Any]) -> Sources:
    """The data servers that the manager names; without any, that of this machine."""
    from flops.data import read_token, unix_location

    named = [Source(**source) for source in arguments.get(SOURCES) or ()]
    return Sources(
        named or [Source("", unix_location(settings.data_socket))], read_token(data_token_file(settings))
    )


def _mock(settings: Settings, *, progress: Progress, **arguments: Any) -> "list[tuple[str, Fragment]]":
    """The fragments, each with its node."""
    from flops.data import mock

    with _sources(settings, arguments) as sources:
        arguments.pop(SOURCES, None)
        made = mock(sources, datasets_dir=settings.datasets_dir, progress=progress, **arguments)
        return [(sources.placed[fragment.id], fragment) for fragment in made]
