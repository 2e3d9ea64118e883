"""Which permission each route needs. A route that is not named here is refused to everybody."""

from collections.abc import Mapping

READS = frozenset({"GET", "HEAD"})
# Ask without changing anything: no entries of the audit log.
NOT_AUDITED = frozenset(
    {
        ("POST", "/v1/projects/{project}/predictions"),
        ("POST", "/v1/specs/validate"),
        ("POST", "/v1/ui"),
        ("POST", "/v1/node/sync"),
        ("POST", "/v1/oidc/begin"),
    }
)
ANYBODY = ""
"""Whoever has a good token."""
NODE = "node"
"""Joined nodes, with their credentials; no user has it."""
_OF_NODES = "/v1/node/"

_AREAS: Mapping[str, str] = {
    "/v1/projects": "projects",
    "/v1/specs": "projects",
    "/v1/models": "models",
    "/v1/data": "data",
    "/v1/nodes": "nodes",
    "/v1/top": "projects",
    "/v1/images": "images",
    "/v1/users": "users",
    "/v1/tokens": "tokens",
    "/v1/audit": "audit",
    "/v1/admin": "manager",
    "/v1/ui": "manager",
    "/v1/shutdown": "manager",
    "/v1/ready": "manager",
    "/v1/metrics": "manager",
}
_OTHERS: Mapping[tuple[str, str], str] = {
    ("GET", "/v1/me"): ANYBODY,
    ("POST", "/v1/specs/validate"): "projects:read",
    ("POST", "/v1/projects/{project}/predictions"): "models:read",
    ("POST", "/v1/ui"): "projects:read",
    ("POST", "/v1/audit/verify"): "audit:read",
    ("POST", "/api/flops/projects"): "projects:write",
    ("POST", "/api/flops/mocks"): "data:write",
    ("GET", "/api/flops/tracking"): "projects:read",
    ("DELETE", "/api/flops/database"): "manager:write",
}


def permission_of(method: str, path: str) -> str | None:
    """What a caller must have for a route, `ANYBODY` for nothing; None: the route is not known here.

    Args:
        path: of the route, such as ``/v1/projects/{project}``.
    """
    if (named := _OTHERS.get((method, path))) is not None:
        return named
    if path.startswith(_OF_NODES):
        return NODE
    area = _AREAS.get("/".join(path.split("/")[:3]))
    if area is None:
        return None
    return f"{area}:{'read' if method in READS else 'write'}"
