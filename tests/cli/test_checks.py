"""What is found before anything is loaded: names, numbers and paths, as the command spells them."""

import json
import subprocess
import sys

import pytest
from terminal import assert_one_line, run

import obc_tools as obc
from obc_tools import cli
from obc_tools.cli import options as checks
from obc_tools.cli.commands import main, parse
from obc_tools.data.data import DATA_SETS
from obc_tools.measure.costs import COUNTINGS
from obc_tools.models import store
from obc_tools.models.networks import PUBLISHED_KINDS
from obc_tools.pruning.choices import PER, SCOPES, TARGETS, Scoring
from obc_tools.runs import folder, job
from obc_tools.runs.job import PruningJob
from obc_tools.scoring.criteria import ALIASES, CRITERIA
from obc_tools.scoring.scores import NORMALIZERS, REDUCTIONS
from obc_tools.structure.groups import PARTS

PRUNE = ["prune", "--model", "resnet20", "--data", "digits"]
RUN = ["run", "resnet56-cifar10"]
OUT = ["--out", "new"]
FOUND_AT_ONCE = [
    ([*PRUNE, *OUT, "--speedup", "0.5"], "--speedup 0.5: expected a number above 1"),
    ([*PRUNE, *OUT, "--speedup", "2", "--macs", "5e6"], "got --speedup 2, --macs 5e+06"),
    ([*PRUNE, *OUT, "--macs", "-1"], "--macs -1.0: expected a positive number"),
    ([*PRUNE, *OUT, "--params", "inf"], "--params inf: expected a positive number"),
    ([*PRUNE, *OUT, "--ratio", "0"], "--ratio 0.0: expected a share between 0 and 1"),
    ([*PRUNE, *OUT], "give one target: --speedup, --macs, --params or --ratio; got none"),
    ([*PRUNE, *OUT, "--ratio", "0.5", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
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
    monkeypatch.setattr("obc_tools.cli.commands.run", lambda _: pytest.fail("something was loaded"))
    assert run(*arguments) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "run"]


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
    (tmp_path / "runs").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").touch()
    ways = (
        "--speedup 2",
        "--ratio 0.5 --criterion magnitude",
        "--macs 5e6 --task own:task",
        "--ratio 0.5 --rows expected:32 --stop 0.1",
        "--params 1 --device cuda:1",
    )
    for way in ways:
        main([*PRUNE, *OUT, "--weights", "published", *way.split()])
    main(["prune", "--model", "own:net", "--data", "own:data", *OUT, "--ratio", "0.5"])
    main(["slurm", RUN[1], *OUT, "--time", "2-12:00"])
    for arguments in (["demo"], RUN + OUT, ["evaluate", "a", "--data", "own:data"], ["runs"], ["slurm", RUN[1], *OUT]):
        main(arguments)
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
    assert checks.TARGETS == TARGETS and (checks.RESULTS, checks.JOB) == (folder.RESULTS, folder.JOB)
    assert (checks.LIBRARIES, checks.MANIFEST) == (job.LIBRARIES, store.MANIFEST)
    assert weights == {*PUBLISHED_KINDS, "pretrained", "scratch"}


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
