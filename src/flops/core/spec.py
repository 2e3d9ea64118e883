"""The project specification: what a user wants trained, checked before anything is started.

`parse_spec` reads YAML or JSON, our own form or the SLA of the FLOps thesis; every problem of a spec is
reported at once, by its dotted place. Specs are values: frozen, and equal after a round trip through JSON.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flops.core import source as repo_source
from flops.core.errors import InvalidInputError
from flops.core.spec_errors import InvalidSpecError, describe, quote, unknown_key
from flops.core.spec_text import read_mapping
from flops.core.thesis_sla import from_thesis, in_thesis_words, is_thesis_sla, known_keys

_MOST_LEARNERS = 10_000
_WEEK_S = 7 * 24 * 3600.0
DEFAULT_MOCK_LEARNERS = 3
"""Learners that share a mocked data set when nobody says how many."""


def _without_repeats(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("scalar", "must be text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("scalar", "must be a finite number")
    return value


def _plain_text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise PydanticCustomError("text", "must be one line of visible text")
    return value


def _or_name(key: str) -> BeforeValidator:
    """Let a section be given as one word, ``strategy: FedAdam`` for ``strategy: {name: FedAdam}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Text = Annotated[str, Field(max_length=200), AfterValidator(_plain_text)]
Count = Annotated[int, Field(ge=1, le=_MOST_LEARNERS)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what every library's generator takes
Parameter = Annotated[bool | int | float | str, BeforeValidator(_scalar)]
Platform = Literal["linux/amd64", "linux/arm64"]
PostTrainingStep = Literal["build_image_for_trained_model", "deploy_trained_model_image"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def _derive(self, **values: object) -> None:
        """Fill in what follows from other fields; it stays "unset", so `merge` can derive it anew."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise PydanticCustomError("cross_field", "{joined}", {"joined": "; ".join(problems)})


class ModelSpec(_Section):
    flavor: Literal["sklearn", "pytorch", "tensorflow", "keras", "xgboost"] | None = None
    """None: detected from the model object."""
    name: Name | None = None
    """Name in the model registry; None: the project's name."""
    initial: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}/[1-9][0-9]{0,8}$")] | None = None
    """Registered model, NAME/VERSION, whose parameters the training starts from; None: the code's own."""


class StrategySpec(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")] = "FedAvg"
    """A strategy of ``flwr.serverapp.strategy``; whether it exists is checked by `flops.federation`."""
    parameters: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], Parameter],
        Field(max_length=64),
    ] = {}


ClusterPath = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}(/[a-z0-9][a-z0-9-]{0,30}){0,7}$")]
"""The name of a cluster; ``europe/north`` lies inside ``europe``."""


class ClustersSpec(_Section):
    """How a hierarchy's learners are divided into clusters."""

    by: Literal["size", "label", "latency", "distribution", "groups"] = "size"
    """size: equally many each; label: sites with the same value of ``label``; latency: learners that are
    equally far away; distribution: clusters whose mixtures of labels are alike, from histograms that the
    sites give out with noise; groups: as ``groups`` says."""
    count: Count | None = None
    """Clusters to form; None: from ``size``, or the square root of the number of learners."""
    size: Count | None = None
    """Learners in a cluster."""
    label: Name | None = None
    epsilon: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Privacy budget of a site's label histogram: smaller is more private."""
    groups: (
        Annotated[
            dict[ClusterPath, Annotated[list[Text], Field(min_length=1)]],
            Field(min_length=1, max_length=1000),
        ]
        | None
    ) = None
    """Sites by cluster."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.groups is not None and "by" not in self.model_fields_set:
            self._derive(by="groups")
        if self.label is not None and "by" not in self.model_fields_set:
            self._derive(by="label")
        if self.count is not None and self.size is not None:
            problems.append(
                "training.clusters.count and training.clusters.size say the same thing - use one of them"
            )
        for field, by in (("label", "label"), ("groups", "groups")):
            if (getattr(self, field) is None) == (self.by == by):
                problems.append(
                    f"training.clusters.{field} is needed where training.clusters.by is '{by}', only there"
                )
        if self.by in ("label", "groups") and (self.count or self.size):
            problems.append(
                f"training.clusters.count and size say nothing where training.clusters.by is '{self.by}' - "
                "leave them out"
            )
        if self.by != "distribution" and self.epsilon != type(self).model_fields["epsilon"].default:
            problems.append(
                "training.clusters.epsilon is for training.clusters.by 'distribution' - leave it out"
            )
        _refuse(problems)
        return self


ASYNCHRONOUS_STRATEGIES = ("FedAsync", "FedBuff", "FedAT")
"""Strategies of our own that wait for nobody; all others are Flower's, and synchronous."""


