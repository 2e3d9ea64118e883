"""Discrete Laplace noise, drawn exactly: with whole numbers only, from the operating system's randomness.

Floating-point Laplace noise leaks through the gaps between doubles (Mironov 2012); nothing here is a float.
"""

import secrets
from fractions import Fraction


def discrete_laplace(scale: Fraction) -> int:
    """Draw a whole number x with probability proportional to exp(-|x| / scale).

    Added to a count that one person's change moves by at most d, it is (d / scale)-differentially private.

    Source:
        Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Algorithm 2 (with Algorithm 1 for the coins).
    """
    t, s = scale.numerator, scale.denominator
    if t <= 0:
        raise ValueError(f"the scale is {scale}, it must be above 0")
    while True:
        remainder = secrets.randbelow(t)
        if not _coin(Fraction(remainder, t)):
            continue
        whole = 0
        while _coin(Fraction(1)):
            whole += 1
        magnitude = (remainder + t * whole) // s
        negative = secrets.randbits(1)
        if negative and magnitude == 0:
            continue  # or zero would have two chances
        return -magnitude if negative else magnitude


def _coin(gamma: Fraction) -> bool:
    """True with probability exp(-gamma), for gamma from 0 to 1."""
    tries = 1
    while secrets.randbelow(gamma.denominator * tries) < gamma.numerator:
        tries += 1
    return tries % 2 == 1
