"""Diagnoses: what is planted is found. The binary is run in test_binaries.py."""

import dataclasses
import functools
import re
import types
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke_config
from ml_collections import FrozenConfigDict

from experiments import (
    diagnose,
    diagnoses,
    diagnosis_report,
    evaluate,
    finetune_policy,
    simulators,
    train_policy,
    train_reward,
    train_world_model,
)
from wam_jax import calibration, evaluation, intervals, json_files, open_loop, ppo, probes, replay, specs, trust
from wam_jax.calibration import Point

quick_compilation = helpers.quick_compilation
RNG = np.random.default_rng(0)


# --- Calibration ---


def points(real, imagined, task="open_drawer", episodes=100):
    return [
        Point(task, f"ppo {i}", episodes, real=r, demonstrations=d, imagined_real=r)
        for i, (r, d) in enumerate(zip(real, imagined, strict=True))
    ]


def test_a_perfect_model_is_calibrated_and_a_reversed_one_is_not():
    real = [10, 30, 55, 70, 95]
    summary = calibration.summarise(points(real, [100 - r for r in real]))
    perfect, reversed_ = summary["real"], summary["demonstrations"]
    for scope in (perfect["all"], perfect["within_tasks"], perfect["tasks"]["open_drawer"]):
        for name in ("pearson", "spearman"):
            assert [scope[name][key] for key in ("value", "low", "high")] == pytest.approx([1, 1, 1])
    assert reversed_["all"]["pearson"]["value"] == pytest.approx(-1)
    assert perfect["mean_absolute_error"] == 0 and reversed_["mean_error"] == pytest.approx(-0.04)
    assert all(row["imagined"] == row["real"] for row in perfect["table"])
    assert sum(row["points"] for row in perfect["table"]) == 5
    assert 0.95 < perfect["ceiling"]["all"] < 1  # 100 episodes are not endless


def test_differences_between_tasks_do_not_count_within_them():
    easy, hard = points([90, 92, 94], [94, 92, 90]), points([10, 12, 14], [14, 12, 10], task="turn_on_led")
    found = calibration.summarise(easy + hard)["demonstrations"]
    assert found["all"]["pearson"]["value"] > 0.99
    assert found["within_tasks"]["pearson"]["value"] == pytest.approx(-1)
    flat = calibration.summarise(points([50, 50], [20, 80]))["demonstrations"]["all"]
    assert np.isnan(flat["pearson"]["value"]) and np.isnan(flat["spearman"]["low"])


def test_a_task_without_starts_of_ppo_counts_where_it_has_some(tmp_path):
    known, without = points([10, 50, 90], [20, 40, 80]), points([30, 60], [None, None], task="turn_on_led")
    counts = []
    for of in (known + without, without):
        record = {
            "settings": {"num_episodes": 100, "start_seed": 2000},
            "units": {f"{point.task}/{point.policy}": dataclasses.asdict(point) for point in of},
            "summary": calibration.summarise(of),
        }
        json_files.write(tmp_path / "calibration.json", record)
        diagnosis_report.draw("calibration", record, str(tmp_path / "calibration.png"))
        summary = diagnosis_report.write_summary(str(tmp_path), {})
        assert "### Imagined from PPO's starts" in summary
        assert ("imagination is trusted in no task" in summary) == (of == without)
        counts.append({starts: figures["all"]["points"] for starts, figures in record["summary"].items()})
    assert counts == [{"demonstrations": 3, "real": 5}, {"real": 2}]


