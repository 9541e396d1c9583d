"""The lint of .ci/run and the hook that runs it before a commit are the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_lint_hook_runs_what_ci_runs():
    """.pre-commit-config.yaml: the version of requirements-dev.txt and the two commands of .ci/run."""
    hook, dev = (ROOT / ".pre-commit-config.yaml").read_text(), (ROOT / "requirements-dev.txt").read_text()
    pinned = re.search(r"^ruff==.+$", dev, re.M)[0]
    assert set(re.findall(r"ruff==[\w.]+", hook)) == {pinned}
    entries = re.findall(r"entry: (.+)", hook)
    assert len(entries) == 2 and all(f"\n{entry}\n" in (ROOT / ".ci" / "run").read_text() for entry in entries)
