"""The user's pip configuration, as pip itself reads it and as uv is told."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from flops.core.errors import InvalidInputError
from flops.images import PipConfiguration
from flops.images.pip_configuration import configuration_files
from tests.registries import scripted


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    return tmp_path


def user_file(home: Path, text: str) -> None:
    (home / ".config" / "pip" / "pip.conf").write_text(text)


def read(home: Path, **variables: str) -> PipConfiguration:
    """As for a user with this home, on a machine without a configuration of its own."""
    environment = {"HOME": str(home), **variables}
    mine = tuple(file for file in configuration_files(environment) if file.is_relative_to(home))
    return PipConfiguration.from_pip(environment, files=mine)


def test_everything_that_leads_to_packages_is_read(home: Path) -> None:
    user_file(
        home,
        "[global]\nindex_url = https://one/simple\ntimeout = 60\ntrusted-host = one\n"
        "extra-index-url =\n  https://two/simple\n  https://three/simple\ncert = /ca.pem\n"
        "[install]\nfind-links = /wheels ~/more\nno-index = yes\n",
    )
    assert read(home) == PipConfiguration(
        index_url="https://one/simple",
        extra_index_urls=("https://two/simple", "https://three/simple"),
        find_links=("/wheels", str(Path("~/more").expanduser())),
        no_index=True,
        trusted_hosts=("one",),
        cert="/ca.pem",
        timeout_s=60,
    )


def test_variables_win_over_files_and_empty_values_say_nothing(home: Path) -> None:
    user_file(home, "[global]\nindex-url = https://one/simple\ntimeout = 60\n[install]\nindex-url =\n")
    got = read(home, PIP_DEFAULT_TIMEOUT="180", PIP_EXTRA_INDEX_URL="https://two/simple", PIP_CERT="")
    assert got == PipConfiguration("https://one/simple", ("https://two/simple",), timeout_s=180)


def test_section_install_wins_over_global_of_a_later_file(home: Path) -> None:
    named = home / "named.conf"
    named.write_text("[global]\nindex-url = https://named/simple\n")
    (home / "site.conf").write_text("[install]\nindex-url = https://site/simple\n")
    got = PipConfiguration.from_pip({}, files=(home / "site.conf", named))
    assert got.index_url == "https://site/simple"


def test_users_own_file_is_left_out_where_another_is_named(home: Path) -> None:
    user_file(home, "[global]\nextra-index-url = https://user/simple\n")
    named = home / "named.conf"
    named.write_text("[global]\nindex-url = https://named/simple\n")
    assert read(home, PIP_CONFIG_FILE=str(named)) == PipConfiguration("https://named/simple")
    assert read(home, PIP_CONFIG_FILE=os.devnull) == PipConfiguration()


def test_reading_agrees_with_pip_itself(home: Path) -> None:
    user_file(home, "[global]\nindex-url = https://one/simple\nfind-links = /wheels\n")
    environment = {**os.environ, "HOME": str(home), "PIP_TIMEOUT": "7"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    values = dict(line.split("=", 1) for line in listed.splitlines())
    ours = PipConfiguration.from_pip(environment)
    assert values["global.index-url"].strip("'") == ours.index_url
    assert int(values[":env:.timeout"].strip("'")) == ours.timeout_s


def test_broken_file_is_named(home: Path) -> None:
    user_file(home, "index-url = x\n")
    with pytest.raises(InvalidInputError) as caught:
        read(home)
    file = home / ".config" / "pip" / "pip.conf"
    assert str(caught.value) == (
        f"pip's configuration file {file} cannot be read: File contains no section headers. - mend it, "
        "'python -m pip config debug' shows which files there are"
    )


def test_timeout_that_is_no_number_is_named(home: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(home, PIP_TIMEOUT="soon")
    assert str(caught.value) == (
        "pip's timeout is 'soon', which is no number of seconds - mend pip's configuration"
    )


def test_uv_is_told_everything_and_nothing_on_its_command_line_is_secret() -> None:
    configuration = PipConfiguration(
        index_url="https://me:hush@one/simple",
        extra_index_urls=("https://two/simple", "https://three/simple"),
        find_links=("/wheels", "/more"),
        no_index=True,
        trusted_hosts=("one",),
        cert="/ca.pem",
        proxy="http://proxy:1",
        timeout_s=7,
    )
    ours = {"PATH": "/bin", "UV_PYTHON": "2.7", "UV_CACHE_DIR": "/c", "PYTHONPATH": "/x", "PIP_CERT": "/y"}
    assert configuration.uv_arguments() == ["--no-index"]
    assert configuration.uv_environment(ours) == {
        "PATH": "/bin",
        "UV_CACHE_DIR": "/c",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_CONFIG": "1",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "NO_COLOR": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS": "false",
        "SSH_ASKPASS_REQUIRE": "force",
        "UV_DEFAULT_INDEX": "https://me:hush@one/simple",
        "UV_EXTRA_INDEX_URL": "https://two/simple https://three/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "one",
        "SSL_CERT_FILE": "/ca.pem",
        "HTTP_PROXY": "http://proxy:1",
        "HTTPS_PROXY": "http://proxy:1",
        "UV_HTTP_TIMEOUT": "7",
    }


def test_a_private_requirement_fails_on_a_terminal_where_nobody_answers() -> None:
    """What reads a terminal from the background is stopped by the kernel, and would be waited for."""
    with scripted(lambda _: (401, {"WWW-Authenticate": 'Basic realm="private"'}, b"")) as host:
        code = f"""
from flops.images import uv
from flops.images.pip_configuration import PipConfiguration
command = ["git", "ls-remote", "http://{host}/private.git"]
print(uv.start(command, PipConfiguration().uv_environment(), 20.0).returncode)
"""
        terminal, ours = pty.openpty()
        try:
            told = subprocess.run(
                ["setsid", "--ctty", sys.executable, "-c", code],
                stdin=ours,
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            os.close(terminal)
            os.close(ours)
    assert told.stdout == "128\n", told.stderr


def test_fingerprint_follows_where_packages_come_from_and_not_how() -> None:
    plain = PipConfiguration().fingerprint({})
    assert PipConfiguration(cert="/ca.pem", timeout_s=3).fingerprint({"UV_CACHE_DIR": "/c"}) == plain
    assert PipConfiguration(extra_index_urls=("https://two",)).fingerprint({}) != plain
    assert "hush" not in PipConfiguration(index_url="https://me:hush@one").fingerprint({})
