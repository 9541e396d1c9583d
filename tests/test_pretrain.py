"""Pre-training: settings and their errors, the draw of objectives, a run and its resume on a small catalogue."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import pretrain
from plumbing import settings
from plumbing.processes import Processes
from plumbing.settings import InputError
from pretrain import PretrainConfig
from tools import summary

ROOT = Path(__file__).parent.parent
ALL = dict.fromkeys(("itc", "itm", "mlm", "mpfc", "mvc", "pac"), 1 / 6)


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
    "argv, message",
    [
        (["--bach_size=4"], "unknown setting '--bach_size'; the nearest is '--batch_size' (--help lists all)"),
        (["-batch_size=4"], "unknown setting '-batch_size'; the nearest is '--batch_size' (--help lists all)"),
        (["--qqq=4"], "unknown setting '--qqq' (--help lists all)"),
        (["--batch_size=many"], "--batch_size: found 'many', expected int"),
        (["--compile=maybe"], "--compile: found 'maybe', expected bool"),
        (["--objectives=itc:high"], "--objectives: found 'itc:high', expected dict"),
        (["--milestones=1;2"], "--milestones: found '1;2', expected tuple"),
        (["no/such/file.py"], "config file no/such/file.py: cannot be read"),
    ],
)
def test_wrong_settings_end_in_one_line(argv, message):
    with pytest.raises(InputError) as error:
        load(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize = 4", ":1: unknown setting 'batchsize'; the nearest is 'batch_size'"),
        ("lr = 1e-3\nbatch_size = 'big'", "batch_size: found 'big', expected int"),
        ("import os", ":1: expected `name = literal`"),
        ("lr = open('x')", ":1: expected `name = literal`"),
        ("lr = ", "cannot be read"),
    ],
)
def test_wrong_config_files_end_in_one_line(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(str(path))
    assert message in str(error.value) and str(path) in str(error.value)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PretrainConfig):
        assert f"--{field.name} " in text and " ".join(field.metadata["meaning"].split())[:40] in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objectives": {"itx": 1.0}}, "objectives: found 'itx', expected some of itc, itm, mlm, mpfc, mvc, pac"),
        ({"objectives": {"itc": 0.5}}, "a sum of 1"),
        ({"objectives": {"itc": 1.5, "mlm": -0.5}}, "none below 0"),
        ({"image_size": 100}, "image_size: found 100, expected a multiple of 32"),
        ({"size": "huge"}, "size: found 'huge', expected one of base"),
        ({"image_tokenizer": "", "init": "pretrained"}, "image_tokenizer: MPFC needs one"),
        ({"data_root": "/nowhere"}, "/nowhere/FashionGen/train_info.json: this file of the data set is missing"),
        ({"batch_size": 100_000}, "but the data has only"),
    ],
)
def test_wrong_runs_end_before_the_first_update(catalogue, tmp_path, changes, message):
    config = small(catalogue, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        pretrain.train(config, Processes(0, 1, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_objectives_are_drawn_by_their_probabilities_from_seed_and_step():
    config = load()
    drawn = [pretrain.objective_at(step, config.objectives, config.seed) for step in range(20_000)]
    counts = Counter(drawn)
    for name, p in pretrain.PAPER_MIX.items():
        assert counts[name] / 20_000 == pytest.approx(p, abs=0.012)
    assert drawn[500:520] == [pretrain.objective_at(step, config.objectives, config.seed) for step in range(500, 520)]
    assert drawn[:50] != [pretrain.objective_at(step, config.objectives, 1) for step in range(50)]


def small(catalogue, out, **changes):
    """A run of seconds: tiny sizes, all six objectives."""
    settings = dict(
        data_root=str(catalogue),
        out_dir=str(out),
        size="tiny",
        resnet="resnet18",
        width=8,
        image_size=64,
        init="random",
        n_attributes=0,
        objectives=ALL,
        batch_size=16,
        max_steps=14,
        lr=1e-3,
        lr_factor=1.0,
        warmup=2,
        milestones=(10,),
        eval_interval=7,
        log_interval=4,
        workers=0,
    )
    return PretrainConfig(**{**settings, **changes})


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(catalogue, image_tokenizer_file, tmp_path, capsys):
    one = Processes(0, 1, torch.device("cpu"))
    changes = {"image_tokenizer": str(image_tokenizer_file), "grad_accum": 2}
    whole = small(catalogue, tmp_path / "whole", **changes)
    pretrain.train(whole, one)
    summary.main([str(tmp_path / "whole")])
    table = capsys.readouterr().out
    drawn = {pretrain.objective_at(step, whole.objectives, whole.seed) for step in range(14)}
    assert len(drawn) > 4 and all(f"\n{name} " in table for name in drawn)

    halves = small(catalogue, tmp_path / "halves", **changes, resume="auto")
    pretrain.train(dataclasses.replace(halves, max_steps=7), one)
    with open(tmp_path / "halves" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lr": 7}\n{"step": 1')  # what a killed run may leave behind
    pretrain.train(halves, one)

    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halves"))
    assert a["step"] == b["step"] == 14
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[key], b["optimizer"]["state"][i][key]) for key in state)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    for rows in logs:
        for row in rows:
            row.pop("samples_per_s", None), row.pop("memory_gb", None)
    # the interrupted run logs its last step too; the lines that both have are equal
    last = {(row["step"], "lr" in row): row for row in logs[1]}
    assert all(last[row["step"], "lr" in row] == row for row in logs[0] if row["step"] != 8)
    assert [row["step"] for row in logs[1]] == sorted(row["step"] for row in logs[1])
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["config"]["grad_accum"] == 2


def test_bfloat16_autocast_trains_and_keeps_float32_weights(catalogue, image_tokenizer_file, tmp_path):
    config = small(catalogue, tmp_path, image_tokenizer=str(image_tokenizer_file), dtype="bfloat16", max_steps=12)
    pretrain.train(config, Processes(0, 1, torch.device("cpu")))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(v.dtype in (torch.float32, torch.int64) for v in state["model"].values())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = [v for row in rows for k, v in row.items() if k.endswith("_loss")]
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
    pretrain.train(config, Processes(0, 1, torch.device("cpu")))
    assert {"ResNet", "Layer"} == set(graphs) and all(graphs.count(name) <= 8 for name in set(graphs))
