"""Films: evaluated episodes, and real frames beside the world model's open-loop prediction of them."""

import os
from collections.abc import Sequence

import cv2
import jax
import numpy as np
from PIL import Image

from wam_jax import prediction, specs
from wam_jax.types import Array, Observation, Params
from wam_jax.world_model import WorldModel

CAPTION_HEIGHT = 22  # pixels
GIF_COLOURS = 128


def open_loop(
    model: WorldModel, params: Params, observation: Observation, action: Array, rng: Array, *, context: int
) -> tuple[Array, Array]:
    """Predicts an episode's frames from its first ones and its true actions.

    Args:
      model, params: the world model.
      observation: real frames [T + 1, ...].
      action: float32 [T, 7]; action[t] leads from frame t to frame t + 1.
      rng: key for z.
      context: real frames that the model filters first; the frames from there on are imagined.

    Returns:
      predicted images (static, gripper), uint8 [T + 1, 64, 64, 3]: reconstructions of the context, then predictions;
      with `soft_prior` from expected z, which blurs what is uncertain (the decoder is trained on samples).
    """
    frames, actions = jax.tree.map(lambda x: np.asarray(x)[None], (observation, action))
    static, gripper = prediction.open_loop(model, params, frames, actions, rng[None], context=context)
    return static[0], gripper[0]


def side_by_side(observation: Observation, predicted: tuple[Array, Array], *, context: int, scale: int = 3) -> list:
    """Lays out real (left) and predicted (right) frames, static camera above the gripper's, with captions.

    Args:
      observation: real frames [T, ...].
      predicted: images (static, gripper), uint8 [T, 64, 64, 3].
      context: number of frames the model was shown.
      scale: screen pixels per image pixel.

    Returns:
      T images uint8 [h, w, 3].
    """
    frames = []
    for index, (static, gripper) in enumerate(zip(*predicted, strict=True)):
        real = np.concatenate([observation.rgb_static[index], observation.rgb_gripper[index]])
        both = np.concatenate([real, np.concatenate([static, gripper])], axis=1)
        both = _enlarge(both, scale)
        what = f"seen {index + 1}/{context}" if index < context else f"imagined +{index - context + 1}"
        frames.append(_caption(both, ("environment", what)))
    return frames


def episode(observation: Observation, text: str, *, scale: int = 3) -> list:
    """Lays out an episode's frames, static camera beside the gripper's, under a caption.

    Args:
      observation: frames [T, ...].
      text: the caption.
      scale: screen pixels per image pixel.

    Returns:
      T images uint8 [h, w, 3].
    """
    both = np.concatenate([observation.rgb_static, observation.rgb_gripper], axis=2)
    return [_caption(_enlarge(image, scale), (text,)) for image in both]


def strip(
    observation: Observation, predicted: tuple[Array, Array], steps: Sequence[int], *, context: int, scale: int = 2
) -> np.ndarray:
    """Lays out some frames of windows in rows, each camera's real ones above its predicted ones.

    Args:
      observation: real frames [B, T, ...].
      predicted: images (static, gripper), uint8 [B, T, 64, 64, 3].
      steps: after the context; 0 is the last frame that was seen.
      context: number of frames the model was shown.
      scale: screen pixels per image pixel.

    Returns:
      one image uint8 [h, w, 3].
    """
    rows = []
    for number in range(len(observation.rgb_static)):
        for real, guess in zip((observation.rgb_static, observation.rgb_gripper), predicted, strict=True):
            for name, images in (("real", real), ("predicted", guess)):
                row = [_enlarge(np.asarray(images[number, context - 1 + step]), scale) for step in steps]
                captions = [f"{name}, seen" if step == 0 else f"{name} +{step}" for step in steps]
                rows.append(_caption(np.concatenate(row, axis=1), captions))
    return np.concatenate(rows)


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)


def _caption(image: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    band = np.full((CAPTION_HEIGHT, image.shape[1], 3), 255, np.uint8)
    for column, text in enumerate(texts):
        left = 6 + column * image.shape[1] // len(texts)
        cv2.putText(band, text, (left, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([band, image])


def save_gif(path: str, frames: Sequence[np.ndarray], *, frames_per_second: float = specs.CONTROL_HZ / 2) -> None:
    """Writes an endless GIF, to a temporary name first; half of real time unless told otherwise."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # A palette for each frame, undithered: speckles would look like errors of the model. Median cut alone forgets small
    # bright things (a lamp, a block); two rounds of k-means bring them back.
    first, *rest = [Image.fromarray(f).quantize(GIF_COLOURS, kmeans=2, dither=Image.Dither.NONE) for f in frames]
    duration = round(1000 / frames_per_second)
    first.save(path + ".tmp", format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    os.replace(path + ".tmp", path)
