"""The training loop: resuming, interruption, broken numbers, and what it writes down."""

import collections
import contextlib
import functools
import json
import os
import shutil
import signal
import threading
import time
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wam_jax import (
    diffusion_policy,
    imagination,
    latents,
    metrics,
    parallel,
    ppo,
    success_classifier,
    training,
    world_model,
    world_model_training,
)
from wam_jax.checkpoints import Checkpointer

quick_compilation = helpers.quick_compilation
DEVICES = jax.local_devices()[:1]
N = 2  # updates a call


def update(state, batch, rng):
    """Momentum towards noisy data; `loss` breaks where the data says so."""
    noise = jax.random.normal(rng, state["x"].shape)
    momentum = 0.9 * state["momentum"] + batch["target"] + noise - state["x"]
    x = state["x"] + 0.1 * momentum
    loss = jnp.square(x).sum()
    state = {"x": x, "momentum": momentum, "count": state["count"] + 1}
    return state, {"loss": loss, "kl": batch["kl"], "target": batch["target"][0]}


COMPILED = parallel.compile_updates(update, DEVICES)


def first_state():
    return {"x": np.zeros(3, np.float32), "momentum": np.zeros(3, np.float32), "count": np.int32(0)}


def batches(first_step, broken_at=None, on_step=None):
    """Batch i is a function of i alone; `on_step(step)` is called before the batch of a step is handed out."""
    step = first_step
    while True:
        if on_step:
            on_step(step)
        steps = range(step, step + N)
        target = np.stack([np.random.default_rng(i).normal(size=3) for i in steps]).astype(np.float32)
        kl = np.array([np.nan if i == broken_at else i for i in steps], np.float32)
        yield {"target": target[None], "kl": kl[None]}
        step += N


def fit(workdir, num_steps, *, run=COMPILED, stage="toy", make_batches=batches, state=None, save_every=4, seed=0):
    return training.fit(
        run,
        first_state() if state is None else state,
        make_batches,
        stage=stage,
        workdir=str(workdir),
        settings={"size": 3},
        seed=seed,
        num_steps=num_steps,
        updates_per_call=N,
        save_every=save_every,
        devices=DEVICES,
    )


