"""The scenarios of scripts/bench that start nodes of their own, with a load that says nothing about speed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.harness.server import ROOT

LITTLE = ["--users", "20", "--rounds", "1", "--rate", "100", "--warm", "0.5", "--time", "2"]

pytestmark = [pytest.mark.long, pytest.mark.alone]


def bench(*argv: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "tools" / "bench.py"), *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mysql", [False, pytest.param(True, marks=pytest.mark.mariadb)])
def test_the_cost_of_acknowledgements_is_told_by_turns(mysql):
    found = bench("acknowledged", *LITTLE, *(["--mysql"] if mysql else []))

    for way in ("plain", "prompt", "stored"):
        assert found[way]["messages"] > 100
        assert found[way]["lost"] == found[way]["failed"] == 0
    assert {"prompt_us_per_message", "stored_us_per_message"} <= set(found)
    assert ("database_cpu_us_per_message" in found["stored"]) is mysql


def test_the_cost_of_post_log_is_told_by_turns():
    found = bench("post_log", *LITTLE)

    assert found["plain"]["lost"] == found["post_log"]["lost"] == 0
    assert found["made"]["lost"] == 0
    assert found["post_log"]["requests"] > 100
    assert {"made_us_per_message", "chat_path_us_per_message"} <= set(found)
    assert found["sender_us_per_message"] > 0
    own = found["chat_path_us_per_message"] + found["sender_us_per_message"]
    assert abs(own - found["post_log_us_per_message"]) < 0.1
    assert found["outbox_at_the_end"][0][2] == "open"


def test_a_sink_that_is_down_is_measured_too():
    found = bench("post_log", "--sink-down", *LITTLE)

    assert found["post_log"]["lost"] == found["post_log"]["requests"] == 0
    assert found["post_log"]["rss_mb"]["end"] > 0
    assert int(found["outbox_at_the_end"][0][3]) > 100


def test_streams_are_resumed_on_both_nodes():
    found = bench("resume", "--users", "10", "--rounds", "2")

    assert 0 < found["same_node_ms"]["p50"] <= found["same_node_ms"]["p99"]
    assert found["other_node_ms"]["p50"] > 0
    assert found["link_rtt_ms"] > 0


def test_waiting_sessions_are_weighed_and_are_there_afterwards():
    found = bench("waiting", "--users", "100", "--settle", "1")

    assert found["bytes_per_session"] > 0
    assert found["checked"] == {"resumed": 20, "messages_brought": 200}