@pytest.mark.parametrize(("bank", "expected"), [("starts of ppo", 3), (None, None)])
def test_calibration_imagines_from_the_starts_that_ppo_has(monkeypatch, tmp_path, bank, expected):
    asked = []

    def start_bank(config, workdir, task, reward_params):
        asked.append((config.ppo.starts, config.ppo.min_trust, task, reward_params))
        return bank, {}

    config = smoke_config.get_config()
    config.ppo.update(starts="play", min_trust=0.5)
    episodes = types.SimpleNamespace(success=np.array([True, False, True, False]))
    for module, attribute, value in (
        (finetune_policy, "start_bank", start_bank),
        (train_world_model, "load", lambda *_: (None, None)),
        (train_reward, "load", lambda *_: "reward"),
        (diagnoses, "candidates", lambda *_: [diagnoses.Candidate(name, None) for name in ("bc", "ppo 2")]),
        (simulators, "make", lambda *_: helpers.Drawer()),
        (evaluate, "make_policy", lambda *_: None),
        (evaluate, "start_latents", lambda *_: "real starts"),
        (evaluate, "imagined_success", lambda config, trained, of: {"real starts": 0.25, bank: 0.75}[of]),
        (evaluation, "rollout", lambda *_, **__: episodes),
    ):
        monkeypatch.setattr(module, attribute, value)
    options = dataclasses.replace(OPTIONS, num_episodes=4)
    units = diagnoses.calibration_units(FrozenConfigDict(config), str(tmp_path), options)
    found = [unit() for unit in units.values()]
    assert [unit["demonstrations"] for unit in found] == [expected] * 2
    assert [(unit["real"], unit["imagined_real"]) for unit in found] == [(2, 1)] * 2
    assert asked == [("play", 0.5, "turn_on_led", "reward")]  # once for all policies


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.15])
def test_the_ceiling_is_what_a_perfect_model_comes_to(spread):
    """Also where all policies are equally good, and only the number of episodes makes them look different."""
    rng, episodes = np.random.default_rng(0), 64
    rates = np.array([p + spread * np.linspace(-1, 1, 7) for p in (0.3, 0.5, 0.7, 0.8)])  # of four tasks
    outside, imagined = rng.binomial(episodes, rates, (2, 100, 4, 7)) / episodes
    for within in (False, True):
        groups = [list(x) if within else [x.reshape(-1)] for x in outside]
        found = [calibration.ceiling(of_draw, np.full(28, episodes)) for of_draw in groups]
        one, other = ((x - x.mean(2, keepdims=True) * within).reshape(100, -1) for x in (outside, imagined))
        seen = [intervals.pearson(np.stack(pair, axis=1)) for pair in zip(one, other, strict=True)]
        assert np.mean(found) == pytest.approx(np.mean(seen), abs=0.1)


def test_policies_lie_on_the_path():
    base, tuned = {"w": np.zeros(2)}, {"w": np.array([2.0, -4.0])}
    for share, expected in ((0, [0, 0]), (0.25, [0.5, -1]), (1, [2, -4]), (2, [4, -8])):
        policy = calibration.along_path(base, tuned, share)
        np.testing.assert_array_equal(policy.finetuned["w"], expected)
        assert policy.base is base


def test_intervals_hold_the_mean_and_narrow_with_more_units():
    few, many = RNG.normal(5, 1, (20, 1)), RNG.normal(5, 1, (2000, 1))
    (low, high), (lower, higher) = intervals.of_mean(few), intervals.of_mean(many)
    assert low < few.mean() < high and (higher - lower) < 0.2 * (high - low)
    np.testing.assert_allclose(higher - lower, 2 * 1.96 / np.sqrt(2000), rtol=0.15)
    low, high = intervals.of_mean(np.array([[1.0, np.nan], [1.0, np.nan], [np.nan, np.nan]]))
    assert (low[0], high[0]) == (1, 1) and np.isnan(low[1])


# --- The classifier and divergence ---

SOLVED = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]], bool)


def planted(params, feature, first_feature):
    """In place of a classifier: the features hold the verdicts, and the first ones that they are the first."""
    assert (first_feature == -1).all()
    return feature[..., 0] > 0


def plant(positive):
    """Features that make `planted` say what is planted after the first frame."""
    features = np.concatenate([np.full_like(positive[:, :1], -1, np.float32), positive], axis=1)
    return features[..., None].astype(np.float32)


@pytest.mark.parametrize("consecutive", [1, 2])
def test_a_classifier_that_always_fires_has_one_false_alarm_an_episode(consecutive):
    rule = {"verdict": planted, "consecutive": consecutive}
    quality = replay.classifier_quality({}, plant(np.ones_like(SOLVED)), SOLVED, **rule)
    assert quality["frames"]["precision"] == pytest.approx(6 / 18) and quality["frames"]["recall"] == 1
    rule = quality["rule"]
    assert (rule["fires"], rule["real_successes"]) == (3, 2)
    assert rule["fires_on_failures"]["count"] == rule["fires_on_failures"]["of"] == 1
    # Of the third episode, frame 2 is solved: a rule of two frames begins to fire there rightly.
    false = {1: 3, 2: 2}[consecutive]
    assert rule["false_alarms_per_episode"]["value"] == pytest.approx(false / 3)
    assert rule["episodes_with_false_alarms"]["count"] == false
    assert rule["precision"]["count"] == 3 - false and rule["recall"]["share"] == 1