def rows(workdir, stage="toy"):
    """The rows of metrics.jsonl without their seconds."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds")}
        for row in metrics.read(str(workdir), stage)
    ]


def latest_step(directory):
    checkpointer = Checkpointer(str(directory))
    step = checkpointer.latest_step()
    checkpointer.close()
    return step


@functools.cache
def whole(num_steps):
    """The state of an uninterrupted run of the same updates, by calls of its own."""
    state = parallel.replicate(first_state(), DEVICES)
    data = batches(0)
    for step in range(0, num_steps, N):
        state, _ = COMPILED(state, next(data), 0, step)
    return jax.device_get(parallel.unreplicate(state))


def test_a_run_is_its_updates_one_after_the_other(tmp_path):
    state = fit(tmp_path, 8)
    helpers.assert_equal(state, whole(8))
    assert all(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(state))


def test_resuming_equals_one_run_bit_for_bit(tmp_path):
    helpers.assert_equal(fit(tmp_path / "halves", 6), whole(6))
    helpers.assert_equal(fit(tmp_path / "halves", 12), whole(12))
    fit(tmp_path / "whole", 12)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_the_seed_matters(tmp_path):
    assert (fit(tmp_path, 4, seed=1)["x"] != whole(4)["x"]).all()


def test_the_world_model_resumes_bit_for_bit(tmp_path):
    model = helpers.make_model(open_loop_weight=0.0, proprioception_weight=0.0)
    run = parallel.compile_updates(
        functools.partial(world_model_training.update, model=model, axis_name=parallel.AXIS_NAME), DEVICES
    )

    def make_batches(first_step):
        for step in range(first_step, 100, N):
            yield helpers.make_steps(seed=step, shape=(1, N, 2, 6))

    def train(workdir, num_steps):
        return fit(workdir, num_steps, run=run, make_batches=make_batches, state=helpers.make_state(model))

    at_once = train(tmp_path / "whole", 4)
    train(tmp_path / "halves", 2)
    helpers.assert_equal(train(tmp_path / "halves", 4), at_once)
    assert at_once.step == 4


@functools.cache
def bank_stages():
    """Update, state before the first one, and bank of the stages that draw their rows from one; by stage."""
    config, model = helpers.make_config(), helpers.make_model()
    bank, state_dim = helpers.make_latents(0, (12,), model.settings), world_model.feature_dim(model.settings)
    policy_settings = helpers.freeze(config.policy, decay_steps=4)
    reward_settings = helpers.freeze(config.reward, soft_feature=config.policy.soft_feature)
    ppo_settings = helpers.freeze(config.ppo, horizon=3, critic_warmup=1)
    policy = diffusion_policy.init(jax.random.key(0), state_dim, policy_settings)
    reward = success_classifier.init(jax.random.key(1), state_dim, reward_settings)
    action = np.random.default_rng(0).uniform(-1, 1, (12, config.policy.chunk, 7)).astype(np.float32)
    inputs = imagination.ImaginationInputs(
        start=latents.latent_at(bank, slice(0, 5)),
        num_starts=np.array(5, np.int32),
        world_model_params=helpers.make_state(model).params,
        reward_params=reward.params,
        base_policy_params=policy.params,
    )
    iteration = functools.partial(
        ppo.iteration,
        imagine_step=functools.partial(world_model.imagine_step, model),
        reward_rule=helpers.classifier_rule(reward_settings),
        policy_settings=policy_settings,
        settings=ppo_settings,
    )
    return {
        "policy": (
            functools.partial(diffusion_policy.update_from_bank, settings=policy_settings),
            policy,
            diffusion_policy.PolicyBank(diffusion_policy.PolicyBatch(bank, action), np.array(12, np.int32)),
        ),
        "reward": (
            functools.partial(success_classifier.update_from_bank, settings=reward_settings),
            reward,
            success_classifier.ClassifierBatch(bank, np.arange(12, dtype=np.int32) % 2),
        ),
        "ppo": (iteration, ppo.init(jax.random.key(2), policy.params, state_dim, ppo_settings), inputs),
    }


@pytest.mark.parametrize("stage", ["policy", "reward", "ppo"])
def test_a_stage_resumes_bit_for_bit(tmp_path, stage):
    update, state, bank = bank_stages()[stage]
    run = parallel.compile_updates(functools.partial(update, axis_name=parallel.AXIS_NAME), DEVICES, num_updates=N)
    train = functools.partial(
        fit, run=run, stage=stage, make_batches=training.repeat(parallel.replicate(bank, DEVICES)), state=state
    )
    at_once = train(tmp_path / "whole", 4)
    half = train(tmp_path / "halves", 2)
    helpers.assert_equal(train(tmp_path / "halves", 4), at_once)
    unchanged = jax.tree.map(np.array_equal, half, at_once)
    assert not all(jax.tree.leaves(unchanged.params))
    if stage == "ppo":
        assert not any(jax.tree.leaves(unchanged.reward_scale))
        assert at_once.iteration == 4
    else:
        assert at_once.step == 4


def test_a_finished_stage_is_left_alone(tmp_path):
    state = fit(tmp_path, 4)

    def no_batches(first_step):
        raise AssertionError("a finished stage asks for no data")

    helpers.assert_equal(fit(tmp_path, 4, make_batches=no_batches), state)


def test_an_update_is_traced_once_for_all_stages(tmp_path):
    traces = collections.Counter()

    def counted(state, batch, rng):
        traces["update"] += 1
        return update(state, batch, rng)

    run = parallel.compile_updates(counted, DEVICES)
    fit(tmp_path, 4, run=run)
    once = traces["update"]
    fit(tmp_path, 8, run=run)
    fit(tmp_path, 4, run=run, stage="another", seed=3)
    assert once == traces["update"] == 1


def test_one_program_serves_fresh_restored_and_running_states(tmp_path, caplog):
    fit(tmp_path, 4, stage="first")  # compiles what the loop itself needs
    run = parallel.compile_updates(update, DEVICES)
    with jax.log_compiles():
        fit(tmp_path, 6, run=run)
        fit(tmp_path, 12, run=run)
        fit(tmp_path, 6, run=run, stage="another", seed=3)
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if message.startswith("Finished XLA compilation")]) == 1, messages


def test_a_metric_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    broken = functools.partial(batches, broken_at=7)
    with pytest.raises(FloatingPointError, match="^kl is nan at step 7"):
        fit(tmp_path, 20, make_batches=broken, save_every=2)
    assert latest_step(tmp_path / "toy") == 6
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]
    helpers.assert_equal(fit(tmp_path, 12), whole(12))  # with the data mended it goes on from there


def test_a_metric_that_breaks_at_the_very_end_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="kl is nan at step 7"):
        fit(tmp_path, 8, make_batches=functools.partial(batches, broken_at=7), save_every=100)
    assert latest_step(tmp_path / "toy") is None


def interrupt_at(wanted, number):
    def on_step(step):
        if step == wanted:
            os.kill(os.getpid(), number)

    return functools.partial(batches, on_step=on_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_and_the_same_command_goes_on(tmp_path, number):
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="toy saved at step 6"):
        fit(tmp_path, 12, make_batches=interrupt_at(4, number), save_every=100)
    assert signal.getsignal(number) == handler
    assert latest_step(tmp_path / "toy") == 6
    helpers.assert_equal(fit(tmp_path, 12), whole(12))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_a_second_interruption_stops_at_once(tmp_path):
    def on_step(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, 12, make_batches=functools.partial(batches, on_step=on_step), save_every=2)
    assert latest_step(tmp_path / "toy") == 2  # what was saved; that of step 4 would have been begun one call later


def test_a_resume_from_an_earlier_checkpoint_repeats_no_row(tmp_path):
    fit(tmp_path, 4, stage="another")
    fit(tmp_path, 8)
    before = rows(tmp_path)
    shutil.rmtree(tmp_path / "toy" / "8")
    fit(tmp_path, 8)
    assert rows(tmp_path) == before
    assert [row["step"] for row in before] == [2, 4, 6, 8]
    assert [row["step"] for row in rows(tmp_path, "another")] == [2, 4]


def test_a_row_is_the_mean_of_its_updates(tmp_path):
    fit(tmp_path, 4)
    assert [row["kl"] for row in rows(tmp_path)] == [0.5, 2.5]
    assert set(rows(tmp_path)[0]) == {"stage", "step", "loss", "kl", "target"}
    assert (tmp_path / "tensorboard" / "toy").is_dir()


def test_seconds_go_on_after_a_resume(tmp_path):
    fit(tmp_path, 8)
    path = tmp_path / "metrics.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"seconds": 100.0 + row["step"]}) + "\n" for row in old))
    fit(tmp_path, 12)
    seconds = {row["step"]: row["seconds"] for row in metrics.read(str(tmp_path), "toy")}
    assert 108 < seconds[10] <= seconds[12] < 208


def test_missing_data_leave_no_file_behind(tmp_path):
    def make_batches(first_step):
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        fit(tmp_path, 8, make_batches=make_batches)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_half_written_row_costs_no_other_row(tmp_path):
    fit(tmp_path, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "toy", "step": "x"}\n')  # damaged
        file.write('{"stage": "toy", "st')  # killed here
    fit(tmp_path, 8)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8]
    with open(tmp_path / "metrics.jsonl") as file:
        assert all(json.loads(line) for line in file)


def test_no_update_waits_for_a_checkpoint(tmp_path):
    went_on = threading.Event()
    save = Checkpointer.save

    def slow_save(checkpointer, step, state, settings):
        assert went_on.wait(60), "no update was made while the checkpoint was being saved"
        save(checkpointer, step, state, settings)

    def run(state, batch, seed, step):
        if step >= 2 * N:  # the checkpoint after N updates is begun when the next N are on their way
            went_on.set()
        return COMPILED(state, batch, seed, step)

    with mock.patch.object(Checkpointer, "save", slow_save):
        helpers.assert_equal(fit(tmp_path, 4 * N, run=run, save_every=N), whole(4 * N))


def test_what_goes_wrong_in_saving_ends_the_run_soon(tmp_path):
    made = []

    def run(state, batch, seed, step):
        made.append(step)
        time.sleep(0.02)
        return COMPILED(state, batch, seed, step)

    with mock.patch.object(Checkpointer, "save", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        fit(tmp_path, 200, run=run, save_every=100)
    assert made[-1] < 150


def test_a_broken_number_does_not_hide_that_saving_failed(tmp_path):
    broken = functools.partial(batches, broken_at=6)
    with mock.patch.object(Checkpointer, "save", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        fit(tmp_path, 12, make_batches=broken, save_every=4)


def test_steps_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"toy: 5 steps are not divisible by updates_per_call={N}"):
        fit(tmp_path, 5)


def test_a_stage_that_is_not_finished_is_not_built_on(tmp_path):
    arguments = dict(stage="toy", workdir=str(tmp_path), settings={}, binary="train_toy")
    with pytest.raises(ValueError, match=f"{tmp_path}/toy is at step 0 of 4; run experiments.train_toy"):
        training.load_finished(np.zeros(2), num_steps=4, **arguments)
    assert not (tmp_path / "toy").exists()
    with contextlib.closing(Checkpointer(str(tmp_path / "toy"))) as checkpointer:
        checkpointer.save(2, np.ones(2), {})
    with pytest.raises(ValueError, match="is at step 2 of 4"):
        training.load_finished(np.zeros(2), num_steps=4, **arguments)
    np.testing.assert_array_equal(training.load_finished(np.zeros(2), num_steps=2, **arguments), np.ones(2))


def test_remaining_steps_that_do_not_divide_are_named(tmp_path):
    checkpointer = Checkpointer(str(tmp_path / "toy"))
    checkpointer.save(3, first_state(), {"size": 3})  # of a run with another updates_per_call
    checkpointer.close()
    with pytest.raises(ValueError, match="toy goes on from step 3 of 6: .* updates_per_call=2"):
        fit(tmp_path, 6)
    assert latest_step(tmp_path / "toy") == 3
