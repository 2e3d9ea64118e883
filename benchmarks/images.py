"""Images from wheels: how long they take with empty caches, after a change of code, and with a model on top.

    python -m benchmarks.images --json -

The learner image of ``examples/mnist-sklearn`` on a base from Debian's packages. Cold: uv's cache, the
assembler's cache and the layout are empty, but for the base. Pushes go to a fresh docker-registry of this
machine, where that is installed. Beside: the same packages installed by pip in ``buildah bud`` on the same
base (``--without-buildah`` leaves it out).

The limit of a cold image is what no assembler can avoid: uv downloading and unpacking the same wheels into an
empty cache, then one copy of the same bytes through hash and compressor; measured in the same run.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from isal import isal_zlib

from benchmarks import report
from flops.images import PipConfiguration, runtime, wheels
from flops.images.assembler import Assembler, Built
from flops.images.base import make_base
from flops.images.base_image import BaseImage
from flops.images.layer import Entry, Layer, write_layer
from flops.images.layout import Layout
from flops.images.locks import Lock
from flops.images.push import push
from flops.images.references import Reference
from flops.images.registry_service import registry_command, registry_installed
from flops.repo import inspect

T = TypeVar("T")
AMD64 = "linux/amd64"
EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist-sklearn"
EXTRA = ("mlflow-skinny", "pandas", "skops")
SERVING = ("mlflow.sklearn", "mlflow.pyfunc", "mlflow.pyfunc.scoring_server", "pandas", "skops.io")
MODEL_BYTES = 70_000
GOALS = {
    "cold_amd64_s": 12.0,
    "cold_both_s": 20.0,
    "code_change_s": 0.5,
    "code_change_pushed_bytes": 100_000,
    "model_image_s": 2.0,
    "learner_bytes": 650_000_000,
    "aggregator_bytes": 300_000_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.images", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of what is cold")
    parser.add_argument("--folder", type=Path, help="where everything is written (default: a temporary one)")
    parser.add_argument("--without-buildah", action="store_true")
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-bench-", dir=options.folder) as name:
        report.write(measure(Path(name), options.runs, not options.without_buildah), options.json)


def measure(folder: Path, runs: int, with_buildah: bool) -> dict[str, Any]:
    source = Layout(folder / "bases")
    begun = time.perf_counter()
    bases = make_base(source)
    base_s = time.perf_counter() - begun
    amd64 = {AMD64: bases[AMD64]}
    one, limits = [], []
    for number in range(runs):  # in turns, so that a neighbour's load meets both
        one.append(Place(folder / f"amd64-{number}", source, amd64).cold())
        limits.append(_limit(folder / f"limit-{number}", one[-1]))
    both = [Place(folder / f"both-{n}", source, bases).cold() for n in range(runs)]
    place = both[-1].place
    last = both[-1].built
    result: dict[str, Any] = {
        "benchmark": "images",
        "base_s": base_s,
        **_cold("cold_amd64", one),
        **_cold("cold_both", both),
        **_code_changes(place, last),
        **_models(place, last),
        "same_digest": len({str(run.built.index.digest) for run in both}) == 1,
        **_sizes(place, last),
        **{f"limit_{part}_s": statistics.median(run[part] for run in limits) for part in limits[0]},
        "cold_amd64_ratio_to_limit": statistics.median(
            run.seconds / sum(limit.values()) for run, limit in zip(one, limits, strict=True)
        ),
    }
    if with_buildah:
        result["buildah_pip"] = _buildah(folder, source, bases[AMD64])
    result["goals"] = GOALS
    return result


@dataclass(frozen=True)
class Run:
    """One cold image."""

    place: "Place"
    built: Built
    seconds: float
    processor_s: float
    """Of this process and its children."""


class Place:
    """A machine that has never made an image: empty caches, and a layout with bases alone."""

    def __init__(self, folder: Path, source: Layout, bases: Mapping[str, BaseImage]) -> None:
        self.folder = folder
        self.bases = bases
        self.layout = Layout(folder / "images")
        self.code = shutil.copytree(EXAMPLE, folder / "code")
        self.environment = {**os.environ, "UV_CACHE_DIR": str(folder / "uv")}
        for base in bases.values():
            for blob in (*base.layers, base.manifest):
                with self.layout.writer() as writer:
                    writer.write(source.path(blob.digest).read_bytes())
                    writer.commit(blob.digest)
        self.assembler = Assembler(self.layout, folder / "cache", environment=self.environment)

    def learner(self) -> Built:
        wanted = inspect(self.code).requirements
        about = {"io.flops.commit": "benchmark"}
        return self.assembler.learner_image(self.bases, wanted.packages, self.code, about)

    def cold(self) -> Run:
        before = _processor_s()
        built, seconds = timed(self.learner)
        return Run(self, built, seconds, _processor_s() - before)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun


def _cold(name: str, runs: list[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    return {
        f"{name}_s": statistics.median(seconds),
        f"{name}_s_all": [round(one, 2) for one in seconds],
        f"{name}_processor_s": statistics.median(run.processor_s for run in runs),
    }


def _code_changes(place: Place, before: Built) -> dict[str, Any]:
    """A line more in a module: built, and pushed to where the image was."""
    times, first_s, push_s, sent = [], 0.0, 0.0, None
    with _registry(place.folder) as host:
        reference = Reference.parse(f"{host}/learner:1") if host else None
        if reference is not None:
            _, first_s = timed(lambda: push(place.layout, before.index, reference))
        for number in range(5):
            with (place.code / "model_manager.py").open("a") as file:
                file.write(f"# change {number}\n")
            after, seconds = timed(place.learner)
            times.append(seconds)
            if reference is not None:
                pushed, push_s = timed(lambda: push(place.layout, after.index, reference))  # noqa: B023
                sent = pushed.sent_bytes
    return {
        "code_change_s": statistics.median(times),
        "code_change_s_all": [round(seconds, 3) for seconds in times],
        "code_change_pushed_bytes": sent,
        "code_change_push_s": round(push_s, 3),
        "first_push_both_s": round(first_s, 2),
    }


def _models(place: Place, learner: Built) -> dict[str, Any]:
    """What serving takes is made while the model is trained; then the model comes on top."""
    model = place.folder / "model"
    model.mkdir()
    (model / "MLmodel").write_text("flavors: {}\n")
    times = []
    assembler = place.assembler
    _, prepare_s = timed(lambda: assembler.prepare_model_image(learner, extra=EXTRA, modules=SERVING))
    for _ in range(5):
        (model / "model.skops").write_bytes(os.urandom(MODEL_BYTES))
        _, seconds = timed(lambda: assembler.model_image(learner, model, extra=EXTRA, modules=SERVING))
        times.append(seconds)
    return {
        "model_image_s": statistics.median(times),
        "model_image_s_all": [round(seconds, 3) for seconds in times],
        "model_prepared_both_cold_s": prepare_s,
    }


def _sizes(place: Place, learner: Built) -> dict[str, Any]:
    aggregator = place.assembler.runtime_image(place.bases)
    return {
        "learner_bytes": max(_uncompressed(layers) for layers in learner.layers.values()),
        "aggregator_bytes": max(_uncompressed(layers) for layers in aggregator.layers.values()),
        "layers": {
            platform: {
                layer.what: {"bytes": layer.size_bytes, "compressed": layer.compressed_bytes}
                for layer in layers
            }
            for platform, layers in learner.layers.items()
        },
    }


def _uncompressed(layers: tuple[Layer, ...]) -> int:
    return sum(layer.size_bytes or 0 for layer in layers)


def _limit(folder: Path, run: Run) -> dict[str, float]:
    """Seconds that the same wheels take by uv alone, and the same bytes by hash and compressor alone."""
    environment = {**os.environ, "UV_CACHE_DIR": str(folder / "uv")}
    configuration = PipConfiguration.from_pip(environment)
    packed = [layer for layer in run.built.layers[AMD64] if layer.packages]
    begun = time.perf_counter()
    for layer in packed:
        lock = Lock.of("3.11", layer.packages, platform=AMD64)
        with wheels.laid_down(lock, folder / "wheels", configuration=configuration, environment=environment):
            pass
    download_s = time.perf_counter() - begun
    layout, packing_s = Layout(folder / "images"), 0.0
    for layer in packed:
        content = folder / "content"
        blob = run.place.layout.path(layer.descriptor.digest)
        with blob.open("rb") as source, content.open("wb") as plain:
            decompressor = isal_zlib.decompressobj(31)
            while part := source.read(1 << 20):
                plain.write(decompressor.decompress(part))
        entry = Entry.copy("/content", content)
        begun = time.perf_counter()
        write_layer(layout, "limit", [entry])
        packing_s += time.perf_counter() - begun
    shutil.rmtree(folder)
    return {"download": download_s, "packing": packing_s}


def _buildah(folder: Path, source: Layout, base: BaseImage) -> dict[str, Any]:
    """``buildah bud`` with pip, on the same base: FLOps' packages, the user's, the code."""
    program = shutil.which("buildah")
    if program is None or os.getuid() != 0:
        return {"left_out": "buildah is not installed, or this is not root"}
    import ensurepip

    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    context = folder / "context"
    context.mkdir()
    shutil.copytree(EXAMPLE, context / "code")
    shutil.copy(pip, context / pip.name)
    ours = runtime.lock(AMD64, base.python_version)
    (context / "ours.txt").write_text("\n".join(ours.packages))
    (context / "user.txt").write_text("\n".join(inspect(EXAMPLE).requirements.packages))
    source.tag("bench-base", base.manifest)
    install = f"RUN {base.python} /{pip.name}/pip install --no-cache-dir --only-binary :all: --quiet"
    site = f"lib/python{base.python_version}/site-packages"
    (context / "Dockerfile").write_text(
        f"FROM oci:{source.folder}:bench-base\nUSER 0\nCOPY {pip.name} ours.txt user.txt /\n"
        f"{install} --no-deps --target /opt/flops/{site} -r /ours.txt\n"
        f"{install} --target /opt/user/{site} -r /user.txt\nCOPY code /code\n"
    )
    storage = ["--root", str(folder / "buildah"), "--runroot", str(folder / "buildah-run")]
    command = [program, *storage, "--storage-driver", "vfs", "build", "--isolation", "chroot"]
    command += ["--network", "host", "--layers=false", *_pip_mounts(), "--tag", "bench", str(context)]
    done, seconds = timed(lambda: subprocess.run(command, capture_output=True, text=True, timeout=900))
    subprocess.run(["umount", "--lazy", str(folder / "buildah")], capture_output=True)
    if done.returncode:
        return {"failed": done.stderr.strip()[-400:]}
    return {
        "seconds": round(seconds, 1),
        "what": "one platform, empty caches, local; pip compiles all modules",
    }


def _pip_mounts() -> list[str]:
    """pip's own configuration of this machine, and what it names, as they are."""
    found: list[str] = []
    for path in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        if path.is_file():
            found += ["--volume", f"{path}:/etc/pip.conf:ro"]
            break
    cert = PipConfiguration.from_pip().cert
    if cert:
        found += ["--volume", f"{cert}:{cert}:ro"]
    for name, value in os.environ.items():
        if name.startswith("PIP_") or name.lower() in ("http_proxy", "https_proxy", "no_proxy"):
            found += ["--env", f"{name}={value}"]
    return found


@contextmanager
def _registry(folder: Path) -> Iterator[str | None]:
    """A fresh docker-registry's address; None where it is not installed."""
    if registry_installed() is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, environment = registry_command(folder / "registry", "127.0.0.1", port)
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
