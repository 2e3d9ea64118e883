import io
import tarfile
from pathlib import Path

from flops.api.archive import tar


def test_a_model_is_one_tar_archive_that_python_reads(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    (tmp_path / "parameters.safetensors").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "empty").touch()
    names = ["MLmodel", "data/parameters.safetensors", "n" * 150 + "/empty"]
    files = [(name, tmp_path / Path(name).name) for name in names]
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar(files))), mode="r:") as archive:
        assert archive.getnames() == names
        for name, path in files:
            member = archive.extractfile(name)
            assert member is not None
            assert member.read() == path.read_bytes()
