import os
import shutil
import socket
from pathlib import Path

import pytest

# child processes of a test import the same files
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])


@pytest.fixture
def free_port():
    """A TCP port of this machine that is free now, for a process group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory):
    """A small made-up catalogue in the five-folder layout, drawn once per test session."""
    from prepare.demo import make_catalogue

    out = tmp_path_factory.mktemp("data") / "demo"
    make_catalogue(out, products=150, size=64)
    return out


@pytest.fixture
def root(catalogue, tmp_path):
    """A copy of the catalogue whose images are links, so that a test may spoil what it likes."""

    def copy(source, target):
        (shutil.copyfile if source.endswith((".json", ".txt")) else os.symlink)(source, target)

    return Path(shutil.copytree(catalogue, tmp_path / "data", copy_function=copy))


@pytest.fixture(scope="session")
def image_tokenizer_file(tmp_path_factory):
    """A tiny image tokenizer with random weights, for MPFC at 64 px."""
    import vqvae
    from plumbing import checkpoint

    sizes = vqvae.ImageTokenizerConfig(ch=8, ch_mult=(1, 1, 1, 1), n_blocks=1, latent_dim=8, n_codes=16, unshuffle=4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt"
    state = {"kind": "image_tokenizer", "model": vqvae.VQVAE(sizes).state_dict()}
    checkpoint.save(path, state)
    return path
