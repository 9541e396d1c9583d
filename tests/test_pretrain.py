"""Pre-training: settings and their errors, the draw of objectives, a run and its resume on a small catalogue."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import ONE
from helpers import small_pretraining as small
from soak import read_log, same_runs

import pretrain
from plumbing import settings
from plumbing.settings import InputError
from pretrain import PretrainConfig
from tools import summary

ROOT = Path(__file__).parent.parent


def load(*argv):
    return settings.load_config(PretrainConfig, list(argv))


def test_settings_from_file_and_line():
    config = load(
        str(ROOT / "configs" / "demo.py"), "--lr=2e-3", "--milestones", "5,7", "--compile=False", "--seed", "4"
    )
    assert (config.lr, config.milestones, config.compile, config.seed) == (2e-3, (5, 7), False, 4)
    assert config.size == "demo" and config.out_dir == "runs/demo"  # from the file, and named after it
    assert load("--objectives=itc:0.5,mlm:0.5").objectives == {"itc": 0.5, "mlm": 0.5}
    assert load("--objectives=itc").objectives == {"itc": 1.0} and load("--deterministic").deterministic is True


def test_the_papers_config_is_the_recipe():
    config = load(str(ROOT / "configs" / "fashionall.py"))
    assert (config.batch_size, config.max_steps, config.lr, config.lr_factor) == (256, 120_000, 1e-5, 20.0)
    assert (config.warmup, config.milestones, config.weight_decay) == (15_000, (45_000, 90_000), 1e-4)
    assert config.objectives == pretrain.PAPER_MIX and config.init == "pretrained" and config.n_attributes == 2232
    pretrain.check_config(config)


@pytest.mark.parametrize(
    "content, argv, message",
    [
        ("", ["--bach_size=4"], "unknown setting '--bach_size'; the nearest is '--batch_size' (--help lists all)"),
        ("", ["-batch_size=4"], "unknown setting '-batch_size'; the nearest is '--batch_size' (--help lists all)"),
        ("", ["--local-rank=1"], "--local-rank: comes from an older launcher; start by torchrun"),
        ("", ["--local_rank", "1"], "--local_rank: comes from an older launcher; start by torchrun"),
        ("", ["--qqq=4"], "unknown setting '--qqq' (--help lists all)"),
        ("", ["--batch_size=many"], "--batch_size: found 'many', expected int"),
        ("", ["--compile=maybe"], "--compile: found 'maybe', expected bool"),
        ("", ["--objectives=itc:high"], "--objectives: found 'itc:high', expected dict"),
        ("", ["--milestones=1;2"], "--milestones: found '1;2', expected tuple"),
        (None, [], "config file FILE: cannot be read"),
        ("batchsize = 4", [], "FILE:1: unknown setting 'batchsize'; the nearest is 'batch_size'"),
        ("lr = 1e-3\nbatch_size = 'big'", [], "FILE: batch_size: found 'big', expected int"),
        ("import os", [], "FILE:1: expected `name = literal`"),
        ("lr = open('x')", [], "FILE:1: expected `name = literal`"),
        ("lr = ", [], "FILE: cannot be read"),
        ("lr = 1e-3\nseed = 3\nlr = 1e-4", [], "FILE:3: setting 'lr' stands in the file twice, expected it once"),
    ],
)
def test_wrong_settings_end_in_one_line(tmp_path, content, argv, message):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        load(str(path), *argv)
    assert message.replace("FILE", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PretrainConfig):
        assert f"--{field.name} " in text and " ".join(field.metadata["meaning"].split())[:40] in text


def test_objectives_are_drawn_by_their_probabilities_from_seed_and_step():
    config = load()
    drawn = [pretrain.objective_at(step, config.objectives, config.seed) for step in range(20_000)]
    counts = Counter(drawn)
    for name, p in pretrain.PAPER_MIX.items():
        assert counts[name] / 20_000 == pytest.approx(p, abs=0.012)
    assert drawn[500:520] == [pretrain.objective_at(step, config.objectives, config.seed) for step in range(500, 520)]
    assert drawn[:50] != [pretrain.objective_at(step, config.objectives, 1) for step in range(50)]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(catalogue, image_tokenizer_file, tmp_path, capsys):
    changes = {"image_tokenizer": str(image_tokenizer_file), "grad_accum": 2, "log_interval": 7}
    whole = small(catalogue, tmp_path / "whole", **changes)
    pretrain.train(whole, ONE)
    summary.main([str(tmp_path / "whole")])
    table = capsys.readouterr().out
    drawn = {pretrain.objective_at(step, whole.objectives, whole.seed) for step in range(14)}
    assert len(drawn) > 4 and all(f"\n{name} " in table for name in drawn)

    halves = small(catalogue, tmp_path / "halves", **changes, resume="auto")
    pretrain.train(dataclasses.replace(halves, max_steps=7), ONE)
    with open(tmp_path / "halves" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lr": 7}\n{"step": 1')  # what a killed run may leave behind
    pretrain.train(halves, ONE)
    assert torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["step"] == 14
    assert [row["step"] for row in read_log(tmp_path / "whole")] == [7, 7, 14, 14]
    same_runs(tmp_path / "whole", tmp_path / "halves")
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["config"]["grad_accum"] == 2


def test_bfloat16_autocast_trains_and_keeps_float32_weights(catalogue, image_tokenizer_file, tmp_path):
    config = small(catalogue, tmp_path, image_tokenizer=str(image_tokenizer_file), dtype="bfloat16", max_steps=12)
    pretrain.train(config, ONE)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(v.dtype in (torch.float32, torch.int64) for v in state["model"].values())
    values = [v for row in read_log(tmp_path) for k, v in row.items() if k.endswith("_loss")]
    assert values and all(v is not None and v < 20 for v in values)


@pytest.mark.slow
def test_compile_makes_few_graphs_over_all_objectives(catalogue, tmp_path, monkeypatch):
    """torch gives up compiling a function at its ninth graph, and says so in a warning alone."""
    graphs, compile_module = [], torch.nn.Module.compile

    def compile_counted(module, **options):
        def backend(graph, inputs):
            graphs.append(type(module).__name__)
            return graph.forward

        compile_module(module, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    config = small(catalogue, tmp_path, compile=True, max_steps=40, seed=1)
    objectives = {pretrain.objective_at(step, config.objectives, config.seed) for step in range(config.max_steps)}
    assert objectives == set(pretrain.OBJECTIVES)
    pretrain.train(config, ONE)
    assert {"ResNet", "Layer"} == set(graphs) and all(graphs.count(name) <= 8 for name in set(graphs))
