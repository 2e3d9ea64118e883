"""Which library a model belongs to, by the modules of its classes; nothing is imported for it."""

from __future__ import annotations

from typing import Any, Optional

_FLAVORS = {
    "sklearn": "sklearn",
    "torch": "pytorch",
    "keras": "keras",
    "tf_keras": "keras",
    "tensorflow": "tensorflow",
    "xgboost": "xgboost",
}


def flavor_of(model: Any) -> Optional[str]:
    """The flavor of a model object; its own class counts before its ancestors (XGBClassifier: XGBoost)."""
    for kind in type(model).__mro__:
        root = getattr(kind, "__module__", "").split(".", 1)[0]
        if root in _FLAVORS:
            return _FLAVORS[root]
    return None
