"""Predictions through their command: known values, windows that depend on nothing else, resuming, the table."""

import json

import helpers
import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image

from experiments import evaluate_prediction, print_architecture, train_world_model
from wam_jax import prediction, prediction_tables, rlds

quick_compilation = helpers.quick_compilation
SETTINGS = dict(num_windows=5, horizon=4, context=2, batch_size=2, seed=0)
STEPS = 12


def write_play(directory, **episodes):
    def episode(seed):
        return rlds.Episode(helpers.make_steps(seed, (STEPS,)), "test")

    return helpers.write_dataset(
        directory, "play", {split: [episode(seed) for seed in range(count)] for split, count in episodes.items()}
    )


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    return write_play(tmp_path_factory.mktemp("play") / "data", train=1, validation=2)


def make_config(play, cache="memory", **changes):
    config = helpers.make_config("wam")
    config.dataset.cache = cache
    config.dataset.play = str(play)
    config.prediction.update(SETTINGS | changes)
    return FrozenConfigDict(config)


@pytest.fixture
def measure(play, monkeypatch, tmp_path):
    """Runs the command on an untrained world model."""
    model = helpers.make_model("wam")
    monkeypatch.setattr(train_world_model, "load", lambda *_: (model, helpers.make_state(model).params))

    def run(workdir="run", paths=None, **changes):
        (tmp_path / workdir).mkdir(exist_ok=True)
        return evaluate_prediction.run(make_config(play, **changes), str(tmp_path / workdir), paths or {})

    return run


