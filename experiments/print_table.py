"""Prints the table of one or several runs, side by side.

python -m experiments.print_table runs/quickstart [runs/another ...]
python -m experiments.print_table --pool_seeds runs/seed_0 runs/seed_1
python -m experiments.print_table --table=prediction runs/dreamer_v2 runs/wam

The paper's Tables III (cloning) and IV (PPO), a column for each config, its seeds gathered:

python -m experiments.print_table --table=bc runs/dreamer_v2_seed_* runs/wam_seed_*
python -m experiments.print_table --table=ppo runs/dreamer_v2_seed_* runs/wam_seed_* --output=docs/results/NAME/ppo.md

Differences paired by start, from WORKDIR/evaluation/STAGE.episodes.json: ppo minus bc of every config, wam minus
dreamer_v2 where both are there, or the runs named minus those of --against, whatever tells the two configs apart:

python -m experiments.print_table --table=differences runs/dreamer_v2_seed_0 runs/wam_seed_0
python -m experiments.print_table --table=differences runs/ours_seed_0 runs/ours_seed_1 \
    --against=runs/base_seed_0,runs/base_seed_1 [--tasks=open_drawer,turn_on_led]
"""

import collections
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import config_values, runs
from wam_jax import cli, differences, json_files, prediction_tables, success_tables, tables

TABLES = ("success", "prediction", "bc", "ppo", "differences")


def main(argv: Sequence[str]) -> None:
    """Prints a Markdown table of every workdir named, and writes it where --output says."""
    output = _OUTPUT.value
    if output:
        cli.check_output(output, ".md", ".json")
    for flag in (_APART, _AGAINST, _TASKS):
        if flag.present and not flag.value:
            raise ValueError(f"--{flag.name}= is empty; name some, comma separated, or leave it out")
    text, values = build(
        _TABLE.value, argv, pool_seeds=_POOL_SEEDS.value, apart=_APART.value, against=_AGAINST.value,
        tasks=_TASKS.value,
    )  # fmt: skip
    print(text)
    if output:
        save(output, text, values)


def save(path: str, text: str, values: Any) -> None:
    """Writes what `build` returned: the values as JSON, or the Markdown."""
    if path.endswith(".json"):
        json_files.write(path, values)
    else:
        json_files.write_text(path, text)


