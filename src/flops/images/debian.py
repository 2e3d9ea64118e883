"""A minimal Debian with Python, unpacked from packages for any processor; none of its programs is run.

mmdebstrap's ``extract`` variant lets apt choose, verify and unpack the packages. What their maintainer
scripts would do, and what matters to a container with one Python program, is done here for all processors
alike: one tree below ``/usr``, users, certificates in one file, a shell, compiled modules of the standard
library. What such a container has no use for (package tools, manuals, translations, character sets that
Python does itself) is left out; the licences stay.
"""

import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flops.core.disk import disk_full
from flops.core.errors import FailedError, FlopsError, InvalidInputError, UnavailableError
from flops.images import compiled, uv
from flops.images.apt_sources import APT, check_suite, sources_text
from flops.images.layer import Entry

ARCHITECTURES: Mapping[str, str] = {"linux/amd64": "amd64", "linux/arm64": "arm64"}
"""Debian's names of platforms."""
USER_ID = 10001

PACKAGES = (
    "base-files",
    "ca-certificates",
    "dash",
    "libc-bin",
    "libgcc-s1",
    "libgomp1",
    "libpython3-stdlib",
    "libstdc++6",
    "netbase",
    "python3-minimal",
    "tzdata",
)
"""Python, what compiled wheels link to, and what it takes to speak TLS, tell time zones and have a shell."""
_LEFT_PACKAGES = frozenset({"adduser", "debconf", "debianutils", "dpkg", "mawk", "perl-base", "tar"})
"""Needed to install packages; here nothing is installed."""
_WITH_DISTUTILS = frozenset({"buster", "bullseye", "bookworm"})
"""Suites that keep the standard library's distutils in a package of its own."""

_TIMEOUT_S = 1800.0
_DEB = re.compile(r"(?P<name>[a-z0-9][a-z0-9+.-]+)_(?P<version>[^_]+)_[a-z0-9]+\.deb")
_PACKAGE_FILES = "var/cache/apt/archives"
_MERGED = ("bin", "sbin", "lib", "lib64")
_MAX_CERTIFICATE_BYTES = 1 << 16

_KEPT = re.compile(
    r"usr/lib(64)?/.*"
    r"|usr/bin/(python3(\.\d+)?|dash)"
    r"|usr/share/(zoneinfo|common-licenses)/.*"
    r"|usr/share/doc/[^/]+/copyright"
    r"|etc/(debian_version|gai\.conf|host\.conf|ld\.so\.conf|mime\.types|netconfig|os-release|protocols"
    r"|rpc|services|ssl/openssl\.cnf|ld\.so\.conf\.d/.*|gss/.*|python3[^/]*/.*)"
)
_LEFT_OUT = re.compile(
    r"usr/lib/(apt|binfmt\.d|dpkg|debug|init|mime|systemd|sysusers\.d|tmpfiles\.d|udev|valgrind)/.*"
    rf"|usr/share/doc/({'|'.join(sorted(_LEFT_PACKAGES))})/.*"
    r"|usr/lib/[^/]+/(gconv|audit|perl[^/]*)/.*"
    r"|usr/lib/ssl/(misc/.*|private)"
    r"|usr/lib/python3[^/]*/(test|tests|idlelib|turtledemo|ensurepip|pydoc_data)/.*"
    r"|usr/lib/python3[^/]*/EXTERNALLY-MANAGED"
    r"|usr/share/zoneinfo/(posix|right)/.*"
    r"|.*\.a"
)
_FOLDERS: Mapping[str, int] = {
    **dict.fromkeys(
        ("dev", "etc", "home", "opt", "proc", "run", "sys", "usr", "usr/bin", "usr/lib", "usr/local",
         "usr/local/bin", "usr/local/lib", "usr/sbin", "usr/share", "var", "var/cache", "var/lib",
         "var/log"),
        0o755,
    ),
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}  # fmt: skip
_FILES: Mapping[str, str] = {
    "etc/group": f"root:x:0:\ntty:x:5:\nflops:x:{USER_ID}:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        f"flops:x:{USER_ID}:{USER_ID}:FLOps:/tmp:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"
    ),
    "etc/shells": "/bin/sh\n",
}
_LINKS: Mapping[str, str] = {
    "bin": "usr/bin",
    "etc/localtime": "/usr/share/zoneinfo/Etc/UTC",
    "lib": "usr/lib",
    "sbin": "usr/sbin",
    "usr/bin/sh": "dash",
    "usr/lib/ssl/cert.pem": "/etc/ssl/certs/ca-certificates.crt",
    "usr/lib/ssl/openssl.cnf": "/etc/ssl/openssl.cnf",
}
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Debian:
    """What was unpacked for one platform."""

    entries: tuple[Entry, ...]
    """Of the image's only layer."""
    packages: Mapping[str, str]
    """Versions by name, of those whose files are kept."""
    python: str
    """Path of the interpreter, such as ``/usr/bin/python3.11``."""
    python_version: str
    """Such as ``3.11``."""


