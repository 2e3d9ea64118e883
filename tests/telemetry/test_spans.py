"""Spans against a receiver that reads OpenTelemetry's own messages; each in a process of its own."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from flops.core.errors import InvalidInputError
from flops.telemetry import collector_of, span, span_of_project, span_of_request, trace_of

DEADLINE_S = 60.0


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return done.stdout


NESTED = """
import sys
from flops.telemetry import *
record_spans("manager", sys.argv[1])
request = "deploy-7"
above = span_of_request(request)
with span("POST /v1/projects", itself=above):
    pass
project = span_of_project("p-7k2mqd", request)
with span("step fetch", parent=project, step="fetch") as step:
    with span("inside"):
        assert current_span() != step.traceparent
try:
    with span("round", parent=project, round=3):
        raise ValueError("private words")
except ValueError:
    pass
record("project", 1.0, 2.5, parent=above, itself=project)
send_spans(30)
"""


def test_spans_of_several_processes_are_one_tree(collector: Collector) -> None:
    run(NESTED, collector.url)
    found = {one.name: one for one in collector.spans}
    assert found.keys() == {"POST /v1/projects", "project", "step fetch", "inside", "round"}
    assert len({one.trace_id for one in found.values()}) == 1
    top, project = found["POST /v1/projects"], found["project"]
    assert top.parent_span_id == b""
    assert project.parent_span_id == top.span_id
    assert found["step fetch"].parent_span_id == found["round"].parent_span_id == project.span_id
    assert found["inside"].parent_span_id == found["step fetch"].span_id
    assert project.end_time_unix_nano - project.start_time_unix_nano == 1_500_000_000
    assert collector.services == {"flops-manager"}


def test_a_failure_is_told_by_its_kind_alone(collector: Collector) -> None:
    run(NESTED, collector.url)
    failed = next(one for one in collector.spans if one.name == "round")
    assert (failed.status.code, failed.status.message) == (2, "ValueError")
    assert "private words" not in str(collector.spans)
    assert {one.key: one.value.int_value for one in failed.attributes} == {"flops.round": 3}


def test_a_collector_that_is_away_keeps_nobody(collector: Collector) -> None:
    program = """
import sys
from flops.telemetry import *
record_spans("manager", sys.argv[1])
for number in range(10_000):
    with span("round"):
        pass
send_spans(0.5)
print("done", flush=True)
import os; os._exit(0)
"""
    assert run(program, "http://127.0.0.1:9") == "done\n"


def test_without_a_collector_nothing_is_imported_and_the_parent_goes_through() -> None:
    program = """
import sys
from flops.telemetry import *
record_spans("manager", "")
with span("round", parent="00-1-2-01") as seen:
    print(seen.traceparent, current_span() == "", any("opentelemetry" in name for name in sys.modules))
"""
    assert run(program) == "00-1-2-01 True False\n"


def test_the_ids_of_a_request_are_its_own_for_ever() -> None:
    request = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace_of(span_of_request(request)) == request
    assert trace_of(span_of_request("deploy-7"))
    assert span_of_project("p-7k2mqd", "deploy-7") == span_of_project("p-7k2mqd", "deploy-7")
    assert span_of_project("p-7k2mqd", "deploy-7")[:35] == span_of_request("deploy-7")[:35]
    assert span_of_request("") == span_of_project("p-7k2mqd", "") == ""


@pytest.mark.parametrize("address", ["collector:4318", "file:///x", "http://"])
def test_what_is_no_collectors_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match="FLOPS_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT is no"):
        collector_of({"FLOPS_OTLP_ENDPOINT": address})


def test_ours_wins_over_the_standard_variable() -> None:
    both = {"FLOPS_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1"}
    assert collector_of(both) == "http://a:1"
    assert collector_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1"}) == "http://b:1"
    assert collector_of({}) == ""


def test_what_is_not_recorded_costs_no_error() -> None:
    with pytest.raises(KeyError), span("round"):
        raise KeyError