def test_known_values():
    real = np.random.default_rng(0).integers(0, 200, (3, 64, 64, 3), np.uint8)
    np.testing.assert_allclose(prediction.psnr(real, real + 10), 20 * np.log10(255 / 10))
    assert list(prediction.psnr(real, real)) == [prediction.MAX_PSNR] * 3
    np.testing.assert_allclose(prediction.ssim(real, real), 1)
    flat, other = (np.full((1, 64, 64, 3), x, np.uint8) for x in (100, 150))  # no contrast: SSIM's first factor alone
    c1 = (0.01 * 255) ** 2
    np.testing.assert_allclose(prediction.ssim(flat, other), (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    values = np.array([[[1.0, 3.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])  # cameras, windows, steps
    static = prediction.summarise(values)["static"]
    assert (static["mean"], static["std"]) == (3, pytest.approx(2**0.5))
    assert static["high"] == pytest.approx(3 + 12.7062)  # t of one degree of freedom, standard error 1
    assert prediction.summarise(values)["both"]["mean"] == 1.5
    assert prediction.curve(values)["static"]["mean"] == [2, 4]


def test_a_prediction_knows_the_context_and_the_actions_alone():
    model = helpers.make_model("wam")
    params = helpers.make_state(model).params
    steps, rngs = helpers.make_steps(0, (3, 6)), jax.random.split(jax.random.key(0), 3)

    def predict(steps, rngs):
        return prediction.open_loop(model, params, steps.observation, steps.action[:, :-1], rngs, context=2)

    predicted = predict(steps, rngs)
    assert [x.shape for x in predicted] == [(3, 6, 64, 64, 3)] * 2
    later = jax.tree.map(lambda x: np.concatenate([x[:, :2], x[:, 2:][:, ::-1]], 1), steps.observation)
    helpers.assert_equal(predict(steps.replace(observation=later), rngs), predicted)
    pushed = steps.replace(action=np.concatenate([steps.action[:, :3], -steps.action[:, 3:]], 1))
    changed = predict(pushed, rngs)
    helpers.assert_equal([x[:, :4] for x in changed], [x[:, :4] for x in predicted])
    assert all((x[:, 4:] != y[:, 4:]).any() for x, y in zip(changed, predicted, strict=True))
    alone = predict(jax.tree.map(lambda x: x[1:2], steps), rngs[1:2])  # up to rounding, whatever runs beside it
    for x, y in zip(alone, predicted, strict=True):
        assert np.abs(x[0].astype(int) - y[1]).max() <= 1


def test_the_command_measures_draws_and_keeps_finished_work(measure, tmp_path, monkeypatch):
    results = measure()
    with open(tmp_path / "run/prediction.json") as file:
        assert json.load(file) == results
    assert {"machine", "date", "dataset", "config", "seed", "window_seed"} <= set(results)
    assert len({tuple(window) for window in results["windows"]}) == SETTINGS["num_windows"]
    assert all(start + 6 <= STEPS for _, start in results["windows"])
    assert {len(curve["low"]) for curve in results["curves"]["psnr"].values()} == {SETTINGS["horizon"]}
    for name in ("prediction.png", "prediction_horizon.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "prediction.json", "prediction.png", "prediction_horizon.png",
    }  # fmt: skip
    np.testing.assert_allclose(
        measure("other", batch_size=5)["per_window"]["psnr"], results["per_window"]["psnr"], 1e-2
    )
    monkeypatch.setattr(prediction, "open_loop", None)
    assert measure() == results
    assert measure(cache="mmap") == results  # decides nothing
    with pytest.raises(TypeError):
        measure(horizon=3)  # other settings are measured anew


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_an_interrupted_run_goes_on(measure, monkeypatch, tmp_path, kept):
    """With the windows that it kept; where a disk has lost some of that file, from the beginning."""
    whole = measure("whole")
    compare, calls = prediction.compare, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(prediction, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure()
    partial = tmp_path / "run/prediction.partial.npz"
    partial.write_bytes(partial.read_bytes()[: int(kept * partial.stat().st_size)])
    assert measure() == whole
    assert len(calls) == 2 + (2 if kept == 1 else 3)  # of three batches, the first was kept


def test_a_perfect_model_and_a_world_that_stands_still(measure, monkeypatch):
    def perfect(model, params, observation, action, rngs, *, context):
        return observation.rgb_static, observation.rgb_gripper

    monkeypatch.setattr(prediction, "open_loop", perfect)
    found = measure()["metrics"]
    assert (found["psnr"]["both"]["mean"], found["ssim"]["both"]["mean"]) == (prediction.MAX_PSNR, pytest.approx(1))
    assert found["still_psnr"]["both"]["mean"] < 30


def test_too_little_validation_play_is_named(play, tmp_path):
    settings = make_config(play).prediction
    with pytest.raises(
        ValueError, match="5 windows of 6 frames .* of a 'validation' split, and .* has only train; coll"
    ):
        prediction.choose_windows(str(write_play(tmp_path / "data", train=1)), settings)
    for changes in (dict(num_windows=15), dict(horizon=11)):
        with pytest.raises(
            ValueError, match=r"has (14|0): 2 episodes, the longest of 12 steps; .*or lower --config.pred"
        ):
            prediction.choose_windows(str(play), make_config(play, **changes).prediction)


def test_half_of_lpips_is_named(measure):
    with pytest.raises(ValueError, match="LPIPS takes two files, and --lpips_linear is not given. It takes alex.pth"):
        measure(paths={"lpips_alexnet": "alexnet.pth"})


def test_lpips_and_fvd_fill_their_cells(measure, tmp_path, monkeypatch):
    """The columns; the networks have tests of their own."""
    for name in ("alexnet.pth", "alex.pth", "i3d.pt"):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr("wam_jax.perceptual.load_lpips", lambda *_: {})
    monkeypatch.setattr("wam_jax.perceptual.lpips", lambda _, x, y: np.abs(x.astype(float) - y).mean((1, 2, 3)) / 255)
    monkeypatch.setattr("wam_jax.perceptual.load_i3d", lambda *_: {})
    monkeypatch.setattr("wam_jax.perceptual.video_features", lambda _, video: video.mean((1, 2, 3)))
    paths = dict(lpips_alexnet="alexnet.pth", lpips_linear="alex.pth", i3d="i3d.pt")
    results = measure(paths={name: str(tmp_path / file) for name, file in paths.items()})
    assert set(results["weights_sha256"]) == set(paths)
    fvd = results["metrics"]["fvd"]
    assert fvd["both"] == pytest.approx((fvd["static"] + fvd["gripper"]) / 2)
    assert 0 < results["metrics"]["lpips"]["both"]["mean"] < 1
    table = prediction_tables.markdown({"run": results})
    assert "skipped" not in table and f"| {fvd['static']:.2f} |" in table
    assert "only our own columns compare" in table


def test_runs_stand_beside_the_paper(measure):
    wam = measure()
    cells = [line.split(" | ") for line in prediction_tables.markdown({"a": wam}).splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    baseline = wam | {"method": "dreamer_v2"}
    lines = prediction_tables.markdown({"a": wam, "b": baseline}).splitlines()
    assert lines[0] == "|  |  | playtable: dreamer_v2 | playtable: wam | paper: dreamer_v2 | paper: wam |"
    assert next(line for line in lines if line.startswith("| FVD")) == "| FVD (down) | both |  |  | 12.13 | 10.82 |"
    assert not any("only our own columns compare" in line for line in lines)
    assert any("Empty cells of LPIPS and FVD: skipped, since no weights were given" in line for line in lines)
    assert any("window by window, both cameras: PSNR +0.000" in line for line in lines)
    assert any("230,000 updates for WAM, 2,000,000 for DreamerV2" in line for line in lines)
    twice = prediction_tables.markdown({"a": wam, "b": wam})
    assert "| a, playtable: wam | b, playtable: wam |" in twice and "window by window" not in twice


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"metrics": 3}, "metrics is 3, expected figures by name"),
        ({"metrics": {"psnr": {"static": 1.0}}}, "psnr has no figure of each of static, gripper, both"),
        ({"metrics": {"psnr": dict.fromkeys(("static", "gripper", "both"), "x")}}, "psnr has no figure of each of"),
        ({"per_window": []}, "per_window is .., expected figures by name"),
    ],
)
def test_damaged_predictions_are_named(measure, tmp_path, damage, message):
    path = tmp_path / "run/prediction.json"
    results = measure()
    assert prediction_tables.load(str(path)) == results
    path.write_text(json.dumps({**results, **damage}))
    with pytest.raises(ValueError, match=f"prediction.json: {message}.*; remove it and run experiments.evaluate_pred"):
        prediction_tables.load(str(path))


def test_print_table_names_missing_predictions(tmp_path):
    done = helpers.run_python("-m", "experiments.print_table", "--table=prediction", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith(f"error: no predictions {tmp_path}/prediction.json; run experiments.evaluate_pred")
    assert len(done.stderr.splitlines()) == 1


def test_parameters_of_the_paper_s_sizes_are_those_of_the_public_code():
    """LUMOS' world model with 18 dims of proprioception, DPPO's actor and critic."""
    counts = {
        method: print_architecture.count_parameters(
            print_architecture.load_config(f"experiments/configs/calvin_d.py:{method}")
        )
        for method in ("dreamer_v2", "wam")
    }
    found = counts["dreamer_v2"]
    assert (found["encoder"], found["rssm"], found["decoder"]) == (7_825_824, 12_917_968, 19_157_286)
    assert (found["policy"], found["critic"]) == (1_612_364, 656_385)
    head = counts["wam"].pop("inverse_dynamics")
    assert head == (2 * 1554 + 1) * 512 + 513 * 512 + 513 * 7
    assert counts["wam"] == found


@pytest.mark.parametrize("name", ["nowhere.py", "README.md", "tests/helpers.py"])
def test_what_is_no_config_is_named(name):
    with pytest.raises(ValueError, match=f"{name} (is no config file|has no get_config)"):
        print_architecture.load_config(name)
