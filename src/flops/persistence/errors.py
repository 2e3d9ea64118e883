"""What the database room raises beyond the errors of the ground floor."""

from flops.core.errors import UnavailableError


class DatabaseAwayError(UnavailableError):
    """The database does not answer, or refuses for now: whoever waits loses nothing, and then goes on."""


class LeaseLostError(DatabaseAwayError):
    """Another manager has taken over: whoever waits goes on there."""
