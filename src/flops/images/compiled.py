"""Compiled modules for images, the same bytes from the same sources.

The root of a container cannot be written to, so what is not compiled when the image is made is compiled anew
by every process that starts. Compiled modules are a layer of their own on top of the sources: they can be
made only by a Python of the image's minor version, and only what running the code takes is compiled.

What compileall writes depends on what the process did before (reference counts decide how marshal writes an
object), on paths and on times. Here modules are marshalled in version 2, which knows no references; carry no
path, which the import system sets; and are not checked against their source (PEP 552).
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flops.core.errors import FailedError
from flops.images import uv
from flops.images.exclusion import exclusive
from flops.images.layer import Entry

MAGIC = importlib.util.MAGIC_NUMBER.hex()
"""Of what this process compiles; changes with the format."""
FORM = "1"
"""Changes with the way modules are compiled here."""

_TIMEOUT_S = 900.0
_MOST_PROCESSES = 4
_WORTH_A_PROCESS = 100
"""So many modules take as long as starting one."""
_PROGRAM = r"""
import json, marshal, sys, warnings
from importlib.util import MAGIC_NUMBER, source_hash
warnings.simplefilter("ignore")
for source, target in json.load(open(sys.argv[1])):
    try:
        content = open(source, "rb").read()
        code = compile(content, "", "exec", dont_inherit=True, optimize=0)
        data = marshal.dumps(code, 2)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        continue  # templates and modules for other versions are no Python
    with open(target, "wb") as file:
        file.write(MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(content) + data)
"""


def can_compile(python: str) -> bool:
    """Whether this process's Python compiles for an image's, such as 3.11."""
    return sys.implementation.name == "cpython" and python == ".".join(map(str, sys.version_info[:2]))


def entries(
    site: Path,
    sources: Iterable[str],
    place: str,
    store: Path,
    *,
    environment: Mapping[str, str] = os.environ,
    cancel: threading.Event | None = None,
) -> Iterator[Entry]:
    """The compiled forms of some modules.

    Args:
        site: the folder that the sources lie in.
        sources: their paths in it.
        place: where ``site`` is in the image.
        store: compiled modules by their source: packages share many among platforms and versions.
    Raises:
        FailedError: the compiler failed, or ``cancel`` was set.
    """
    folder = store / f"{MAGIC}-{FORM}"
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    found: dict[str, tuple[Path, str]] = {}
    for relative in sources:
        path = site / relative
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        parent, _, module = f"{place}/{relative}".rpartition("/")
        target = f"{parent}/__pycache__/{module.removesuffix('.py')}.{tag}.pyc"
        found[target] = (path, name)
    with exclusive(folder / ".lock"):  # platforms come at the same time, with the same modules
        _fill(folder, found.values(), environment, cancel)
    for target, (_, name) in found.items():
        if (folder / name).exists():
            yield Entry.copy(target, folder / name, 0o644)


def _fill(
    folder: Path,
    wanted: Iterable[tuple[Path, str]],
    environment: Mapping[str, str],
    cancel: threading.Event | None,
) -> None:
    """Compile the sources whose compiled forms are not in the folder under their names."""
    missing = {name: path for path, name in wanted if not (folder / name).exists()}
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as making:
        pairs = [[str(path), f"{making}/{name}"] for name, path in missing.items()]
        processes = min(os.cpu_count() or 1, _MOST_PROCESSES, 1 + len(pairs) // _WORTH_A_PROCESS)

        def compile_part(number: int) -> None:
            listed = Path(making) / f"wanted-{number}.json"
            listed.write_text(json.dumps(pairs[number::processes]), encoding="utf-8")
            command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, str(listed)]
            variables = {**environment, "PYTHONHASHSEED": "0"}
            finished = uv.start(command, variables, _TIMEOUT_S, None, cancel)
            if finished.returncode:
                raise FailedError(
                    f"modules could not be compiled: {finished.stderr[-300:]} - install FLOps again"
                )

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(compile_part, range(processes)))
        for name in missing:
            made = Path(making) / name
            if made.exists():
                made.replace(folder / name)
