"""The steps that build images: a project's, that of FLOps' own programs, base images.

Images are kept in one OCI image layout, named after what they are for; where there is an image registry they
are pushed to it, and known by their reference there.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops import __version__
from flops.core.errors import InvalidInputError
from flops.core.settings import Settings
from flops.manager.states import INITIAL_MODEL, RUNTIME_IMAGE
from flops.manager.step_process import Progress

if TYPE_CHECKING:
    from flops.images.assembler import Built
    from flops.images.base_image import BaseImage
    from flops.images.layout import Layout
    from flops.manager.steps import Work

INITIAL_MODEL_FILE = "/model/initial.safetensors"
"""Where the image of an aggregator holds the model that training starts from."""
_PROJECT = "io.flops.project"
_SPEC = "io.flops.spec"
_MODEL = "io.flops.model"
_SOURCE = "org.opencontainers.image.source"
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_REPOSITORIES = ("flops-runtime", "flops-learner", "flops-aggregator", "flops-model")
"""Of which each may have layers of the others."""


class Workshop:
    """One step's way to images.

    Args:
        arguments: of the step: ``registry``, ``base_image``, ``platforms`` of nodes.
    """

    def __init__(self, settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> None:
        from flops.images.assembler import Assembler
        from flops.images.layout import Layout

        self._registry, self._plain = _registry_of(arguments.get("registry"))
        self._base_image: str | None = arguments.get("base_image")
        self._nodes: Sequence[str] = arguments.get("platforms") or ()
        self._progress = progress
        self._bases: dict[tuple[tuple[str, ...], str | None], Mapping[str, BaseImage]] = {}
        self.warnings: list[str] = []
        self.layout: Layout = Layout(settings.images_dir)
        self.assembler: Assembler = Assembler(self.layout, settings.home / "image-cache", progress=progress)

    def runtime(self, platforms: Sequence[str] = ()) -> "Built":
        """FLOps' own programs, for the nodes' platforms and more."""
        from flops.images.manifest import TITLE

        wanted = sorted({*self._nodes, *platforms})
        return self.assembler.runtime_image(self.bases(wanted, None), {TITLE: "FLOps"})

    def bases(self, platforms: Sequence[str], python: str | None) -> "Mapping[str, BaseImage]":
        from flops.images.base import find_base

        asked = (tuple(platforms), python)
        if asked not in self._bases:
            self._bases[asked] = find_base(
                self.layout,
                platforms,
                python=python,
                wanted=self._base_image,
                progress=self._progress,
                warn=self.warnings.append,
            )
        return self._bases[asked]

    def keep(self, built: "Built", repository: str, tag: str) -> dict[str, Any]:
        """Name an image and push it; answers its reference and what was sent."""
        from flops.images.push import push
        from flops.images.references import Reference
        from flops.images.registry import Registry

        self.warnings += [one for one in built.warnings if one not in self.warnings]
        self.layout.tag(f"{repository}:{tag}", built.index)
        size = sum(layer.size_bytes or 0 for layers in built.layers.values() for layer in layers)
        if self._registry is None:
            return {
                "image": f"{repository}:{tag}@{built.index.digest}",
                "size_bytes": size,
                "pushed_bytes": 0,
            }
        reference = Reference.parse(f"{self._registry}/{repository}:{tag}")
        prefix = reference.repository.removesuffix(repository)
        with Registry.of_user(reference.host, insecure=self._plain or None) as registry:
            pushed = push(
                self.layout,
                built.index,
                reference,
                mount_from=[prefix + other for other in _REPOSITORIES],
                registry=registry,
            )
        return {
            "image": str(pushed.reference),
            "size_bytes": size,
            "pushed_bytes": pushed.sent_bytes,
        }


def images(work: "Work") -> dict[str, Any]:
    """What agents and learners run: FLOps' programs, the user's environment and code."""
    shop = Workshop(work.settings, work.arguments, work.progress)
    runtime = shop.keep(shop.runtime(work.spec.platforms), "flops-runtime", __version__)
    learner = shop.keep(learner_image(work, shop), "flops-learner", work.project)
    return {
        "runtime": runtime["image"],
        "learner": learner["image"],
        "size_bytes": {"runtime": runtime["size_bytes"], "learner": learner["size_bytes"]},
        "pushed_bytes": runtime["pushed_bytes"] + learner["pushed_bytes"],
        "warnings": shop.warnings,
    }


def aggregator_image(work: "Work") -> dict[str, Any]:
    """FLOps' programs, and the initial model."""
    shop = Workshop(work.settings, work.arguments, work.progress)
    built = shop.assembler.with_files(
        shop.runtime(work.spec.platforms),
        {INITIAL_MODEL_FILE: Path(work.results[INITIAL_MODEL]["path"])},
        _about(work, "aggregator"),
    )
    return shop.keep(built, "flops-aggregator", work.project)


