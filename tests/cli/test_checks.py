"""What is found before anything is loaded: names, numbers and paths, as the command spells them."""

import json
import subprocess
import sys

import pytest
import timm
import torchvision
from terminal import assert_one_line, run
from torchvision.datasets import CIFAR10, CIFAR100

import obc_tools as obc
from obc_tools import cli
from obc_tools.cli import options as checks
from obc_tools.cli.commands import main, parse
from obc_tools.comparing import compare
from obc_tools.data.data import DATA_SETS
from obc_tools.data.embedded import EMBEDDED
from obc_tools.errors import UnknownNameError
from obc_tools.measure.costs import COUNTINGS
from obc_tools.models import networks, store
from obc_tools.models.networks import OWN_NETWORKS, PUBLISHED_FILES, PUBLISHED_KINDS
from obc_tools.pruning.choices import PER, SCOPES, TARGETS, Scoring
from obc_tools.runs import grid, job
from obc_tools.runs.job import PruningJob
from obc_tools.scoring.criteria import ALIASES, CRITERIA
from obc_tools.scoring.scores import NORMALIZERS, REDUCTIONS
from obc_tools.structure.groups import PARTS

PRUNE = ["prune", "--model", "resnet20", "--data", "digits"]
RUN = ["run", "resnet56-cifar10"]
OUT = ["--out", "new"]
COMPARE = ["compare", "--model", "resnet20", "--data", "digits", *OUT]
NETWORK, PRETRAINED = ["prune", "--model"], ["--weights", "pretrained"]
REST = ["--data", "digits", *OUT, "--ratio", "0.5", *PRETRAINED]
FOUND_AT_ONCE = [
    ([*PRUNE, *OUT, "--speedup", "0.5"], "--speedup 0.5: expected a number above 1"),
    ([*PRUNE, *OUT, "--speedup", "2", "--macs", "5e6"], "got --speedup 2, --macs 5e+06"),
    ([*PRUNE, *OUT, "--macs", "-1"], "--macs -1.0: expected a positive number"),
    ([*PRUNE, *OUT, "--speedup", "inf"], "--speedup inf: expected a number above 1"),
    ([*PRUNE, *OUT, "--params", "inf"], "--params inf: expected a positive number"),
    ([*PRUNE, *OUT, "--ratio", "0"], "--ratio 0.0: expected a share between 0 and 1"),
    ([*PRUNE, *OUT], "give one target: --speedup, --macs, --params or --ratio; got none"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--max-ratio", "2"], "--max-ratio 2.0: expected a share above 0, at most 1"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--lr", "-1"], "--lr -1.0: expected a number of at least 0"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--lr", "nan"], "--lr nan: expected a number of at least 0"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--seed", "-1"], "--seed -1: expected at least 0"),
    (
        [*PRUNE, *OUT, "--ratio", "0.5", "--equivalent"],
        "--equivalent: Equivalent Pruning is a way of fine-tuning: give",
    ),
    ([*PRUNE, *OUT, "--ratio", "0.5", *PRETRAINED], "--weights pretrained: there are none of resnet20, only of"),
    (
        [*PRUNE, *OUT, "--ratio", "0.5", "--weights", "published"],
        "there are none of resnet20, but of resnet56 and vgg19",
    ),
    ([*NETWORK, "torchvision:resnet51", *REST], "unknown network of torchvision 'resnet51'; closest: resnet"),
    ([*NETWORK, "timm:vit_tiny", *REST], "unknown network of timm 'vit_tiny'; closest: "),
    ([*NETWORK, "resnet57", *REST], "unknown network 'resnet57'; closest: resnet56"),
    ([*NETWORK, "resnet50", *REST], "unknown network 'resnet50'; closest: timm:resnet50, torchvision:resnet50"),
    (["evaluate", "timm:nope", "--data", "digits", *PRETRAINED], "unknown network of timm 'nope'"),
    ([*COMPARE, "--criteria"], "--criteria: name at least one, each once"),
    ([*COMPARE, "--criteria", "l1", "l1"], "--criteria l1 l1: name at least one, each once"),
    ([*COMPARE, "--macs", "2"], "--macs 2.0: expected a share between 0 and 1"),
    (["compare", *PRUNE[1:], "--out", "full"], "--out 'full' holds something else than a comparison (notes.txt)"),
    (["demo", "--out", "full"], "--out 'full' holds something else than a run (notes.txt): choose another folder"),
    (["demo", "--out", "run"], "--out run already holds a run: choose another folder, or overwrite it (--overwrite)"),
    (["demo", "--out", "/proc/x"], "--out /proc/x: nothing can be written to '/proc'"),
    (["slurm", RUN[1], "--out", "full"], "--out 'full' holds something else than a run (notes.txt)"),
    (["grid", RUN[1], "--out", "full"], "--out 'full' holds something else than a grid (notes.txt)"),
    (["grid", RUN[1], "--out", "grid"], "--out grid already holds a grid: choose another folder, or go on with it"),
    (
        ["grid", RUN[1], *OUT],
        "/obc_tools/cifar10': pass as --root a folder that holds one of cifar-10-batches-py, train",
    ),
    (["grid", RUN[1], *OUT, "--root", "full"], "no cifar10 in 'full': pass as --root a folder that holds one of"),
    (
        ["grid", "paper-cifar", *OUT, "--roots", "cifar10", "nowhere"],
        "--roots cifar10 nowhere: there is no such folder",
    ),
    (["grid", "paper-cifar", *OUT, "--roots", "cifar11", "full"], "unknown --roots 'cifar11'; closest: cifar10"),
    (["grid", "paper-imagenet", *OUT], "imagenet: no root was given; pass --root, a folder with class folders"),
    ([*RUN, *OUT, "--amp", "fp8"], "unknown --amp 'fp8'; closest: fp16"),
    ([*RUN, *OUT, "--epochs", "0"], "--epochs 0: expected at least 1"),
    (["runs", "full"], "'full' holds 0 runs"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--stop", "0.5"], "--stop 0.5: expected a share between 0 and 0.5"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--rows", "expected:0"], "--rows expected:0: expected batch, sample, a number"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--weights", "no.pth"], "--weights no.pth: there is no such file"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--root", "no"], "--root no: there is no such folder"),
    ([*PRUNE, "--out", "file", "--ratio", "0.5"], "--out file is a file, not a folder"),
    ([*PRUNE, "--out", "run", "--ratio", "0.5"], "--out run already holds a run: choose another folder, or overwrite"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--criterion", "fischer"], "unknown --criterion 'fischer'"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--task", "detecting"], "unknown --task 'detecting'; closest: detection"),
    ([*RUN, "--out", "run"], "--out run already holds a run: choose another folder, or go on with it (--resume)"),
    ([*RUN, *OUT, "--speedup", "2", "--macs", "2"], "give one target: --speedup or --macs; got --speedup 2, --macs 2"),
    (["run", "resnet56-cifar", *OUT], "unknown experiment 'resnet56-cifar'; closest: resnet56-cifar10"),
    (["compare", "--model", "a", "--data", "digits", *OUT, "--criteria", "l1", "l3"], "unknown --criteria 'l3'"),
    (["evaluate", "x", "--data", "cifar"], "unknown --data 'cifar'"),
    (["evaluate", "x", "--data", "digits"], "'x' holds no saved model; for a network by name, pass --weights too"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--criterion", "magnitud"], "unknown --criterion 'magnitud'; closest: magnitude"),
    ([*PRUNE, *OUT, "--ratio", "0.5"], "--weights: which weights of 'resnet20'? It begins with a trained network"),
    ([*PRUNE, "--out", "full", "--ratio", "0.5"], "--out 'full' holds something else than a run (notes.txt)"),
    ([*PRUNE, "--out", "file/in", "--ratio", "0.5"], "/file' is a file, not a folder"),
    (["compare", *PRUNE[1:], *OUT, "--criteria", "l1,l2"], "--criteria l1,l2: put spaces between names, no commas"),
    (["prune", "--model", "nosuch:net", "--data", "digits", *OUT, "--ratio", "0.5"], "there is no module 'nosuch'"),
    (["runs", "nowhere"], "'nowhere' holds 0 runs: there is no such folder"),
    (["grid", "paper", *OUT], "unknown grid 'paper'; closest: paper-cifar"),
    (["slurm", RUN[1], *OUT, "--time", "1day"], "--time 1day: expected minutes, or 24:00:00, or 2-12:00"),
]


