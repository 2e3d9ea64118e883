"""The header Idempotency-Key: a request that makes something is sent again and answered as the first time."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import BaseModel

from flops.api.access import caller_of
from flops.manager import CarryOut, Manager, OnceRequest

REPLAYED = "Idempotency-Replayed"

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Any text that is new for each new request. The same again, with the same body and "
        "within 24 hours, is answered as the first time; with another body it is refused (409)",
    ),
]


def once(
    manager: Manager,
    request: Request,
    response: Response,
    key: str | None,
    body: BaseModel | None,
    carry_out: CarryOut,
    *,
    harmless: bool = True,
) -> Mapping[str, Any]:
    """Carry the request out, or give the answer that was given before, with the header `REPLAYED`.

    Args:
        harmless: see `OnceRequest`.
    """
    given = body.model_dump(mode="json") if body is not None else None
    told, repeated = manager.once(
        OnceRequest(
            caller=caller_of(request).user,
            key=key,
            operation=f"{request.method} {request.url.path}?{request.url.query}",
            body=given,
            harmless=harmless,
        ),
        carry_out,
    )
    if repeated:
        response.headers[REPLAYED] = "true"
    return told
