"""Images assembled from layers, for every platform alike, by an ordinary process.

Nothing is executed but uv, which unpacks wheels: no container engine, no builder, no emulation. An image is a
base, FLOps' programs, the user's packages and the user's code, each in layers of their own (see `Assembler`).
A layer is made once for its inputs; equal inputs give equal digests. Platforms, and layers of one platform,
are made side by side.

A blob that is made here and not tagged in the end is left to `Layout.collect`.
"""

import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from flops.core.errors import InvalidInputError
from flops.images import bytecode, manifest, runtime, sbom, uv
from flops.images.base_image import PYTHON_VERSION, BaseImage
from flops.images.descriptor import INDEXES, Descriptor
from flops.images.layer import Compression, Entry, Layer, tree
from flops.images.layout import Layout
from flops.images.locks import Lock
from flops.images.package_layers import PackageSet, Tools
from flops.images.pip_configuration import PipConfiguration
from flops.images.platforms import lock_platforms

CODE = "/code"
"""Where the user's code lies."""
MODEL = "/model"
"""Where a model image has its MLflow model, and an aggregator its start."""

_THREADS = 2
_Made = Future[list[Layer]]
_RUNTIME, _SERVING, _DEPENDENCIES, _EXTRA = "runtime", "serving", "dependencies", "extra"
_CODE, _MODEL = "code", "model"
_REPLACED = frozenset({_DEPENDENCIES, f"{_DEPENDENCIES}-compiled", _EXTRA, f"{_EXTRA}-compiled"})
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "HOME": "/tmp",  # noqa: S108 - the only place that programs of an image may write to unasked
    "PYTHONDONTWRITEBYTECODE": "1",  # the root cannot be written to
}


@dataclass(frozen=True)
class Built:
    """An image, for all its platforms. Everything is in the layout; nothing of it is tagged."""

    index: Descriptor
    platforms: Mapping[str, Descriptor]
    """Manifest of each platform."""
    layers: Mapping[str, tuple[Layer, ...]]
    """Of each platform, lowest first: what they are, and their sizes."""
    warnings: tuple[str, ...] = ()
    """What the user should know about the choice of versions."""


