"""A user's mistake is one line that names the value and the mend, before any work starts."""

import json
import subprocess
import sys

import helpers
import jax
import pytest
from ml_collections import FrozenConfigDict

from experiments import collect_playtable, config_checks, finetune_policy, launch, reproduce, train_world_model


@pytest.fixture(autouse=True)
def updates(monkeypatch):
    """Records settings of JAX instead of making them: they would outlast the test."""
    found = []
    monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: found.append((name, value)))
    return found


def change(path, value, config=None):
    """A tiny config with another value at a dotted path."""
    config = config or helpers.make_config()
    with config.unlocked():
        *parents, key = path.split(".")
        part = config
        for name in parents:
            part = part[name]
        part[key] = value
    return config


def test_a_good_config_passes_and_is_frozen(tmp_path):
    config = launch.prepare(helpers.make_config(), str(tmp_path / "new" / "run"))
    assert isinstance(config, FrozenConfigDict)
    assert hash(config.world_model) == hash(FrozenConfigDict(helpers.make_config()).world_model)
    with open(tmp_path / "new" / "run" / "config.json") as file:
        assert json.load(file)["world_model"]["batch_size"] == helpers.B


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tasks", ("open_drawer", "open_door"), "unknown task 'open_door'; expected one of open_drawer"),
        ("environment", "kitchen", "config.environment='kitchen'; expected one of playtable, calvin"),
        ("dataset.pictures", "full", "config.dataset.pictures='full'; expected one of drawn for playtable"),
        ("evaluation.video_task", "fly", "unknown task 'fly'; expected one of open_drawer"),
        ("num_devices", 999, "num_devices=999, but this host has .*; ask for at most"),
        ("num_devices", -1, "config.num_devices=-1; expected 0 or more"),
        ("seed", -1, "config.seed=-1; expected 0 or more"),
        ("world_model.batch_size", 0, "config.world_model.batch_size=0; expected 1 or more"),
        ("world_model.encoder_width", 0, "config.world_model.encoder_width=0; expected 1 or more"),
        ("world_model.learning_rate", float("nan"), "config.world_model.learning_rate=nan; expected a number above 0"),
        ("world_model.kl_weight", float("inf"), "config.world_model.kl_weight=inf; expected a number above 0"),
        ("world_model.open_loop_weight", -1.0, "config.world_model.open_loop_weight=-1.0; expected a number of 0 or"),
        ("ppo.ema_decay", 1.0, "ppo.ema_decay=1.0 keeps the cloned policy for ever"),
        ("policy.ema_decay", 1.0, "config.policy.ema_decay=1.0 keeps the network as it was drawn for ever"),
        ("ppo.critic_warmup", 4, "config.ppo.critic_warmup=4 leaves the actor none of num_iterations=4; take fewer"),
        ("policy.ema_decay", 2.0, "config.policy.ema_decay=2.0; expected a number from 0 to 1"),
        ("policy.noise_draws", 3, "config.policy.noise_draws=3 does not divide the 8 noised chunks .*e.g. 1"),
        ("policy.noise_draws", 0, "config.policy.noise_draws=0; expected 1 or more"),
        ("policy.kind", "normal", "config.policy.kind='normal'; expected 'diffusion' or 'gaussian'"),
        ("policy.compute_dtype", "half", "config.policy.compute_dtype='half'; expected"),
        ("reward.kind", "rule", "config.reward.kind='rule'; expected 'classifier' or 'scene'"),
        (
            "reward.kind",
            "scene",
            "kind='scene' needs a world model that decodes .*scene_weight is 0; take a weight above",
        ),
        ("reward.disagreement_quantile", 0.5, "asks for priors that may disagree, .*num_members=0; take 2 or more"),
        ("reward.disagreement_quantile", 1.5, "disagreement_quantile=1.5; expected a number from 0 to 1"),
        ("prior_ensemble.num_members", -1, "config.prior_ensemble.num_members=-1; expected 0 or more"),
        ("prior_ensemble.num_steps", 250, "config.prior_ensemble.num_steps=250 .*updates_per_call=100; take"),
        ("prior_ensemble.batch_size", 0, "config.prior_ensemble.batch_size=0; expected 1 or more"),
        ("reward.embedding_dims", (), "config.reward.embedding_dims=.*; expected one size or more"),
        ("ppo.max_start_step", -1, "config.ppo.max_start_step=-1; expected 0 or more"),
        ("tasks", ("open_drawer", "open_drawer"), "config.tasks names 'open_drawer' twice"),
        ("reward.batch_size", 7, "config.reward.batch_size=7 must be even .* take a multiple of 2"),
        ("world_model.num_steps", 5, "config.world_model.num_steps=5 is not a positive multiple of .*=2; take 4"),
        ("policy.num_steps", 7, "config.policy.num_steps=7 .*; take 8"),
        ("reward.num_steps", 3, "config.reward.num_steps=3 .*; take"),
        ("ppo.num_iterations", 3, "config.ppo.num_iterations=3 .*updates_per_call=2; take"),
        ("world_model.updates_per_call", 0, "config.world_model.updates_per_call=0; expected 1 or more"),
        ("tasks", (), "config.tasks is empty; name at least one of open_drawer"),
        ("evaluation.num_episodes", 0, "config.evaluation.num_episodes=0; expected 1 or more"),
        ("ppo.batch_size", 0, "config.ppo.batch_size=0; expected 1 or more"),
        ("evaluation.max_steps", 70, "config.evaluation.max_steps=70 .*multiple of config.policy.chunk=4.*; take 72"),
        ("ppo.max_steps", 37, "config.ppo.max_steps=37 .*multiple of config.policy.chunk=4.*; take 36"),
        ("ppo.max_steps", -4, "config.ppo.max_steps=-4; expected 0 or more"),
        ("dataset.disturbed_share", 1.5, "disturbed_share=1.5; expected a number from 0 to 1"),
        ("method", "dreamer_v2", "config.world_model.action_weight=1000.0 with method 'dreamer_v2'"),
        ("world_model.action_input", "latents", "action_input='latents'; expected one of embeddings, features"),
        ("world_model.action_target", "random", "action_target='random'; expected one of taken, shuffled"),
        ("world_model.action_steps", 0, "config.world_model.action_steps=0; expected 1 or more"),
        ("world_model.action_steps", 8, "action_steps=8 .*window_length=8; take 7 or less"),
        ("world_model.first_kl_weight", -1.0, "config.world_model.first_kl_weight=-1.0; expected a number of 0 or"),
        ("world_model.open_loop_steps", 9, "open_loop_steps=9; expected 2 to window_length=8"),
        ("world_model.open_loop_steps", 1, "open_loop_steps=1; expected 2 to window_length=8"),
        ("world_model.window_length", 1, "config.world_model.window_length=1; expected 2 or more"),
        ("policy.time_dim", 2, "config.policy.time_dim=2; expected 4 or more"),
        ("policy.time_dim", 7, "config.policy.time_dim=7 is odd"),
        ("ppo.clip_rate", 0.0, "config.ppo.clip_rate=0.0; expected a number above 0"),
        ("reward.embedding_dims", (5.5,), "config.reward.embedding_dims=.*; expected one size or more"),
        ("reward.classification_dims", ("a",), "config.reward.classification_dims=.*; expected one size or more"),
        ("seed", 10**20, "config.seed=1000.*; expected 0 or more, at most 2147482648"),
        ("method", "abc", "config.method='abc'; expected one of wam, dreamer_v2"),
        ("world_model.window_length", 500, "window_length=500 is longer than .*play_steps=400"),
        ("dataset.cache", "disk", "config.dataset.cache='disk'; expected one of none, memory"),
        ("dataset.play", "nowhere", "dataset directory nowhere does not exist"),
        ("dataset.demonstrations", "nowhere", "dataset directory nowhere does not exist"),
        ("dataset.validation_episodes", 0, "config.dataset.validation_episodes=0; expected 1 or more"),
        ("dataset.demonstrations_per_task", 0, "config.dataset.demonstrations_per_task=0; expected 1 or more"),
        ("policy.finetuned_steps", 5, "config.policy.finetuned_steps=5 exceeds denoising_steps=4"),
        ("policy.warmup_steps", 4, "config.policy.warmup_steps=4 .*num_steps=4"),
        ("world_model.kind", "mlp", "world_model.kind='mlp'; expected 'conv' or 'patch'"),
        ("world_model.compute_dtype", "half", "world_model.compute_dtype='half'; expected"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_the_mend(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        launch.prepare(change(path, value), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_gaussian_policy_is_cloned_without_noise(tmp_path):
    config = change("policy.kind", "gaussian", change("policy.noise_draws", 2))
    with pytest.raises(ValueError, match="noise_draws=2, but a Gaussian policy is cloned without noise; take 1"):
        launch.prepare(config, str(tmp_path / "run"))


def test_a_soft_prior_needs_a_policy_that_was_cloned_on_probabilities(tmp_path):
    config = change("policy.soft_feature", False, change("world_model.soft_prior", True))
    with pytest.raises(ValueError, match="soft_prior=True needs config.policy.soft_feature=True"):
        launch.prepare(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("world_model.proprioception_weight", 0.0, "proprioception_weight is 0; take another, e.g. 1000"),
        ("world_model.proprioception_input", False, "robot_state=True needs proprioception_input=True"),
        ("world_model.action_input", "features", "from which the action can be read off; take action_input=embeddings"),
    ],
)
def test_the_robots_own_state_is_seen_and_learnt_and_no_input_of_the_inverse_dynamics(tmp_path, path, value, message):
    good = change("world_model.proprioception_weight", 1.0, change("world_model.robot_state", True))
    config_checks.check(good)
    with pytest.raises(ValueError, match=message):
        launch.prepare(change(path, value, good), str(tmp_path / "run"))


def test_batches_must_divide_over_the_devices(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 3)
    config = change("num_devices", 3)
    with pytest.raises(ValueError, match="config.world_model.batch_size=4 .* by 3 devices.*: 3$"):
        config_checks.check(config)
    for path in ("world_model.batch_size", "policy.batch_size", "ppo.num_rollouts"):
        change(path, 6, config)
    with pytest.raises(ValueError, match="config.reward.batch_size=16 .* 3 devices.*; take a multiple of 6"):
        config_checks.check(config)
    config_checks.check(change("reward.batch_size", 12, config))
    with pytest.raises(ValueError, match="config.prior_ensemble.batch_size=256 .* by 3 devices.*: 255$"):
        config_checks.check(change("prior_ensemble.num_members", 2, config))


@pytest.mark.parametrize(
    ("path", "value"), [("seed", 1), ("world_model.learning_rate", 0.5), ("tasks", ("open_drawer",))]
)
def test_a_workdir_of_another_config_is_refused(tmp_path, path, value):
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=f"{tmp_path} holds a run with config.{path}=.*; use another --workdir"):
        launch.prepare(change(path, value), str(tmp_path))
    assert (tmp_path / "config.json").read_text() == before


def test_a_workdir_without_work_takes_another_config(tmp_path):
    launch.prepare(change("environment", "calvin"), str(tmp_path))  # as after a mistake that was named later
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="config.environment='playtable', not 'calvin'"):
        launch.prepare(change("environment", "calvin"), str(tmp_path))


