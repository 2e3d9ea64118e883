"""Until when a manager may act, in memory that it shares with the processes of its steps."""

import mmap
import struct
import time


def boot_time() -> float:
    """Seconds that also pass while the machine sleeps; the same for all processes of the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lease_end(until: mmap.mmap) -> float:
    """Until when the lease holds, by `boot_time`."""
    return float(struct.unpack_from("d", until, 0)[0])


def set_lease_end(until: mmap.mmap, time_s: float) -> None:
    struct.pack_into("d", until, 0, time_s)