@pytest.mark.parametrize("arguments, message", FOUND_AT_ONCE, ids=[message for _, message in FOUND_AT_ONCE])
def test_it_is_said_before_anything_is_loaded(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "grid.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("obc_tools.cli.commands.run", lambda _: pytest.fail("something was loaded"))
    assert run(*arguments) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "grid", "run"]


def test_no_library_is_loaded_to_find_it():
    script = (
        "import sys; from obc_tools.cli import main\n"
        f"try: main({[*PRUNE, *OUT, '--speedup', '0.5']})\n"
        "finally: print('heavy:', sorted({'torch', 'torchvision', 'timm', 'plotly', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "heavy: []\n"
    assert done.stderr == "obc: error: --speedup 0.5: expected a number above 1\n"


def test_what_is_meant_passes(monkeypatch, tmp_path):
    passed = []
    monkeypatch.setattr("obc_tools.cli.commands.run", passed.append)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").touch()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "job.json").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").touch()
    ways = (
        "--speedup 2",
        "--ratio 0.5 --criterion magnitude",
        "--macs 5e6 --task own:task",
        "--ratio 0.5 --rows expected:32 --stop 0.1",
        "--params 1 --device cpu",
    )
    for way in ways:
        main(["prune", "--model", "resnet56", *PRUNE[3:], *OUT, "--weights", "published", *way.split()])
    main(["prune", "--model", "own:net", "--data", "own:data", *OUT, "--ratio", "0.5"])
    main(["slurm", RUN[1], *OUT, "--time", "2-12:00"])
    for arguments in (["demo"], [*RUN, *OUT, "--data", "digits"], ["evaluate", "a", "--data", "own:data"], ["runs"]):
        main(arguments)
    main(["slurm", RUN[1], *OUT])
    assert len(passed) == len(ways) + 7 and passed[1].criterion == "magnitude"


