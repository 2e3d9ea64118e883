import pytest

from flops.core.errors import InvalidInputError
from flops.core.source import check_ref, check_repo, is_folder, redact, split_ref


@pytest.mark.parametrize(
    ("text", "repo", "ref"),
    [
        ("https://host/me/x", "https://host/me/x", None),
        ("https://host/me/x.git@v1", "https://host/me/x.git", "v1"),
        ("https://host/me/x@feature/y", "https://host/me/x", "feature/y"),
        ("https://user:secret@host/me/x", "https://user:secret@host/me/x", None),
        ("https://user:secret@host/me/x@v1", "https://user:secret@host/me/x", "v1"),
        ("https://user@host", "https://user@host", None),
        ("https://host/@scope/x", "https://host/@scope/x", None),
        ("https://host/@scope/x@v1", "https://host/@scope/x", "v1"),
        ("ssh://git@host:22/me/x@main", "ssh://git@host:22/me/x", "main"),
        ("file:///srv/git/x.git@v1", "file:///srv/git/x.git", "v1"),
        ("git@host:x.git", "git@host:x.git", None),
        ("git@host:x.git@v1", "git@host:x.git", "v1"),
        ("git@host:me/x@0123abcd", "git@host:me/x", "0123abcd"),
        ("host:x@v1", "host:x", "v1"),
        ("/data/x", "/data/x", None),
        ("/data/x@v1", "/data/x", "v1"),
        ("/data/a@b/x", "/data/a@b/x", None),
        ("/data/x@v1/", "/data/x@v1/", None),
        ("./x@v1", "./x", "v1"),
        ("@x", "@x", None),
        ("/data/@x", "/data/@x", None),
        ("/data/x@", "/data/x@", None),
    ],
)
def test_reference_is_split_off_at_the_right_place(text: str, repo: str, ref: str | None) -> None:
    assert split_ref(text) == (repo, ref)


@pytest.mark.parametrize("text", ["/data/x", "./x", "x", "~/x", "../a:b/c"])
def test_paths_are_folders(text: str) -> None:
    assert is_folder(text)


@pytest.mark.parametrize("text", ["https://h/x", "git@h:x", "file:///x", "ssh://h/x"])
def test_addresses_are_no_folders(text: str) -> None:
    assert not is_folder(text)


@pytest.mark.parametrize(
    ("repo", "problem"),
    [
        ("", "must be a git URL or a folder"),
        ("   ", "must be a git URL or a folder"),
        ("a\nb", "must be a git URL or a folder"),
        ("x" * 5000, "must be a git URL or a folder"),
        ("--upload-pack=touch /tmp/x", "is an option or a remote helper"),
        ("ext::sh -c touch", "is an option or a remote helper"),
        ("::x", "is an option or a remote helper"),
        ("ftp://host/x", "has the scheme 'ftp'"),
        ("ssh://-oProxyCommand=x/y", "has a host that starts with '-'"),
        ("ssh://me@-oProxyCommand=x/y", "has a host that starts with '-'"),
        ("me@-oProxyCommand=x:y", "has a host that starts with '-'"),
    ],
)
def test_addresses_that_git_must_not_get_are_refused(repo: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        check_repo(repo)


@pytest.mark.parametrize("ref", ["main", "v1.2", "feature/x", "0" * 40, "HEAD", "größe"])
def test_usual_references_pass(ref: str) -> None:
    assert check_ref(ref) == ref


@pytest.mark.parametrize(
    "ref", ["", "-x", "a b", "a..b", "a:b", "HEAD~1", "a^", "a\\b", "/a", "a/", "a.lock", "a" * 300]
)
def test_impossible_references_are_refused(ref: str) -> None:
    with pytest.raises(InvalidInputError, match="is not the name of a branch"):
        check_ref(ref)


@pytest.mark.parametrize(
    ("repo", "shown"),
    [
        ("https://user:secret@host/x", "https://***@host/x"),
        ("https://ghp_token@host:8443/x", "https://***@host:8443/x"),
        ("https://host/x?access_token=1", "https://host/x?***"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("ssh://git:secret@host/x", "ssh://***@host/x"),
        ("git@host:x", "git@host:x"),
        ("/data/x", "/data/x"),
        ("https://[::1/x", "***"),
    ],
)
def test_credentials_are_never_shown(repo: str, shown: str) -> None:
    assert redact(repo) == shown
