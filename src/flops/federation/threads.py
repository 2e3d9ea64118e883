"""How programs with a thread for every member share one interpreter."""

import sys

_SWITCH_S = 0.1


def expect_many_threads() -> None:
    """Let threads that wait for the interpreter sleep until it is given to them.

    Each of them would wake every 5 ms to ask for it; with a thousand members that is what the processor does.
    Nobody here computes for long, and whoever waits for the network lets others in: each of 1,000 virtual
    learners costs the aggregator 2.0 ms of processor time a round instead of 3.2, and their agent as much.
    """
    sys.setswitchinterval(_SWITCH_S)
