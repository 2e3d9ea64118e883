"""Which layer came out of which inputs: an unchanged layer costs a look into a small file.

Safe among threads and processes: a layer is made once, whoever else wants it waits. A layer that is not in
the layout any more is made again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.images.descriptor import Descriptor
from flops.images.exclusion import exclusive
from flops.images.layer import Layer
from flops.images.layout import Layout
from flops.images.locks import write_atomically


class LayerCache:
    """Remembered layers of a layout, in a folder."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout

    def layer(self, what: str, inputs: Mapping[str, str], make: Callable[[], Layer]) -> Layer:
        """The layer of some inputs, made if it is not there.

        Args:
            what: its kind.
            inputs: everything that it depends on.
        """
        text = json.dumps([what, dict(inputs)], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        known = self._known(path)
        if known is not None:
            return known
        with exclusive(path.with_suffix(".lock")):
            made = self._known(path)
            if made is None:
                made = make()
                entry = {
                    "inputs": dict(inputs),
                    "descriptor": made.descriptor.to_json(),
                    "diff_id": made.diff_id,
                }
                write_atomically(path, json.dumps(entry, indent=1, sort_keys=True) + "\n")
            return made

    def _known(self, path: Path) -> Layer | None:
        try:
            entry = json.loads(path.read_bytes())
            descriptor = Descriptor.from_json(entry["descriptor"])
            layer = Layer.of(descriptor, str(entry["diff_id"]))
        except (OSError, ValueError, KeyError, TypeError, InvalidInputError):
            return None  # absent or damaged: made anew, and the file written over
        return layer if self._layout.has(descriptor.digest) else None
