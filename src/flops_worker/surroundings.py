"""What user code finds in its environment, wherever it runs: nothing that makes runs differ, no hubs."""

from __future__ import annotations

from typing import Dict, Mapping, Optional

SETTINGS: Mapping[str, str] = {
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "LOKY_MAX_CPU_COUNT",
)


def settings(home: str, threads: Optional[int]) -> Dict[str, str]:
    """Environment variables of user code.

    Args:
        home: the folder for what it and its libraries leave lying about.
        threads: how many threads numerical libraries use; None: as they like.
    """
    result = {
        **SETTINGS,
        "LANG": "C.UTF-8",
        "HOME": home,
        "TMPDIR": home,
        "HF_HOME": home + "/huggingface",
    }
    if threads is not None:
        result.update(dict.fromkeys(_THREADS, str(threads)))
    return result
