"""Measures the world model's open-loop prediction on validation windows: Table I of WAM.

python -m experiments.evaluate_prediction --config=experiments/configs/quickstart.py --workdir=runs/quickstart

From the first real frame of a window and its true actions the model predicts the rest. PSNR and SSIM always; LPIPS with
--lpips_alexnet and --lpips_linear, FVD with --i3d (published weights, which are not part of this repository; a wrong
file's error says what to fetch). Writes WORKDIR/prediction.json, prediction.png and prediction_horizon.png. After an
interruption the same command goes on with the missing windows. `print_table --table=prediction` sets runs side by side.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import date

import jax
import matplotlib
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from experiments import config_values, launch, train_world_model
from wam_jax import json_files, metrics, npz_files, perceptual, prediction, prediction_tables, videos

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_WEIGHTS = {
    name: flags.DEFINE_string(name, "", f"Takes {source}; empty: left out")
    for name, source in perceptual.SOURCES.items()
}
PICTURED_WINDOWS = 2
PICTURED_STEPS = (0, 1, 5, 10, 20, 30, 40, 50)


def run(config, workdir: str, paths: Mapping[str, str]) -> dict:
    """Measures what is missing and writes the results; finished work is kept.

    Args:
      paths: of weights files, by the names of perceptual.SOURCES; metrics that lack theirs are left out.

    Returns:
      the results, as prediction.json has them.

    Raises:
      ValueError: no world model, too little validation play, or a weights file is missing or another one.
    """
    functions, features = _metrics(paths)  # a wrong file is named before any work
    directory = launch.play_directory(config, workdir)
    windows = prediction.choose_windows(directory, config.prediction)
    about = _describe(config, directory, windows, paths)
    path = os.path.join(workdir, prediction_tables.FILE)
    if not (os.path.exists(path) and about.items() <= prediction_tables.load(path).items()):
        values = _measure(config, workdir, windows, about, functions, features)
        results = about | {"machine": metrics.machine(), "date": date.today().isoformat()} | _summary(values)
        _plot(os.path.join(workdir, "prediction_horizon.png"), results)
        json_files.write(path, results)
        os.remove(_partial_path(workdir))
    return prediction_tables.load(path)


def _metrics(paths: Mapping[str, str]) -> tuple[dict[str, prediction.FrameMetric], list[Callable]]:
    """Metrics of frames by name, and the function from a video to its features, if there are weights for one."""
    functions: dict[str, prediction.FrameMetric] = {"psnr": prediction.psnr, "ssim": prediction.ssim}
    missing = {"lpips_alexnet", "lpips_linear"} - paths.keys()
    if len(missing) == 1:
        name = missing.pop()
        raise ValueError(f"LPIPS takes two files, and --{name} is not given. It takes {perceptual.SOURCES[name]}")
    if not missing:
        lpips_params = perceptual.load_lpips(paths["lpips_alexnet"], paths["lpips_linear"])
        functions["lpips"] = lambda real, predicted: np.asarray(perceptual.lpips(lpips_params, real, predicted))
    if "i3d" not in paths:
        return functions, []
    i3d_params = perceptual.load_i3d(paths["i3d"])
    return functions, [lambda video: np.asarray(perceptual.video_features(i3d_params, video[None]))[0]]


def _describe(config, directory: str, windows: list[tuple[int, int]], paths: Mapping[str, str]) -> dict:
    """What the results depend on, as JSON would give it back."""
    digests = {}
    for name, path in paths.items():
        with open(path, "rb") as file:
            digests[name] = hashlib.sha256(file.read()).hexdigest()
    sections = ["world_model", "dataset", *(["prior_ensemble"] if train_world_model.imagines(config) else [])]
    about = {
        "environment": config.environment,
        "method": config.method,
        "seed": config.seed,
        "dataset": directory,
        "split": prediction.SPLIT,
        "episodes": len({episode for episode, _ in windows}),
        "num_windows": config.prediction.num_windows,
        "horizon": config.prediction.horizon,
        "context": config.prediction.context,
        "window_seed": config.prediction.seed,
        "windows": windows,
        "weights_sha256": digests,
        "config": config_values.deciding({name: config[name].to_dict() for name in sections}),
    }
    return json.loads(json.dumps(about))


def _measure(config, workdir: str, windows, about: dict, functions: dict, features: list) -> dict[str, np.ndarray]:
    """All metrics of all windows; each batch is kept as it ends."""
    model, params = train_world_model.load(config, workdir)
    settings, directory = config.prediction, launch.play_directory(config, workdir)
    parts = _load_partial(workdir, about)
    done = parts["psnr"].shape[1] if parts else 0
    for first in tqdm(range(done, len(windows), settings.batch_size), "predicting", unit="batch"):
        numbers = np.arange(first, min(first + settings.batch_size, len(windows)))
        steps = prediction.read_windows(directory, [windows[n] for n in numbers], settings.context + settings.horizon)
        rngs = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(settings.seed), n))(numbers)
        predicted = prediction.open_loop(
            model, params, steps.observation, steps.action[:, :-1], rngs, context=settings.context
        )
        found = prediction.compare(steps.observation, predicted, functions, settings.context)
        found |= _features(steps.observation, predicted, features, settings.context)
        if first == 0:
            _picture(os.path.join(workdir, "prediction.png"), steps.observation, predicted, settings)
        parts = {name: np.concatenate([parts[name], x], 1) if parts else x for name, x in found.items()}
        _save_partial(workdir, about, parts)
    return parts


def _features(observation, predicted, features: list, context: int) -> dict[str, np.ndarray]:
    """Features of the real and the predicted video after the context, [2, B, 400] each, where they can be computed."""
    frames = {"real": (observation.rgb_static, observation.rgb_gripper), "predicted": predicted}
    return {
        f"features_{name}": np.stack([[function(video[context:]) for video in camera] for camera in cameras])
        for function in features
        for name, cameras in frames.items()
    }


def _summary(values: dict[str, np.ndarray]) -> dict:
    frames = {name: x for name, x in values.items() if not name.startswith("features_")}
    summary: dict = {name: prediction.summarise(x) for name, x in frames.items()}
    if "features_real" in values:
        pairs = zip(values["features_real"], values["features_predicted"], strict=True)
        fvd = [perceptual.frechet_distance(*pair) for pair in pairs]
        summary["fvd"] = dict(zip((*prediction.CAMERAS, prediction.BOTH), (*fvd, float(np.mean(fvd))), strict=True))
    return {
        "metrics": summary,
        "curves": {name: prediction.curve(x) for name, x in frames.items()},
        "per_window": {name: x.mean(axis=2).tolist() for name, x in frames.items()},  # [camera][window]
    }


# --- Files ---


def _partial_path(workdir: str) -> str:
    return os.path.join(workdir, "prediction.partial.npz")


def _load_partial(workdir: str, about: dict) -> dict[str, np.ndarray]:
    """The windows that an interrupted run of the same description had measured; empty if there are none."""
    try:
        parts = npz_files.read(_partial_path(workdir), "the windows measured so far")
    except ValueError:  # none, or damaged: they are only work to be done again
        return {}
    return parts if str(parts.pop("about", "")) == json.dumps(about) else {}


def _save_partial(workdir: str, about: dict, parts: dict[str, np.ndarray]) -> None:
    path = _partial_path(workdir)
    with open(path + ".tmp", "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **parts)  # type: ignore[arg-type]
    os.replace(path + ".tmp", path)


def _picture(path: str, observation, predicted, settings) -> None:
    steps = [step for step in PICTURED_STEPS if step <= settings.horizon]
    real, guess = jax.tree.map(lambda x: x[:PICTURED_WINDOWS], (observation, predicted))
    image = Image.fromarray(videos.strip(real, guess, steps, context=settings.context))
    image.save(path + ".tmp", format="PNG")
    os.replace(path + ".tmp", path)


def _plot(path: str, results: dict) -> None:
    """Each metric against the step, with its interval, beside the last real frame held still."""
    names = [name for name in results["curves"] if not name.startswith("still_")]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for colour, camera in enumerate(prediction.CAMERAS):
            for curve, style in ((name, "-"), (f"still_{name}", ":")):
                points = results["curves"][curve][camera]
                steps = np.arange(1, len(points["mean"]) + 1)
                label = camera if style == "-" else f"{camera}, last seen frame held"
                axis.plot(steps, points["mean"], style, color=f"C{colour}", label=label)
                axis.fill_between(steps, points["low"], points["high"], color=f"C{colour}", alpha=0.2, linewidth=0)
        axis.set(title=f"{name.upper()} of open-loop prediction", xlabel="step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path + ".tmp", format="png", dpi=90)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def _run_and_print(config, workdir: str) -> None:
    paths = {name: flag.value for name, flag in _WEIGHTS.items() if flag.value}
    print(prediction_tables.markdown({workdir: run(config, workdir, paths)}))


if __name__ == "__main__":
    launch.main(_run_and_print, reads=lambda: True)
