"""Several tasks as one program: the same as one after another, with checkpoints and metrics of their own."""

import functools
import shutil

import helpers
import jax
import numpy as np
import pytest
import test_training as toys

from experiments import finetune_policy
from wam_jax import imagination, latents, parallel, training

quick_compilation = helpers.quick_compilation


def toy_together(workdir, num_steps, stages=("a", "b"), seeds=(3, 5), make_batches=toys.batches):
    """Two toys as one program; both read the same batches, and their noise is their seed's."""
    run = parallel.compile_updates(jax.vmap(toys.update, in_axes=(0, None, 0)), toys.DEVICES)
    return training.fit_together(
        run,
        jax.tree.map(lambda x: np.stack([x] * len(stages)), toys.first_state()),
        make_batches,
        stages=stages,
        workdir=str(workdir),
        settings={"size": 3},
        seed=np.array(seeds, np.int32),
        num_steps=num_steps,
        updates_per_call=toys.N,
        save_every=4,
        devices=toys.DEVICES,
    )


def test_stages_trained_together_equal_those_one_after_another_with_a_resume(tmp_path):
    toy_together(tmp_path / "joint", 6)
    together = toy_together(tmp_path / "joint", 12)
    for index, (stage, seed) in enumerate((("a", 3), ("b", 5))):
        alone = toys.fit(tmp_path / "apart", 12, stage=stage, seed=seed)
        helpers.assert_close(jax.tree.map(lambda x, i=index: x[i], together), alone, rtol=1e-5)
        joint_rows, alone_rows = (toys.rows(tmp_path / folder, stage) for folder in ("joint", "apart"))
        assert [row["step"] for row in joint_rows] == [2, 4, 6, 8, 10, 12]
        for joint, other in zip(joint_rows, alone_rows, strict=True):
            assert joint.pop("stage") == other.pop("stage") and joint == pytest.approx(other, rel=1e-5)
        helpers.assert_close(toys.fit(tmp_path / "joint", 12, stage=stage), alone, rtol=1e-5)  # a checkpoint of its own


@pytest.mark.parametrize(("at", "kept"), [(4, []), (8, [4])])
def test_a_run_that_was_killed_between_its_saves_equals_one_that_was_not(tmp_path, at, kept):
    whole = toy_together(tmp_path / "whole", 12)
    toy_together(tmp_path / "killed", at)
    shutil.rmtree(tmp_path / "killed" / "b" / str(at))
    assert [int(path.name) for path in (tmp_path / "killed" / "b").iterdir()] == kept
    helpers.assert_equal(toy_together(tmp_path / "killed", 12), whole)
    for stage in ("a", "b"):
        assert toys.rows(tmp_path / "killed", stage) == toys.rows(tmp_path / "whole", stage)
        assert toys.latest_step(tmp_path / "killed" / stage) == 12


def test_stages_at_different_steps_are_not_trained_together(tmp_path):
    toys.fit(tmp_path, 8, stage="a")
    with pytest.raises(ValueError, match="cannot go on from the same step: a from 4 or 8, b from 0; train them apart"):
        toy_together(tmp_path, 8)


def test_a_stage_that_breaks_among_others_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match="^a: kl is nan at step 7"):
        toy_together(tmp_path, 20, make_batches=functools.partial(toys.batches, broken_at=7))
    assert toys.latest_step(tmp_path / "a") == toys.latest_step(tmp_path / "b") == 4


def test_tasks_fine_tuned_together_equal_those_one_after_another():
    update, state, inputs = toys.bank_stages()["ppo"]
    update = functools.partial(update, axis_name=parallel.AXIS_NAME)
    starts = [inputs.start, jax.tree.map(lambda x: x[::-2], inputs.start)]
    (start, size), (other_start, other_size) = latents.pad_start_banks(starts)
    assert (size, other_size) == (5, 3)
    other = inputs.replace(
        start=other_start,
        num_starts=other_size,
        reward_params=jax.tree.map(lambda x: x + 0.1, inputs.reward_params),
    )
    tasks = [inputs.replace(start=start, num_starts=size), other]
    run = parallel.compile_updates(update, toys.DEVICES, num_updates=toys.N)
    several = jax.vmap(update, in_axes=(0, imagination.TASK_AXES, 0))
    together = parallel.compile_updates(several, toys.DEVICES, num_updates=toys.N)
    stacked = parallel.replicate(jax.tree.map(lambda x: np.stack([x, x]), jax.device_get(state)), toys.DEVICES)
    bank = parallel.replicate(imagination.stack_tasks(tasks), toys.DEVICES)
    state_of_all, metrics_of_all = together(stacked, bank, np.array([3, 5], np.int32), 0)
    for index, (task, seed) in enumerate(zip(tasks, (3, 5), strict=True)):
        own = task.replace(start=latents.latent_at(task.start, slice(0, int(task.num_starts))))  # without padding
        args = (parallel.replicate(x, toys.DEVICES) for x in (jax.device_get(state), own))
        alone, metrics_alone = run(*args, seed, 0)
        helpers.assert_close({k: v[..., index] for k, v in metrics_of_all.items()}, metrics_alone, rtol=1e-3, atol=1e-4)
        ours = jax.tree.map(lambda x, i=index: x[:, i], state_of_all)
        helpers.assert_close(ours.params, alone.params, rtol=0, atol=1e-5)


def test_tasks_share_a_program_at_the_same_iteration(tmp_path):
    toys.fit(tmp_path, 8, stage="ppo/turn_on_led")
    toys.fit(tmp_path, 4, stage="ppo/close_drawer")  # its first save, killed before open_drawer's

    tasks = ["open_drawer", "close_drawer", "turn_on_led", "turn_off_led"]
    found = finetune_policy.groups(tasks, str(tmp_path), 2)
    assert found == [["open_drawer", "close_drawer"], ["turn_off_led"], ["turn_on_led"]]
