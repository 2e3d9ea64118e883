"""Images from a folder of wheels: same inputs, same digests, a layer per kind of change; real ones run."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.errors import FailedError, InvalidInputError
from flops.images import compiled, debian, runtime, wheels
from flops.images.assembler import Assembler, Built
from flops.images.base import make_base
from flops.images.base_image import BaseImage
from flops.images.descriptor import CYCLONEDX, Descriptor
from flops.images.layer import Layer
from flops.images.layout import Layout
from flops.repo import inspect
from tests.conftest import Require
from tests.engines import PrivateEngine, can_run_engines, clear_leftovers
from tests.images.conftest import tiny_base

if TYPE_CHECKING:
    from tests.images.conftest import Index

BOTH = ("linux/amd64", "linux/arm64")
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
X86_64 = "cp311-cp311-manylinux_2_17_x86_64"
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
Make = Callable[..., Assembler]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "images")


@pytest.fixture
def bases(layout: Layout) -> Mapping[str, BaseImage]:
    return {platform: tiny_base(layout, platform) for platform in BOTH}


@pytest.fixture
def make(
    layout: Layout,
    index: "Index",
    surroundings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Assemblers that need no network: without the packages of FLOps' own programs."""
    monkeypatch.setattr(runtime, "DISTRIBUTIONS", ())
    monkeypatch.setattr(runtime, "SERVING", ())

    def _make(cache: str = "cache", into: Layout = layout, **options: Any) -> Assembler:
        options.setdefault("configuration", index.configuration)
        return Assembler(into, tmp_path / cache, environment=surroundings, **options)

    return _make


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "model_manager.py").write_text("import top\n")
    return folder


def kinds(layers: Sequence[Layer]) -> list[str]:
    return [layer.what for layer in layers]


def layer(built: Built, what: str, platform: str = BOTH[0]) -> Layer:
    (found,) = [layer for layer in built.layers[platform] if layer.what == what]
    return found


def files(layout: Layout, layer: Layer) -> dict[str, bytes]:
    with tarfile.open(layout.path(layer.descriptor.digest)) as tar:
        return {
            f"/{member.name}": content.read()
            for member in tar.getmembers()
            if (member.isfile() or member.islnk()) and (content := tar.extractfile(member)) is not None
        }


def config(layout: Layout, manifest: Descriptor) -> dict[str, Any]:
    return layout.read_json(Descriptor.from_json(layout.read_json(manifest)["config"]))


