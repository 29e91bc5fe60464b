"""A mistake on the command line, as a user meets it: one line, before any work, and nothing is written."""

import json

import helpers
import pytest

QUICKSTART = "--config=experiments/configs/quickstart.py"
MISTAKES = {
    "value": ([QUICKSTART, "--config.world_model.batch_size=abc"], "config.world_model.batch_size"),
    "key": ([QUICKSTART, "--config.world_model.no_such=1"], "config.world_model.no_such"),
    "key of a value": ([QUICKSTART, "--config.environment.x=1"], "--config.environment.x: the config has no such key"),
    "file": (["--config=experiments/configs/missing.py"], "experiments/configs/missing.py"),
    "no Python": (["--config=README.md"], "--config names could not be loaded (SyntaxError"),
    "no config": (["--config=wam_jax/specs.py"], "--config names could not be loaded (AttributeError"),
    "file and key": (["--config=experiments/configs/missing.py", "--config.seed=1"], "experiments/configs/missing.py"),
    "method": (["--config=experiments/configs/quickstart.py:dreamer"], "unknown method 'dreamer'"),
    "argument": ([QUICKSTART, "extra"], "unexpected argument 'extra'"),
    "nothing": ([], "--config"),
    "workdir": ([QUICKSTART, "--workdir="], "--workdir is empty"),
    "plot_transfer": (["docs", "--output=docs/findings.md/a.png"], "docs/findings.md is a file; name another folder"),
    "print_table": (["docs", "--output=docs/findings.txt"], "--output=docs/findings.txt ends in none of .md, .json"),
    "diagnose": ([QUICKSTART], "holds no run (it has no config.json)"),
    "evaluate_prediction": ([QUICKSTART], "holds no run (it has no config.json)"),
    "evaluate": ([QUICKSTART, "--policy=bc"], "holds no run (it has no config.json)"),
    "evaluate an expert": (  # which needs no run
        [QUICKSTART, "--policy=expert", "--config.evaluation.num_episodes=0"],
        "config.evaluation.num_episodes=0",
    ),
}


# Each mistake in a process of its own, which begins after the imports that they share; the binary is the first word of
# the mistake's name where there is one of that name.
RUN_EACH = """
import json, os, runpy, sys
from experiments import collect_playtable, train_policy, train_reward, train_world_model

for name, arguments in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        first = os.path.basename(name).split()[0]
        binary = first if os.path.exists(f"experiments/{first}.py") else "collect_playtable"
        sys.argv = [binary, *arguments]
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        sys.modules.pop(f"experiments.{binary}", None)
        runpy.run_module(f"experiments.{binary}", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each mistake ends in: its exit status and its stderr; and the workdir."""
    folder = tmp_path_factory.mktemp("mistakes")
    workdir = folder / "run"
    commands = {}
    for name, (arguments, _) in MISTAKES.items():
        named = not arguments or "--workdir=" in arguments or name in ("plot_transfer", "print_table")
        commands[str(folder / name)] = [*arguments, *([] if named else [f"--workdir={workdir}"])]
    done = helpers.run_python("-c", RUN_EACH, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    statuses = [int(line) for line in done.stdout.splitlines()]
    ends = {name: (status, (folder / name).read_text()) for name, status in zip(MISTAKES, statuses, strict=True)}
    return ends, workdir


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(runs, mistake):
    (status, stderr), workdir = runs[0][mistake], runs[1]
    assert status == 1
    assert MISTAKES[mistake][1] in stderr, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    assert not workdir.exists()
