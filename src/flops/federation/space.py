"""A full disk ends the aggregator's process: what counts is committed, and it is started again until there is
space. Nothing else has to know of full disks.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flops.core.disk import EXIT_WITHOUT_SPACE, disk_full, is_full

log = logging.getLogger(__name__)


def lacks_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error."""
    while error is not None and not is_full(error):
        error = error.__cause__
    return error is not None


@contextmanager
def needing_space(folder: Path, subject: str) -> Iterator[None]:
    """Within the block a write that finds no space ends this process at once, from any thread."""
    try:
        yield
    except Exception as error:
        if not lacks_space(error):
            raise
        log.error("%s", disk_full(folder, subject))
        logging.shutdown()
        os._exit(EXIT_WITHOUT_SPACE)
