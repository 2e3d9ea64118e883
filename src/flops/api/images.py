"""Routes of images: what is kept here, and base images made on the spot, told line by line."""

import json
import queue
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from flops.api import schemas
from flops.api.problems import SLOW, documented
from flops.core.errors import FlopsError
from flops.manager import Manager


def image_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/images", tags=["images"])

    @routes.get(
        "",
        response_model=schemas.ImageList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        summary="What the image layout holds, by name",
    )
    def list_images() -> Any:
        return {"images": manager.images()}

    @routes.post(
        "/base",
        response_class=StreamingResponse,
        responses=documented() | {200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
        openapi_extra=SLOW,
        summary="Make a base image from Debian's packages",
        description="Answers JSON lines: {progress}, and last {result} or {error: {code, detail}}.",
    )
    def make_base_image(request: schemas.BaseImageRequest) -> StreamingResponse:
        return StreamingResponse(_told(manager, request.model_dump()), media_type="application/x-ndjson")

    return routes


def _told(manager: Manager, request: dict[str, Any]) -> Iterator[str]:
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def make() -> None:
        try:
            lines.put({"result": manager.make_base(request, lambda text: lines.put({"progress": text}))})
        except FlopsError as error:
            lines.put({"error": {"code": error.code, "detail": str(error)}})

    # Whoever stops listening does not stop the work: the image is of use all the same.
    threading.Thread(target=make, name="flops-base-image", daemon=True).start()
    while True:
        line = lines.get()
        yield json.dumps(line) + "\n"
        if "progress" not in line:
            return
