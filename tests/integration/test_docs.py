"""The pages: the site builds without a warning, their code runs, and the messages that they explain exist."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import amos_dist
from tests.distributed.harness import run_ranks
from tests.integration.pages import DOCS, python_blocks

ROOT = DOCS.parent


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors, pages that are in no menu, arguments in docstrings that do not exist: all are warnings."""
    pytest.importorskip("material", reason="needs docs/requirements.txt")
    pytest.importorskip("mkdocstrings", reason="needs docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / ".mkdocs.yml", "-d", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert pages <= {page.relative_to(tmp_path) for page in tmp_path.rglob("*.html")}
    assert (tmp_path / "derivation.html").read_text().count(
        'class="arithmatex"'
    ) > 40  # formulas.js looks for nothing else
    for name in ("Amos.step", "Monitor.close", "memory.estimate", "memory.profile"):
        assert f'id="amos_dist.{name}"' in (tmp_path / "api.html").read_text(), name


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """The names that the Python blocks of a page leave, run one after another; `names` are there before."""
    with torch.random.fork_rng():
        for block in python_blocks(DOCS / page):
            exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    ("page", "classes", "losses"),
    [
        ("quickstart.md", 64, ["loss"]),
        ("zh/quickstart.md", 64, ["loss"]),
        ("from_adamw.md", 64, ["before", "after"]),
        ("huggingface.md", 32, ["loss"]),
    ],
)
def test_training_that_is_shown_trains(
    page: str, classes: int, losses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "huggingface.md":
        pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    found = run_page(page)
    for name in losses:
        loss = torch.as_tensor(found[name]).item()
        assert loss < math.log(classes) / 2  # half of what a guess costs


def test_what_is_shown_without_tuning_is_the_rule_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside Muon: it takes the same matrices."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    from study_optimizers import RULES, factor, hidden_matrices
    from study_plan import RULE
    from study_tasks import TASKS

    for steps in (40, 1000):
        model = TASKS["bert"].model()
        names = run_page("choosing.md", amos_dist=amos_dist, torch=torch, model=model, steps=steps)
        groups = amos_dist.param_groups(model, sigma=RULE["sigma"])
        sigmas = {id(p): group["sigma"] for group in groups for _, p in group["params"]}
        rate = RULES[RULE["lr"]](1, steps, 1.0)
        assert names["lr"] == rate and names["warmup"] == round(RULE["warmup"] * steps)
        shapes = [factor(RULE["schedule"], t, steps, names["warmup"]) for t in range(steps)]
        assert [names["shape"](t) for t in range(steps)] == pytest.approx(shapes)
        for optimizer in (names["optimizer"], names["optimizers"][0]):
            assert optimizer.defaults["lr"] == rate
            for group in optimizer.param_groups:
                assert (group["beta"], group["momentum"]) == (RULE["beta"], RULE["momentum"])
                assert {sigmas[id(p)] for p in group["params"]} == {group["sigma"]}
        assert names["optimizer"].param_groups[0]["momentum_dtype"] == "int8" and names["shape"](steps + 9) == 0
        wrapped = names["optimizers"][1]
        assert {id(p) for p in names["hidden"]} == {id(p) for p in hidden_matrices(model)[0]}
        assert {(g["lr"], g["momentum"], g["sigma"]) for g in wrapped.param_groups} == {(rate, 0.9, "auto")}


def test_numbers_of_the_derivation() -> None:
    found = run_page("derivation.md")  # its blocks have asserts of their own
    assert found["t"] == 100_000 and len(found["inverse_square"]) == 2


def test_sharding_that_is_shown_equals_one_process() -> None:
    """116 + 55 + 5 elements on 3 ranks: borders inside of rows, and padding."""
    reports = run_ranks(Path(__file__).with_name("docs_worker.py"), 3, None)
    assert max(report["worst"] for report in reports) <= 1e-6
    assert [report["compared"] > 15 for report in reports] == [True, False, False]  # state is on the first rank


def messages() -> list[str]:
    """The first columns of what docs/install.md explains, but for messages of others."""
    tables = (DOCS / "install.md").read_text().partition("## What each message means")[2]
    rows = re.findall(r"^\| ([^|]*`.*?) \|", tables, re.MULTILINE)
    return [found for row in rows if "'s)" not in row for found in re.findall("`([^`]+)`", row)]


def test_messages_that_are_explained_exist() -> None:
    files = [ROOT / "setup.py", ROOT / "launch" / "install.sh", *(ROOT / "amos_dist").rglob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    text = re.sub(r"\"\n *f?\"", "", text)  # strings that are continued
    explained = messages()
    assert len(explained) > 30

    def is_there(message: str) -> bool:
        parts = message.removeprefix("install: ").strip("…").split("…")  # install.sh puts its name before each
        return bool(re.search(".{0,80}?".join(map(re.escape, parts)), text))

    assert [message for message in explained if not is_there(message)] == []
