"""Several blobs on their way at once: progress of all together, and an end of all with the first failure."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from flops.core.errors import FailedError
from flops.images.blob_upload import Told
from flops.images.descriptor import Descriptor

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done, from any thread, one at a time; what it raises ends the work."""


class Transfers:
    """The blobs of one push or pull; one that is listed twice travels once."""

    def __init__(
        self,
        what: str,
        blobs: Sequence[Descriptor],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """``what``: for people, such as ``the pull of x:1``."""
        self._what = what
        self._blobs = {blob.digest: blob for blob in blobs}
        self._total = sum(blob.size for blob in self._blobs.values())
        self._progress = progress
        self._cancel = cancel
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._failed = threading.Event()
        self._first: BaseException | None = None

    def run(self, work: Callable[[Descriptor, Told], None], parallel: int) -> None:
        """Do ``work`` for every blob; gives back when all have ended.

        Raises:
            FailedError: stopped on request. Others: the first that ``work`` raised.
        """
        # The largest first: the end is not one large blob alone.
        blobs = sorted(self._blobs.values(), key=lambda blob: -blob.size)
        with ThreadPoolExecutor(parallel, thread_name_prefix="image-blobs") as pool:
            futures = [pool.submit(self._one, work, blob) for blob in blobs]
            try:
                wait(futures)
            except BaseException:  # Ctrl-C: do not wait for blobs of gigabytes
                self._failed.set()
                raise
        if self._first is not None:
            raise self._first

    def check(self) -> None:
        """Go no further after a failure elsewhere or a request to stop.

        Raises:
            FailedError: one of them was there.
        """
        if self._failed.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise FailedError(f"{self._what} was stopped on request")

    def _one(self, work: Callable[[Descriptor, Told], None], blob: Descriptor) -> None:
        def told(done: int) -> None:
            self.check()
            with self._lock:
                self._done[blob.digest] = done
                if self._progress is not None:
                    self._progress(sum(self._done.values()), self._total)

        try:
            self.check()
            work(blob, told)
            told(blob.size)
        except BaseException as error:
            with self._lock:
                if self._first is None:
                    self._first = error
            self._failed.set()
            raise