class TrainingSpec(_Section):
    mode: Literal["classic", "hierarchical", "asynchronous"] = "classic"
    """Unset: asynchronous with a strategy that is, hierarchical where clusters are given."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 3
    """In an asynchronous training: commits of the global model."""
    cycles: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Root-level passes of a hierarchy, each of ``rounds`` rounds inside every cluster."""
    learners: Count | None = None
    """None: one per site with matching data (for mocked data: three, or the minimum if larger)."""
    virtual: bool = False
    """Many learners in a few processes of one machine; each keeps its own data and state."""
    virtual_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that run user code for virtual learners; None: one for each CPU."""
    clusters: ClustersSpec | None = None
    min_clusters: Count = 1
    """Clusters that must answer in a cycle."""
    strategy: Annotated[StrategySpec, _or_name("name")] = StrategySpec()
    fraction_fit: Annotated[float, Field(gt=0, le=1)] = 1.0
    fraction_evaluate: Annotated[float, Field(ge=0, le=1)] = 1.0
    """0: nobody evaluates."""
    min_available_learners: Count = 1
    """Learners that must be connected before a round starts; unset: the larger of the next two."""
    min_fit_learners: Count = 1
    min_evaluate_learners: Count = 1
    quorum: Count | None = None
    """Accepted updates without which a round fails; None: ``min_fit_learners``."""
    cohort: Literal["random", "round-robin", "data-size", "availability"] = "random"
    """Who trains where ``fraction_fit`` is below 1. data-size: in proportion to the examples; availability:
    reliable and quick learners more often, but each has its turn."""
    over_sample: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Learners asked for each one that is needed; a round closes when enough have answered."""
    eject_after: Count = 3
    """Refused answers after which a learner is ejected."""
    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    """Updates farther than this from the global model (L2 norm of the difference) are refused."""
    start_deadline_s: Annotated[float, Field(gt=0, le=_WEEK_S)] = 120.0
    round_deadline_s: Annotated[float, Field(gt=0, le=_WEEK_S)] | None = None
    seed: Seed = 0

    @property
    def updates_needed(self) -> int:
        """Accepted updates without which a round fails."""
        return self.min_fit_learners if self.quorum is None else self.quorum

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "min_available_learners" not in self.model_fields_set:
            self._derive(min_available_learners=max(self.min_fit_learners, self.min_evaluate_learners))
        problems = []
        asynchronous = self.strategy.name in ASYNCHRONOUS_STRATEGIES
        if "mode" not in self.model_fields_set:
            if asynchronous:
                self._derive(mode="asynchronous")
            elif self.clusters is not None:
                self._derive(mode="hierarchical")
        if asynchronous != (self.mode == "asynchronous"):
            own = " or ".join(ASYNCHRONOUS_STRATEGIES)
            problems.append(
                f"training.strategy {self.strategy.name} and training.mode '{self.mode}' do not go together"
                f" - 'asynchronous' is for {own}, and they for it"
            )
        if self.clusters is not None and self.mode != "hierarchical":
            problems.append(f"training.clusters are for training.mode 'hierarchical' (is '{self.mode}')")
        if self.virtual_workers is not None and not self.virtual:
            problems.append("training.virtual_workers are for training.virtual - set it, or leave them out")
        if self.over_sample > 1 and self.mode == "asynchronous":
            problems.append("training.over_sample says nothing where nobody is waited for - leave it out")
        if self.cycles > 1 and self.mode != "hierarchical":
            problems.append(
                f"training.cycles is {self.cycles} but training.mode is 'classic' - only 'hierarchical' has "
                "cycles: set that mode, or use training.rounds"
            )
        for name in ("min_fit_learners", "min_evaluate_learners"):
            if getattr(self, name) > self.min_available_learners:
                problems.append(
                    f"training.{name} ({getattr(self, name)}) must not be more than "
                    f"training.min_available_learners ({self.min_available_learners})"
                )
        if self.learners is not None:
            problems += self._problems_of_few_learners(self.learners)
        _refuse(problems)
        return self

    def _problems_of_few_learners(self, learners: int) -> list[str]:
        # A hierarchy's minimums count inside one cluster, and a cluster never has more than all learners.
        problems = []
        if learners < self.min_available_learners:
            problems.append(
                f"training.learners ({learners}) must not be less than "
                f"training.min_available_learners ({self.min_available_learners})"
            )
        cohort = min(learners, max(math.ceil(learners * self.fraction_fit), self.min_fit_learners))
        if self.quorum is not None and self.quorum > cohort:
            problems.append(
                f"training.quorum ({self.quorum}) can never be reached: {cohort} of {learners} learners take "
                "part in a round - lower training.quorum or raise training.fraction_fit"
            )
        return problems


