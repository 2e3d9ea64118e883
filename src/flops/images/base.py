"""Base images: what every other image is built on, made here from Debian's packages or taken from a registry.

Promises: nothing of a base is executed to make, find or check it; a base made here has equal digests for
equal packages; the same one is made once and shared by all projects, several callers may ask at once.
"""

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from packaging.version import Version

from flops.core.errors import (
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.images import debian, uv
from flops.images.base_image import PYTHON, PYTHON_VERSION, BaseImage, read_base
from flops.images.descriptor import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
)
from flops.images.exclusion import exclusive
from flops.images.inspection import check_python
from flops.images.interpreters import Interpreter, candidates, own_interpreter
from flops.images.layer import write_layer
from flops.images.layout import Layout
from flops.images.platforms import PLATFORMS
from flops.images.pull import pull
from flops.images.references import Reference
from flops.images.registry import Registry

SUITE = "bookworm"
PUBLIC = "python:{python}-slim"
"""Of the public hub."""
PACKAGES = "io.flops.debian.packages"
"""Annotation of a base made here: ``name=version`` of every package in it."""

_TAG = "flops-base"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MINORS = range(11, 15)
"""Of Pythons that FLOps' programs run on."""
_MOST_PATCHES = 40
_PATIENCE_S = 4.0
_asking = threading.Lock()
_answering: dict[str, bool] = {}


