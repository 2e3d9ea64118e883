"""``python -m tests.chaos --kills N --seed S``: a project undisturbed, then again and again under faults.

Real processes of real projects are killed (SIGKILL), frozen, and cut off from each other, until N processes
were killed. Each disturbed project has to end with the bits of the undisturbed one, every round exactly once,
one registered version, and nothing left behind. Prints a line for each fault and a JSON summary; exits with 1
where anything differs.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.faults import Chaos, Record, recoveries
from tests.chaos.home import Home
from tests.chaos.outcome import Outcome, outcome, problems, remains
from tests.chaos.repository import make_repository, project_spec

_UNDISTURBED_S = 600.0
CLUSTERS = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-a-project", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--learners", type=int, help="default: 3; in a hierarchy 4")
    parser.add_argument("--mode", choices=("classic", "hierarchical"), default="classic")
    parser.add_argument("--pause-s", type=float, default=1.2, help="mean pause between two faults")
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="for each project")
    parser.add_argument("--keep", action="store_true", help="keep the folder, also when all is well")
    parser.add_argument("--json", metavar="FILE", default="-", help="where the summary goes (-: stdout)")
    options = parser.parse_args()
    options.learners = options.learners or (4 if options.mode == "hierarchical" else 3)

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    say(f"in {folder}")
    summary = run(folder, options)
    text = json.dumps(summary, indent=2)
    if options.json == "-":
        say(text)
    else:
        Path(options.json).write_text(text + "\n")
    if summary["ok"] and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"kept: {folder}")
    return 0 if summary["ok"] else 1


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All projects of one run, and the summary of what came of them."""
    started = time.monotonic()
    spec = project_spec(
        make_repository(folder / "repository"),
        learners=options.learners,
        rounds=options.rounds,
        seed=options.seed,
    )
    if options.mode == "hierarchical":
        spec = hierarchical(spec)
    reference, reference_s = undisturbed(folder / "undisturbed", spec, options)
    say(f"undisturbed: {reference.state} after {reference_s:.1f} s, {len(reference.rounds)} rounds")

    if reference.state != "finished":
        return {"ok": False, "reason": reference.reason}
    record, rng = Record(), random.Random(options.seed)
    projects: list[dict[str, Any]] = []
    times: list[tuple[float, bool]] = []
    while record.kills < options.kills:
        home = Home(folder / f"home-{len(projects) + 1}")
        before = record.kills
        projects.append(disturbed(home, spec, reference, record, rng, options, times))
        if not projects[-1]["identical"] and projects[-1]["state"] == "unended":
            break
        if record.kills == before and not projects[-1]["ok"]:
            break
    clean = [seconds for seconds, alone in times if alone]
    lost = sum(project["lost_rounds"] for project in projects)
    return {
        "mode": options.mode,
        "seed": options.seed,
        "rounds": options.rounds,
        "learners": options.learners,
        "projects": len(projects),
        "seconds": round(time.monotonic() - started, 1),
        "undisturbed_s": round(reference_s, 1),
        **record.counts(),
        "lost_rounds": lost,
        "repeated_rounds": sum(project["repeated_rounds"] for project in projects),
        "identical": all(project["identical"] for project in projects),
        "recovery_s": spread([seconds for seconds, _ in times]),
        "recovery_undisturbed_s": spread(clean),
        "manager_start_s": spread(record.manager_starts_s),
        "ok": all(project["ok"] for project in projects),
        "details": projects,
    }


def undisturbed(folder: Path, spec: dict[str, Any], options: argparse.Namespace) -> tuple[Outcome, float]:
    home = Home(folder)
    try:
        home.put_data(options.learners)
        start = time.monotonic()
        project = home.submit(spec)
        home.wait(project, _UNDISTURBED_S)
        seconds = time.monotonic() - start
        result = outcome(home, project)
        found = problems(home, project)
    finally:
        home.end()
    found += remains(home)
    if found:
        say("undisturbed, and yet: " + "; ".join(found))
    return result, seconds


def disturbed(
    home: Home,
    spec: dict[str, Any],
    reference: Outcome,
    record: Record,
    rng: random.Random,
    options: argparse.Namespace,
    times: list[tuple[float, bool]],
) -> dict[str, Any]:
    """One project under faults, in a FLOPS_HOME of its own."""
    started, before = time.monotonic(), record.kills
    home.put_data(options.learners)
    project = home.submit(spec)
    found: list[str] = []
    state = "unended"
    try:
        wanted = min(options.kills - record.kills, options.kills_a_project)
        Chaos(home, record, rng, options.pause_s, say).disturb(
            project, kills=wanted, timeout_s=options.timeout_s
        )
        result = outcome(home, project)
        state = result.state
        found += reference.differences(result)
        found += problems(home, project)
        times += recoveries(home, record, project)
    except TimeoutError as error:
        found.append(str(error))
        result = outcome(home, project)
    finally:
        home.end()
    found += remains(home)
    repeated = len(result.rounds) - len(set(result.rounds))
    missing = len(set(reference.rounds) - set(result.rounds))
    line = {
        "project": project,
        "state": state,
        "kills": record.kills - before,
        "seconds": round(time.monotonic() - started, 1),
        "identical": (result.model, result.last_global) == (reference.model, reference.last_global),
        "lost_rounds": missing,
        "repeated_rounds": repeated,
        "found": found,
        "ok": not found,
    }
    say(json.dumps(line))
    return line


def hierarchical(spec: dict[str, Any]) -> dict[str, Any]:
    """The same training in two clusters; each learner has to take part in each round of its cluster."""
    training = {**spec["training"], "mode": "hierarchical", "clusters": {"by": "size", "count": CLUSTERS}}
    training |= {"min_clusters": CLUSTERS, "cycles": training["rounds"] // 2, "rounds": 2}
    for name in ("min_available_learners", "min_fit_learners", "min_evaluate_learners", "quorum"):
        training[name] = training["learners"] // CLUSTERS
    return {**spec, "training": training}


def spread(seconds: list[float]) -> dict[str, float | int | None]:
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 2) if seconds else None,
        "max": round(max(seconds), 2) if seconds else None,
    }


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
