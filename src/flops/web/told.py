"""Events as sentences, for the list of what happened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flops.core.events import EventKind
from flops.web.words import clean, duration, how_many, number, percent, size


@dataclass(frozen=True)
class Told:
    """One line of the list. ``tone``: ok, warn, bad, run or quiet; it picks icon and colour."""

    seq: int
    time: float
    tone: str
    kind: str
    text: str


def tell(event: Mapping[str, Any], unit: str) -> Told:
    tone, text = _words(str(event["kind"]), event["data"], unit)
    return Told(event["seq"], event["time"], tone, clean(event["kind"], 60), clean(text, 600))


def _words(kind: str, data: Mapping[str, Any], unit: str) -> tuple[str, str]:
    cluster = f"{data['cluster']}: " if "cluster" in data else ""
    match kind:
        case EventKind.PROJECT_STATE:
            state = str(data.get("state"))
            tone = {"finished": "ok", "failed": "bad", "stopped": "warn", "paused": "warn"}.get(state, "run")
            return tone, state + (f": {data['reason']}" if data.get("reason") else "")
        case EventKind.STEP_STARTED:
            return "quiet", f"{data.get('step')} begins"
        case EventKind.STEP_PROGRESS:
            return "quiet", f"{data.get('step')}: {data.get('message')}"
        case EventKind.STEP_FINISHED:
            return "ok", f"{data.get('step')} is done, {duration(float(data.get('duration_s') or 0))}"
        case EventKind.WARNING:
            return "warn", str(data.get("message"))
        case EventKind.LEARNER_CONNECTED:
            return "quiet", f"{cluster}{data.get('learner')} is connected"
        case EventKind.LEARNER_LEFT:
            return "warn", f"{cluster}{data.get('learner')} left: {data.get('reason') or 'no reason given'}"
        case EventKind.LEARNER_EJECTED:
            return "bad", f"{cluster}{data.get('learner')} is ejected: {data.get('reason')}"
        case EventKind.CLUSTERS_FORMED:
            formed = data.get("clusters") or {}
            return "quiet", "clusters: " + ", ".join(
                f"{name} ({how_many(who)})" for name, who in formed.items()
            )
        case EventKind.CLUSTER_CONNECTED:
            return "quiet", f"{data.get('cluster')} is connected"
        case EventKind.CLUSTER_LEFT:
            tone = "quiet" if data.get("final") else "warn"
            return tone, f"{data.get('cluster')} left: {data.get('reason') or 'no reason given'}"
        case EventKind.CLUSTER_ROUND:
            return (
                "quiet",
                f"{cluster}round {data.get('round')} of {data.get('rounds')}, {_who_took_part(data)}",
            )
        case EventKind.TRAINING_WAITING:
            expected = data.get("expected") or data.get("needed")
            return "quiet", f"{cluster}waiting for members: {data.get('connected')} of {expected} connected"
        case EventKind.ROUND_STARTED:
            word = "round" if cluster else unit
            return (
                "quiet",
                f"{cluster}{word} {data.get('round')} begins with {how_many(data.get('cohort'))} members",
            )
        case EventKind.UPDATE_RECEIVED:
            return "quiet", f"{cluster}update of {data.get('learner')}, {size(data.get('bytes'))}"
        case EventKind.UPDATE_REFUSED:
            late = " (late)" if data.get("late") else ""
            return "warn", f"{cluster}update of {data.get('learner')} refused{late}: {data.get('reason')}"
        case EventKind.ROUND_FINISHED:
            metrics = data.get("metrics") or {}
            told = [_who_took_part(data)]
            if metrics.get("loss") is not None:
                told.append(f"loss {number(metrics['loss'])}")
            if metrics.get("accuracy") is not None:
                told.append(f"accuracy {percent(metrics['accuracy'])}")
            left_out = data.get("left_out") or {}
            if left_out:
                told.append(
                    "left out " + ", ".join(f"{who} ({why})" for who, why in list(left_out.items())[:5])
                )
            return "ok", f"{cluster}{unit} {data.get('round')}: " + ", ".join(told)
        case EventKind.TRAINING_FINISHED:
            return "ok", f"training is finished, the best {unit} is {data.get('best_round')}"
        case EventKind.TRAINING_FAILED:
            return "bad", f"training failed: {data.get('reason')}"
        case EventKind.MODEL_REGISTERED:
            return "ok", f"registered as {data.get('name')}:{data.get('version')}"
        case EventKind.MODEL_DEPLOYED:
            return "ok", f"{data.get('name')}:{data.get('version')} is served at {data.get('url')}"
        case EventKind.MODEL_UNDEPLOYED:
            return "quiet", f"{data.get('name')}:{data.get('version')} is served no longer"
    return "quiet", ", ".join(f"{key} {value}" for key, value in list(data.items())[:6])


def _who_took_part(data: Mapping[str, Any]) -> str:
    who = f"{how_many(data.get('participants'))} of {how_many(data.get('cohort'))} took part"
    return f"{who}, {duration(float(data.get('duration_s') or 0))}"