def find_base(
    layout: Layout,
    platforms: Sequence[str] = PLATFORMS,
    *,
    python: str | None = None,
    wanted: str | None = None,
    public: str = PUBLIC,
    refresh: bool = False,
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    warn: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Mapping[str, BaseImage]:
    """The base to build on, for each platform.

    What was pulled or made before is taken again, with no network asked, so that equal projects have equal
    images; ``refresh`` asks for the present one.

    Args:
        python: PEP 440 specifiers of the wanted Python; None: FLOps' own. Where there is no such base the
            nearest is taken, and ``warn`` is told.
        wanted: an image's reference, in which ``{python}`` stands for a version such as 3.12, or
            ``flops-base:SUITE``; None: Python's image of the public hub where that can be reached, else a
            base made here.
        public: what is tried first where nothing is wanted.
    Raises:
        InvalidInputError: reference or specifiers are broken, or the image is not for these platforms.
        NotFoundError: the registry has no such image.
        UnavailableError: nothing can be reached or made.
        FailedError: an image is damaged, or ``cancel`` was set.
    """
    tell, say = progress or _ignore, warn or _ignore
    wish = candidates(python, [one for minor in _MINORS for one in _patches(minor)], own_interpreter())
    reference = (wanted or public).replace("{python}", f"3.{wish.interpreters[0].minor}")
    search = _Search(layout, tuple(sorted(set(platforms))), refresh, environment, tell, cancel)
    if reference.startswith(f"{_TAG}:"):
        found = search.made(reference.removeprefix(f"{_TAG}:"))
    elif wanted is not None:
        found = search.pulled(reference)
    else:
        found = search.public(reference, python)
    for base in found.values():
        if not _fits(base, python):
            say(
                f"Python {wish.asked} is asked for; base image {base.source} for {base.platform} has "
                f"{base.python_version}, which is used"
            )
    return found


class _Search:
    """One call's ways to a base."""

    def __init__(
        self,
        layout: Layout,
        platforms: tuple[str, ...],
        refresh: bool,
        environment: Mapping[str, str],
        tell: uv.Progress,
        cancel: threading.Event | None,
    ) -> None:
        self._layout = layout
        self._platforms = platforms
        self._refresh = refresh
        self._environment = environment
        self._tell = tell
        self._cancel = cancel

    def made(self, suite: str) -> Mapping[str, BaseImage]:
        return make_base(
            self._layout,
            suite,
            self._platforms,
            refresh=self._refresh,
            environment=self._environment,
            progress=self._tell,
            cancel=self._cancel,
        )

    def pulled(self, text: str) -> Mapping[str, BaseImage]:
        """From a registry, checked before it gets a name here."""
        reference = Reference.parse(text)
        name = str(reference)
        known = {} if self._refresh else _known(self._layout, name, self._platforms)
        if set(self._platforms) <= set(known):
            return {platform: known[platform] for platform in self._platforms}
        self._tell(f"pulling base image {name}")
        with Registry.of_user(reference.host, self._environment) as registry:
            descriptor = pull(
                reference, self._layout, self._platforms, registry=registry, cancel=self._cancel
            )
        found = {
            platform: read_base(self._layout, descriptor, platform, name) for platform in self._platforms
        }
        for base in found.values():
            check_python(self._layout, base)
        self._layout.tag(name, descriptor)
        return found

    def public(self, text: str, python: str | None) -> Mapping[str, BaseImage]:
        """From the public hub, else made here."""
        reference = Reference.parse(text)
        known = _known(self._layout, str(reference), self._platforms)
        away = ""
        if set(self._platforms) <= set(known) or _answers(reference.host):
            try:
                return self.pulled(text)
            except (UnavailableError, NotFoundError) as error:
                away = str(error)
        else:
            away = f"image registry {reference.host} cannot be reached"
        self._tell(f"{away}; a base image made here is used")
        try:
            return self.made(_nearest(self._layout, python))
        except UnavailableError as error:
            raise UnavailableError(f"{away}, and {error}") from error


def make_base(
    layout: Layout,
    suite: str = SUITE,
    platforms: Sequence[str] = PLATFORMS,
    *,
    mirror: str | None = None,
    refresh: bool = False,
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Mapping[str, BaseImage]:
    """The base from a Debian suite, made for those platforms that it is not there for.

    It is named ``flops-base:SUITE`` in the layout.

    Args:
        mirror: a Debian mirror's address; None: those of this machine's apt.
        refresh: make it again from the packages of today.
        cancel: set it from another thread to end the call; what is there already stays.
    Raises:
        InvalidInputError: no such suite, or not for such a platform.
        UnavailableError: mmdebstrap is not installed, or the mirror cannot be reached, or no space is left.
        FailedError: mmdebstrap failed otherwise, or ``cancel`` was set.
    """
    wanted = sorted(set(platforms))
    if not wanted:
        raise InvalidInputError("a base image needs a platform - name one such as linux/amd64")
    name = f"{_TAG}:{suite}"
    tell = progress or _ignore
    with exclusive(layout.folder / ".bases.lock", "base image", tell, cancel):
        known = {found.platform: found.manifest for found in _known(layout, name).values()}
        missing = [platform for platform in wanted if refresh or platform not in known]

        def make(platform: str) -> Descriptor:
            tell(f"unpacking Debian {suite} for {platform}")
            place = Path(scratch) / platform.replace("/", "-")
            place.mkdir()
            store = Path(scratch) / "compiled"
            found = debian.unpack(
                suite, platform, place, store, mirror=mirror, environment=environment, cancel=cancel
            )
            tell(f"writing the base image for {platform}")
            return _write(layout, found, suite, platform)

        if missing:
            with (
                tempfile.TemporaryDirectory(prefix="flops-base-") as scratch,
                ThreadPoolExecutor(len(missing)) as pool,
            ):
                known |= dict(zip(missing, pool.map(make, missing), strict=True))
            manifests = [known[platform].to_json() for platform in sorted(known)]
            document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
            layout.tag(name, layout.add_json(document, OCI_INDEX))
    return {platform: read_base(layout, known[platform], platform, name) for platform in wanted}


def made_bases(layout: Layout) -> Mapping[str, Descriptor]:
    """The bases made here, by suite."""
    start = f"{_TAG}:"
    return {
        name.removeprefix(start): found for name, found in layout.tags().items() if name.startswith(start)
    }


def _known(layout: Layout, name: str, platforms: Sequence[str] = PLATFORMS) -> dict[str, BaseImage]:
    """What has that name here, by platform; without what is not whole any more."""
    known: dict[str, BaseImage] = {}
    for platform in platforms:
        with suppress(NotFoundError, InvalidInputError, FailedError):
            known[platform] = read_base(layout, layout.resolve(name), platform, name)
    return known


def _nearest(layout: Layout, python: str | None) -> str:
    """The suite whose Python is wanted, among those made here; without any, the usual one."""
    suites = sorted(made_bases(layout), key=lambda suite: (suite != SUITE, suite))
    for suite in suites:
        if any(_fits(base, python) for base in _known(layout, f"{_TAG}:{suite}").values()):
            return suite
    return suites[0] if suites else SUITE


def _fits(base: BaseImage, python: str | None) -> bool:
    """Whether some patch release of the base's Python is what is wanted."""
    minor = int(base.python_version.partition(".")[2])
    return candidates(python, _patches(minor), own_interpreter()).fits


def _patches(minor: int) -> list[Interpreter]:
    return [Interpreter(Version(f"3.{minor}.{patch}"), Path()) for patch in range(_MOST_PATCHES)]


def _answers(host: str) -> bool:
    """Whether a registry can be reached; asked once, with little patience."""
    with _asking:
        if host not in _answering:
            answers: Queue[bool] = Queue()
            threading.Thread(target=_ask, args=(host, answers), daemon=True).start()
            try:
                _answering[host] = answers.get(timeout=_PATIENCE_S)
            except Empty:
                _answering[host] = False
        return _answering[host]


def _ask(host: str, answers: "Queue[bool]") -> None:
    try:
        with Registry(host, pauses_s=()) as registry:
            registry.ping()
        answers.put(True)
    except FlopsError as error:
        answers.put(isinstance(error, UnauthorizedError))  # a refusal is an answer


def _write(layout: Layout, found: debian.Debian, suite: str, platform: str) -> Descriptor:
    """The layer, config and manifest of one platform."""
    layer = write_layer(layout, "base", found.entries)
    system, architecture = platform.split("/")
    config = {
        "architecture": architecture,
        "os": system,
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Env": [f"PATH={_PATH}", "LANG=C.UTF-8"],
            "User": f"{debian.USER_ID}:{debian.USER_ID}",
            "Cmd": [found.python],
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"Debian {suite}"}],
    }
    packages = " ".join(f"{name}={version}" for name, version in sorted(found.packages.items()))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": layout.add_json(config, OCI_CONFIG).to_json(),
        "layers": [layer.descriptor.to_json()],
        "annotations": {
            PYTHON: found.python,
            PYTHON_VERSION: found.python_version,
            PACKAGES: packages,
            "org.opencontainers.image.title": f"Debian {suite} with Python {found.python_version}",
        },
    }
    return layout.add_json(manifest, OCI_MANIFEST, platform=platform)


def _ignore(_message: str) -> None:
    return