def find_mmdebstrap() -> str | None:
    return shutil.which("mmdebstrap")


def unpack(
    suite: str,
    platform: str,
    folder: Path,
    store: Path,
    *,
    mirror: str | None = None,
    environment: Mapping[str, str] = os.environ,
    cancel: threading.Event | None = None,
) -> Debian:
    """Fetch, verify and unpack the packages of a suite for a platform into an empty folder.

    Args:
        folder: what is returned refers to files in it.
        store: the same for compiled modules, which platforms share.
        mirror: a mirror's address; None: those of this machine's apt.
    Raises:
        InvalidInputError: no such suite, or it does not have that platform.
        UnavailableError: mmdebstrap is not installed, or the mirror cannot be reached.
        FailedError: mmdebstrap failed otherwise, or ``cancel`` was set.
    """
    program = find_mmdebstrap()
    if program is None:
        raise UnavailableError(
            "a base image cannot be made: the program 'mmdebstrap' is missing - run 'apt install "
            "mmdebstrap', or name a base image in FLOPS_BASE_IMAGE"
        )
    wanted = [*PACKAGES, *(["python3-distutils"] if check_suite(suite) in _WITH_DISTUTILS else [])]
    sources = sources_text(suite, mirror)
    root = folder / "root"
    arguments = [
        *["--mode=chrootless", "--variant=extract", "--format=directory"],  # extract runs nothing at all
        *["--skip=cleanup/apt/cache", f"--architectures={_architecture(platform)}"],
        f"--include={','.join(wanted)}",
        *_apt_options(environment),
        *[suite, str(root)],
    ]
    if sources:
        listed = folder / "flops.sources"
        listed.write_text(sources, encoding="utf-8")
        arguments.append(str(listed))
    variables = {**environment, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "0"}
    finished = uv.start([program, *arguments], variables, _TIMEOUT_S, None, cancel)
    if finished.returncode:
        raise _failure(finished.stderr, suite, platform, folder)
    return _Tree(root).arrange(store, environment, cancel)


