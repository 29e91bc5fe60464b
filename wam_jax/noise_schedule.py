"""The noise schedule of the diffusion policy: constants of the chain x_0 ... x_{K-1} (Ho et al. 2020)."""

import flax.struct
import jax.numpy as jnp
import numpy as np

from wam_jax.types import Array

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


@flax.struct.dataclass
class Schedule:
    """Constants of the diffusion, one per denoising step; float32 [K]."""

    alpha_bar: Array  # share of the signal's variance left at step t
    variance: Array  # of the posterior q(x_{t-1} | x_t, x_0)
    clean_weight: Array  # weight of x_0 in the posterior's mean
    noisy_weight: Array  # weight of x_t in the posterior's mean


def cosine_schedule(num_steps: int) -> Schedule:
    """The cosine schedule of Nichol & Dhariwal (2021), eq. 17, for K steps."""
    grid = np.arange(num_steps + 1) / num_steps
    signal = np.cos((grid + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    beta = np.clip(1 - signal[1:] / signal[:-1], 0, MAX_BETA)
    alpha_bar = np.cumprod(1 - beta)
    previous = np.append(1.0, alpha_bar[:-1])
    return Schedule(
        alpha_bar=jnp.asarray(alpha_bar, jnp.float32),
        variance=jnp.asarray(beta * (1 - previous) / (1 - alpha_bar), jnp.float32),
        clean_weight=jnp.asarray(beta * np.sqrt(previous) / (1 - alpha_bar), jnp.float32),
        noisy_weight=jnp.asarray((1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar), jnp.float32),
    )
