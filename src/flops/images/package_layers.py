"""The layers of packages: what a lock names, laid down once, packed, and compiled where that is possible.

Large libraries that an environment of the same image has too (pyarrow's, most often) are links to those: they
are stored, sent and loaded into memory once. Whether two are equal is what their packages' RECORD says.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flops.core.errors import FailedError
from flops.images import bytecode, compiled, uv, wheels
from flops.images.exclusion import exclusive
from flops.images.layer import Compression, Entry, Layer, write_layer
from flops.images.layer_cache import LayerCache
from flops.images.layout import Layout
from flops.images.locks import Lock, write_atomically
from flops.images.pip_configuration import PipConfiguration


@dataclass(frozen=True)
class PackageSet:
    """The packages of a lock, as they come to one place of an image."""

    what: str
    """Kind of the layer."""
    lock: Lock
    place: str
    """The environment in the image, such as ``/opt/user``."""
    modules: tuple[str, ...] = ()
    """Compile what importing these takes."""
    unused: tuple[str, ...] = ()
    """Patterns of files that are left out."""
    beside: "PackageSet | None" = None
    """The packages of another place of the same image, whose libraries are shared."""

    def inputs(self) -> dict[str, str]:
        """Everything that the layer of packages depends on."""
        common = set(self.beside.lock.packages) & set(self.lock.packages) if self.beside else set()
        shared = [self.beside.place, *sorted(common), *self.beside.unused] if self.beside and common else []
        return {
            "lock": self.lock.hash,
            "platform": self.lock.platform,
            "python": self.lock.python,
            "place": self.place,
            "trim": str(wheels.TRIM),
            "unused": " ".join(self.unused),
            "shared": " ".join(shared),
        }


@dataclass(frozen=True)
class _LaidDown:
    packages: wheels.Packages
    site: Path
    """The folder that they lie in."""
    shared: Mapping[str, str]
    """The libraries of the packages beside."""


@dataclass(frozen=True)
class Tools:
    """What layers are made with."""

    layout: Layout
    cache: Path
    compression: Compression
    configuration: PipConfiguration
    environment: Mapping[str, str]
    progress: uv.Progress | None
    cancel: threading.Event | None

    def remembered(self, what: str, inputs: Mapping[str, str], make: Callable[[], Layer]) -> Layer:
        """The layer of some inputs, made if it is not there."""
        layers = LayerCache(self.cache / "layers", self.layout)
        return layers.layer(what, {**inputs, "compression": self.compression}, make)

    def write(self, what: str, entries: Iterable[Entry], packages: tuple[str, ...] = ()) -> Layer:
        """Make a layer; ends with a FailedError once ``cancel`` is set."""
        return write_layer(self.layout, what, self._watched(entries), self.compression, packages=packages)

    def package_layers(self, wanted: PackageSet) -> list[Layer]:
        """The layer of some packages, and if possible one with their compiled modules.

        Raises:
            UnavailableError: a package could not be fetched.
            InvalidInputError: a package is malformed, or has no wheel any more.
            FailedError: uv failed otherwise, or ``cancel`` was set.
            DiskFullError: no space is left.
        """
        with ExitStack() as stack, ThreadPoolExecutor(2, thread_name_prefix="pack") as pool:
            opened: list[_LaidDown] = []
            opening = threading.Lock()

            def laid_down() -> _LaidDown:
                with opening:
                    if not opened:  # once for both layers, and only if one of them is not there
                        opened.append(stack.enter_context(self._laid_down(wanted)))
                    return opened[0]

            inputs = wanted.inputs()
            pack = partial(self._pack, wanted, laid_down)
            layers = [pool.submit(self.remembered, wanted.what, inputs, pack)]
            if wanted.modules and wanted.lock.packages and compiled.can_compile(wanted.lock.python):
                inputs = inputs | {
                    "modules": " ".join(wanted.modules),
                    "magic": compiled.MAGIC,
                    "form": compiled.FORM,
                    "shared": "",
                }
                what = f"{wanted.what}-compiled"
                compile_ = partial(self._compile, what, wanted, laid_down)
                layers.append(pool.submit(self.remembered, what, inputs, compile_))
            return [layer.result() for layer in layers]

    def _pack(self, wanted: PackageSet, laid_down: Callable[[], "_LaidDown"]) -> Layer:
        found, lock = laid_down(), wanted.lock
        self._tell(f"packing {len(lock.packages)} packages for {lock.platform} ({wanted.what})")
        other = wanted.beside.place if wanted.beside else ""
        entries = found.packages.entries(wanted.place, lock.python, found.shared, other)
        return self.write(wanted.what, entries, lock.packages)

    def _compile(self, what: str, wanted: PackageSet, laid_down: Callable[[], "_LaidDown"]) -> Layer:
        found = laid_down()
        site = found.site
        read = {str(path.relative_to(site)) for path in bytecode.imported(site, wanted.modules)}
        entries = compiled.entries(
            site,
            [name for name in found.packages.sources() if name in read],
            wheels.site_packages(wanted.place, wanted.lock.python),
            self.cache / "compiled",
            environment=self.environment,
            cancel=self.cancel,
        )
        return self.write(what, entries)

    def _libraries(self, wanted: PackageSet) -> Mapping[str, str]:
        """The libraries of some packages that others can share; waits for whoever is laying them down."""
        note = self._note(wanted)
        with exclusive(note.with_suffix(".lock")):
            known = _read(note)
        if known is None:
            with self._laid_down(wanted) as found:
                known = found.packages.libraries()
        return known

    @contextmanager
    def _laid_down(self, wanted: PackageSet) -> Iterator["_LaidDown"]:
        # First, because what both need is then there already.
        shared = self._libraries(wanted.beside) if wanted.beside and wanted.inputs()["shared"] else {}
        note = self._note(wanted)
        with ExitStack() as stack:
            with exclusive(note.with_suffix(".lock")):
                site = stack.enter_context(
                    wheels.laid_down(
                        wanted.lock,
                        self.cache / "wheels",
                        configuration=self.configuration,
                        known=note.exists(),
                        environment=self.environment,
                        progress=self.progress,
                        cancel=self.cancel,
                    )
                )
                packages = wheels.Packages(site, wanted.unused)
                write_atomically(note, json.dumps(packages.libraries(), indent=1, sort_keys=True) + "\n")
            yield _LaidDown(packages, site, shared)

    def _note(self, wanted: PackageSet) -> Path:
        """Where the libraries of some packages are noted."""
        text = json.dumps([wanted.lock.hash, wanted.unused, wheels.TRIM])
        return self.cache / "libraries" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _watched(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if self.cancel is not None and self.cancel.is_set():
                raise FailedError("making an image was stopped on request")
            yield entry

    def _tell(self, message: str) -> None:
        if self.progress is not None:
            self.progress(message)


def _read(note: Path) -> dict[str, str] | None:
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
    return {str(name): str(content) for name, content in known.items()} if isinstance(known, dict) else None
