"""The one resize of the project."""

import cv2
import numpy as np

from wam_jax import specs


def resize(image: np.ndarray, size: int = specs.IMAGE_SIZE) -> np.ndarray:
    """Brings an image, uint8 [h, w, 3], to `size` x `size` by averaging areas."""
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