def test_a_classifier_that_knows_has_none():
    two = {"verdict": planted, "consecutive": 2}
    rule = replay.classifier_quality({}, plant(SOLVED), SOLVED, **two)["rule"]
    assert rule["false_alarms_per_episode"]["value"] == 0 and rule["precision"]["share"] == rule["recall"]["share"] == 1
    assert rule["delay"] == 1 and rule["fires_on_failures"]["share"] == 0
    never = replay.classifier_quality({}, plant(0 * SOLVED), SOLVED, **two)
    assert never["frames"]["precision"] is None and never["rule"]["recall"]["share"] == 0


def test_divergence_names_the_step_at_which_a_planted_imagination_parts():
    steps, columns = 20, probes.STATE[-1].stop
    state = np.zeros((5, steps, columns))
    imagined = state.copy()
    imagined[:, 10:, 0] = imagined[:, :2, 0] = 7.0  # cm of the hand, from step 11 on, and in the first two
    solved, fires = np.zeros((2, 5, steps), bool)
    solved[0, 4:] = solved[1, 15:] = solved[2, 15:] = True  # at steps 5, 16, 16; the others fail
    fires[0, 7:] = fires[1, 2:] = fires[3, 8:] = True  # on time (4 in a row), early, never, made up, rightly never
    recorded = np.zeros_like(fires)
    recorded[2, 9] = True
    identity = probes.Probe(np.eye(columns), np.zeros(columns), 0.0)
    found = replay.divergence(
        replay.Replay(imagined, state, state, solved, fires, solved, recorded), identity, probes.quantity("drawer"),
        consecutive=4, slack=2,
    )  # fmt: skip
    assert (found["real"], found["rule_on_real_frames"], found["rule_on_imagination"]) == (3, 3, 3)
    success, failure = found["groups"]["success"], found["groups"]["failure"]
    assert success["running"] == [3] * 5 + [2] * 11 + [0] * 4 and failure["running"] == [2] * steps
    assert success["verdicts"] == {"agree": 1, "early": 1, "late": 0, "missed": 1, "made up": 0}
    assert failure["verdicts"] == {"agree": 1, "early": 0, "late": 0, "missed": 0, "made up": 1}
    assert success["disagreement"] == {"episodes": 2, "of": 3, "median_step": 9.5}  # steps 3 and 16
    assert success["parting"] == {"episodes": 2, "of": 3, "median_step": 11}  # the first has ended before
    counts = ("rule_on_real_frames", "rule_on_imagination", "rule_with_recorded_robot")
    assert [success[name] for name in counts] == [3, 2, 1] and [failure[name] for name in counts] == [0, 1, 0]
    hand = failure["errors"]["hand"]
    assert hand["imagined"]["mean"] == [7] * 2 + [0] * 8 + [7] * 10 and hand["filtered"]["mean"] == [0] * steps
    assert np.isnan(success["errors"]["mechanism"]["imagined"]["mean"][16:]).all()


def test_the_published_summary_is_that_of_its_figures(tmp_path):
    published = helpers.ROOT / "docs/results/playtable_ensemble/wam_3/diagnose"
    for part in ("trust", "divergence"):
        (tmp_path / f"{part}.json").write_bytes((published / f"{part}.json").read_bytes())
    assert diagnosis_report.write_summary(str(tmp_path), {}) == (published / "summary.md").read_text()
    older = json_files.read(tmp_path / "divergence.json", "")  # of before the rule's verdicts were counted by group
    for unit in older["units"].values():
        for group in unit["groups"].values():
            del group["rule_on_real_frames"], group["rule_with_recorded_robot"]
    json_files.write(tmp_path / "divergence.json", older)
    assert "| 25 | - |" in diagnosis_report.write_summary(str(tmp_path), {})


# --- The binary ---

CONFIG = smoke_config.get_config()
OPTIONS = diagnoses.Options(tasks=("turn_on_led",), horizons=(1, 4))


