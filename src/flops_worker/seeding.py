"""Random numbers: every step of user code starts from generators seeded by (seed, round)."""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np


def seed_everything(seed: int, round_number: int) -> None:
    """Seed Python, numpy, and PyTorch and TensorFlow where user code has imported them."""
    digest = hashlib.sha256(f"flops:{seed}:{round_number}".encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    manual_seed = getattr(sys.modules.get("torch"), "manual_seed", None)
    if manual_seed is not None:
        manual_seed(number)
    set_seed = getattr(getattr(sys.modules.get("tensorflow"), "random", None), "set_seed", None)
    if set_seed is not None:
        set_seed(number & 0x7FFFFFFF)