class Assembler:
    """Makes images into a layout.

    Layers, lowest first: ``base`` (one or more); ``skeleton``: folders and interpreters; ``runtime``: what
    FLOps' programs import; ``dependencies``: the user's packages; ``programs``: FLOps itself; ``guest``: what
    of it user code can import; ``code``: the user's. A model image has ``serving`` (what the inference server
    imports), ``extra`` packages and the ``model`` on top. Where this process's Python is the image's, layers
    ``...-compiled`` hold compiled modules (see `compiled`); without them an image works the same, and starts
    slowly.

    Args:
        layout: where blobs are read from and written to.
        cache: folder for locks, notes about layers, and wheels while they are packed; on the file system of
            uv's cache that costs links and no copies.
        compression: of new layers. Docker before version 23 takes gzip alone.
        configuration: None: the user's pip configuration.
        progress: told lines for the user.
        cancel: set it from another thread to end a call with a FailedError.
    """

    def __init__(
        self,
        layout: Layout,
        cache: Path,
        *,
        compression: Compression = "gzip",
        configuration: PipConfiguration | None = None,
        environment: Mapping[str, str] = os.environ,
        progress: uv.Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self._layout = layout
        configuration = configuration or PipConfiguration.from_pip(environment)
        self._tools = Tools(layout, cache, compression, configuration, environment, progress, cancel)

    def runtime_image(
        self, bases: Mapping[str, BaseImage], annotations: Mapping[str, str] | None = None
    ) -> Built:
        """FLOps' programs alone: for aggregators and data servers.

        Args:
            bases: for each platform.
            annotations: of the image and its index.
        Raises:
            InvalidInputError: a base does not fit.
            UnavailableError: a package could not be fetched.
            FailedError: uv failed, or ``cancel`` was set.
            DiskFullError: no space is left.
        """
        sets = _runtimes(_pythons(bases))
        with self._pool() as pool:
            ours = self._start(pool, sets)
            images = {platform: self._with_ours(ours[platform], base) for platform, base in bases.items()}
        return self._finished(images, annotations)

    def learner_image(
        self,
        bases: Mapping[str, BaseImage],
        requirements: Sequence[str],
        code: Path,
        annotations: Mapping[str, str] | None = None,
        *,
        python: str | None = None,
    ) -> Built:
        """FLOps' programs, the user's packages and the user's code.

        Args:
            bases: for each platform.
            requirements: PEP 508; locked for each platform, with equal versions where wheels allow it.
            code: the checkout; its ``.git`` is left out, links stay links.
            annotations: of the image and its index, such as `REVISION`; no part of the layers.
            python: PEP 440 specifiers of the Python that the user asks for; a warning tells of a base that
                has another.
        Raises:
            InvalidInputError: versions that do not fit together, a package without a wheel for a platform, a
                base that does not fit, or files that cannot be part of an image.
            UnavailableError, FailedError, DiskFullError: see `runtime_image`.
        """
        warnings = _about_python(bases, python)
        runtimes = _runtimes(_pythons(bases))
        with self._pool() as pool:
            ours = self._start(pool, runtimes)
            locks = self._lock(requirements, _pythons(bases))
            used = tuple(bytecode.imports_of(bytecode.python_files(code)))
            theirs = self._start(
                pool,
                {
                    p: PackageSet(_DEPENDENCIES, lock, runtime.USER_PLACE, used, (), runtimes[p])
                    for p, lock in locks.items()
                },
            )
            top = self._tools.write(_CODE, tree(code, CODE, skip=bytecode.HIDDEN.__contains__))
            images = {
                platform: self._with_ours(ours[platform], base, theirs[platform].result()).on_top(
                    [top], {manifest.LOCK: locks[platform].hash}
                )
                for platform, base in bases.items()
            }
        warnings += [warning for lock in locks.values() for warning in lock.warnings]
        return self._finished(images, annotations, warnings)

    def with_files(
        self,
        image: Built | Descriptor,
        files: Mapping[str, Path],
        annotations: Mapping[str, str] | None = None,
    ) -> Built:
        """An image with more files, in one layer.

        Args:
            files: files and folders of this machine, by their paths in the image; everybody can read them.
        Raises:
            InvalidInputError: paths that are impossible, or a platform's image that is malformed.
            NotFoundError, FailedError, DiskFullError: the image is not in the layout, or cannot be written.
        """
        entries = [
            entry
            for place, path in files.items()
            for entry in (tree(path, place) if path.is_dir() else [Entry.copy(place, path, 0o644)])
        ]
        layer = self._tools.write("files", entries)
        images = {platform: below.on_top([layer], {}) for platform, below in self._read(image).items()}
        return self._finished(images, annotations)

    def model_image(
        self,
        learner: Built | Descriptor,
        model: Path,
        *,
        extra: Sequence[str] = (),
        modules: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
    ) -> Built:
        """A learner image with a trained model, and what serving it takes.

        The learner's packages stay the same layer. ``extra`` ones come in a layer on top; where they need
        other versions, all packages come in a layer in place of the learner's, and a warning names them.

        Args:
            model: the MLflow model folder; it comes to `MODEL`.
            extra: requirements on top of the learner's.
            modules: what serving imports of them.
        Raises:
            NotFoundError: the learner image is not in the layout any more.
            InvalidInputError, UnavailableError, FailedError, DiskFullError: see `learner_image`.
        """
        learners = self._read(learner)
        with self._pool() as pool:
            locks, made = self._start_serving(pool, learners, extra, modules)
            trained = self._tools.write(_MODEL, tree(model, MODEL))
            images = {}
            for platform, image in learners.items():
                layers = _results(made[platform])
                replaced = _REPLACED if any(layer.what == _DEPENDENCIES for layer in layers) else ()
                lock = {manifest.LOCK: locks[platform].hash}
                images[platform] = image.without(replaced).on_top([*layers, trained], lock)
        return self._finished(
            images, annotations, [note for lock in locks.values() for note in lock.warnings]
        )

    def prepare_model_image(
        self, learner: Built | Descriptor, *, extra: Sequence[str] = (), modules: Sequence[str] = ()
    ) -> None:
        """Make what `model_image` with the same arguments takes besides the model: while that is trained."""
        with self._pool() as pool:
            _, made = self._start_serving(pool, self._read(learner), extra, modules)
            for platform in made:
                _results(made[platform])

    def _start_serving(
        self,
        pool: ThreadPoolExecutor,
        learners: Mapping[str, manifest.Image],
        extra: Sequence[str],
        modules: Sequence[str],
    ) -> tuple[Mapping[str, Lock], Mapping[str, Sequence[_Made]]]:
        """Begin what a model image has more than a learner's: for our server, and for the model."""
        old = {platform: _lock_of(image, platform) for platform, image in learners.items()}
        pythons = {platform: lock.python for platform, lock in old.items()}
        ours = self._start(pool, _runtimes(pythons, _SERVING, runtime.SERVING))
        new = self._lock(extra, pythons, old) if extra else old
        grown = {p: _grown(old[p], new[p], tuple(modules)) for p in learners if new[p].hash != old[p].hash}
        theirs = self._start(pool, grown)
        return new, {p: (ours[p], *(theirs[one] for one in theirs if one == p)) for p in learners}

    def _start(self, pool: ThreadPoolExecutor, sets: Mapping[str, PackageSet]) -> dict[str, _Made]:
        """Begin the layers of packages for each platform."""
        return {
            platform: pool.submit(self._tools.package_layers, sets[platform]) for platform in sorted(sets)
        }

    def _with_ours(self, packages: _Made, base: BaseImage, more: Iterable[Layer] = ()) -> manifest.Image:
        """A base with everything of FLOps; ``more`` comes below what changes with every version of it."""
        path = dict(value.partition("=")[::2] for value in base.environment).get("PATH") or os.defpath
        environment = {**_ENVIRONMENT, "PATH": f"{runtime.USER_PLACE}/bin:{path}"}
        form = {"python": base.python, "version": base.python_version, "form": runtime.FORM}
        skeleton = self._remembered("skeleton", form, lambda: runtime.skeleton(base))
        layers = [
            skeleton,
            *packages.result(),
            *more,
            self._content("programs", runtime.programs(base.python_version)),
            self._content("guest", runtime.guest()),
        ]
        return manifest.on_base(base, environment).on_top(layers, {})

    def _content(self, what: str, files: Mapping[str, bytes]) -> Layer:
        inputs = {"content": runtime.digest(files)}
        return self._remembered(
            what, inputs, lambda: (Entry.file(path, content) for path, content in files.items())
        )

    def _remembered(
        self, what: str, inputs: Mapping[str, str], entries: Callable[[], Iterable[Entry]]
    ) -> Layer:
        return self._tools.remembered(what, inputs, lambda: self._tools.write(what, entries()))

    def _lock(
        self, requirements: Sequence[str], pythons: Mapping[str, str], base: Mapping[str, Lock] | None = None
    ) -> dict[str, Lock]:
        return lock_platforms(
            requirements,
            pythons,
            cache=self._tools.cache / "locks",
            base=base,
            configuration=self._tools.configuration,
            environment=self._tools.environment,
            progress=self._tools.progress,
            cancel=self._tools.cancel,
        )

    def _read(self, image: Built | Descriptor) -> dict[str, manifest.Image]:
        if isinstance(image, Built):
            listed = dict(image.platforms)
        elif image.media_type in INDEXES:
            listed = {
                entry.platform: entry
                for entry in self._layout.references(image)
                if entry.platform is not None and entry.artifact_type is None
            }
        else:
            raise InvalidInputError(f"{image.digest} is not the index of an image - name that")
        return {platform: manifest.load(self._layout, entry, platform) for platform, entry in listed.items()}

    def _finished(
        self,
        images: Mapping[str, manifest.Image],
        annotations: Mapping[str, str] | None,
        warnings: Iterable[str] = (),
    ) -> Built:
        """Write the documents of all platforms, and their bills of materials."""
        said = dict(annotations or {})
        images = {platform: images[platform].on_top((), said) for platform in sorted(images)}
        manifests = {platform: manifest.store(self._layout, image) for platform, image in images.items()}
        bills = [
            sbom.attach(self._layout, self._bill(images[platform]), subject)
            for platform, subject in manifests.items()
        ]
        index = manifest.store_index(self._layout, [*manifests.values(), *bills], said)
        layers = {platform: image.layers for platform, image in images.items()}
        return Built(index, manifests, layers, tuple(dict.fromkeys(warnings)))

    def _bill(self, image: manifest.Image) -> str:
        packages = {layer.what: layer.packages for layer in image.layers if layer.packages}
        name = image.annotations.get(manifest.TITLE, "flops")
        version = image.annotations.get(manifest.REVISION, importlib.metadata.version("flops"))
        return sbom.document(name, version, packages)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="assemble")