@pytest.mark.parametrize(
    ("changes", "only", "message"),
    [
        ({}, ("probes",), "--only=probes: no such part"),
        ({"tasks": ("close_drawer",)}, (), "--tasks=close_drawer: the run has"),
        ({"seed_offset": 0}, (), "--seed_offset=0 would be the evaluation's own starts"),
        ({"horizons": (2, 1)}, (), "--horizons=2,1; expected rising"),
    ],
)
def test_mistakes_are_named(changes, only, message):
    options = diagnoses.Options(**{**OPTIONS.__dict__, **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        diagnose.check(CONFIG, options, only)


def test_a_gaussian_policy_has_no_noise_to_vary():
    config, options = smoke_config.get_config(), diagnoses.Options(**{**OPTIONS.__dict__, "noise": (0.4,)})
    diagnose.check(config, options, ())
    config.policy.kind = "gaussian"
    with pytest.raises(
        ValueError, match="--noise changes policy.evaluation_std, which a Gaussian policy does not have"
    ):
        diagnose.check(config, options, ())


def test_a_broken_diagnosis_goes_on_and_figures_of_other_options_are_refused(monkeypatch, tmp_path):
    done, episodes = [], {"num_episodes": 3}

    def units(config, workdir, options):
        return {name: lambda name=name: measure(name) for name in ("a", "b")}

    def measure(name):
        if name == "b" and done == ["a"]:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(name)
        return {"name": name, "share": float("nan")}

    drawn = {}
    monkeypatch.setattr(diagnoses, "PARTS", {"classifier": units})
    monkeypatch.setattr(diagnoses, "settings", lambda *arguments: episodes)
    monkeypatch.setattr(diagnosis_report, "draw", lambda part, record, path: drawn.update(record["units"]))
    monkeypatch.setattr(diagnosis_report, "write_summary", lambda directory, left_out: "told")
    with pytest.raises(KeyboardInterrupt):
        diagnose.run(CONFIG, str(tmp_path), OPTIONS)
    for _ in range(2):
        assert diagnose.run(CONFIG, str(tmp_path), OPTIONS) == "told"
    assert done == ["a", "killed", "b"] and list(drawn) == ["a", "b"] and drawn["a"]["share"] is None
    episodes["num_episodes"] = 2
    with pytest.raises(ValueError, match="made with num_episodes=3, not 2; take that value, or delete it"):
        diagnose.run(CONFIG, str(tmp_path), OPTIONS)


@pytest.mark.parametrize(
    ("part", "module", "name", "value", "message"),
    [
        ("open_loop", probes, "PENALTIES", (1.0,), "penalties_of_each_target=[1e-08, .* not [1.0]"),
        ("trust", trust, "HOLD", 7, "held_steps=12, not 7"),
        ("divergence", replay, "PARTING", 4.0, "parting_cm=3.0, not 4.0"),
        ("classifier", None, "", None, "world_model_sha256='"),
    ],
)
def test_figures_of_other_code_or_another_world_model_are_refused(
    monkeypatch, tmp_path, part, module, name, value, message
):
    config, params = FrozenConfigDict(CONFIG), {"kernel": np.zeros(3, np.float32)}
    monkeypatch.setattr(train_world_model, "load", lambda *arguments: (None, params))
    monkeypatch.setattr(diagnoses, "PARTS", {part: lambda *arguments: {"a": lambda: {"n": 1}}})
    monkeypatch.setattr(diagnosis_report, "draw", lambda *arguments: None)
    monkeypatch.setattr(diagnosis_report, "write_summary", lambda *arguments: "told")
    for _ in range(2):  # the same code goes on
        assert diagnose.run(config, str(tmp_path), OPTIONS) == "told"
    if module is None:
        params["kernel"][1] = 1e-6
    else:
        monkeypatch.setattr(module, name, value)
    with pytest.raises(ValueError, match=f"made with {message.replace('[', '.')}"):
        diagnose.run(config, str(tmp_path), OPTIONS)


def train_ppo(config, workdir, warmup):
    """PPO whose iterations only count, and after some of warm-up move the actor; nothing else is computed."""

    def iteration(state, inputs, rng, **static):
        moved = jax.tree.map(lambda x: x + (state.iteration >= warmup), state.params.actor)
        state = state.replace(params=state.params.replace(actor=jax.tree.map(lambda x: x + 9, moved)))
        average = jax.tree.map(lambda x: x + (state.iteration >= warmup), state.ema_actor)
        return state.replace(ema_actor=average, iteration=state.iteration + 1), {"imagined_success": jnp.float32(0)}

    starts = helpers.make_latents(0, (2,), config.world_model)
    with (
        mock.patch.object(ppo, "iteration", iteration),
        mock.patch.object(finetune_policy, "start_bank", return_value=(starts, {})),
        mock.patch.object(train_world_model, "load", return_value=(helpers.make_model(), {"rssm": {}})),
        mock.patch.object(train_reward, "load", return_value={}),
    ):
        finetune_policy.run(config, workdir)


@pytest.mark.parametrize(("keep", "warmup", "names"), [(2, 2, ["ppo 4", "ppo 5"]), (4, 2, ["ppo 3", "ppo 4", "ppo 5"])])
def test_policies_along_training_are_those_that_ppo_kept_and_changed(monkeypatch, tmp_path, keep, warmup, names):
    config = helpers.make_config()
    config.update(tasks=("turn_on_led",))
    config.ppo.update(num_iterations=5, tasks_at_once=1, updates_per_call=1, save_every=1, keep_checkpoints=keep)
    config = FrozenConfigDict(config)
    base = train_policy.initial_state(config, "turn_on_led").ema_params
    monkeypatch.setattr(train_policy, "load", lambda *arguments: base)
    train_ppo(config, str(tmp_path), warmup)
    finetune_policy.load(config, str(tmp_path), "turn_on_led")  # reading deletes nothing
    found = diagnoses.candidates(config, str(tmp_path), "turn_on_led", diagnoses.Options(tasks=(), shares=(0.5,)))
    assert [candidate.name for candidate in found] == ["bc", *names, "ppo 5 x 0.5"]
    saved = finetune_policy.saved_iterations(str(tmp_path), "turn_on_led")
    assert saved == list(range(6 - keep, 6))  # ppo 2 of the longer row equals the cloned policy


def test_a_policy_that_ppo_never_changed_is_one_policy(monkeypatch, tmp_path):
    config = helpers.make_config()
    config.update(tasks=("turn_on_led",))
    config.ppo.update(num_iterations=1, tasks_at_once=1, updates_per_call=1, save_every=1)
    config = FrozenConfigDict(config)
    base = train_policy.initial_state(config, "turn_on_led").ema_params
    monkeypatch.setattr(train_policy, "load", lambda *arguments: base)
    train_ppo(config, str(tmp_path), warmup=1)
    options = diagnoses.Options(tasks=(), noise=(0.4,))
    found = diagnoses.candidates(config, str(tmp_path), "turn_on_led", options)
    assert [candidate.name for candidate in found] == ["bc", "bc, noise 0.4"]


def test_imagination_of_a_context_begins_where_the_filter_is():
    model = helpers.make_model(soft_prior=True)
    params, steps = helpers.make_state(model).params, helpers.make_steps()
    settings = FrozenConfigDict({"soft_feature": True})
    windows, rng = open_loop.encode(model, params, [steps, steps]), jax.random.key(0)
    assert windows.embedding.shape[:2] == (2 * helpers.B, helpers.T)
    alone = open_loop.Windows(*(x[:, 2:] for x in windows))
    from_start = open_loop.imagined(model, params, alone, rng, settings=settings, first=2, context=3, horizon=2)
    inside = open_loop.imagined(model, params, windows, rng, settings=settings, first=4, context=3, horizon=2)
    helpers.assert_close(inside, from_start, atol=1e-6)
    windows.embedding[:, 5:] = 0.0  # the future
    helpers.assert_equal(
        open_loop.imagined(model, params, windows, rng, settings=settings, first=4, context=3, horizon=2), inside
    )


def test_imagination_of_recordings_may_move_the_robot_as_recorded():
    model = helpers.make_model(robot_state=True)
    params, steps = helpers.make_state(model).params, helpers.make_steps()
    windows, settings = open_loop.encode(model, params, [steps]), FrozenConfigDict({"soft_feature": True})
    imagine = functools.partial(
        open_loop.imagined, model, params, windows, jax.random.key(0), settings=settings, first=1, context=2, horizon=2
    )
    recorded = specs.proprioception(steps.observation.robot_obs)[:, 1:4]  # frames 1, seen, to 3
    robot = imagine(recorded_robot=True)[..., -specs.PROPRIOCEPTION_DIM :]
    helpers.assert_close(robot, recorded, atol=1e-6)
    free = imagine()[..., -specs.PROPRIOCEPTION_DIM :]
    helpers.assert_close(free[:, 0], recorded[:, 0], atol=1e-6)
    assert np.abs(free[:, 1:] - recorded[:, 1:]).max() > 1e-3
    bare = helpers.make_model()
    with pytest.raises(ValueError, match="robot_state=False: this model carries no state of the robot"):
        open_loop.imagined(bare, params, windows, jax.random.key(0), settings=settings, first=1, context=2, horizon=2,
                           recorded_robot=True)  # fmt: skip
