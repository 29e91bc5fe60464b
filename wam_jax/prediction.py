"""Open-loop prediction of video from true actions, and how far it is from what happened (WAM's Table I)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from skimage import metrics as image_metrics

from wam_jax import datasets, input_pipeline, world_model
from wam_jax.types import Array, Observation, Params, StepBatch
from wam_jax.world_model import WorldModel

SPLIT = "validation"
CAMERAS = ("static", "gripper")
BOTH = "both"  # the mean over the two cameras
MAX_PSNR = 100.0  # dB, for frames that are equal; one grey level in one pixel of 64 x 64 is 89

FrameMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]  # real and predicted, uint8 [N, h, w, 3] -> [N]


# --- Windows ---


def choose_windows(directory: str, settings: Any) -> list[tuple[int, int]]:
    """Draws windows of the validation split, without repetition; the same ones for every model.

    Args:
      directory: the play dataset.
      settings: `config.prediction`.

    Returns:
      the episode and the first step of each.

    Raises:
      ValueError: there is no validation split, or it has too few windows of that length.
    """
    length = settings.context + settings.horizon
    needed = f"prediction needs {settings.num_windows} windows of {length} frames (context + horizon)"
    splits = sorted(datasets.open_builder(directory).info.splits)
    if SPLIT not in splits:
        raise ValueError(
            f"{needed} of a {SPLIT!r} split, and {directory} has only {', '.join(splits)}; collect or convert play "
            f"with {SPLIT} episodes, or name such a dataset: --config.dataset.play=DIR"
        )
    lengths = datasets.episode_lengths(directory, SPLIT)
    count = sum(max(0, steps - length + 1) for steps in lengths)
    if count < settings.num_windows:
        raise ValueError(
            f"{needed}, and the {SPLIT!r} split of {directory} has {count}: {len(lengths)} episodes, the longest of "
            f"{max(lengths)} steps; collect longer episodes, or lower --config.prediction.horizon or "
            "--config.prediction.num_windows"
        )
    windows = input_pipeline.Windows(lengths, length, settings.seed)
    return [windows(number) for number in range(settings.num_windows)]


def read_windows(directory: str, windows: Sequence[tuple[int, int]], length: int) -> StepBatch:
    """Decodes windows, numpy [B, length, ...]."""
    store = input_pipeline.StreamingStore(directory, SPLIT)
    with ThreadPoolExecutor(datasets.num_threads()) as pool:
        found = list(pool.map(lambda window: store.window(window[0], window[1], length), windows))
    return jax.tree.map(lambda *x: np.stack(x), *found)


# --- Prediction ---


def open_loop(
    model: WorldModel, params: Params, observation: Observation, action: Array, rngs: Array, *, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts windows from their first frames and their true actions.

    Args:
      model, params: the world model.
      observation: real frames [B, T + 1, ...].
      action: float32 [B, T, 7]; action[t] leads from frame t to frame t + 1.
      rngs: B keys for z; a window's prediction does not depend on the others.
      context: real frames that the model filters first; the frames from there on are imagined.

    Returns:
      predicted images (static, gripper), uint8 [B, T + 1, 64, 64, 3]: reconstructions of the context, then predictions;
      with `soft_prior` from expected z, which blurs what is uncertain (the decoder is trained on samples).
    """
    seen = jax.tree.map(lambda x: np.asarray(x)[:, :context], observation)
    return jax.device_get(_open_loop(model, context)(params, seen, np.asarray(action), rngs))


@functools.lru_cache(maxsize=4)
def _open_loop(model: WorldModel, context: int) -> Callable:
    @jax.jit
    def predict(params, observation, action, rngs):
        def one(embedding, action, rng):
            observe_rng, imagine_rng = jax.random.split(rng)
            posterior = world_model.observe(model, params, embedding[None], action[None, :context], observe_rng)
            start = jax.tree.map(lambda x: x[:, -1], posterior)
            imagined = world_model.imagine(model, params, start, action[None, context - 1 :], imagine_rng)
            return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1)[0], posterior, imagined)

        embedding = world_model.embed(model, params, observation)
        return world_model.decode(model, params, jax.vmap(one)(embedding, action, rngs))

    return predict


# --- Frames ---


def psnr(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB, at most MAX_PSNR; uint8 [N, h, w, 3] each -> [N]."""
    with np.errstate(divide="ignore"):  # equal frames
        pairs = zip(real, predicted, strict=True)
        found = [image_metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    return np.minimum(found, MAX_PSNR)


def ssim(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame as Wang et al. (2004) set it: Gaussian window of 1.5 pixels, mean of RGB."""
    options = dict(channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    pairs = zip(real, predicted, strict=True)
    return np.array([image_metrics.structural_similarity(x, y, **options) for x, y in pairs])


def compare(
    observation: Observation, predicted: Sequence[np.ndarray], functions: Mapping[str, FrameMetric], context: int
) -> dict[str, np.ndarray]:
    """Compares the predicted frames of windows with the real ones, and with the last real frame held still.

    Args:
      observation: real frames [B, context + H, ...].
      predicted: images of both cameras, as `open_loop` returns them.
      functions: metrics of frames by name.
      context: leading frames that were seen.

    Returns:
      for each metric float64 [2, B, H], the cameras first; under "still_NAME" for the frame held still.
    """
    frames = np.stack([observation.rgb_static, observation.rgb_gripper])
    real, guess = frames[:, :, context:], np.stack(list(predicted))[:, :, context:]
    still = np.broadcast_to(frames[:, :, context - 1 : context], real.shape)
    found = {}
    with ThreadPoolExecutor(datasets.num_threads()) as pool:
        for name, function in functions.items():
            for prefix, images in (("", guess), ("still_", still)):
                jobs = [x.reshape(-1, *x.shape[2:]) for x in (real, images)]  # one a window and camera
                found[prefix + name] = np.array(list(pool.map(function, *jobs)), np.float64).reshape(real.shape[:3])
    return found


# --- Summaries ---


def summarise(values: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean and spread of the windows' means.

    Args:
      values: [2, W, H], of a metric.

    Returns:
      for each camera and for "both" of them: the mean, the standard deviation over windows, and the mean's 95 %
      interval (Student's t over windows).
    """
    windows = _with_both(values.mean(axis=2))
    return {
        name: {"mean": float(x.mean()), "std": float(x.std(ddof=1)), **_bounds(x[:, None], 0)}
        for name, x in windows.items()
    }


def curve(values: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Mean and 95 % interval over windows at each step; values [2, W, H] -> lists of H for each camera and "both"."""
    return {name: {"mean": x.mean(axis=0).tolist(), **_bounds(x)} for name, x in _with_both(values).items()}


def _with_both(values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(CAMERAS, values, strict=True)) | {BOTH: values.mean(axis=0)}


def _bounds(values: np.ndarray, column: Any = slice(None)) -> dict[str, Any]:
    """The 95 % interval of the mean over the first axis of [W, H]; lists of H, or the numbers of one column."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    mean = values.mean(axis=0)
    return {"low": (mean - half)[column].tolist(), "high": (mean + half)[column].tolist()}
