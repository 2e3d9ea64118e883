"""The volumes of a swarm's nodes: where they are, and how they go.

Swarm has no word for the volumes of other nodes: it can neither list nor remove them. So each is noted in a
config of the swarm before the first service uses it, and a project's volumes are emptied by a service that
runs where they are (a broom), from the image that last used them, and may do nothing else. On the engine's
own node they are removed; elsewhere their names stay, empty:
``docker volume prune --filter label=flops.home`` forgets those.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from flops.core.errors import ConflictError, NotFoundError
from flops.orchestration import swarm_objects as objects
from flops.orchestration.containers import Engine, Names
from flops.orchestration.port import ServiceSpec
from flops.orchestration.swarm_objects import Task

_log = logging.getLogger(__name__)

_BROOM_S = 60.0
_RELEASE_S = 10.0
_LOOK_S = 0.1
_NOTE = b"a volume"
_PLACE = "/mnt"
_SWEEP = f"""
import os, shutil
for entry in os.scandir("{_PLACE}"):
    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
"""


class SwarmVolumes:
    """`note` may be called from any thread, the rest from one at a time.

    Args:
        own_node: the id of the engine's node.
        python: of images.
    """

    def __init__(self, engine: Engine, names: Names, own_node: str, python: str) -> None:
        self._engine = engine
        self._names = names
        self._own_node = own_node
        self._python = python

    @property
    def _api(self) -> Any:
        return self._engine.api

    def note(self, spec: ServiceSpec, node_id: str) -> None:
        """Remember the volumes of a service that is about to run on a node."""
        if not spec.volumes:
            return
        with self._engine.asking(f"the volumes of service {spec.name} are not noted"):
            self._note(spec, node_id)

    def _note(self, spec: ServiceSpec, node_id: str) -> None:
        api = self._api
        there = {config["Spec"]["Name"]: config for config in api.configs(filters=self._names.mine())}
        for volume in spec.volumes:
            name = self._note_name(volume.name, node_id)
            if name in there:
                if there[name]["Spec"]["Labels"].get("flops.image") == spec.image:
                    continue
                api.remove_config(there[name]["ID"])
            labels = self._names.labels(volume=volume.name, node=node_id, image=spec.image or "")
            api.create_config(name, _NOTE, labels=labels)

    def remove(self, prefix: str) -> None:
        """Remove the volumes whose names begin so, and what an earlier call could not; those of a node
        that is down stay until a later call, or `clean`.
        """
        with self._engine.asking(f"volumes {prefix}* cannot be removed"):
            for note in self._api.configs(filters=self._names.mine()):
                labels = note["Spec"]["Labels"]
                if labels["flops.volume"].startswith(prefix) or "flops.doomed" in labels:
                    self._remove(note)

    def clean(self) -> None:
        """Complete what `remove` could not, or what an end of the manager interrupted."""
        api, mine = self._api, self._names.mine()
        with self._engine.asking("volumes of removed projects cannot be removed"):
            for service in api.services(filters=mine):
                if "flops.broom" in service["Spec"]["Labels"]:
                    api.remove_service(service["ID"])
            for note in api.configs(filters=mine):
                if "flops.doomed" in note["Spec"]["Labels"]:
                    self._remove(note)

    def _note_name(self, volume: str, node_id: str) -> str:
        return self._names.of("volume", hashlib.sha256(f"{volume}@{node_id}".encode()).hexdigest()[:32])

    def _remove(self, note: Mapping[str, Any]) -> None:
        api = self._api
        labels = note["Spec"]["Labels"]
        volume, node_id = labels["flops.volume"], labels["flops.node"]
        nodes = {node["ID"] for node in api.nodes()}
        if node_id == self._own_node:
            done = self._remove_here(self._names.of(volume))
        elif node_id in nodes:
            done = self._sweep(volume, node_id, labels["flops.image"])
        else:
            done = True  # the node left the swarm, and its volumes with it
        if done:
            api.remove_config(note["ID"])
            return
        _log.warning("volume %s of node %s is removed later", volume, node_id)
        if "flops.doomed" not in labels:
            api.remove_config(note["ID"])
            api.create_config(note["Spec"]["Name"], _NOTE, labels={**labels, "flops.doomed": "yes"})

    def _remove_here(self, name: str) -> bool:
        deadline = time.monotonic() + _RELEASE_S
        while True:
            try:
                with self._engine.asking(f"volume {name} cannot be removed"):
                    self._api.remove_volume(name)
                return True
            except NotFoundError:
                return True
            except ConflictError:  # Swarm has not removed the container yet
                if time.monotonic() > deadline:
                    return False
            time.sleep(_LOOK_S)

    def _sweep(self, volume: str, node_id: str, image: str) -> bool:
        """Empty a volume where it is; whether that succeeded."""
        api = self._api
        name = objects.name_of(self._names, "broom", volume)
        template = objects.broom_template(
            image, [self._python, "-I", "-S", "-c", _SWEEP], self._names.of(volume), _PLACE, node_id
        )
        service = api.create_service(
            template,
            name=name,
            labels=self._names.labels(broom=volume),
            mode=objects.ONE,
            endpoint_spec=objects.NO_ADDRESS,
        )["ID"]
        try:
            deadline = time.monotonic() + _BROOM_S
            while time.monotonic() < deadline:
                if node_id in objects.down_nodes(api.nodes()):
                    return False
                tasks = [Task.from_json(value) for value in api.tasks(filters={"service": service})]
                if tasks and tasks[0].ended:
                    if tasks[0].exit_code == 0:
                        return True
                    _log.error("volume %s is not emptied: %s", volume, tasks[0].error)
                    return False
                time.sleep(_LOOK_S)
            _log.error("volume %s was not emptied within %g s", volume, _BROOM_S)
            return False
        finally:
            api.remove_service(service)
