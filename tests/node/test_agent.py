"""An agent that is told to insist runs no code that has a network."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flops.agent.crew import Crew
from flops.core.errors import FailedError
from flops.federation import AgentConfig

MODEL_MANAGER = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


def test_code_whose_network_cannot_be_cut_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "model_manager.py").write_text(MODEL_MANAGER)
    config = AgentConfig(
        project="p-test",
        learner="learner-1",
        aggregator="grpc+tls://127.0.0.1:1",
        python=sys.executable,
        code=str(tmp_path),
        isolate=False,
        insist=True,
    )
    with pytest.raises(FailedError, match="the network of the user's code cannot be cut here"):
        Crew(config)
    assert not (tmp_path / "ran").exists()
    crew = Crew(replace(config, insist=False))
    crew.kill()


def test_a_tally_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    config = AgentConfig(project="p-test", aggregator="", tally=str(tmp_path / "missing" / "tally"))
    with pytest.raises(FailedError, match="what is sent cannot be counted in"):
        Crew(config)
