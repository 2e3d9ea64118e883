"""A hierarchy beside flat averaging: the same learners, the same seeds, one round a cycle.

Real aggregators, and real learners on virtual agents, one a cluster (the flat run has the same agents). The
fit returns seeded random steps and example counts, so the two final models can be compared. The limit is a
raw loopback socket that moves the same bytes as a flat round.

    python -m benchmarks.hierarchy --learners 200 --clusters 4 --bytes 1000000 --rounds 10 --json -
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loopback, report
from benchmarks.services import peak_rss, services
from flops.federation import AgentConfig, AggregatorConfig, Link, Member, Plan, VirtualLearner
from flops_worker.tensors import Layout, read_layout, views, write

_MODEL_MANAGER = '''\
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    """Seeded random steps of seeded weights: whatever a topology changes shows in the numbers."""

    def set_model_data(self) -> None:
        pass

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters) -> None:
        self.parameters = parameters

    def fit_model(self) -> int:
        self.parameters = [p + np.random.random(p.shape).astype(p.dtype) - 0.5 for p in self.parameters]
        return int(np.random.randint(1, 1000))

    def evaluate_model(self):
        return 0.5, 0.5, 1
'''
_EVERYBODY = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.hierarchy", description=__doc__.split("\n")[0])
    parser.add_argument("--learners", type=int, default=200)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="size of the model (float32 parameters)")
    parser.add_argument("--rounds", type=int, default=10)
    report.add_json_option(parser)
    options = parser.parse_args()
    learners, clusters = options.learners, options.clusters
    nbytes, rounds = options.bytes // 4 * 4, options.rounds
    flat = measure(learners, clusters, nbytes, rounds, hierarchical=False)
    hierarchical = measure(learners, clusters, nbytes, rounds, hierarchical=True)
    few = measure(learners // 5, clusters, nbytes, rounds, hierarchical=True)
    limit_s = loopback.seconds(learners, nbytes)
    difference = max(
        float(np.abs(one.astype(np.float64) - other).max())
        for one, other in zip(flat.pop("model"), hierarchical.pop("model"), strict=True)
    )
    few.pop("model")
    report.write(
        {
            "benchmark": "hierarchy",
            "learners": learners,
            "clusters": clusters,
            "bytes": nbytes,
            "rounds": rounds,
            "flat": flat,
            "hierarchical": hierarchical,
            "round_s_ratio_to_flat": hierarchical["round_s_median"] / flat["round_s_median"],
            "root_peak_rss_ratio_to_flat": hierarchical["root_peak_rss_bytes"] / flat["root_peak_rss_bytes"],
            "root_bytes_up_ratio_to_flat": hierarchical["root_bytes_up"] / flat["root_bytes_up"],
            "with_a_fifth_of_the_learners": few,
            "root_peak_rss_growth_with_learners": hierarchical["root_peak_rss_bytes"]
            / few["root_peak_rss_bytes"],
            "max_abs_difference_from_flat": difference,
            "loopback_s": limit_s,
            "flat_ratio_to_loopback": flat["round_s_median"] / limit_s,
            "ratio_to_loopback": hierarchical["round_s_median"] / limit_s,
        },
        options.json,
    )


def measure(learners: int, clusters: int, nbytes: int, rounds: int, *, hierarchical: bool) -> dict[str, Any]:
    """One training; times are the root's own, round by round."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name, services(Path(name)) as running:
        folder = Path(name)
        groups = _write(folder, learners, clusters, nbytes, rounds, hierarchical)
        for number in range(len(groups)):
            if hierarchical:
                running.start("flops.federation.aggregator", f"cluster-{number}")
            running.start("flops.agent", f"agent-{number}")
        root = running.start("flops.federation.aggregator", "root")
        peak = 0
        while root.poll() is None:
            peak = max(peak, peak_rss(root.pid))
            time.sleep(0.1)
        if root.returncode != 0:
            raise SystemExit(f"the root failed: {(folder / 'root.log').read_text()[-2000:]}")
        lines = [json.loads(line) for line in (folder / "root" / "reports.jsonl").read_text().splitlines()]
        model = _read(folder / "root" / f"global-{rounds + 1}.safetensors")
    finished = [line["data"] for line in lines if line["kind"] == "round.finished"]
    # The first round warms caches, buffers and files; it is the start of a project, not its pace.
    times = [data["duration_s"] for data in finished[1:]]
    return {
        "round_s_median": statistics.median(times),
        "round_s_min": min(times),
        "round_s_max": max(times),
        "root_peak_rss_bytes": peak,
        "root_bytes_up": finished[-1]["bytes_up"],
        "model": model,
    }


def _write(
    folder: Path, learners: int, clusters: int, nbytes: int, rounds: int, hierarchical: bool
) -> list[list[int]]:
    """All configurations; returns the learners of each agent."""
    code = folder / "code"
    code.mkdir()
    (code / "model_manager.py").write_text(_MODEL_MANAGER)
    arrays = [np.random.default_rng(0).standard_normal(nbytes // 4, np.float32)]
    with (folder / "initial.safetensors").open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)
    groups = [part.tolist() for part in np.array_split(np.arange(1, learners + 1), clusters)]
    whole = {f"learner-{slot}": Member(f"token-{slot}", slot=slot) for slot in range(1, learners + 1)}
    listen = f"grpc+unix://{folder / 'root.sock'}"
    plan = {"start_deadline_s": 600.0, "fraction_evaluate": 0.0, **_EVERYBODY}
    members = whole
    if hierarchical:
        members = {
            f"cluster-{number}": Member(f"token-of-cluster-{number}", slot=group[0], kind="cluster")
            for number, group in enumerate(groups)
        }
    common: dict[str, Any] = {"project": "p-bench", "initial_model": str(folder / "initial.safetensors")}
    AggregatorConfig(
        **common,
        listen=listen,
        members=members,
        state_dir=str(folder / "root"),
        plan=_plan(plan, rounds + 1, len(members)),
    ).write(folder / "root.json")
    for number, group in enumerate(groups):
        at = listen
        if hierarchical:
            name = f"cluster-{number}"
            at = f"grpc+unix://{folder / name}.sock"
            AggregatorConfig(
                **common,
                listen=at,
                members={f"learner-{slot}": whole[f"learner-{slot}"] for slot in group},
                state_dir=str(folder / name),
                plan=_plan(plan, 1, len(group), cycles=rounds + 1),
                parent=Link(listen, name, members[name].token),
            ).write(folder / f"{name}.json")
        AgentConfig(
            project="p-bench",
            aggregator=at,
            python=sys.executable,
            code=str(code),
            threads=1,
            virtual=tuple(VirtualLearner(f"learner-{slot}", f"token-{slot}", slot) for slot in group),
        ).write(folder / f"agent-{number}.json")
    return groups


def _plan(common: dict[str, Any], rounds: int, members: int, cycles: int = 1) -> Plan:
    everybody: dict[str, Any] = {"min_available_learners": members, "min_fit_learners": members}
    return Plan(**{**common, "rounds": rounds, "cycles": cycles, **everybody})


def _read(path: Path) -> list[np.ndarray[Any, Any]]:
    with path.open("rb") as file:
        layout, offset = read_layout(file.fileno())
    return views(layout, path.read_bytes()[offset:])


if __name__ == "__main__":
    main()
