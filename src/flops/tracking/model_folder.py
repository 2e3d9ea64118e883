"""A model folder as the user's environment left it: foreign files that are checked before they are copied."""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from flops.core.errors import FailedError

MLMODEL = "MLmodel"
_MAX_MLMODEL_BYTES = 1 << 20
_MAX_FILES = 10_000


class RecordRefusedError(FailedError):
    """A record that can never be tracked, whatever is tried later."""

    code = "record-refused"


def check_model_folder(directory: Path) -> None:
    """Make sure that copying the folder copies what is in it, and nothing else.

    Raises:
        RecordRefusedError: no folder, no model, too many files, or a link or special file in it. User
            code wrote the folder; a link in it would make the recorder publish any file of ours, such as
            tokens.
    """
    check_plain_file(directory / MLMODEL)
    if (directory / MLMODEL).stat().st_size > _MAX_MLMODEL_BYTES:
        raise RecordRefusedError(f"{directory / MLMODEL} is over 1 MiB - export the model again")
    count = 0
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RecordRefusedError(f"{path} is not a plain file - save the model without links")
        count += len(files)
        if count > _MAX_FILES:
            raise RecordRefusedError(f"{directory} has over {_MAX_FILES} files - save fewer")


def check_plain_file(path: Path) -> None:
    """
    Raises:
        RecordRefusedError: the file is not there, or is not a plain file.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordRefusedError(f"{path} is gone - export the model again") from error
    if not stat.S_ISREG(mode):
        raise RecordRefusedError(f"{path} is not a plain file - export the model again")


def stamped_mlmodel(directory: Path, *, model_id: str, run_id: str, location: str) -> str:
    """The MLmodel file with what only the tracker knows; the rest as the saving MLflow, maybe old, wrote it.

    Raises:
        RecordRefusedError: the file is not a YAML mapping.
    """
    try:
        content: Any = yaml.safe_load((directory / MLMODEL).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordRefusedError(f"{directory / MLMODEL} is not YAML - export the model again") from error
    if not isinstance(content, dict):
        raise RecordRefusedError(f"{directory / MLMODEL} describes no model - export the model again")
    content |= {
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "artifact_path": location,
    }
    return yaml.safe_dump(content, sort_keys=False)
