"""Networks of the diffusion policy, the Gaussian policy and the critic: residual MLPs of DPPO (Ren et al. 2024).

DPPO feeds the predictor concat[chunk, time embedding, state]. The state rows hold two thirds of its multiplications
and depend on neither the chunk nor the step, so here they are a layer of their own: `condition` is computed once a
decision, `time` once a step, and every denoising step adds both. The function, the parameter count and the initial
scale stay those of the concatenation.

Kernels start as PyTorch's linear layers do, uniform in +-1/sqrt(inputs); biases start at zero (PyTorch: the same
uniform).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wam_jax import specs
from wam_jax.types import Array

MAX_PERIOD = 10_000.0  # of the time embedding, in denoising steps


def _uniform(inputs: int | None = None) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(inputs); None takes the kernel's own number of inputs."""

    def init(rng, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(inputs or shape[0])
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


@jax.custom_vjp
def mish(x: Array) -> Array:
    """X tanh(softplus(x)) (Misra 2019) by one exponential: with n = e^x (e^x + 2), tanh(softplus(x)) = n / (n + 2).

    The backward pass keeps x alone and takes the exponential again: reading and writing what lies between costs more.
    """
    exponential = jnp.exp(jnp.minimum(x, 20.0))  # above, the quotient is 1 in float32
    numerator = exponential * (exponential + 2)
    return x * numerator / (numerator + 2)


def _mish_backward(x: Array, gradient: Array) -> tuple[Array]:
    """With e = e^x, the derivative of n / (n + 2) is 4 e (e + 1) / (n + 2)^2."""
    exponential = jnp.exp(jnp.minimum(x, 20.0))
    numerator = exponential * (exponential + 2)
    share = 1 / (numerator + 2)
    return (gradient * share * (numerator + 4 * x * exponential * (exponential + 1) * share),)


mish.defvjp(lambda x: (mish(x), x), _mish_backward)


def time_embedding(step: Array, dim: int) -> Array:
    """Sines, then cosines of a denoising step at geometric frequencies (Vaswani et al. 2017).

    Args:
      step: int [...], denoising step.
      dim: entries of the embedding, even.

    Returns:
      float32 [..., dim].
    """
    half = dim // 2
    frequency = jnp.exp(-math.log(MAX_PERIOD) / (half - 1) * jnp.arange(half))
    angle = step[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ResidualBlock(nn.Module):
    """y = x + W2 mish(W1 mish(x)), without normalisation."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        hidden = nn.Dense(width, dtype=self.dtype, kernel_init=_uniform())(mish(x))
        return x + nn.Dense(width, dtype=self.dtype, kernel_init=_uniform())(mish(hidden))


class ChunkAndTime(nn.Module):
    """A linear layer on concat[chunk, time embedding] whose columns are applied apart.

    The time's product has one row a denoising step in place of one a chunk, and no gradient of the chunk is taken.
    """

    chunk_dim: int
    time_dim: int
    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Any

    def setup(self):
        self.kernel = self.param("kernel", self.kernel_init, (self.chunk_dim + self.time_dim, self.features))

    def of_chunk(self, chunk: Array) -> Array:
        """The chunk's share of the layer: [M, C*A] -> [M, features]."""
        return chunk.astype(self.dtype) @ self.kernel[: self.chunk_dim].astype(self.dtype)

    def of_time(self, time: Array) -> Array:
        """The time's share of the layer: [..., time] -> [..., features]."""
        return time.astype(self.dtype) @ self.kernel[self.chunk_dim :].astype(self.dtype)


class Standardize(nn.Module):
    """(x - mean) / std with constants that are set from data before training and get no gradient."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mean = self.param("mean", nn.initializers.zeros, x.shape[-1:])
        std = self.param("std", nn.initializers.ones, x.shape[-1:])
        return (x - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(std)


class Denoiser(nn.Module):
    """Predicts the noise in a chunk of actions from the chunk, the denoising step and the state."""

    hidden_dim: int = 512
    num_blocks: int = 1
    time_dim: int = 16
    chunk: int = 4
    state_dim: int = 2048  # only the initialisation reads it
    standardize: bool = False  # DPPO and DiWA feed the state as it is
    dtype: Any = jnp.float32

    def setup(self):
        chunk_dim = self.chunk * specs.ACTION_DIM
        inputs = chunk_dim + self.time_dim + self.state_dim
        self.standardized = Standardize() if self.standardize else lambda state: state
        self.state_in = nn.Dense(self.hidden_dim, dtype=self.dtype, kernel_init=_uniform(inputs))
        self.chunk_in = ChunkAndTime(chunk_dim, self.time_dim, self.hidden_dim, _uniform(inputs), self.dtype)
        self.time_hidden = nn.Dense(2 * self.time_dim, kernel_init=_uniform())
        self.time_out = nn.Dense(self.time_dim, kernel_init=_uniform())
        self.blocks = [ResidualBlock(self.dtype) for _ in range(self.num_blocks)]
        self.output = nn.Dense(self.chunk * specs.ACTION_DIM, dtype=self.dtype, kernel_init=_uniform())

    def condition(self, state: Array) -> Array:
        """The state's share of the first layer: [..., state] -> [..., hidden]."""
        return self.state_in(self.standardized(state))

    def time(self, step: Array) -> Array:
        """The share of the denoising step, int [...] in [0, K), of the first layer: [..., hidden]."""
        return self.chunk_in.of_time(self.time_out(mish(self.time_hidden(time_embedding(step, self.time_dim)))))

    def __call__(self, noisy_chunk: Array, condition: Array) -> Array:
        """Predicts the noise; leading axes broadcast against each other.

        Args:
          noisy_chunk: [..., C, A].
          condition: [..., hidden], from `condition` of the state, and `time` of the chunk's noise level, added up.

        Returns:
          float32 [..., C, A].
        """
        leading = noisy_chunk.shape[:-2]
        # Two axes only: with more, XLA's weight gradients on a CPU take several times as long.
        of_chunk = self.chunk_in.of_chunk(noisy_chunk.reshape(math.prod(leading), -1))
        hidden = (of_chunk.reshape(*leading, -1) + condition).reshape(of_chunk.shape)
        for block in self.blocks:
            hidden = block(hidden)
        return self.output(hidden).astype(jnp.float32).reshape(noisy_chunk.shape)

    def denoise(self, noisy_chunk: Array, step: Array, state: Array) -> Array:
        """All at once: chunks [D*B, C, A] and steps int [D*B] of states [B, state], which repeat D times."""
        repeated = jnp.tile(self.condition(state), (len(step) // len(state), 1))
        return self(noisy_chunk, repeated + self.time(step))


class ChunkMean(nn.Module):
    """Predicts a chunk of actions from the state alone: the mean of a Gaussian policy, squashed by tanh as in DPPO."""

    hidden_dim: int = 512
    num_blocks: int = 1
    chunk: int = 4
    standardize: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.standardized = Standardize() if self.standardize else lambda state: state
        self.state_in = nn.Dense(self.hidden_dim, dtype=self.dtype, kernel_init=_uniform())
        self.blocks = [ResidualBlock(self.dtype) for _ in range(self.num_blocks)]
        self.output = nn.Dense(self.chunk * specs.ACTION_DIM, dtype=self.dtype, kernel_init=_uniform())

    def condition(self, state: Array) -> Array:
        """The first layer: [..., state] -> [..., hidden]."""
        return self.state_in(self.standardized(state))

    def time(self, step: Array) -> Array:
        """Nothing: there is one step. [..., 1], as of `Denoiser` but for the size."""
        return jnp.zeros((*step.shape, 1), self.dtype)

    def __call__(self, noisy_chunk: Array, condition: Array) -> Array:
        """Arguments as of `Denoiser`, of which only `condition` matters; float32 [..., C, A] in [-1, 1]."""
        hidden = condition.reshape(-1, self.hidden_dim)  # two axes, as there
        for block in self.blocks:
            hidden = block(hidden)
        mean = jnp.tanh(self.output(hidden).astype(jnp.float32))
        mean = mean.reshape(*condition.shape[:-1], self.chunk, specs.ACTION_DIM)
        return jnp.broadcast_to(mean, noisy_chunk.shape)

    def denoise(self, noisy_chunk: Array, step: Array, state: Array) -> Array:
        """All at once, as of `Denoiser`."""
        del step
        return self(noisy_chunk, self.condition(state))


class Critic(nn.Module):
    """Value of a state, before any denoising."""

    hidden_dim: int = 256
    num_blocks: int = 1

    @nn.compact
    def __call__(self, state: Array) -> Array:
        """Maps [..., state] to float32 [...]; computed in float32, since it is small and its errors compound in GAE."""
        hidden = nn.Dense(self.hidden_dim, kernel_init=_uniform())(state.astype(jnp.float32))
        for _ in range(self.num_blocks):
            hidden = ResidualBlock(jnp.float32)(hidden)
        return nn.Dense(1, kernel_init=_uniform())(hidden)[..., 0]
