"""The GPU's path, on a pretend GPU: every tensor lives on the right device, and the host waits only where it must.

It computes as the CPU does, in float32, so every run must also end where the same run on the CPU ends."""

import pytest
import test_vqvae
import torch
from helpers import ONE as CPU
from helpers import small_finetuning, small_pretraining
from torch.utils._pytree import tree_map

import evaluate
import finetune
import pretrain
import search
import vqvae
from model import FashionViL
from plumbing import checkpoint
from plumbing.processes import Processes

pretend_gpu = pytest.importorskip("pretend_gpu", reason="older torch cannot pretend", exc_type=ImportError)
GPU = Processes(0, 1, pretend_gpu.DEVICE)


@pytest.fixture
def gpu(monkeypatch):
    """The pretend GPU is there. It unties tied weights when a model moves to it, and files must hold plain tensors."""
    move, save = torch.nn.Module.to, checkpoint.save

    def to(model, *args, **kwargs):
        model = move(model, *args, **kwargs)
        if "mlm" in model.heads:
            model.heads["mlm"].decoder.weight = model.bert.embeddings.word_embeddings.weight
        return model

    monkeypatch.setattr(FashionViL, "to", to)
    monkeypatch.setattr(checkpoint, "save", lambda path, state: save(path, tree_map(pretend_gpu.plain, state)))
    for program in (evaluate, search):
        monkeypatch.setattr(program, "start_processes", lambda *args: GPU)
    with pretend_gpu.on():
        yield


def same_weights(a, b):
    a, b = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def waits_of_an_update(train):
    """{(operation, line): waits of one update}; train(steps) runs that many updates without log or validation."""
    counts = []
    for steps in (2, 3):
        pretend_gpu.waits.clear()
        train(steps)
        counts.append(pretend_gpu.waits.copy())
    return counts[1] - counts[0]


@pytest.mark.parametrize("objective, most", [("itc", 1), ("itm", 2), ("mlm", 1), ("mpfc", 1), ("mvc", 1), ("pac", 1)])
def test_pretraining_waits_for_the_gpu_at_most_once_an_update(
    objective, most, gpu, catalogue, image_tokenizer_file, tmp_path
):
    def train(steps):
        run = {"objectives": {objective: 1.0}, "image_tokenizer": str(image_tokenizer_file)}
        run |= {"max_steps": steps, "eval_interval": -1, "log_interval": 100}
        pretrain.train(small_pretraining(catalogue, tmp_path / f"{steps}", **run), GPU)

    waits = waits_of_an_update(train)
    assert sum(waits.values()) == most, waits


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_fine_tuning_waits_for_the_gpu_at_most_once_an_update(task, gpu, catalogue, tmp_path):
    def train(steps):
        run = {"max_steps": steps, "eval_interval": -1, "log_interval": 100}
        finetune.train(small_finetuning(task, catalogue, tmp_path / f"{steps}", **run), GPU)

    waits = waits_of_an_update(train)
    assert sum(waits.values()) <= 1, waits


def test_pretraining_trains_validates_and_saves_as_on_the_cpu(request, catalogue, image_tokenizer_file, tmp_path):
    run = {"image_tokenizer": str(image_tokenizer_file), "max_steps": 8, "eval_interval": 4}
    ours = pretrain.train(small_pretraining(catalogue, tmp_path / "cpu", **run), CPU)
    request.getfixturevalue("gpu")
    theirs = pretrain.train(small_pretraining(catalogue, tmp_path / "gpu", **run), GPU)
    assert ours == pytest.approx(theirs, abs=0.01)
    same_weights(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_fine_tuning_and_evaluation_are_as_on_the_cpu(task, request, catalogue, tmp_path):
    ours = finetune.train(small_finetuning(task, catalogue, tmp_path / "cpu"), CPU)
    path = str(tmp_path / "cpu" / "best.pt")
    config = evaluate.EvalConfig(task, path, data_root=str(catalogue), workers=0)
    request.getfixturevalue("gpu")
    finetune.train(small_finetuning(task, catalogue, tmp_path / "gpu"), GPU)
    same_weights(tmp_path / "cpu", tmp_path / "gpu")
    for protocol, result in evaluate.evaluate_checkpoint(path, config, GPU).items():
        assert result.metrics == pytest.approx(ours[protocol].metrics, abs=1e-6)


def test_the_image_tokenizer_trains_as_on_the_cpu(request, catalogue, tmp_path):
    def train(name, processes):  # few updates: later a rounding decides which of two codes is nearer
        config = test_vqvae.make_config(catalogue, tmp_path / name, max_steps=2, reseed_after=99)
        return vqvae.train(config, processes)[1]

    ours = train("cpu", CPU)
    request.getfixturevalue("gpu")
    assert train("gpu", GPU)["l1"] == pytest.approx(ours["l1"], rel=1e-3)


def test_search_finds_the_same_on_the_gpu(request, catalogue, tmp_path, capsys):
    finetune.train(small_finetuning("fashiongen_retrieval", catalogue, tmp_path, max_steps=1), CPU)
    words = [f"--checkpoint={tmp_path}/best.pt", f"--gallery={catalogue}/FashionGen/val", "--text=red dress", "--top=5"]

    def found(index):
        capsys.readouterr()
        search.main([*words, f"--index={tmp_path}/{index}", "--device=cpu"])
        return capsys.readouterr().out

    ours = found("cpu")
    request.getfixturevalue("gpu")
    assert found("gpu") == ours and ours.count(".jpg") == 5
