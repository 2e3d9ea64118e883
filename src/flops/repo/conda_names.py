"""Names of conda packages where PyPI has another one, or none; only what ML repositories use.

Source:
    the recipes of conda-forge (https://github.com/conda-forge/NAME-feedstock, section ``source``) and the
    mapping that pixi uses (https://github.com/prefix-dev/parselmouth).
"""

PYPI_NAMES = {
    "dask-core": "dask",
    "faiss": "faiss-cpu",
    "faiss-gpu": "faiss-cpu",
    "jax-cpu": "jax",
    "lightgbm-cpu": "lightgbm",
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "numpy-base": "numpy",
    "opencv": "opencv-python-headless",
    "py-lightgbm": "lightgbm",
    "py-opencv": "opencv-python-headless",
    "py-xgboost": "xgboost",
    "py-xgboost-cpu": "xgboost",
    "py-xgboost-gpu": "xgboost",
    "pyarrow-core": "pyarrow",
    "python-flatbuffers": "flatbuffers",
    "python-graphviz": "graphviz",
    "pytables": "tables",
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "ray-core": "ray",
    "ray-default": "ray[default]",
    "seaborn-base": "seaborn",
    "tensorflow-base": "tensorflow",
    "tensorflow-gpu": "tensorflow",
    "tensorflow-mkl": "tensorflow",
    "torchvision-cpu": "torchvision",
}
"""conda name -> PyPI name (with extras)."""

NATIVE = frozenset(
    {
        *("blas", "bzip2", "c-ares", "c-compiler", "ca-certificates", "cairo", "clang", "cmake", "compilers"),
        *(
            "cpuonly",
            "cudatoolkit",
            "cudnn",
            "cxx-compiler",
            "expat",
            "ffmpeg",
            "fontconfig",
            "fortran-compiler",
        ),
        *(
            "freetype",
            "gcc",
            "gfortran",
            "git",
            "glib",
            "graphviz",
            "gxx",
            "hdf5",
            "icu",
            "intel-openmp",
            "jpeg",
        ),
        *(
            "krb5",
            "lame",
            "lcms2",
            "lerc",
            "llvm-openmp",
            "lz4-c",
            "make",
            "mkl",
            "nccl",
            "ncurses",
            "nettle",
        ),
        *(
            "ninja",
            "nodejs",
            "nomkl",
            "openblas",
            "openh264",
            "openjpeg",
            "openmpi",
            "openssl",
            "pandoc",
            "pcre",
        ),
        *(
            "pixman",
            "pthread-stubs",
            "python-abi",
            "python_abi",
            "pytorch-cuda",
            "pytorch-mutex",
            "qt",
            "qt-main",
        ),
        *(
            "re2",
            "readline",
            "snappy",
            "sqlite",
            "tbb",
            "tk",
            "tzdata",
            "unixodbc",
            "x264",
            "x265",
            "xz",
            "yaml",
        ),
        *("zeromq", "zlib", "zstd"),
    }
)
NATIVE_PREFIXES = (
    "_",
    "cuda-",
    "gcc_",
    "gxx_",
    "gfortran_",
    "ld_impl_",
    "xorg-",
    "kernel-headers_",
    "sysroot_",
)
_PYTHON_WITH_LIB = frozenset({"libclang", "libcst", "librosa", "libsvm-official", "libtmux"})


def is_native(name: str) -> bool:
    """Whether a conda package is no Python package: it comes with wheels or with the system."""
    if name.startswith("lib"):
        return name not in _PYTHON_WITH_LIB
    return name in NATIVE or name.startswith(NATIVE_PREFIXES)
