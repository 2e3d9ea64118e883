"""Platforms of images: what uv calls them, and locks for them from wheels alone.

Nothing of a platform other than this machine's can be run, so nothing is built: a requirement without a wheel
is an error that names it. Platforms are locked one after the other, each preferring the versions of another,
so that learners on different processors run the same versions wherever wheels allow it.
"""

import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.images import clashes, uv
from flops.images.locks import Lock, LockStore, request_key
from flops.images.pip_configuration import PipConfiguration
from flops.images.resolution import Resolution
from flops.images.undeclared import foreseen

# glibc 2.28: Debian 10, RHEL 8 and everything since; no wheel of today asks for more.
_UV_NAMES = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
_PYTHON = re.compile(r"3\.\d{1,2}")
_WITHOUT_WHEEL = re.compile(
    r"(?:only the following versions of )?([A-Za-z0-9][A-Za-z0-9._-]*(?:[=<>!~]=?=?[^\s,]+)?)"
    r"(?: was found in the package registry, but)? (?:has|have) no (?:usable )?(?:wheels?|source)"
)

PLATFORMS = tuple(_UV_NAMES)
"""Those that images can be assembled for."""


def uv_arguments(platform: str, python: str) -> list[str]:
    """How uv is told to choose for a platform and a Python such as 3.11.

    Raises:
        InvalidInputError: no images can be made for that platform or Python.
    """
    if platform not in _UV_NAMES:
        raise InvalidInputError(
            f"images cannot be assembled for platform '{platform[:40]}' - choose from {', '.join(PLATFORMS)}"
        )
    if not _PYTHON.fullmatch(python):
        raise InvalidInputError(f"'{python[:40]}' is not a Python version of an image - write it like 3.11")
    return ["--python-platform", _UV_NAMES[platform], "--python-version", python]


def lock_platforms(
    packages: Sequence[str],
    platforms: Mapping[str, str],
    *,
    cache: Path,
    base: Mapping[str, Lock] | None = None,
    configuration: PipConfiguration | None = None,
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, Lock]:
    """One lock for each platform; the stored ones when the same was asked before.

    Args:
        packages: PEP 508 requirements.
        platforms: the Python of each, such as ``{"linux/arm64": "3.11"}``.
        cache: folder of stored locks.
        base: locks whose pins are kept, ``packages`` come on top; where that is impossible the newest that
            fit are taken, and a warning names what has changed.
    Raises:
        InvalidInputError: nothing fits together, or a package has no wheel for a platform.
        UnavailableError: an index cannot be reached, and its remembered answers do not suffice.
        FailedError: uv failed otherwise, or ``cancel`` was set.
    """
    if configuration is None:
        configuration = PipConfiguration.from_pip(environment)
    store = LockStore(cache)
    ordered = sorted(platforms.items())
    kept = {platform: base[platform].packages if base is not None else () for platform, _ in ordered}
    fingerprint = configuration.fingerprint(environment)
    keys = {
        platform: request_key(packages, kept[platform], python, fingerprint, f"{platform} among {ordered}")
        for platform, python in ordered
    }
    known = {platform: answer.lock for platform, key in keys.items() if (answer := store.answer(key))}
    if len(known) == len(keys):
        return known
    work = Resolution(configuration, environment, progress, cancel)
    locks: dict[str, Lock] = {}
    preferred: Sequence[str] = ()
    for platform, python in ordered:
        locks[platform] = _lock(work, packages, kept[platform], preferred, platform, python)
        preferred = locks[platform].packages
    for platform, python in ordered[:-1]:  # the last may have had to take other versions, which suit all
        if _differ(locks[platform].packages, preferred):
            locks[platform] = _lock(work, packages, kept[platform], preferred, platform, python)
    for platform, lock in locks.items():
        store.remember(keys[platform], lock, None)
    return locks


def _differ(pins: Sequence[str], others: Sequence[str]) -> bool:
    """Whether there is a package in both with two versions."""
    versions = dict(pin.partition("==")[::2] for pin in others)
    return any(
        versions.get(name, version) != version for name, _, version in (pin.partition("==") for pin in pins)
    )


def _lock(
    work: Resolution,
    packages: Sequence[str],
    kept: Sequence[str],
    preferred: Sequence[str],
    platform: str,
    python: str,
) -> Lock:
    target = uv_arguments(platform, python)
    wanted = [*kept, *packages]
    # As constraints, for what uv takes as preferences it wrongly refuses where wheels of platforms differ:
    # "numpy==1.26.4 has no wheels with a matching platform tag" while it has them (uv 0.13.9).
    constraints = [*preferred, *foreseen(wanted)]
    pins = work.pins(wanted, target, wheels_only=True, constraints=constraints)
    if isinstance(pins, uv.Finished) and constraints:
        pins = work.pins(wanted, target, wheels_only=True)
    warnings: list[str] = []
    if isinstance(pins, uv.Finished) and kept:
        names = [pin.partition("==")[0] for pin in kept]
        loose = work.pins([*names, *packages], target, wheels_only=True)
        if not isinstance(loose, uv.Finished):
            changed = ", ".join(sorted(set(kept) - set(loose)))
            warnings = [f"to add {', '.join(packages)}, other versions are used of: {changed}"]
            pins = loose
    if isinstance(pins, uv.Finished):
        raise _refusal(pins, platform, python)
    pins, notes = work.mend(wanted, pins, target, True)
    return Lock.of(python, pins, [*warnings, *notes], platform)


def _refusal(refusal: uv.Finished, platform: str, python: str) -> InvalidInputError:
    reason = clashes.explain(refusal.stderr)
    if not clashes.is_about_wheels(refusal.stderr):
        return InvalidInputError(
            f"the requirements cannot be installed together for {platform} and Python {python}: {reason} - "
            "change one of these pins"
        )
    named = sorted({match.rstrip(".") for match in _WITHOUT_WHEEL.findall(reason)})
    what = f"{', '.join(named)} has" if named else "a requirement has"
    return InvalidInputError(
        f"{what} no wheel for {platform} and Python {python} ({reason}) - pin versions that have one, leave "
        f"{platform} out, or build the image yourself on such a machine with {_builders()}, and name it"
    )


def _builders() -> str:
    installed = [name for name in ("docker", "buildah") if shutil.which(name)]
    note = f"{' and '.join(installed)} installed here" if installed else "neither is installed here"
    return f"'docker buildx' or 'buildah' ({note})"
