"""The OpenAPI document of the REST API, without a manager: ``python -m flops.api.document > FILE``."""

import json
import sys
from typing import Any, cast

from flops.api.app import create_app
from flops.manager import Manager


class _Nobody:
    """Stands where routes expect their manager, which they ask only when they are called."""

    def __getattr__(self, name: str) -> "_Nobody":
        return self


def document() -> dict[str, Any]:
    return create_app(cast(Manager, _Nobody()), "", lambda: None).openapi()


def as_text(value: dict[str, Any]) -> str:
    """As it is kept in the repository."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_text(document()))