def _pythons(bases: Mapping[str, BaseImage]) -> dict[str, str]:
    return {platform: base.python_version for platform, base in bases.items()}


def _runtimes(
    pythons: Mapping[str, str],
    what: str = _RUNTIME,
    distributions: Sequence[str] | None = None,
) -> dict[str, PackageSet]:
    """What FLOps' programs import, for each platform and its Python."""
    if not pythons:
        raise InvalidInputError("an image needs a platform at least - name one, such as linux/amd64")
    used = tuple(bytecode.imports_of(runtime.program_files()))
    chosen = runtime.DISTRIBUTIONS if distributions is None else distributions
    return {
        platform: PackageSet(
            what, runtime.lock(platform, python, chosen), runtime.PLACE, used, runtime.UNUSED
        )
        for platform, python in pythons.items()
    }


def _grown(old: Lock, new: Lock, modules: tuple[str, ...]) -> PackageSet:
    """What a lock has more than another, or all of it where that has something else."""
    if not set(old.packages) <= set(new.packages):
        return PackageSet(_DEPENDENCIES, new, runtime.USER_PLACE, modules)
    more = sorted(set(new.packages) - set(old.packages))
    lock = Lock.of(new.python, more, platform=new.platform)
    return PackageSet(_EXTRA, lock, runtime.USER_PLACE, modules)


def _results(made: Iterable[_Made]) -> list[Layer]:
    return [layer for layers in made for layer in layers.result()]


def _lock_of(image: manifest.Image, platform: str) -> Lock:
    """The lock that a learner image's packages come from; the image says it all."""
    pins = [pin for layer in image.layers if layer.what in (_DEPENDENCIES, _EXTRA) for pin in layer.packages]
    return Lock.of(image.annotations.get(PYTHON_VERSION, ""), pins, platform=platform)


def _about_python(bases: Mapping[str, BaseImage], python: str | None) -> list[str]:
    try:
        wish = SpecifierSet(python or "")
    except InvalidSpecifier as error:
        raise InvalidInputError(
            f"'{(python or '')[:60]}' is not a Python version - write it like 3.11 or >=3.10,<3.13"
        ) from error
    # A base says 3.11; whether that is the 3.11.7 that somebody pinned does not matter to wheels.
    return [
        f"Python {python} is asked for; the image for {platform} has {base.python_version}"
        for platform, base in sorted(bases.items())
        if not any(wish.contains(f"{base.python_version}.{micro}") for micro in range(30))
    ]