class MockSpec(_Section):
    """A known data set, split over fresh learners."""

    dataset: Literal["mnist", "digits"]
    partition: Literal["iid", "dirichlet", "shards"] = "iid"
    """Unset: dirichlet where an alpha is given, shards where their number is. Shards: the examples sorted by
    label are cut into equal parts, of which each learner gets ``shards_per_learner``."""
    shards_per_learner: Annotated[int, Field(ge=1, le=1000)] = 2
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    """Concentration of the Dirichlet distribution: small means that labels differ between learners."""
    seed: Seed = 0
    num_examples: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Examples taken from the data set in all; None: all it has."""
    test_split: bool = False
    """Give the learners the data set's test examples too, in equal parts. The rows then have a column
    ``split``, "train" or "test"; a repository that does not look at it would train on both."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_fields_set
        if "alpha" in given and "partition" not in given:
            self._derive(partition="dirichlet")
        elif "shards_per_learner" in given and "partition" not in given:
            self._derive(partition="shards")
        shards = type(self).model_fields["shards_per_learner"].default
        if self.shards_per_learner != shards and self.partition != "shards":
            _refuse(
                [
                    "data.mock.shards_per_learner says nothing about data.mock.partition "
                    f"'{self.partition}' - use 'shards', or leave it out"
                ]
            )
        if self.alpha != type(self).model_fields["alpha"].default and self.partition != "dirichlet":
            _refuse(
                [
                    f"data.mock.alpha ({self.alpha}) says nothing about data.mock.partition "
                    f"'{self.partition}' - use "
                    "'dirichlet', or leave alpha out"
                ]
            )
        return self


class DataSpec(_Section):
    tags: Annotated[list[Text], Field(max_length=100), AfterValidator(_without_repeats)] = []
    """A fragment is used if it carries any of them; unset with mocked data: the data set's name."""
    mock: Annotated[MockSpec, _or_name("dataset")] | None = None

    @model_validator(mode="after")
    def _fill(self) -> Self:
        if self.mock is not None and not self.tags:
            self._derive(tags=[self.mock.dataset])
        return self


class ResourcesSpec(_Section):
    """What one learner may use; None: no limit of ours."""

    memory_mb: Annotated[int, Field(ge=1, le=64 * 1024 * 1024)] | None = None
    vcpus: Annotated[float, Field(gt=0, le=4096)] | None = None
    storage_mb: Annotated[int, Field(ge=0, le=1024 * 1024 * 1024)] | None = None


class SelectionSpec(_Section):
    """Which round's model is the result."""

    metric: Literal["loss", "accuracy"] = "loss"
    best: Literal["min", "max"] | None = None
    """Follows from the metric."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        best = "min" if self.metric == "loss" else "max"
        if self.best not in (None, best):
            _refuse(
                [
                    f"selection.best is '{self.best}', which would keep the worst round by selection.metric "
                    f"'{self.metric}' - use '{best}' or leave it out"
                ]
            )
        self._derive(best=best)
        return self


class TrackingSpec(_Section):
    experiment: Text | None = None
    """None: the project's name."""
    learner_metrics: bool = False
    """Track single learners' metrics too, where their data's owner allows it."""
    clusters: bool = False
    """A child run for each cluster of a hierarchy, with the metrics of its own rounds."""


_SECTIONS = ("model", "training", "data", "resources", "selection", "tracking")


