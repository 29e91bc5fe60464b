"""Films: evaluated episodes, and real frames beside the world model's open-loop prediction of them."""

import os
from collections.abc import Sequence

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from wam_jax import specs, world_model
from wam_jax.types import Array, LatentState, Observation, Params
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
    return jax.device_get(_open_loop(model, context)(params, observation, jnp.asarray(action), rng))


def _open_loop(model: WorldModel, context: int):
    @jax.jit
    def predict(params, observation, action, rng):
        observe_rng, imagine_rng = jax.random.split(rng)
        seen = jax.tree.map(lambda x: jnp.asarray(x)[None, :context], observation)
        embedding = world_model.embed(model, params, seen)
        posterior = world_model.observe(model, params, embedding, action[None, :context], observe_rng)
        start: LatentState = jax.tree.map(lambda x: x[:, -1], posterior)
        imagined = world_model.imagine(model, params, start, action[None, context - 1 :], imagine_rng)
        film = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1)[0], posterior, imagined)
        return world_model.decode(model, params, film)

    return predict


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
