"""What can come of running user code, as errors; the causes are in the user's repository."""

from collections.abc import Sequence
from typing import ClassVar

from flops.core.errors import FailedError
from flops_worker import CUT_OFF


class GuestError(FailedError):
    """User code raised, or does not keep to the contract.

    Attributes:
        where: the step of the contract, such as ``fit_model``.
        type: the exception's class name; ``ContractError`` where the contract is not kept.
        message: the exception's own text.
        traceback: its last 20 lines, without FLOps's own frames.
    """

    code: ClassVar[str] = "guest-failed"

    def __init__(
        self, text: str, *, where: str, type: str, message: str, traceback: Sequence[str] = ()
    ) -> None:
        super().__init__(text)
        self.where = where
        self.type = type
        self.message = message
        self.traceback = tuple(traceback)


class GuestDied(GuestError):
    """The process of the user's code ended by itself or was killed by the system.

    Attributes:
        exit_code: its exit status, None where a signal ended it, or where nobody knows.
        signal: the signal's name, such as ``SIGSEGV``, else None.
        log: the last lines of what it wrote.
    """

    code: ClassVar[str] = "guest-died"

    def __init__(self, *, where: str, exit_code: int | None, signal: str | None, log: Sequence[str]) -> None:
        if signal is None and exit_code is None:
            cause = "with its container (perhaps for lack of memory)"
        elif signal is None:
            cause = f"with exit code {exit_code}"
        elif signal == "SIGKILL":
            cause = "by SIGKILL (perhaps for lack of memory)"
        else:
            cause = f"by {signal}"
        message = f"the process ended {cause}"
        last = next((line.strip() for line in reversed(log) if line.strip()), "")
        hint = f"; its last log line: {last[:300]}" if last else ""
        super().__init__(
            f"the process of the repository's code ended {cause} during {where}"
            f" - see the log and mend the code{hint}",
            where=where,
            type="GuestDied",
            message=message,
        )
        self.exit_code = exit_code
        self.signal = signal
        self.log = tuple(log)

    @property
    def from_outside(self) -> bool:
        """It was killed or cut off: perhaps nothing that user code did."""
        if self.signal is None:
            return self.exit_code in (None, CUT_OFF)
        return self.signal == "SIGKILL"


class GuestTimeout(GuestError):
    """User code did not answer in time; its process was killed, because it cannot be interrupted safely."""

    code: ClassVar[str] = "guest-timeout"

    def __init__(self, *, where: str, timeout_s: float) -> None:
        message = f"no answer within {timeout_s:g} s"
        super().__init__(
            f"{where} of the repository gave no answer within {timeout_s:g} s - speed it up or allow more",
            where=where,
            type="GuestTimeout",
            message=message,
        )
        self.timeout_s = timeout_s


class GuestClosed(GuestError):
    """The guest was closed by this side, before or during the request."""

    code: ClassVar[str] = "guest-closed"

    def __init__(self, *, where: str) -> None:
        super().__init__(
            f"the guest was closed, {where} has no result - start a new one",
            where=where,
            type="GuestClosed",
            message="closed",
        )
