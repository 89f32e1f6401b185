"""tests/gpu/report.sh, as far as it runs without a GPU: it must work on the day that there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_checks_on_the_cpu(tmp_path: Path) -> None:
    report, numbers = tmp_path / "report.md", tmp_path / "report.json"
    command = ["bash", ROOT / "tests/gpu/report.sh", "--skip-build", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--report", report, "--json", numbers],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No failures" in report.read_text()
    ran = [section for section in json.loads(numbers.read_text())["sections"].values() if not section["skipped"]]
    assert len(ran) >= 3
