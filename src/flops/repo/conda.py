"""Conda's dependency lines as PEP 508 requirements: what a conda file asks for, in the words of PyPI.

Translated by name and version; channels and builds are dropped, since wheels have neither. Packages that
exist in conda only to provide native libraries or tools are left out: wheels bring their own.
"""

import re
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from flops.core.errors import InvalidInputError

# Names that differ between conda-forge and PyPI; source: the packages' own pages in both indexes.
_PYPI_NAMES = {
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "tensorflow-cpu": "tensorflow-cpu",
    "tensorflow-base": "tensorflow",
    "py-xgboost": "xgboost",
    "py-xgboost-cpu": "xgboost",
    "libxgboost": None,
    "opencv": "opencv-python-headless",
    "py-opencv": "opencv-python-headless",
    "msgpack-python": "msgpack",
    "matplotlib-base": "matplotlib",
    "dask-core": "dask",
    "pytables": "tables",
    "python-graphviz": "graphviz",
    "huggingface_hub": "huggingface-hub",
    "numpy-base": "numpy",
}
# Conda only: native libraries, compilers, and the tools of environments themselves.
_NATIVE = re.compile(
    r"_libgcc_mutex|_openmp_mutex|_py-xgboost-mutex|ca-certificates|certifi-win32|openssl|cudatoolkit|cudnn|cuda|"
    r"cuda-.*|pytorch-cuda|pytorch-mutex|cpuonly|mkl|mkl-.*|blas|libblas|liblapack|libcblas|openblas|libopenblas|"
    r"libgcc.*|libstdcxx.*|libgomp|libgfortran.*|libffi|libuuid|libsqlite|sqlite|libzlib|zlib|bzip2|xz|tk|ncurses|"
    r"readline|ld_impl_.*|gcc|gxx|gcc_.*|gxx_.*|compilers|cmake|make|git|conda|mamba|nomkl|python_abi|tzdata|vc|"
    r"vs2015_runtime|libxcb|freetype|jpeg|libpng|libtiff|icu|intel-openmp|llvm-openmp"
)
_TOOLS = {"pip", "wheel"}
NEVER_INSTALLED = {"mlflow", "mlflow-skinny", "mlflow-tracing", "flops-utils", "flops_utils"}
"""Not for learners: the manager tracks, and FLOps brings flops_utils itself."""

_LINE = re.compile(
    r"(?:(?P<channel>[\w./-]+(?:/[\w-]+)?)::)?(?P<name>[A-Za-z0-9_][\w.-]*)\s*(?:\[[^\]]*\])?\s*(?P<rest>.*)"
)


@dataclass(frozen=True)
class Translated:
    """One line: the requirement, or None with the reason why there is none."""

    requirement: str | None
    python: str | None = None
    note: str | None = None


def translate(line: str) -> Translated:
    """Translate one line of a conda file's ``dependencies``.

    Raises:
        InvalidInputError: the line is no conda dependency; names it.
    """
    text = line.split("#", 1)[0].strip()
    match = _LINE.fullmatch(text)
    if match is None:
        raise InvalidInputError(_unusable(line))
    name, rest = match["name"].lower(), match["rest"].strip()
    if name == "python":
        return Translated(None, python=specifiers(rest, line) or None)
    if name in _TOOLS or _NATIVE.fullmatch(name):
        return Translated(None)
    if name in NEVER_INSTALLED:
        return Translated(None, note=f"{name} is left out: learners do not need it")
    pypi_name = _PYPI_NAMES.get(name, name)
    if pypi_name is None:
        return Translated(None)
    requirement = pypi_name + specifiers(rest, line)
    try:
        return Translated(str(Requirement(requirement)))
    except InvalidRequirement as error:
        raise InvalidInputError(_unusable(line)) from error


def specifiers(rest: str, line: str) -> str:
    """Conda's version part (``=1.26.4``, ``>=1.2,<2``, ``1.2.* build``) as PEP 440 specifiers.

    A single ``=`` is conda's fuzzy match: ``=1.26`` means any 1.26; a complete version of three parts or
    more is what it says.

    Raises:
        InvalidInputError: not a version that PEP 440 can say.
    """
    rest = rest.strip()
    if not rest or rest == "*":
        return ""
    parts = []
    for part in rest.split(","):
        part = part.strip()
        match = re.fullmatch(r"(===?|~=|!=|<=|>=|<|>|=)?\s*([^\s=]+)(?:\s*=\s*\S+|\s+\S+)?", part)
        if match is None or "|" in part:
            raise InvalidInputError(_unusable(line))
        operator, version = match[1] or "", match[2]
        parts.append(_specifier(operator, version, line))
    text = ",".join(part for part in parts if part)
    try:
        return str(SpecifierSet(text))
    except InvalidSpecifier as error:
        raise InvalidInputError(_unusable(line)) from error


def _specifier(operator: str, version: str, line: str) -> str:
    starred = version.endswith("*")
    bare = version.rstrip("*").rstrip(".")
    if starred and not bare:
        return ""
    try:
        release = Version(bare).release
    except InvalidVersion as error:
        raise InvalidInputError(_unusable(line)) from error
    if operator in ("", "="):
        # Two equals signs are exact; one, or none, is a prefix as long as the version is not complete.
        return f"=={bare}" if len(release) >= 3 and not starred else f"=={bare}.*"
    if operator == "==" and starred:
        return f"=={bare}.*"
    if operator == "!=" and starred:
        return f"!={bare}.*"
    if operator == "~=" and len(release) < 2:
        return f">={bare}"
    return f"{operator}{bare}"


def _unusable(line: str) -> str:
    return (
        f"conda.yaml: the dependency '{line[:100]}' cannot be read - write it like numpy=1.26.4 or "
        "numpy>=1.26"
    )