def test_learner_image_has_a_layer_for_each_kind_of_change(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    index.add("base", "1.0")
    index.add("top", "1.5", requires=["base"])
    built = make().learner_image(bases, ["top"], code, {"io.flops.commit": "abc"})
    assert set(built.platforms) == set(BOTH)
    names = ["base", "skeleton", "runtime", "dependencies", "programs", "guest", "code"]
    assert [kind for kind in kinds(built.layers[BOTH[1]]) if not kind.endswith("-compiled")] == names
    site = "/opt/user/lib/python3.11/site-packages"
    packages = files(layout, layer(built, "dependencies"))
    assert packages[f"{site}/top.py"] == b"VERSION = '1.5'\n"
    assert layer(built, "dependencies").packages == ("base==1.0", "top==1.5")
    assert files(layout, layer(built, "code")) == {"/code/model_manager.py": b"import top\n"}
    skeleton = files(layout, layer(built, "skeleton"))
    assert skeleton["/opt/user/pyvenv.cfg"].startswith(
        b"home = /usr/bin\ninclude-system-site-packages = false"
    )
    assert skeleton[f"{site}/flops-guest.pth"] == b"/opt/flops-guest\n"
    assert "/opt/flops-guest/flops_worker/__main__.py" in files(layout, layer(built, "guest"))
    manifest = layout.read_json(built.platforms[BOTH[0]])
    assert manifest["annotations"]["io.flops.commit"] == "abc"
    written = config(layout, built.platforms[BOTH[0]])
    assert written["config"]["User"] == "10001:10001"
    assert written["config"]["Env"][0] == "PATH=/opt/user/bin:/usr/bin:/bin"
    assert (written["os"], written["architecture"], written["created"]) == (
        "linux",
        "amd64",
        "1970-01-01T00:00:00Z",
    )
    assert written["rootfs"]["diff_ids"] == [one.diff_id for one in built.layers[BOTH[0]]]


def test_another_machine_gets_the_same_digests(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path, tmp_path: Path
) -> None:
    index.add("top", "1.5")
    other = Layout(tmp_path / "other")
    elsewhere = {platform: tiny_base(other, platform) for platform in BOTH}
    first = make().learner_image(bases, ["top"], code)
    second = make("other-cache", other).learner_image(elsewhere, ["top"], code)
    assert second == first


def test_change_of_code_changes_one_small_layer(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    wheel = index.add("top", "1.5")
    before = make().learner_image(bases, ["top"], code)
    (code / "model_manager.py").write_text("import top\nprint(1)\n")
    wheel.unlink()
    after = make().learner_image(bases, ["top"], code)
    assert after.index != before.index
    for platform in BOTH:
        assert before.layers[platform][:-1] == after.layers[platform][:-1]
        assert after.layers[platform][-1].compressed_bytes < 1000


def test_code_keeps_its_links_and_loses_its_history(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    (code / ".git").mkdir()
    (code / ".git" / "config").write_text("x")
    (code / "passwords").symlink_to("/etc/shadow")
    built = make().learner_image(bases, [], code)
    with tarfile.open(layout.path(layer(built, "code").descriptor.digest)) as tar:
        assert tar.getnames() == ["code", "code/model_manager.py", "code/passwords"]
        assert tar.getmember("code/passwords").linkname == "/etc/shadow"


def test_package_without_a_wheel_for_a_platform_is_named_with_the_way_out(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    index.add("top", "1.5", tag=X86_64)
    with pytest.raises(InvalidInputError) as caught:
        make().learner_image(bases, ["top==1.5"], code)
    text = str(caught.value)
    assert text.startswith("top==1.5 has no wheel for linux/arm64 and Python 3.11 (")
    assert "leave linux/arm64 out" in text
    assert "'docker buildx' or 'buildah'" in text
    built = make().learner_image({BOTH[0]: bases[BOTH[0]]}, ["top==1.5"], code)
    assert list(built.platforms) == [BOTH[0]]


@pytest.mark.parametrize("tag", [X86_64, X86_64.replace("x86_64", "aarch64")])
def test_platforms_get_one_version_where_wheels_allow_it(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path, tag: str
) -> None:
    index.add("top", "1.0")
    index.add("top", "2.0", tag=tag)
    built = make().learner_image(bases, ["top"], code)
    assert [layer(built, "dependencies", p).packages for p in BOTH] == [("top==1.0",), ("top==1.0",)]


def test_requirements_that_clash_are_explained(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    index.add("base", "1.0")
    index.add("top", "1.0", requires=["base>=2"])
    with pytest.raises(
        InvalidInputError, match=r"cannot be installed together for linux/amd64 and Python 3\.11"
    ):
        make().learner_image(bases, ["top", "base"], code)


def test_tests_headers_and_paths_of_this_machine_are_left_out(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    index.add(
        "top",
        "1.5",
        files={
            "pkg/__init__.py": "",
            "pkg/stub.pyi": "",
            "pkg/include/pkg.h": "",
            "pkg/_x.pyx": "",
            "pkg/testing/__init__.py": "",
            "pkg/tests/test_a.py": "",
            "other/__init__.py": "from .tests.runner import Runner\n",
            "other/tests/runner.py": "",
            "triton/include/cuda.h": "",
            "top-1.5.dist-info/entry_points.txt": "[console_scripts]\nTop-Tool = pkg.cli:App.main [x]\n",
        },
    )
    found = files(layout, layer(make().learner_image(bases, ["top"], code), "dependencies"))
    site = "/opt/user/lib/python3.11/site-packages/"
    names = {name.removeprefix(site) for name in found if ".dist-info/" not in name}
    assert names == {
        "top.py",
        "pkg/__init__.py",
        "pkg/stub.pyi",
        "pkg/testing/__init__.py",
        "other/__init__.py",
        "other/tests/runner.py",
        "triton/include/cuda.h",
        "/opt/user/bin/Top-Tool",
    }
    script = found["/opt/user/bin/Top-Tool"].decode()
    assert script.startswith("#!/opt/user/bin/python\n")
    assert "from pkg.cli import App" in script
    assert "sys.exit(App.main())" in script
    record = found[f"{site}top-1.5.dist-info/RECORD"].decode()
    assert "pkg/tests" not in record
    assert "bin/" not in record
    assert "other/tests/runner.py" in record
    assert not any(name.endswith(("INSTALLER", "uv_cache.json", "direct_url.json")) for name in found)


def test_large_libraries_of_both_environments_are_stored_once(
    make: Make,
    layout: Layout,
    index: "Index",
    bases: Mapping[str, BaseImage],
    code: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = importlib.metadata.version("packaging")
    content = {"pkg/libx.so.25": "x" * 70_000, "pkg/small.so": "x", "pkg/data.bin": "x" * 70_000}
    index.add("packaging", version, files=content)
    index.add("other", "1.0", files={"other/liby.so": "y" * 70_000})
    assembler = make()
    monkeypatch.setattr(runtime, "DISTRIBUTIONS", ("packaging",))
    wanted = [f"packaging=={version}", "other"]
    built = assembler.learner_image(bases, wanted, code)
    with tarfile.open(layout.path(layer(built, "dependencies").descriptor.digest)) as tar:
        links = {member.name: member.linkname for member in tar.getmembers() if member.issym()}
        assert tar.getmember("opt/user/lib/python3.11/site-packages/other/liby.so").isfile()
    path = "lib/python3.11/site-packages/pkg/libx.so.25"
    assert links == {f"opt/user/{path}": f"/opt/flops/{path}"}
    assert f"/opt/flops/{path}" in files(layout, layer(built, "runtime"))
    for note in (assembler._tools.cache / "libraries").glob("*.json"):
        note.unlink()
    layout.path(layer(built, "dependencies").descriptor.digest).unlink()
    assert assembler.learner_image(bases, wanted, code) == built, "what was noted can be found again"


def test_library_that_flops_leaves_out_or_has_another_version_of_is_not_shared(
    make: Make,
    layout: Layout,
    index: "Index",
    bases: Mapping[str, BaseImage],
    code: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = importlib.metadata.version("packaging")
    index.add("packaging", version, files={"pkg/libx.so": "x" * 70_000, "pkg/libz.so": "z" * 70_000})
    index.add("packaging", "0.1", files={"pkg/libx.so": "x" * 70_000, "pkg/libz.so": "z" * 70_000})
    assembler = make()
    monkeypatch.setattr(runtime, "DISTRIBUTIONS", ("packaging",))
    monkeypatch.setattr(runtime, "UNUSED", ("pkg/libx*",))
    for wanted, shared in ((f"packaging=={version}", {"libz.so"}), ("packaging==0.1", set())):
        built = assembler.learner_image(bases, [wanted], code)
        with tarfile.open(layout.path(layer(built, "dependencies").descriptor.digest)) as tar:
            links = {Path(member.name).name for member in tar.getmembers() if member.issym()}
        assert links == shared


def test_model_image_reuses_the_learners_packages(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], code: Path, tmp_path: Path
) -> None:
    index.add("top", "1.5")
    index.add("server", "3.0", requires=["top", "more"])
    index.add("more", "1.0")
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text("flavors: {}\n")
    learner = make().learner_image(bases, ["top"], code)
    make().prepare_model_image(learner, extra=["server"])
    built = make().model_image(learner.index, model, extra=["server"], annotations={"io.flops.model": "m/1"})
    for platform in BOTH:
        count = len(learner.layers[platform])
        assert built.layers[platform][:count] == learner.layers[platform]
        assert layer(built, "extra", platform).packages == ("more==1.0", "server==3.0")
    assert files(layout, layer(built, "model")) == {"/model/MLmodel": b"flavors: {}\n"}
    assert built.warnings == ()
    assert (
        make().model_image(learner, model, extra=["server"], annotations={"io.flops.model": "m/1"}) == built
    )


def test_model_image_with_other_versions_says_so(
    make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path, tmp_path: Path
) -> None:
    index.add("top", "1.5")
    index.add("top", "2.0")
    index.add("server", "3.0", requires=["top<2"])
    learner = make().learner_image(bases, ["top"], code)
    assert layer(learner, "dependencies").packages == ("top==2.0",)
    (tmp_path / "model").mkdir()
    built = make().model_image(learner, tmp_path / "model", extra=["server"])
    assert layer(built, "dependencies").packages == ("server==3.0", "top==1.5")
    assert "extra" not in kinds(built.layers[BOTH[0]])
    assert built.warnings == ("to add server, other versions are used of: top==2.0",)


def test_files_come_on_top(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], tmp_path: Path
) -> None:
    below = make().runtime_image(bases)
    (tmp_path / "initial").write_bytes(b"numbers")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "x").write_bytes(b"1")
    wanted = {"/model/initial.safetensors": tmp_path / "initial", "/srv": tmp_path / "folder"}
    built = make().with_files(below.index, wanted, {"io.flops.project": "p-1"})
    assert files(layout, built.layers[BOTH[0]][-1]) == {
        "/model/initial.safetensors": b"numbers",
        "/srv/deep/x": b"1",
    }
    assert built.layers[BOTH[1]][:-1] == below.layers[BOTH[1]]
    assert config(layout, built.platforms[BOTH[1]])["config"]["Labels"]["io.flops.project"] == "p-1"


def test_index_lists_platforms_and_what_they_hold(
    make: Make, layout: Layout, index: "Index", bases: Mapping[str, BaseImage], code: Path
) -> None:
    index.add("top", "1.5")
    built = make().learner_image(bases, ["top"], code, {"org.opencontainers.image.revision": "abc"})
    listed = layout.references(built.index)
    assert [entry.platform for entry in listed] == [*BOTH, "unknown/unknown", "unknown/unknown"]
    assert [entry.artifact_type for entry in listed[2:]] == [CYCLONEDX, CYCLONEDX]
    artifact = layout.read_json(listed[2])
    assert artifact["subject"]["digest"] == built.platforms[BOTH[0]].digest
    bill = json.loads(layout.read(artifact["layers"][0]["digest"]))
    assert [part["purl"] for part in bill["components"]] == ["pkg:pypi/top@1.5"]


def test_base_with_an_old_python_is_refused(make: Make, layout: Layout, code: Path) -> None:
    old = {"linux/amd64": tiny_base(layout, "linux/amd64", "3.9")}
    with pytest.raises(InvalidInputError, match=r"has Python 3\.9, FLOps needs 3\.11"):
        make().learner_image(old, [], code)


def test_no_platform_is_refused(make: Make, code: Path) -> None:
    with pytest.raises(InvalidInputError, match="needs a platform"):
        make().learner_image({}, [], code)


def test_base_with_another_python_than_asked_for_is_said(
    make: Make, bases: Mapping[str, BaseImage], code: Path
) -> None:
    assert make().learner_image(bases, [], code, python="==3.11.4").warnings == ()
    warnings = make().learner_image(bases, [], code, python="<3.11").warnings
    assert warnings[0] == "Python <3.11 is asked for; the image for linux/amd64 has 3.11"


def test_stopped_on_request(make: Make, index: "Index", bases: Mapping[str, BaseImage], code: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(FailedError, match="stopped on request"):
        make(cancel=cancel).learner_image(bases, [], code)


def test_zstd_where_the_registry_takes_it(make: Make, bases: Mapping[str, BaseImage], code: Path) -> None:
    built = make(compression="zstd").learner_image(bases, [], code)
    plain = make().learner_image(bases, [], code)
    assert layer(built, "code").descriptor.media_type.endswith("+zstd")
    assert layer(built, "code").diff_id == layer(plain, "code").diff_id


def test_compiled_modules_are_the_same_wherever_they_are_made(tmp_path: Path) -> None:
    names = ["argparse.py", "json/decoder.py", "email/_header_value_parser.py", "broken.py"]
    sites = [tmp_path / "first", tmp_path / "second" / "deeper"]
    for site in sites:
        for name in names[:-1]:
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(argparse_folder()) / name, site / name)
        (site / "broken.py").write_text("{{ template }} is no Python")
    found = [
        {
            entry.path: entry.source.read_bytes()
            for entry in compiled.entries(site, order, "/opt/x", tmp_path / f"store-{number}")
            if entry.source is not None
        }
        for number, (site, order) in enumerate(zip(sites, (names, names[::-1]), strict=True))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    target = tmp_path / "import" / "argparse.pyc"
    target.parent.mkdir()
    target.write_bytes(found[0][f"/opt/x/__pycache__/argparse.cpython-{OWN.replace('.', '')}.pyc"])
    program = (
        f"import sys; sys.path.insert(0, {str(target.parent)!r}); import argparse; print(argparse.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(target)


def argparse_folder() -> str:
    import argparse

    return str(Path(argparse.__file__).parent)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assembled")


@pytest.fixture(scope="module")
def real(place: Path, require: Require) -> tuple[Layout, Assembler, Built]:
    """An image of the scikit-learn example on a base from Debian's packages."""
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    layout = Layout(place / "images")
    bases = make_base(layout, platforms=["linux/amd64"])
    assembler = Assembler(layout, place / "cache")
    built = assembler.learner_image(bases, inspect(EXAMPLE).requirements.packages, EXAMPLE)
    layout.tag("learner", built.index)
    return layout, assembler, built


@pytest.fixture(scope="module")
def run(real: tuple[Layout, Assembler, Built], require: Require) -> Any:
    """Run a command in the learner image: as its own user, on a read-only root, without capabilities."""
    require(can_run_engines() and shutil.which("skopeo") is not None, "a Docker engine, as root, and skopeo")
    clear_leftovers()
    engine = PrivateEngine()
    try:
        engine.start()
        source = f"oci:{real[0].folder}:learner"
        copy = ["skopeo", "copy", "--quiet", "--override-arch", "amd64", "--dest-daemon-host", engine.url]
        subprocess.run([*copy, source, "docker-daemon:learner:1"], check=True, timeout=280)
        docker = ["docker", "--host", engine.url, "run", "--rm", "--network", "none", "--read-only"]
        docker += ["--tmpfs", "/tmp", "--cap-drop", "ALL", "learner:1"]

        def _run(*command: str) -> str:
            done = subprocess.run([*docker, *command], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield _run
    finally:
        engine.close()


IMPORTS = """
import os, sys
import numpy, numpy.testing, scipy.stats, scipy.sparse.linalg, sklearn.linear_model, sklearn.ensemble
import sklearn.datasets, pandas, pandas.testing, flops_worker, flops_utils.ml_repo_templates
import pyarrow.compute, pyarrow.parquet, pyarrow.dataset, pyarrow.fs, datasets, PIL.Image
from importlib.metadata import files, version
x, y = sklearn.datasets.load_digits(return_X_y=True)
score = sklearn.linear_model.LogisticRegression(max_iter=30).fit(x[:200] / 16, y[:200]).score(x, y)
print(version("scikit-learn"), len(files("numpy")) > 100, score > 0.7, os.getuid(), os.getgid(), sys.prefix)
import sklearn.utils
print(sklearn.utils.__cached__, os.path.exists(sklearn.utils.__cached__))
try:
    import flops
except ImportError as error:
    print(error)
"""
STATE = """
import os
for path in ("/run/flops", "/run/flops/seat", "/run/flops/data", "/var/lib/flops", "/run/secrets"):
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (10001, 10001, 0o700), path
    os.listdir(path)
open("/tmp/x", "w").close()
try:
    open("/run/flops/x", "w")
except OSError as error:
    print(error.strerror)
"""
PROGRAMS = """
import flops.agent.__main__, flops.agent.crew, flops.data.server, flops.federation.aggregator
import flops.federation.flower
from flwr.serverapp import strategy
import pyarrow as pa, pyarrow.compute, pyarrow.flight, pyarrow.parquet as pq
pq.write_table(pa.table({"a": [1, 2]}), "/tmp/x.parquet")
print(pq.read_table("/tmp/x.parquet").num_rows, strategy.FedYogi.__name__)
"""


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.docker
class TestReal:
    def test_user_code_runs_with_what_it_needs_and_nothing_else(self, run: Callable[..., str]) -> None:
        said = run("/opt/user/bin/python", "-c", IMPORTS).splitlines()
        assert said[0] == "1.4.2 True True 10001 10001 /opt/user"
        assert said[2] == "No module named 'flops'"
        assert said[1].endswith("True") == compiled.can_compile("3.11")

    def test_worker_and_scripts_start(self, run: Callable[..., str]) -> None:
        assert "--connect" in run("/opt/user/bin/python", "-m", "flops_worker", "--help")
        assert run("f2py", "-v").strip() == "1.26.4"

    def test_flops_own_programs_start(self, run: Callable[..., str]) -> None:
        assert run("/opt/flops/bin/python", "-P", "-c", PROGRAMS) == "2 FedYogi\n"
        assert "--config" in run("/opt/flops/bin/python", "-P", "-m", "flops.agent", "--help")

    def test_state_has_its_folders_and_the_rest_cannot_be_written(self, run: Callable[..., str]) -> None:
        assert run("/opt/flops/bin/python", "-c", STATE) == "Read-only file system\n"

    def test_sizes_stay_below_their_limits(self, real: tuple[Layout, Assembler, Built]) -> None:
        built = real[2]
        layers = built.layers["linux/amd64"]
        sizes = {one.what: one.size_bytes or 0 for one in layers}
        assert all(sizes.values())
        ours = ("base", "skeleton", "runtime", "runtime-compiled", "programs", "guest")
        assert sum(sizes.get(what, 0) for what in ours) <= 300e6
        assert sum(sizes.values()) <= 650e6


def test_packages_of_this_machine_are_not_asked_for_what_is_left_out() -> None:
    """The rules read code; this is what they are for."""
    content = b"from .tests.runner import Runner\nimport a.b.tests.c\nfrom x import (\n  y,\n  tests\n)\n"
    assert wheels._tests_named(content, "p/q/__init__.py") == {"p/q/tests", "a/b/tests", "x/tests"}
    assert wheels._tests_named(b"from ..tests import x\n", "p/q/m.py") == {"p/tests"}
    assert wheels._tests_named(b"# tests\nx = 'from .tests import x'\n", "p/m.py") == set()