def test_the_names_are_the_librarys():
    known, weights = checks.KNOWN, set(checks.NAMED_WEIGHTS)
    assert set(known["criterion"]) == set(CRITERIA) and known["criteria"] == known["criterion"]
    assert set(checks.ALIASES) == set(ALIASES)
    assert (known["scope"], known["group_reduction"], known["counting"]) == (SCOPES, REDUCTIONS, COUNTINGS)
    assert {*known["per"], "latency"} == {*PER}  # which no command's targets go with
    assert (None, *known["normalizer"]) == NORMALIZERS and {None, *known["only"]} == set(PARTS)
    assert set(known["task"]) == set(obc.TASKS) and set(known["data"]) == set(DATA_SETS)
    assert set(known["experiment"]) == set(obc.EXPERIMENTS)
    assert set(known["grid"]) - {"paper-cifar", "paper-imagenet"} == set(obc.EXPERIMENTS)
    assert checks.TARGETS == TARGETS and (checks.RESULTS, checks.JOB) == (job.RESULTS, job.JOB)
    assert (checks.LIBRARIES, checks.MANIFEST) == (job.LIBRARIES, store.MANIFEST)
    assert weights == {*PUBLISHED_KINDS, "pretrained", "scratch"}
    assert (checks.OWN_NETWORKS, set(checks.PUBLISHED)) == (OWN_NETWORKS, {name for _, name in PUBLISHED_FILES})
    assert (checks.GRID, checks.SETTINGS) == (grid.GRID, compare.SETTINGS)
    for name, kinds in grid.GRIDS.items():
        assert set(checks.GRIDS[name]) == {obc.EXPERIMENTS[kind].base.data for kind in kinds}
    assert all(name.endswith(f"-{experiment.base.data}") for name, experiment in obc.EXPERIMENTS.items())
    assert {*checks.LIES_IN} == set(DATA_SETS) - {"digits", *EMBEDDED}
    for data, reader in {"cifar10": CIFAR10, "cifar100": CIFAR100}.items():
        assert reader.base_folder in checks.LIES_IN[data]


