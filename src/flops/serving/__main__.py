"""``python -m flops.serving --config FILE``: serve one model.

Exit codes: 0 it was told to end (SIGTERM, SIGINT) and has, 1 the model cannot be loaded, 2 the configuration
or the address is unusable.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from flops.core.errors import FlopsError
from flops.serving.config import ServingConfig
from flops.serving.errors import ModelFailedError
from flops.serving.server import serve
from flops.telemetry import log_lines

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.serving")
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(arguments)
    log_lines("model")
    try:
        uvloop.run(serve(ServingConfig.read(options.config)))
    except ModelFailedError as error:
        log.error("%s", error)
        return 1
    except FlopsError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
