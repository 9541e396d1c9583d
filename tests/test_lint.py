"""What .ci/run proves is what the other files say: the lint before a commit, and the range of torch."""

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


def test_readme_says_the_lowest_torch_of_the_requirements():
    """.ci/run takes it from there, too."""
    lowest = re.findall(r"^torch>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert lowest == re.findall(r"torch ([\d.]+) or newer", (ROOT / "README.md").read_text())
