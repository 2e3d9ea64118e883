"""The learners' own data, from the data server of their node."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from flops.federation import DataAccess
from flops.federation.model_file import anonymous_file


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
            self._client().write_matching(self._access.tags, site, fd)
        except BaseException:
            os.close(fd)
            raise
        return [fd]

    def _client(self) -> Any:
        from flops.data import DataClient  # learners without data do not need it

        with self._opening:
            if self._opened is None and self._access is not None:
                self._opened = DataClient(self._access.location, self._access.token)
            return self._opened