def build(
    table: str,
    workdirs: Sequence[str],
    *,
    pool_seeds: bool = False,
    apart: Sequence[str] = (),
    against: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> tuple[str, Any]:
    """A table as Markdown and as what JSON keeps of it.

    Args:
      table: one of TABLES.
      workdirs: of the runs.
      pool_seeds: "success" alone: runs of one config that differ in their seed are one column.
      apart: names of config values that tell columns apart, besides environment and method.
      against: "differences" alone: workdirs of the runs to subtract.
      tasks: "differences" alone: those to compare, where one side has more of them; all where none is named.

    Raises:
      ValueError: a run is missing or of another config than the others of its column, or an option does not belong to
        the table.
    """
    if "" in workdirs:
        raise ValueError(f"one of the runs {', '.join(map(repr, workdirs))} has no name; name each")
    for option, named in (("--against", against), ("--tasks", tasks)):
        if "" in named:
            raise ValueError(f"{option}: one of {', '.join(map(repr, named))} is empty; name each, with single commas")
    if not workdirs:
        raise ValueError("name at least one workdir, e.g. python -m experiments.print_table runs/quickstart")
    if twice := [task for task in tasks if list(tasks).count(task) > 1]:
        raise ValueError(f"--tasks has {twice[0]} twice; name each once")
    for name, wanted, there in (
        ("pool_seeds", ("success",), pool_seeds),
        ("apart", ("bc", "ppo", "differences"), apart),
        ("against", ("differences",), against),
        ("tasks", ("differences",), tasks),
    ):
        if there and table not in wanted:
            raise ValueError(f"--{name} belongs to --table={tables.join(wanted)}, not to {table}; leave it out")
    runs.check_distinct([*workdirs, *against])
    if table == "prediction":
        found = {name: prediction_tables.load(os.path.join(name, prediction_tables.FILE)) for name in workdirs}
        return prediction_tables.markdown(found), {name: results["metrics"] for name, results in found.items()}
    if table == "success":
        pooled = runs.gather([runs.load(workdir) for workdir in workdirs]) if pool_seeds else []
        loaded = {workdir: tables.load(os.path.join(workdir, "table.json")) for workdir in workdirs}
        rows = combine(loaded, pool_seeds=pool_seeds)
        outcomes = {
            (group.config["environment"], group.config["method"], stage): _outcomes(group, stage)
            for group in pooled
            for stage in runs.stages(group)
        }
        return tables.markdown(rows, outcomes), [dataclasses.asdict(row) for row in rows]
    groups = runs.gather([runs.load(workdir) for workdir in workdirs], apart or ("ppo.rollouts",))
    if table == "differences":
        values = _compare_with(groups, against, apart, tasks) if against else _compare_within(groups, tasks)
        return differences.markdown(values), values
    values = success_tables.compute(table, [_column(group, table) for group in groups], runs.config_notes(groups))
    return success_tables.markdown(values), values


def combine(by_name: dict[str, list[tables.Row]], *, pool_seeds: bool) -> list[tables.Row]:
    """All rows; where two runs have the same column, their names tell the columns apart, unless seeds are pooled.

    Raises:
      ValueError: a run has no rows.
    """
    for name, rows in by_name.items():
        if not rows:
            raise ValueError(f"{name}/table.json has no rows; run experiments.evaluate with this --workdir first")
    columns = {name: {(row.environment, row.method, row.stage) for row in rows} for name, rows in by_name.items()}
    shared = collections.Counter(column for of_run in columns.values() for column in of_run).most_common(1)
    if pool_seeds or not shared or shared[0][1] == 1:
        return [row for rows in by_name.values() for row in rows]
    return [
        dataclasses.replace(row, environment=f"{name}, {row.environment}")
        for name, rows in by_name.items()
        for row in rows
    ]


def _outcomes(group: runs.Group, stage: str) -> dict[str, np.ndarray]:
    """Of several seeds, where every run keeps them; one seed's interval does not need them."""
    return runs.outcomes(group, stage) if len(group.runs) > 1 and runs.has_episodes(group, stage) else {}


def _column(group: runs.Group, stage: str) -> success_tables.Column:
    rows = runs.stage_rows(group, stage)
    if not rows:
        raise ValueError(
            f"{group.runs[0].name}/table.json has no rows of stage {stage}; run experiments.evaluate --policy={stage} "
            "with this --workdir, or leave it out"
        )
    config, steps = group.config, runs.interactions(group.config)
    return success_tables.Column(
        title=group.title,
        environment=config["environment"],
        rows=rows,
        demonstrations=config["dataset"]["demonstrations_per_task"],
        demonstrations_given=any(run.config["dataset"]["demonstrations"] for run in group.runs),
        updates=config["world_model"]["num_steps"],
        imagined_steps=steps["imagination"],
        environment_steps=steps["environment"],
        outcomes=_outcomes(group, stage),
    )


def _compare_within(groups: Sequence[runs.Group], tasks: Sequence[str]) -> dict[str, Any]:
    """Ppo - bc of every group, wam - dreamer_v2 of every stage that both have; on all tasks or those named."""
    columns = [_pair(f"{g.title}, ppo - bc", (g, "ppo"), (g, "bc")) for g in groups if runs.stages(g) == ["bc", "ppo"]]
    notes = []
    methods = {(g.config["environment"], g.apart, g.config["method"]): g for g in groups}
    for (environment, apart, method), wam in methods.items():
        baseline = methods.get((environment, apart, "dreamer_v2"))
        if method == "wam" and baseline:
            both = [stage for stage in runs.stages(wam) if stage in runs.stages(baseline)]
            title = f"{wam.title} - dreamer_v2"
            columns += [_pair(f"{title}, {stage}", (wam, stage), (baseline, stage)) for stage in both]
            notes += runs.config_notes([wam, baseline])
    if not columns:
        raise ValueError(
            f"nothing to compare in {', '.join(run.name for g in groups for run in g.runs)}: differences need the "
            "stages bc and ppo of a run, or one stage of wam and of dreamer_v2, or --against"
        )
    return differences.compute(_of_tasks(columns, tasks), notes)


def _compare_with(
    groups: Sequence[runs.Group], against: Sequence[str], apart: Sequence[str], tasks: Sequence[str]
) -> dict[str, Any]:
    """The group named minus that of --against, at every stage that both have, on all tasks or those named."""
    others = runs.gather([runs.load(workdir) for workdir in against], apart)
    for name, found in (("the runs named", groups), ("--against", others)):
        if len(found) > 1:
            titles = "; ".join(group.title for group in found)
            raise ValueError(f"{name} are of several configs ({titles}); name the seeds of one")
    (first,), (second,) = groups, others
    both = [stage for stage in runs.stages(first) if stage in runs.stages(second)]
    if not both:
        raise ValueError(f"{first.runs[0].name} and {second.runs[0].name} have no stage in common; evaluate both")
    columns = [_pair(f"{first.title}, {stage}: first - second", (first, stage), (second, stage)) for stage in both]
    names = [", ".join(run.name for run in group.runs) for group in (first, second)]
    changed = config_values.differing(first.config, second.config)
    unsaid = {"seed", "tasks"} if tasks else {"seed"}
    texts = [f"{key} ({one!r}, {other!r})" for key, (one, other) in changed.items() if key not in unsaid]
    note = f"First: {names[0]}. Second: {names[1]}. Their configs differ in {', '.join(texts) or 'nothing'}."
    return differences.compute(_of_tasks(columns, tasks), [note])


def _of_tasks(comparisons: Sequence[differences.Comparison], tasks: Sequence[str]) -> list[differences.Comparison]:
    """Comparisons of these tasks alone; of all that they have where none is named."""
    if not tasks:
        return list(comparisons)
    narrowed = []
    for comparison in comparisons:
        sides = (comparison.first, comparison.second)
        for task in tasks:
            if any(task not in side for side in sides):
                there = ", ".join(sorted(sides[0].keys() & sides[1].keys())) or "none"
                raise ValueError(f"--tasks={task}: {comparison.title} has not both sides of it, but of {there}")
        first, second = ({task: side[task] for task in tasks} for side in sides)
        untrained = comparison.untrained & {*tasks}
        narrowed.append(dataclasses.replace(comparison, first=first, second=second, untrained=untrained))
    return narrowed


def _pair(title: str, first: tuple[runs.Group, str], second: tuple[runs.Group, str]) -> differences.Comparison:
    """Two stages of groups with the same seeds, from the same starts."""
    (one, _), (other, _) = first, second
    if one.seeds != other.seeds:
        seeds = " and ".join(", ".join(map(str, group.seeds)) for group in (one, other))
        raise ValueError(f"{title}: seeds {seeds}; differences pair equal seeds, so name the same ones of both")
    runs.check_starts(one, other, (first[1], second[1]))
    untrained = frozenset(row.task for side in (first, second) for row in runs.stage_rows(*side) if row.untrained)
    return differences.Comparison(title, tuple(one.seeds), runs.outcomes(*first), runs.outcomes(*second), untrained)


if __name__ == "__main__":
    _TABLE = flags.DEFINE_enum(
        "table", "success", TABLES,
        "Success of policies; quality of the world model's predictions (Table I); success beside the paper's after "
        "cloning (III) or PPO (IV); differences paired by start",
    )  # fmt: skip
    _POOL_SEEDS = flags.DEFINE_bool("pool_seeds", False, "Gather runs of one config that differ in their seed")
    _APART = flags.DEFINE_list("apart", [], "Config values that tell columns apart, comma separated: ppo.rollouts,...")
    _AGAINST = flags.DEFINE_list("against", [], "Of --table=differences: workdirs to subtract, comma separated")
    _TASKS = flags.DEFINE_list(
        "tasks", [], "Of --table=differences: tasks to compare, where one side has more, comma separated"
    )
    _OUTPUT = flags.DEFINE_string("output", "", "File to write as well: .md, or .json with unrounded numbers")
    cli.run(main, takes="workdirs")
