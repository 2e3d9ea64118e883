"""The learners' own data, from the data server of their node."""

import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from flops.core.errors import UnavailableError
from flops.federation import DataAccess
from flops.federation.model_file import anonymous_file

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 10.0
_PATIENCE_S = 3600.0


class Fragments:
    """What the data server has for the learners of this agent; any thread may ask."""

    def __init__(self, access: DataAccess | None) -> None:
        self._access = access
        self._opening = threading.Lock()
        self._opened: Any = None

    def of_site(self, site: str) -> Sequence[int]:
        """A learner's own fragments as one open Arrow IPC file; the caller closes it."""
        if self._access is None:
            return []
        fd = anonymous_file("flops-data")
        try:
            self._write(self._access.tags, site, fd)
        except BaseException:
            os.close(fd)
            raise
        return [fd]

    def _write(self, tags: Sequence[str], site: str, fd: int) -> None:
        """Ask again while the data server is away: it is started again when it dies."""
        until = time.monotonic() + _PATIENCE_S
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._client().write_matching(tags, site, fd)
                return
            except UnavailableError as error:
                if time.monotonic() > until:
                    raise
                log.info("the data are not there yet, asking again: %s", error)
            # Jitter, so that the learners of a place do not come back in one instant.
            time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _client(self) -> Any:
        from flops.data import DataClient  # learners without data do not need it

        with self._opening:
            if self._opened is None and self._access is not None:
                self._opened = DataClient(self._access.location, self._access.token)
            return self._opened
