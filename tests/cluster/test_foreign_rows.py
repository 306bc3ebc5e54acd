"""What the sessions of other nodes cost."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says how much memory a process has")
def test_a_session_of_another_node_costs_at_most_400_bytes():
    command = [sys.executable, "-m", "tests.cluster.foreign_rows", "100000"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)

    assert 100 < float(done.stdout) <= 400