@pytest.mark.parametrize("name", ["data", "world_model", "evaluation", "diagnose"])
def test_a_file_in_place_of_a_folder_of_the_run_is_named(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/{name} should be a folder of the run, and is a file"):
        launch.prepare(helpers.make_config(), str(tmp_path))


def test_a_second_run_in_a_workdir_is_refused_while_the_first_lives(tmp_path):
    code = "import sys; from experiments import launch; launch._lock(sys.argv[1]); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=helpers.ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"another run works in {tmp_path}; wait for it"):
            launch.prepare(helpers.make_config(), str(tmp_path))
        other.communicate(b"\n")
    launch.prepare(helpers.make_config(), str(tmp_path))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--workdir={tmp_path}/file cannot be made or written"):
        launch.prepare(helpers.make_config(), str(tmp_path / "file"))


def test_a_damaged_config_is_named(tmp_path):
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is damaged .*; delete it"):
        launch.prepare(helpers.make_config(), str(tmp_path))


def write_old_config(workdir, change):
    """The config.json of a run that another version has made."""
    launch.prepare(helpers.make_config(), str(workdir))
    (workdir / "metrics.jsonl").write_text("")
    old = json.loads((workdir / "config.json").read_text())
    change(old)
    (workdir / "config.json").write_text(json.dumps(old))


def test_an_option_that_came_later_is_as_if_it_stood_at_its_default(tmp_path):
    write_old_config(tmp_path, lambda old: old["ppo"].pop("min_advantage_std"))
    with pytest.raises(ValueError, match="with config.ppo.min_advantage_std=0.0, not 2.0; use another --workdir"):
        launch.prepare(change("ppo.min_advantage_std", 2.0), str(tmp_path))
    launch.prepare(change("ppo.min_advantage_std", 0.0), str(tmp_path))


def test_an_option_that_has_gone_is_named(tmp_path):
    write_old_config(tmp_path, lambda old: old["ppo"].update(entropy_weight=0.1))
    with pytest.raises(ValueError, match="another version, with config.ppo.entropy_weight=0.1.*does not know; use"):
        launch.prepare(helpers.make_config(), str(tmp_path))


def test_a_mistake_that_is_found_late_leaves_its_mend_possible(tmp_path):
    """A dataset that cannot be opened must not make the workdir one of another config."""
    config = launch.prepare(helpers.make_config(), str(tmp_path))
    with pytest.raises(ValueError, match=f"dataset directory {tmp_path}/data/playtable_play does not exist"):
        train_world_model.run(config, str(tmp_path))
    launch.prepare(change("dataset.play_steps", 200), str(tmp_path))


def test_rollouts_last_as_long_as_evaluations_episodes_or_as_they_are_told():
    config = helpers.make_config()  # evaluation.max_steps = 12, chunks of 4
    assert finetune_policy.ppo_settings(FrozenConfigDict(config)).horizon == 3
    assert finetune_policy.ppo_settings(FrozenConfigDict(change("ppo.max_steps", 20, config))).horizon == 5


def test_all_differences_are_counted(tmp_path):
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"config.method='wam', not 'dreamer_v2' \(and 1 more difference\w*\)"):
        launch.prepare(helpers.make_config("dreamer_v2"), str(tmp_path))