def test_every_network_of_a_library_is_known():
    for library, names in {
        "torchvision": torchvision.models.list_models(),
        "timm": [*timm.list_models(), "resnet50.a1_in1k", "vit_base_patch16_224_in21k"],
    }.items():
        assert {name.partition(".")[0] for name in names} <= checks._networks_of(library)
    for depth in (1, 2, 8, 11, 14, 16, 18, 20, 34, 50, 56, 57, 101, 110, 152, 158):
        for name in (f"resnet{depth}", f"vgg{depth}"):
            try:
                checks._check_network_name(name)
            except UnknownNameError:
                with pytest.raises(ValueError, match="unknown network"):
                    networks._check_name(name)
            else:
                networks._check_name(name)


def test_a_gpu_that_the_machine_has_not_is_said_at_once(monkeypatch):
    monkeypatch.setattr(checks, "GPUS", ("no such device",))
    monkeypatch.setattr(sys, "platform", "linux")
    for command, said in (
        (parse([*PRUNE, *OUT, "--ratio", "0.5", "--device", "cuda:1"]), "--device cuda:1: this machine has no GPU"),
        (parse(["grid", RUN[1], *OUT, "--devices", "0", "5"]), "--devices 0 5: this machine has no GPU"),
    ):
        with pytest.raises(ValueError, match=said):
            checks._check_gpus(vars(command))
    monkeypatch.setattr(checks, "GPUS", ("null",))
    checks._check_gpus(vars(command))


def test_the_librarys_own_words_are_spelled_as_options():
    command = main_command("--ratio", "0.5", "--round-to", "8")
    said = "ratio=0.5 cannot be met: the best is ratio=0; leave round_to=, unknown group_reduction 'x'; loss=0.9"
    meant = (
        "--ratio 0.5 cannot be met: the best is --ratio 0; leave --round-to, unknown --group-reduction 'x'; loss=0.9"
    )
    assert checks.spelled(said, command) == meant


def main_command(*options):
    return parse([*PRUNE, *OUT, *options])


def test_help_is_a_command_too(capsys):
    assert run("help") == 0
    assert "The whole job on handwritten digits" in capsys.readouterr().out


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == "obc_tools 0.1.0\n"


def test_ctrl_c_while_commands_are_loaded_leaves_one_line(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("obc_tools.cli.commands.parse", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])
    assert ended.value.code == 130 and capsys.readouterr().err == "\nobc: stopped\n"


@pytest.mark.parametrize(
    ("said", "rows"), [("sample", "sample"), ("4", 4), ("expected", "expected"), ("expected:32", ("expected", 32))]
)
def test_rows_and_stopping_reach_the_job_and_its_file(said, rows):
    arguments = [*PRUNE, *OUT, "--weights", "scratch.pth", "--ratio", "0.5", "--rows", said, "--stop", "0.1"]
    job = parse(arguments).job()
    assert job.scoring(job.criterion) == Scoring(rows=rows, stop=0.1)
    assert PruningJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_a_criterion_without_rows_is_refused_by_a_job():
    command = parse([*PRUNE, *OUT, "--weights", "w.pth", "--ratio", "0.5", "--criterion", "l1", "--rows", "sample"])
    with pytest.raises(ValueError, match="rows='sample': criterion 'l1' has no rows"):
        command.job()
