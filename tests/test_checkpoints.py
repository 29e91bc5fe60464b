"""Checkpoints: what is restored is what was saved, or an error says why not."""

import functools
import resource
import shutil

import helpers
import jax
import numpy as np
import optax
import pytest

from wam_jax import diffusion_policy, ppo
from wam_jax.checkpoints import Checkpointer

quick_compilation = helpers.quick_compilation


def make_state(size=3):
    """Dicts, tuples, named tuples and empty states of optimisers, several dtypes."""
    params = {"layer": {"kernel": np.arange(2.0 * size, dtype=np.float32).reshape(2, size), "bias": np.ones(size)}}
    params = jax.tree.map(np.float32, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, optimizer_state = optimizer.update(params, optimizer.init(params), params)
    return {"params": params, "optimizer": optimizer_state, "pair": (np.int32(3), np.array([True, False]))}


def save(directory, steps=(1,), *, size=3, settings=None):
    checkpointer = Checkpointer(str(directory))
    for step in steps:
        checkpointer.save(step, {**make_state(size), "step": np.int32(step)}, settings or {"size": size})
    checkpointer.close()


def restore(directory, *, size=3, settings=None, step=None):
    checkpointer = Checkpointer(str(directory))
    try:
        return checkpointer.restore({**make_state(size), "step": np.int32(0)}, settings or {"size": size}, step)
    finally:
        checkpointer.close()


def test_round_trip(tmp_path):
    save(tmp_path)
    restored, saved = restore(tmp_path), {**make_state(), "step": np.int32(1)}
    helpers.assert_equal(restored, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(saved)]


def test_round_trip_of_train_states_from_abstract_templates(tmp_path):
    config = helpers.make_config()
    policy_settings = helpers.freeze(config.policy, decay_steps=4)
    init_policy = functools.partial(diffusion_policy.init, state_dim=8, settings=policy_settings)
    init_ppo = functools.partial(ppo.init, state_dim=8, settings=config.ppo)
    policy = jax.jit(init_policy)(jax.random.key(0))
    states = {"policy": policy, "ppo": jax.jit(init_ppo)(jax.random.key(1), policy.params)}
    for name, state in states.items():
        checkpointer = Checkpointer(str(tmp_path / name))
        checkpointer.save(1, state, {"name": name})
        checkpointer.wait()
        restored = checkpointer.restore(jax.eval_shape(lambda x: x, state), {"name": name})
        checkpointer.close()
        helpers.assert_equal(restored, jax.device_get(state))
        assert type(restored) is type(state)


def test_settings_of_any_kind_are_saved(tmp_path):
    settings = helpers.make_config().ppo.to_dict() | {"dims": (2, 3), "nested": {"name": "x"}}
    save(tmp_path, settings=settings)
    helpers.assert_equal(restore(tmp_path, settings=settings)["params"], make_state()["params"])


@pytest.mark.parametrize("place", ["world_model", "policy/open_drawer"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path, place):
    (tmp_path / place.split("/")[0]).write_text("")
    with pytest.raises(ValueError, match=f"{place} should be a folder of checkpoints"):
        Checkpointer(str(tmp_path / place))


def test_the_newest_is_restored_unless_a_step_is_named(tmp_path):
    save(tmp_path, (1, 5, 10))
    assert restore(tmp_path)["step"] == 10
    assert restore(tmp_path, step=5)["step"] == 5
    assert not (tmp_path / "1").exists()  # two are kept


def test_another_size_is_named_in_one_line(tmp_path):
    save(tmp_path, settings={"hidden_dim": 3, "learning_rate": 0.1})
    with pytest.raises(ValueError, match="of another size") as error:
        restore(tmp_path, size=4, settings={"hidden_dim": 4, "learning_rate": 0.1})
    message = str(error.value)
    assert "hidden_dim=3 there, 4 here" in message
    assert "learning_rate" not in message
    assert "\n" not in message and "another --workdir" in message and str(tmp_path) in message


def test_missing_parts_are_named_like_another_size(tmp_path):
    save(tmp_path, settings={"action_weight": 1000.0})
    template = {**make_state(), "step": np.int32(0), "more": np.zeros(2)}
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(ValueError, match="action_weight=1000.0 there, 0.0 here"):
        checkpointer.restore(template, {"action_weight": 0.0})
    checkpointer.close()


def test_other_settings_of_the_same_size_are_restored(tmp_path):
    save(tmp_path, settings={"learning_rate": 0.1})
    assert restore(tmp_path, settings={"learning_rate": 0.2})["step"] == 1


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}.*run the stage"):
        restore(tmp_path)


@pytest.mark.parametrize("damage", ["no state", "no settings", "empty files", "empty folder"])
def test_a_damaged_checkpoint_is_named_with_the_mend(tmp_path, damage):
    save(tmp_path, (1, 2))
    if damage == "empty files":
        for path in (tmp_path / "2" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    else:
        for part in {"no state": ["state"], "no settings": ["settings"], "empty folder": ["state", "settings"]}[damage]:
            shutil.rmtree(tmp_path / "2" / part)
    with pytest.raises(ValueError, match=f"{tmp_path}/2 .*; delete that folder: the stage then goes on") as error:
        restore(tmp_path)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "2")
    assert restore(tmp_path)["step"] == 1


def test_saving_a_step_again_changes_nothing(tmp_path):
    save(tmp_path)
    save(tmp_path)
    assert restore(tmp_path)["step"] == 1


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    save(tmp_path, (1, 2))
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    (tmp_path / "3.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    assert restore(tmp_path)["step"] == 2
    save(tmp_path, (3,))
    assert restore(tmp_path)["step"] == 3


KILLED = """
import os, sys
import numpy as np
from wam_jax.checkpoints import Checkpointer

checkpointer = Checkpointer(sys.argv[1])
big = {"x": np.zeros(1 << 24, np.float32)}
checkpointer.save(1, big, {"size": 1})
checkpointer.wait()
checkpointer.save(2, {"x": big["x"] + 1}, {"size": 1})
os.kill(os.getpid(), 9)
"""


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    run = helpers.run_python("-c", KILLED, str(tmp_path), JAX_PLATFORMS="cpu")
    assert run.returncode == -9, run.stderr
    checkpointer = Checkpointer(str(tmp_path))
    step = checkpointer.latest_step()
    restored = checkpointer.restore({"x": np.zeros(1 << 24, np.float32)}, {"size": 1})
    checkpointer.close()
    assert step in (1, 2)  # the second where the machine was fast enough
    assert (restored["x"] == step - 1).all()


def test_a_save_that_finds_no_room_says_so_and_leaves_the_checkpoint_before(tmp_path):
    save(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}: a checkpoint could not be saved .*make room, and run the same"):
            save(tmp_path, (2,), size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    helpers.assert_equal(restore(tmp_path)["step"], np.int32(1))


def test_the_directory_of_a_stage_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("here")
    assert restore(tmp_path / "here")["step"] == 1