def _architecture(platform: str) -> str:
    if platform not in ARCHITECTURES:
        raise InvalidInputError(
            f"Debian has nothing for platform '{platform[:40]}' - use one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[platform]


class _Tree:
    """An unpacked system, on its way to what an image needs of it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def arrange(self, store: Path, environment: Mapping[str, str], cancel: threading.Event | None) -> Debian:
        packages = self._packages()
        link = self._root / "usr/bin/python3"
        name = str(link.readlink()) if link.is_symlink() else ""
        version = name.removeprefix("python")
        if not re.fullmatch(r"3\.\d{1,2}", version) or not (link.parent / name).is_file():
            raise FailedError("the unpacked packages hold no Python 3 - name another suite, such as bookworm")
        entries = {entry.path: entry for entry in self._files()}
        entries |= {entry.path: entry for entry in self._compiled(version, store, environment, cancel)}
        made = [Entry.folder(f"/{path}", mode) for path, mode in _FOLDERS.items()]
        made += [Entry.file(f"/{path}", text.encode()) for path, text in _FILES.items()]
        made.append(Entry.file(_CERTIFICATES, self._certificates()))
        made += [Entry.link(f"/{path}", target) for path, target in _LINKS.items()]
        if any(path.startswith("/usr/lib64/") for path in entries):
            made.append(Entry.link("/lib64", "usr/lib64"))
        entries |= {entry.path: entry for entry in made}
        return Debian(tuple(entries.values()), packages, f"/usr/bin/{name}", version)

    def _packages(self) -> dict[str, str]:
        names = sorted(path.name for path in (self._root / _PACKAGE_FILES).glob("*.deb"))
        matches = [match for match in map(_DEB.fullmatch, names) if match is not None]
        return {
            match["name"]: match["version"].replace("%3a", ":")
            for match in matches
            if match["name"] not in _LEFT_PACKAGES
        }

    def _files(self) -> Iterator[Entry]:
        for folder, _, _ in os.walk(self._root):
            for path in sorted(Path(folder).iterdir()):
                inside = path.relative_to(self._root).as_posix()
                place = _merged(inside)
                if not _KEPT.fullmatch(place) or _LEFT_OUT.fullmatch(place):
                    continue
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    yield Entry.link(f"/{place}", _moved(str(path.readlink()), inside, place))
                elif stat.S_ISREG(status.st_mode):
                    yield Entry.copy(f"/{place}", path)

    def _certificates(self) -> bytes:
        """What ``update-ca-certificates`` would write."""
        found = sorted((self._root / "usr/share/ca-certificates").rglob("*.crt"))
        parts = []
        for path in found:
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    parts.append(file.read(_MAX_CERTIFICATE_BYTES).strip() + b"\n")
        return b"".join(parts)

    def _compiled(
        self, version: str, store: Path, environment: Mapping[str, str], cancel: threading.Event | None
    ) -> Iterator[Entry]:
        """The standard library's modules; where this Python cannot make them, programs start slower."""
        library = self._root / "usr/lib" / f"python{version}"
        place = f"/usr/lib/python{version}"
        sources = [
            path.relative_to(library).as_posix()
            for path in sorted(library.rglob("*.py"))
            if not path.is_symlink() and not _LEFT_OUT.fullmatch(path.relative_to(self._root).as_posix())
        ]
        if compiled.can_compile(version):
            yield from compiled.entries(
                library, sources, place, store, environment=environment, cancel=cancel
            )


def _merged(path: str) -> str:
    """Where a path lies when ``/bin`` and ``/lib`` are links to those below ``/usr``."""
    first, _, rest = path.partition("/")
    return f"usr/{path}" if first in _MERGED and rest else path


def _moved(target: str, before: str, after: str) -> str:
    """A link's target, after the link moved."""
    if target.startswith("/") or before == after:
        return target
    whole = os.path.normpath(PurePosixPath(before).parent / target)
    return os.path.relpath(_merged(whole), PurePosixPath(after).parent)


def _apt_options(environment: Mapping[str, str]) -> list[str]:
    """How this machine's apt reaches mirrors: proxies, certificates, passwords."""
    config = shutil.which("apt-config")
    if config is None:
        return []
    finished = uv.start([config, "dump", "--no-empty"], environment, 30.0)
    kept = re.compile(
        r"(Acquire::(https?|ftp)::(\S+::)*(Proxy(-Auto-Detect)?|Verify-\w+|CaInfo|SslCert|SslKey)(::\S+)?"
        r"|Acquire::Check-Valid-Until) \"[^\"\n]*\";"
    )
    lines = [line for line in finished.stdout.splitlines() if kept.fullmatch(line)]
    if (APT / "auth.conf").is_file():
        lines.append(f'Dir::Etc::netrc "{APT / "auth.conf"}";')
    if any((APT / "auth.conf.d").glob("*.conf")):
        lines.append(f'Dir::Etc::netrcparts "{APT / "auth.conf.d"}";')
    return [f"--aptopt={line}" for line in lines]


def _failure(stderr: str, suite: str, platform: str, folder: Path) -> FlopsError:
    about = f"unpacking Debian {suite} for {platform} failed"
    if "No space left on device" in stderr:
        return disk_full(folder, f"a base image for {platform}")
    away = UnavailableError(
        f"{about}: a mirror could not be reached - check the network and this machine's apt "
        "configuration, then try again"
    )
    if re.search(r"Could not (resolve|connect)|Unable to connect|Temporary failure|timed out", stderr):
        return away
    if re.search(r"does not have a Release file|404 +Not Found", stderr):
        return InvalidInputError(
            f"{about}: the mirror has no suite '{suite}' or not for this platform - name one such as bookworm"
        )
    if "Failed to fetch" in stderr:
        return away
    if re.search(r"NO_PUBKEY|is not signed|signatures? (couldn't|could not)", stderr):
        return FailedError(
            f"{about}: the mirror's signature cannot be checked - install debian-archive-keyring"
        )
    return FailedError(f"{about}: {_last(stderr.splitlines())} - see mmdebstrap's manual")


def _last(lines: Sequence[str]) -> str:
    told = [line.strip() for line in lines if line.startswith("E:")] or [line for line in lines if line]
    return "; ".join(told[-2:])[:300] or "it said nothing"
