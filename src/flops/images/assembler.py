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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from flops.core.errors import FailedError, InvalidInputError
from flops.images import bytecode, compiled, manifest, runtime, sbom, uv, wheels
from flops.images.base_image import PYTHON_VERSION, BaseImage
from flops.images.descriptor import INDEXES, Descriptor
from flops.images.layer import Compression, Entry, Layer, tree, write_layer
from flops.images.layer_cache import LayerCache
from flops.images.layout import Layout
from flops.images.locks import Lock
from flops.images.pip_configuration import PipConfiguration
from flops.images.platforms import lock_platforms

CODE = "/code"
"""Where the user's code lies."""
MODEL = "/model"
"""Where a model image has its MLflow model, and an aggregator its start."""

_THREADS = 2
_HIDDEN = frozenset({".git", "__pycache__"})
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
        self._cache = cache
        self._layers = LayerCache(cache / "layers", layout)
        self._compression: Compression = compression
        self._configuration = configuration or PipConfiguration.from_pip(environment)
        self._environment = environment
        self._progress = progress
        self._cancel = cancel

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
        with self._pool() as pool:
            ours = self._start_ours(pool, _pythons(bases))
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
        with self._pool() as pool:
            ours = self._start_ours(pool, _pythons(bases))
            locks = self._lock(requirements, _pythons(bases))
            used = compiled.imports_of(_python_files(code))
            theirs = {
                platform: self._start_packages(pool, _DEPENDENCIES, lock, used)
                for platform, lock in locks.items()
            }
            top = self._write(_CODE, tree(code, CODE, skip=_HIDDEN.__contains__))
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
        layer = self._write("files", entries)
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
            trained = self._write(_MODEL, tree(model, MODEL))
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
        ours = self._start_ours(pool, pythons, _SERVING)
        new = self._lock(extra, pythons, old) if extra else old
        theirs = {p: self._start_grown(pool, old[p], new[p], modules) for p in learners}
        return new, {p: (ours[p], theirs[p]) for p in learners}

    def _start_ours(
        self, pool: ThreadPoolExecutor, pythons: Mapping[str, str], what: str = _RUNTIME
    ) -> Mapping[str, _Made]:
        """Begin the packages of FLOps' programs for each platform and its Python."""
        if not pythons:
            raise InvalidInputError("an image needs a platform at least - name one, such as linux/amd64")
        distributions = runtime.SERVING if what == _SERVING else runtime.DISTRIBUTIONS
        used = compiled.imports_of(runtime.program_files())
        return {
            platform: self._start_packages(
                pool,
                what,
                runtime.lock(platform, python, distributions),
                used,
                place=runtime.PLACE,
                unused=runtime.UNUSED,
            )
            for platform, python in sorted(pythons.items())
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

    def _start_packages(
        self,
        pool: ThreadPoolExecutor,
        what: str,
        lock: Lock,
        modules: Sequence[str],
        place: str = runtime.USER_PLACE,
        unused: Sequence[str] = (),
    ) -> _Made:
        """Begin the layers of a lock: its packages, and what importing some modules takes, compiled."""
        inputs = {
            "lock": lock.hash,
            "platform": lock.platform,
            "python": lock.python,
            "place": place,
            "trim": str(wheels.TRIM),
            "unused": ",".join(unused),
        }

        def pack(packages: wheels.Packages, _: Path) -> Layer:
            self._tell(f"packing {len(lock.packages)} packages for {lock.platform} ({what})")
            return self._write(what, packages.entries(place, lock.python), lock.packages)

        def precompile(packages: wheels.Packages, site: Path) -> Layer:
            wanted = {str(path.relative_to(site)) for path in bytecode.imported(site, modules)}
            found = compiled.entries(
                site,
                [name for name in packages.sources() if name in wanted],
                wheels.site_packages(place, lock.python),
                self._cache / "compiled",
                environment=self._environment,
                cancel=self._cancel,
            )
            return self._write(f"{what}-compiled", found)

        def make() -> list[Layer]:
            with ExitStack() as stack:
                opened: list[tuple[wheels.Packages, Path]] = []

                def laid_down(then: Callable[[wheels.Packages, Path], Layer]) -> Layer:
                    if not opened:  # once for both layers, and only if one is not there
                        site = stack.enter_context(self._laid_down(lock))
                        opened.append((wheels.Packages(site, unused), site))
                    return then(*opened[0])

                layers = [self._layers.layer(what, self._inputs(inputs), lambda: laid_down(pack))]
                if modules and lock.packages and compiled.can_compile(lock.python):
                    more = {"modules": ",".join(modules), "magic": compiled.MAGIC, "form": compiled.FORM}
                    keyed = self._inputs({**inputs, **more})
                    layers.append(
                        self._layers.layer(f"{what}-compiled", keyed, lambda: laid_down(precompile))
                    )
                return layers

        return pool.submit(make)

    def _start_grown(self, pool: ThreadPoolExecutor, old: Lock, new: Lock, modules: Sequence[str]) -> _Made:
        """What a lock has more than another, or all of it where that has something else."""
        if new.packages == old.packages:
            return pool.submit(list[Layer])
        if set(old.packages) <= set(new.packages):
            more = sorted(set(new.packages) - set(old.packages))
            return self._start_packages(pool, _EXTRA, Lock.of(new.python, more, (), new.platform), modules)
        return self._start_packages(pool, _DEPENDENCIES, new, modules)

    def _laid_down(self, lock: Lock) -> AbstractContextManager[Path]:
        return wheels.laid_down(
            lock,
            self._cache / "wheels",
            configuration=self._configuration,
            environment=self._environment,
            progress=self._progress,
            cancel=self._cancel,
        )

    def _content(self, what: str, files: Mapping[str, bytes]) -> Layer:
        inputs = {"content": runtime.digest(files)}
        return self._remembered(
            what, inputs, lambda: (Entry.file(path, content) for path, content in files.items())
        )

    def _remembered(
        self, what: str, inputs: Mapping[str, str], entries: Callable[[], Iterable[Entry]]
    ) -> Layer:
        return self._layers.layer(what, self._inputs(inputs), lambda: self._write(what, entries()))

    def _inputs(self, inputs: Mapping[str, str]) -> dict[str, str]:
        return {**inputs, "compression": self._compression}

    def _write(self, what: str, entries: Iterable[Entry], packages: Sequence[str] = ()) -> Layer:
        return write_layer(self._layout, what, self._watched(entries), self._compression, packages=packages)

    def _watched(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if self._cancel is not None and self._cancel.is_set():
                raise FailedError("making an image was stopped on request")
            yield entry

    def _lock(
        self, requirements: Sequence[str], pythons: Mapping[str, str], base: Mapping[str, Lock] | None = None
    ) -> dict[str, Lock]:
        return lock_platforms(
            requirements,
            pythons,
            cache=self._cache / "locks",
            base=base,
            configuration=self._configuration,
            environment=self._environment,
            progress=self._progress,
            cancel=self._cancel,
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

    def _tell(self, message: str) -> None:
        if self._progress is not None:
            self._progress(message)


def _pythons(bases: Mapping[str, BaseImage]) -> dict[str, str]:
    return {platform: base.python_version for platform, base in bases.items()}


def _results(made: Iterable[_Made]) -> list[Layer]:
    return [layer for layers in made for layer in layers.result()]


def _python_files(code: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(code):
        folders[:] = [name for name in folders if name not in _HIDDEN]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


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
