"""The short run of CI; `make chaos` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"manager", "aggregator", "agent", "worker", "data", "recorder"}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
def test_a_project_under_kills_cuts_and_freezes_ends_with_the_bits_of_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    summary = tmp_path / "summary.json"
    command = [sys.executable, "-m", "tests.chaos", "--kills", "12", "--seed", "1", "--rounds", "60"]
    command += ["--pause-s", "0.8", "--json", str(summary)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(summary.read_text())
    assert found["identical"]
    assert (found["lost_rounds"], found["repeated_rounds"]) == (0, 0)
    assert found["kills"] >= 12
    assert len(KINDS & found["kills_by_kind"].keys()) >= 5, found["kills_by_kind"]