def test_what_does_not_change_the_files_may_change(tmp_path):
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    config = helpers.make_config()
    free = {"evaluation.num_episodes": 3, "world_model.save_every": 8, "policy.save_every": 1, "num_devices": 0}
    free |= {"dataset.cache": "none", "ppo.updates_per_call": 1, "ppo.tasks_at_once": 2}
    for path, value in free.items():
        change(path, value, config)
    launch.prepare(config, str(tmp_path))
    with open(tmp_path / "config.json") as file:
        assert json.load(file)["world_model"]["save_every"] == 8


def test_a_longer_training_needs_a_workdir_of_its_own(tmp_path):
    """Later stages there were trained on the latents of the shorter one."""
    launch.prepare(helpers.make_config(), str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    config = helpers.make_config()
    change("world_model.num_steps", 8, config)
    with pytest.raises(ValueError, match=r"config.world_model.num_steps=\d+, not 8.*use another --workdir"):
        launch.prepare(config, str(tmp_path))


def test_virtual_cpu_devices_run_in_step_with_the_host(tmp_path, monkeypatch, updates):
    """JAX reads the setting when it first looks for devices, so it has to be made before."""
    seen = []

    def local_devices():
        seen.append(("jax_cpu_enable_async_dispatch", False) in updates)
        return jax.devices() * 2

    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setattr(jax, "local_devices", local_devices)
    launch.prepare(helpers.make_config(), str(tmp_path))
    assert seen and all(seen)


def test_programs_are_cached_where_the_environment_says(tmp_path, monkeypatch, updates):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    launch.prepare(helpers.make_config(), str(tmp_path))
    assert ("jax_compilation_cache_dir", str(tmp_path / "cache")) in updates


def test_datasets_are_the_configs_or_the_workdirs():
    config = FrozenConfigDict(change("dataset.play", "elsewhere"))
    assert launch.play_directory(config, "run") == "elsewhere"
    assert launch.demonstration_directory(config, "run") == "run/data/playtable_demonstrations"


def test_recorded_data_is_not_collected_and_a_simulator_without_assets_refused(tmp_path):
    config = FrozenConfigDict(change("environment", "calvin"))
    for binary in (collect_playtable, train_world_model):
        with pytest.raises(ValueError, match="config.dataset.play is empty, .* --config.dataset.play=DIR"):
            binary.run(config, str(tmp_path))
    with pytest.raises(ValueError, match="no folder of CALVIN's assets given: --calvin_assets=DIR"):
        reproduce.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", '{"seconds": 3}', '{"seconds": {"policy": "x"}}', "{"])
def test_damaged_notes_of_seconds_stop_nothing(tmp_path, text):
    (tmp_path / "stages.json").write_text(text)
    for _ in range(2):
        reproduce.note_seconds(str(tmp_path), "policy", 1.5)
    assert json.loads((tmp_path / "stages.json").read_text())["seconds"] == {"policy": 3.0}


@pytest.mark.parametrize(("until", "number"), [("reward", 4), ("evaluate_bc", 5), ("video", 8)])
def test_reproduce_stops_after_the_stage_that_until_names(tmp_path, monkeypatch, capsys, until, number):
    done = []
    for name in reproduce.STAGES:
        monkeypatch.setitem(reproduce.STAGES, name, lambda config, workdir, name=name: done.append(name))
    reproduce.run(FrozenConfigDict(helpers.make_config()), str(tmp_path), until=until)
    assert done[-1] == until and len(done) == number
    assert f"[{number}/{number}] {until}" in capsys.readouterr().out
    with open(tmp_path / "stages.json") as file:
        assert list(json.load(file)["seconds"]) == done
    assert not (tmp_path / "table.json").exists()  # nothing was evaluated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json is damaged"),
        ("[]", "config.json is damaged .it holds a list, not a dict"),
        ('{"architectures": ["Bert"]}', "config.json is no config of a run .its method is None"),
        (None, "holds a run with config.seed=0, not 5"),
    ],
)
def test_a_binary_that_reads_a_run_compares_its_config_even_where_it_lies_alone(tmp_path, text, message):
    path = tmp_path / "config.json"
    launch.prepare(helpers.make_config(), str(tmp_path))
    if text is not None:
        path.write_text(text)
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        launch.prepare(change("seed", 5), str(tmp_path), reads=True)
    assert path.read_text() == before
