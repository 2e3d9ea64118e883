"""The REST API of a manager: routes, proof of identity, the event stream; no logic of its own.

Two applications: `create_app` for people and programs (TCP on loopback, one token) and `create_reports_app`
for the services of this machine (a Unix socket, one token for each project); `Standby` answers for a manager
that waits. Every error is `application/problem+json`.
"""

from flops.api.app import create_app, create_reports_app
from flops.api.server import serve
from flops.api.standby import Standby

__all__ = ["Standby", "create_app", "create_reports_app", "serve"]
