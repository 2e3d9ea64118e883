"""The arm64 image of a scikit-learn repository trains a round, on this machine's processor by emulation.

Assembling it emulates nothing; only here it is run. The kernel hands arm64 programs to qemu inside a user
namespace that ends with the test: nothing is registered on this machine.
"""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flops.guest import Guest
from flops.images import debian
from flops.images.assembler import Assembler, Built
from flops.images.base import find_base
from flops.images.descriptor import Descriptor
from flops.images.layout import Layout
from flops.repo import inspect
from tests.conftest import Require

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

ARM64 = "linux/arm64"
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
SEAT = "run/flops/seat/agent.sock"
T = 300.0

ELF = bytes.fromhex("7f454c460201010000000000000000000200b700")
MASK = bytes.fromhex("ffffffffffffff00fffffffffffffffffeffffff")
"""Any program for arm64, whichever system it names."""

CONTAINER = """
mkdir -p "$2" && mount -t binfmt_misc none "$2" && printf '%s' "$3" > "$2/register" || exit 77
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && mount -t tmpfs tmpfs "$1/tmp" || exit 78
mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" || exit 79
shift 3 && exec "$@"
"""


def escaped(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arm64")


@pytest.fixture(scope="module")
def layout(place: Path) -> Layout:
    return Layout(place / "images")


@pytest.fixture(scope="module")
def built(place: Path, layout: Layout, require: Require) -> Built:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    bases = find_base(layout, [ARM64], wanted="flops-base:bookworm")
    needed = inspect(EXAMPLE).requirements
    return Assembler(layout, place / "cache").learner_image(bases, needed.packages, EXAMPLE)


@pytest.fixture(scope="module")
def root(place: Path, layout: Layout, built: Built) -> Path:
    """The image unpacked, as an engine would."""
    root = place / "root"
    root.mkdir()
    for layer in built.layers[ARM64]:
        # Not by tarfile: Debian's Python is older than its filters, which keep owners and modes.
        unpack = ["tar", "--extract", "--gzip", "--numeric-owner", "--directory", str(root)]
        subprocess.run([*unpack, "--file", str(layout.path(layer.descriptor.digest))], check=True)
    return root


@pytest.fixture(scope="module")
def container(place: Path, layout: Layout, built: Built, root: Path, require: Require) -> list[str]:
    """A command that runs the rest of its arguments in the image: without network, on a read-only root."""
    qemu = shutil.which("qemu-aarch64-static")
    require(qemu is not None and os.getuid() == 0, "qemu-aarch64-static and root")
    rule = f":flops-arm64:M::{escaped(ELF)}:{escaped(MASK)}:{qemu}:F"
    command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    command += ["sh", "-c", CONTAINER, "sh", str(root), str(place / "binfmt"), rule]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60)
    require(tried.returncode not in (1, 77), f"a kernel with binfmt_misc in namespaces ({tried.stderr})")
    config = layout.read_json(Descriptor.from_json(layout.read_json(built.platforms[ARM64])["config"]))
    return [*command, "env", "-i", *config["config"]["Env"], "chroot", str(root)]


def digits(count: int) -> int:
    """A fragment with real digits, as an open Arrow IPC file."""
    features = {"image": {"_type": "Image"}, "label": {"names": list("0123456789"), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image_type), ("label", pa.int64())], metadata=metadata)
    loaded = load_digits()
    rows = []
    for image in loaded.images[:count]:
        png = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).resize((28, 28)).save(png, "PNG")
        rows.append({"bytes": png.getvalue(), "path": None})
    fd = os.memfd_create("fragment")
    with open(fd, "wb", closefd=False) as file, pa.ipc.new_file(file, schema) as writer:
        columns = [pa.array(rows, image_type), pa.array(loaded.target[:count], pa.int64())]
        writer.write_table(pa.table(columns, schema=schema))
    return fd


def test_the_image_holds_programs_for_arm64_alone(root: Path) -> None:
    machines = set()
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                start = file.read(20)
            if start.startswith(b"\x7fELF"):
                machines.add(int.from_bytes(start[18:20], "little"))
    assert machines == {183}


def test_flops_programs_start_in_it(container: list[str]) -> None:
    program = "import platform, flops.agent, flops.federation; print(platform.machine())"
    command = [*container, "/opt/flops/bin/python", "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=T)
    assert (done.stdout, done.stderr) == ("aarch64\n", "")


def test_one_round_is_trained_in_it(container: list[str], root: Path, place: Path) -> None:
    seat = root / SEAT
    for folder in (seat.parent.parent, seat.parent):
        os.chown(folder, 0, 0)  # the worker is the agent's user, and that is root here
    command = ["/opt/user/bin/python", "-m", "flops_worker", "--connect", f"/{SEAT}", "--code", "/code"]
    with (place / "worker.log").open("wb") as log:
        process = subprocess.Popen([*container, *command], stdout=log, stderr=log)
    try:
        with Guest.attach(seat, dataset=lambda: [digits(200), digits(300)], deadline_s=T) as guest:
            guest.load(T)
            layout, model = guest.describe(T)
            guest.load_data(T)
            before = guest.evaluate(model, 0, timeout_s=T)
            fit = guest.fit(model, 1, timeout_s=T)
            after = guest.evaluate(fit.update_fd, 1, timeout_s=T)
            os.close(model)
        assert process.wait(T) == 0, (place / "worker.log").read_text()
    finally:
        process.kill()
        process.wait()
    assert layout.nbytes == (28 * 28 + 1) * 10 * 8
    assert (fit.num_examples, after.num_examples) == (400, 100)
    assert before.loss == pytest.approx(np.log(10))
    assert after.accuracy > 0.7 > before.accuracy
