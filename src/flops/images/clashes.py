"""Why requirements cannot be met together: uv's proof, cut to what a user needs."""

import re

_START = re.compile(r"No solution found when resolving[^:\n]*:?")
_MARKS = re.compile(r"^[\s×╰─▶├│]*(?:cause:\s*)?")
_MAX_SENTENCES = 4
_MAX_LENGTH = 600


def is_clash(stderr: str) -> bool:
    """Whether uv failed because no set of versions fits (and not for the network or a build)."""
    return bool(_START.search(stderr))


def explain(stderr: str) -> str:
    """uv's ``Because ... we can conclude`` sentences on one line, at most 4 of them and 600 characters.

    The last sentence is always kept: it names what the user wrote.
    """
    match = _START.search(stderr)
    text = stderr[match.end() :] if match else stderr
    lines = []
    for line in text.splitlines():
        bare = _MARKS.sub("", line).strip()
        if bare.startswith("hint:"):
            break
        if bare:
            lines.append(bare)
    joined = " ".join(lines).replace("we can conclude that ", "")
    sentences = re.split(r"(?<=\.)\s+(?=(?:And|Because|So)\b)", joined)
    if len(sentences) > _MAX_SENTENCES:
        sentences = [*sentences[: _MAX_SENTENCES - 1], "…", sentences[-1]]
    short = " ".join(sentences).removesuffix(".")
    if len(short) > _MAX_LENGTH:
        last = sentences[-1].removesuffix(".")
        short = last if len(last) <= _MAX_LENGTH else "…" + last[-_MAX_LENGTH:]
    return short


def is_about_python(stderr: str) -> bool:
    """Whether another Python might do: no wheel for this one, or the package refuses it."""
    return bool(re.search(r"\bwheels?\b|\bPython\b", stderr))


def is_about_wheels(stderr: str) -> bool:
    """Whether allowing a build from source might help."""
    return bool(re.search(r"\bno (?:usable )?wheels?\b|building from source is disabled", stderr))
