import math
from collections import Counter
from fractions import Fraction

import pytest

from flops.data.noise import discrete_laplace

DRAWS = 20_000


@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(2), Fraction(2) / Fraction(0.7), Fraction(20)])
def test_noise_follows_the_discrete_laplace_distribution(scale: Fraction) -> None:
    # Oracle: P(x) = (1 - p) / (1 + p) * p ** |x| with p = exp(-1 / scale), cells of 10 or more.
    p = math.exp(-1 / scale)
    seen = Counter(discrete_laplace(scale) for _ in range(DRAWS))
    chi_square, cells, covered = 0.0, 0, 0.0
    for x in range(-400, 401):
        expected = DRAWS * (1 - p) / (1 + p) * p ** abs(x)
        if expected >= 10:
            chi_square += (seen[x] - expected) ** 2 / expected
            cells += 1
            covered += expected
    tail = DRAWS - covered
    beyond = DRAWS - sum(count for x, count in seen.items() if DRAWS * (1 - p) / (1 + p) * p ** abs(x) >= 10)
    assert abs(beyond - tail) < 6 * math.sqrt(tail + 1)
    # Wilson-Hilferty: a false alarm once in some ten million runs.
    assert ((chi_square / cells) ** (1 / 3) - (1 - 2 / (9 * cells))) / math.sqrt(2 / (9 * cells)) < 5.2


def test_noise_needs_a_scale() -> None:
    with pytest.raises(ValueError, match="the scale is 0"):
        discrete_laplace(Fraction(0))
