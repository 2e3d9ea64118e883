"""What many members need of the operating system."""

import resource

from flops.core.errors import UnavailableError

_FILES_EACH = 5
"""Open files of one learner: in the agent or in its worker its models, update and data, in the aggregator its
connection and spool file."""
_FILES_BESIDE = 256


def raise_file_limit(learners: int) -> None:
    """Allow this process, and those it starts, the open files that its learners need.

    Raises:
        UnavailableError: the system does not allow as many.
    """
    needed = learners * _FILES_EACH + _FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UnavailableError(
            f"{learners} learners in one process need {needed} open files, the system allows {hard}"
            " - raise its limit (ulimit -Hn), or train with fewer learners"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