def learner_image(work: "Work", shop: Workshop) -> "Built":
    """The user's environment and code."""
    from flops.manager.steps import inspect_repository, resolve

    wanted = inspect_repository(work).requirements
    bases = shop.bases(work.spec.platforms, wanted.python)
    locked = resolve(work)
    code = Path(work.results["fetch"]["path"])
    about = _about(work, "learner")
    minor = ".".join(locked.python.split(".")[:2])
    if all(base.python_version == minor for base in bases.values()):
        # The versions of this machine, which the repository was checked with, and its model is exported with.
        try:
            return shop.assembler.learner_image(bases, locked.packages, code, about, python=wanted.python)
        except InvalidInputError as error:
            work.progress(f"{error}; other versions are looked for")
    return shop.assembler.learner_image(bases, wanted.packages, code, about, python=wanted.python)


def prepare_model_image(work: "Work") -> None:
    """All of a model's image but the model: made while the training runs."""
    from flops.manager.steps import export_extra, modules_of_serving

    shop = Workshop(work.settings, work.arguments, work.progress)
    shop.assembler.prepare_model_image(
        learner_image(work, shop), extra=export_extra(work), modules=modules_of_serving(work)
    )


def model_image(work: "Work") -> dict[str, Any]:
    """The trained model with everything that serves it."""
    from flops.manager.steps import export_extra, modules_of_serving

    model = work.arguments.get("model")
    if model is None:
        raise InvalidInputError("the project has registered no model whose files are on this machine")
    name, version = work.arguments["name"], work.arguments["version"]
    shop = Workshop(work.settings, work.arguments, work.progress)
    learner = learner_image(work, shop)
    built = shop.assembler.model_image(
        learner,
        Path(model),
        extra=export_extra(work),
        modules=modules_of_serving(work),
        annotations={
            **_about(work, "model"),
            _MODEL: f"{name}/{version}",
        },
    )
    kept = shop.keep(built, "flops-model", f"{slug(name)}-{version}")
    return {**kept, "warnings": shop.warnings}


def runtime_image(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The image of FLOps' own programs."""
    shop = Workshop(settings, arguments, progress)
    return {**shop.keep(shop.runtime(), "flops-runtime", __version__), "warnings": shop.warnings}


def base_image(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Make a base image from Debian's packages."""
    from flops.images.base import make_base
    from flops.images.layout import Layout

    made = make_base(
        Layout(settings.images_dir),
        arguments["suite"],
        arguments["platforms"],
        mirror=arguments.get("mirror"),
        refresh=bool(arguments.get("refresh")),
        progress=progress,
    )
    return {
        "name": f"flops-base:{arguments['suite']}",
        "platforms": [
            {
                "platform": platform,
                "digest": base.manifest.digest,
                "python": base.python_version,
                "size_bytes": sum(layer.size for layer in base.layers),
            }
            for platform, base in made.items()
        ],
    }


def list_images(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """What the image layout of this FLOPS_HOME holds, by name."""
    from flops.images.layout import Layout

    layout = Layout(settings.images_dir)
    return {"images": [_described(layout, name) for name in sorted(layout.tags())]}


def forget_images(settings: Settings, arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Take a removed project's names away, and blobs that nothing refers to any more."""
    from flops.images.layout import Layout

    layout = Layout(settings.images_dir)
    for name in [name for name in layout.tags() if name.endswith(f":{arguments['project']}")]:
        layout.untag(name)
    return {"freed_bytes": layout.collect()}


IMAGE_STEPS: dict[str, Callable[[Settings, Mapping[str, Any], Progress], dict[str, Any]]] = {
    RUNTIME_IMAGE: runtime_image,
    "base-image": base_image,
    "list-images": list_images,
    "forget-images": forget_images,
}


def _registry_of(place: str | None) -> tuple[str | None, bool]:
    """``HOST[:PORT][/PREFIX]``, and whether it is to be spoken to in plain HTTP, as ``http://`` says."""
    if place is None:
        return None, False
    plain = place.startswith("http://")
    return place.removeprefix("http://").removeprefix("https://").rstrip("/"), plain


def _described(layout: "Layout", name: str) -> dict[str, Any]:
    index = layout.resolve(name)
    platforms, blobs = [], {index.digest: index.size}
    for manifest in layout.references(index):
        if manifest.platform is None or manifest.artifact_type is not None:
            continue
        platforms.append(manifest.platform)
        blobs[manifest.digest] = manifest.size
        blobs |= {blob.digest: blob.size for blob in layout.references(manifest)}
    return {
        "name": name,
        "digest": index.digest,
        "platforms": platforms,
        "size_bytes": sum(blobs.values()),
    }


def _about(work: "Work", what: str) -> dict[str, str]:
    from flops.images.manifest import REVISION, TITLE

    wanted = json.dumps(work.spec.to_json(redacted=True), sort_keys=True)
    return {
        TITLE: f"{work.spec.name or work.project} ({what})",
        REVISION: str(work.results["fetch"]["commit"] or ""),
        _SOURCE: work.spec.redacted_repo,
        _PROJECT: work.project,
        _SPEC: "sha256:" + hashlib.sha256(wanted.encode()).hexdigest(),
    }


def slug(name: str) -> str:
    """A name as part of an image's tag."""
    return _NOT_IN_NAMES.sub("-", name.lower()).strip("-")[:60] or "model"
