"""Where Debian's packages come from: the machine's own apt configuration, whatever its form."""

from pathlib import Path

import pytest

from flops.core.errors import InvalidInputError
from flops.images.apt_sources import Source, read_sources, sources_text

DEB822 = """# a comment
Types: deb deb-src
# in between
URIs: https://one.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: https://one.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/a.gpg

Types: deb-src
URIs: https://sources.example/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: https://off.example/debian
Suites: bookworm
Components: main
"""


def apt(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        place = folder if name == "list" else folder / "sources.list.d"
        (place / ("sources.list" if name == "list" else f"site.{name}")).write_text(text)
    return folder


def release(folder: Path, name: str, codename: str) -> Path:
    path = folder / "os-release"
    path.write_text(f'ID={name}\nVERSION_CODENAME="{codename}"\n')
    return path


def test_both_forms_of_apts_configuration_are_read(tmp_path: Path) -> None:
    line = (
        "deb [arch=amd64 signed-by=/k.gpg] http://two.example/debian bookworm main # here\n# deb http://x y\n"
    )
    sources = read_sources(apt(tmp_path / "apt", list=line, sources=DEB822))
    assert sources[0] == Source(
        ("http://two.example/debian",), ("bookworm",), ("main",), (("Signed-By", "/k.gpg"),)
    )
    assert [source.uris[0] for source in sources[1:]] == [
        "https://one.example/debian",
        "https://one.example/debian-security",
    ]
    assert dict(sources[1].options)["Signed-By"].splitlines() == [
        "",
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " abc",
    ]


def test_only_what_belongs_to_the_suite_is_used(tmp_path: Path) -> None:
    more = "deb https://third-party.example/apt bookworm tools\ndeb http://two.example/debian trixie main\n"
    text = sources_text("bookworm", apt=apt(tmp_path / "apt", list=more, sources=DEB822))
    assert "third-party" not in text
    assert "two.example" not in text
    assert "Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: \n -----BEGIN" in text
    assert "Suites: bookworm-security" in text


def test_another_suite_comes_from_the_same_mirrors(tmp_path: Path) -> None:
    folder = apt(tmp_path / "apt", sources=DEB822)
    text = sources_text("trixie", apt=folder, release=release(tmp_path, "debian", "bookworm"))
    assert "URIs: https://one.example/debian\nSuites: trixie trixie-updates\n" in text
    assert "URIs: https://one.example/debian-security\nSuites: trixie-security\n" in text
    text = sources_text("sid", apt=folder, release=release(tmp_path, "debian", "bookworm"))
    assert "Suites: sid\n" in text
    assert "security" not in text


def test_a_machine_that_is_no_debian_names_no_mirror(tmp_path: Path) -> None:
    folder = apt(tmp_path / "apt", list="deb http://ubuntu.example/ubuntu noble main\n")
    assert sources_text("bookworm", apt=folder, release=release(tmp_path, "ubuntu", "noble")) == ""
    assert sources_text("bookworm", apt=tmp_path / "none", release=tmp_path / "none") == ""


def test_a_mirror_may_be_named() -> None:
    assert "URIs: https://m.example/debian\nSuites: bookworm" in sources_text(
        "bookworm", "https://m.example/debian"
    )
    for wrong in ("m.example/debian", "ftp://m.example/debian", "http://m.example/a\nSuites: evil"):
        with pytest.raises(InvalidInputError, match="mirror"):
            sources_text("bookworm", wrong)


@pytest.mark.parametrize("suite", ["", "Bookworm", "../x", "book worm", "--hook", "a" * 99])
def test_what_is_no_suite_is_refused(suite: str) -> None:
    with pytest.raises(InvalidInputError, match="suite"):
        sources_text(suite)