class ProjectSpec(_Section):
    """One requested federated training."""

    repo: str
    """git URL (https, ssh, file, scp-like) or folder; a trailing ``@REF`` moves to ``ref``."""
    ref: str | None = None
    """Branch, tag or commit; None: the repository's default branch, or a folder's HEAD."""
    name: Name | None = None
    customer_id: Text = "local"
    verbose: bool = False
    use_devel_base_images: bool = False
    platforms: Annotated[list[Platform], Field(min_length=1), AfterValidator(_without_repeats)] = [
        "linux/amd64"
    ]
    post_training_steps: Annotated[list[PostTrainingStep], AfterValidator(_without_repeats)] = []
    """Deploying the image implies building it."""
    model: ModelSpec = ModelSpec()
    training: TrainingSpec = TrainingSpec()
    data: DataSpec = DataSpec()
    resources: ResourcesSpec = ResourcesSpec()
    selection: SelectionSpec = SelectionSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        # an empty section of a YAML file arrives as None
        fields = {key: part for key, part in value.items() if part is not None or key not in _SECTIONS}
        if isinstance(fields.get("repo"), str) and fields.get("ref") is None:
            fields["repo"], fields["ref"] = repo_source.split_ref(fields["repo"])
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        try:
            repo_source.check_repo(self.repo)
        except InvalidInputError as error:
            problems.append(f"repo {error}")
        try:
            repo_source.check_ref("HEAD" if self.ref is None else self.ref)
        except InvalidInputError as error:
            problems.append(f"ref {error} (is {quote(self.ref)})")
        steps = self.post_training_steps
        if "deploy_trained_model_image" in steps and "build_image_for_trained_model" not in steps:
            self._derive(post_training_steps=["build_image_for_trained_model", *steps])
        if self.data.mock is not None:
            learners = self.training.learners
            if learners is None:
                learners = max(DEFAULT_MOCK_LEARNERS, self.training.min_available_learners)
                training = self.training.model_copy()
                training._derive(learners=learners)
                self._derive(training=training)
            if self.data.mock.num_examples is not None and self.data.mock.num_examples < learners:
                problems.append(
                    f"data.mock.num_examples ({self.data.mock.num_examples}) must be at least "
                    f"training.learners ({learners}): every learner needs an example"
                )
        _refuse(problems)
        return self

    @property
    def redacted_repo(self) -> str:
        """The repository without credentials: the only form for events, logs, tracking and errors."""
        return repo_source.redact(self.repo)

    def to_json(self, *, redacted: bool = False) -> dict[str, Any]:
        """The whole spec as JSON values; `spec_from_mapping` of it gives an equal spec.

        Args:
            redacted: hide credentials inside ``repo`` (for whatever is shown or stored in the open).
        """
        mapping = self.model_dump(mode="json")
        if redacted:
            mapping["repo"] = self.redacted_repo
        return mapping


def parse_spec(text: str, *, source: str, overrides: Mapping[str, Any] | None = None) -> ProjectSpec:
    """Read a spec from YAML or JSON text (JSON may carry comments), in our own form or the thesis SLA's.

    Args:
        source: what the text is called in errors, mostly its file name.
        overrides: values by dotted own name (``training.rounds``) that win over the text's.
    Raises:
        InvalidInputError: lists every problem with its dotted place.
    """
    prefix = f"spec '{source}'"
    return _build(read_mapping(text, prefix=prefix), overrides or {}, prefix)


def spec_from_mapping(mapping: Mapping[str, Any]) -> ProjectSpec:
    """Check a spec that arrived as a mapping, in our own form or the thesis SLA's.

    Raises:
        InvalidInputError: lists every problem with its dotted place.
    """
    return _build(mapping, {}, "spec")


def merge(spec: ProjectSpec, overrides: Mapping[str, Any]) -> ProjectSpec:
    """A copy with some values replaced, by dotted name; what was derived is derived anew.

    Raises:
        InvalidInputError: the outcome is no valid spec.
    """
    return _build(spec.model_dump(mode="json", exclude_unset=True), overrides, "spec")


def _build(mapping: Mapping[str, Any], overrides: Mapping[str, Any], prefix: str) -> ProjectSpec:
    if not isinstance(mapping, Mapping) or not all(isinstance(key, str) for key in mapping):
        raise InvalidInputError(f"{prefix} must be a mapping of names to values")
    problems: list[str] = []
    own: Mapping[str, Any] = mapping
    thesis = is_thesis_sla(mapping)
    if thesis:
        own, unknown, not_sections = from_thesis(mapping)
        problems += [unknown_key(section, key, known_keys(section)) for section, key in unknown]
        problems += [f"{section} must be a mapping" for section in not_sections]
    try:
        spec = ProjectSpec.model_validate(_overridden(own, overrides))
    except ValidationError as error:
        found = describe(error, ProjectSpec)
        problems += [in_thesis_words(problem) for problem in found] if thesis else found
    if problems:
        raise InvalidSpecError(prefix, problems)
    return spec


def _overridden(mapping: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(mapping)
    if "repo" in overrides and "ref" not in overrides:
        result.pop("ref", None)  # it belonged to the other repository
    for dotted, value in overrides.items():
        *sections, last = dotted.split(".")
        place = result
        for section in sections:
            inner = place.get(section)
            if isinstance(inner, str):  # the one-word form of a section
                inner = {"name" if section == "strategy" else "dataset": inner}
            place[section] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[section]
        place[last] = value
    return result
