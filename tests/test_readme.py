"""Every command of the README's shell blocks runs as it stands, training with few steps, or says what it needs.

Its program in Python runs, too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEWER = {"vqvae.py": ["--max_steps=3"], "pretrain.py": ["--max_steps=3"], "finetune.py": ["--max_steps=3"]}
# what .ci/run does itself, or through demo.sh
IN_CI = {
    "bash demo.sh": "bash demo.sh --max_steps=30",
    "pip install -r requirements.txt": "bash demo.sh --max_steps=30",
    "pip install -r requirements-dev.txt": "python -m pytest",
}


def commands(section=""):
    """[(command, its comment)] of the ```bash blocks of the README or of one of its sections, in order."""
    text = (ROOT / "README.md").read_text()
    if section:
        text = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [tuple(part.strip() for part in line.partition(" #")[::2]) for line in lines]


def test_the_marked_ones_need_what_ci_lacks():
    found = commands()
    assert len(found) >= 15
    for command, comment in found:
        if any(command.startswith(start) for start in IN_CI):
            assert IN_CI[next(s for s in IN_CI if command.startswith(s))] in (ROOT / ".ci" / "run").read_text()
        elif "needs" not in comment:
            assert re.match(r"python (-m (tools|prepare)\.\w+|\S+\.py) ", command)
            word = command.removeprefix("python -m ").removeprefix("python ").split()[0]
            assert (ROOT / word).exists() or (ROOT / f"{word.replace('.', '/')}.py").exists()
            assert "torchrun" not in command and "fashionall" not in command


@pytest.mark.slow
def test_the_others_run(tmp_path):
    """One after another: later ones need what earlier ones wrote. The stages come first, for they repeat the demo."""
    for name in ("plumbing", "prepare", "configs", "tools", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    stages = commands("Run the stages")
    assert stages
    for command, comment in [*stages, *(other for other in commands() if other not in stages)]:
        if "needs" in comment or any(command.startswith(start) for start in IN_CI):
            continue
        command += "".join(f" {word}" for word in FEWER.get(command.split()[1], []))
        result = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"
    for photo in ("a.jpg", "b.jpg"):
        shutil.copy(tmp_path / "data/demo/FashionGen/val/1000.jpg", tmp_path / photo)
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "tensor([[" in result.stdout, result.stderr[-2000:]
    for picture in ("page.png", "curves.png", "sheet.png", "changed.png", "outfit.png"):
        assert (tmp_path / picture).stat().st_size > 1_000
