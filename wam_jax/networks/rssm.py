"""Recurrent state-space model with categorical latents (DreamerV2, Hafner et al. 2021; sizes and form of LUMOS).

    h_t = GRU(h_{t-1}, ELU(LN(W_z z_{t-1} + W_a a_{t-1})))
    z_t ~ q(. | h_t, e_t)   posterior, where the embedding e_t of the observation is known
    z_t ~ p(. | h_t)        prior, in imagination

With `robot_state` (ours) the robot's proprioception p is part of the state: measured while observing, in imagination
moved by what h expects of the action. The hand's place then needs no categoricals, which hold it to a few centimetres.

    h_t = GRU(h_{t-1}, ELU(LN(W_z z_{t-1} + W_a a_{t-1} + W_p p_{t-1})))
    p_t = p_{t-1} + 0.1 MLP([h_t; W_a a_{t-1} + W_p p_{t-1}])   in imagination

The products that do not depend on the recurrence (W_a a and W_e e) are methods of their own, so that callers compute
them for all time steps in one matrix product outside the scan.
"""

import functools
from typing import Any

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp

from wam_jax.networks.categorical import one_hot_at
from wam_jax.networks.layers import MLP, NormElu, dense
from wam_jax.networks.recurrence import recurrent_dot
from wam_jax.types import Array, LatentState


def feature(latent: LatentState, *, soft: bool = False) -> Array:
    """The model's state as policy, critic, classifier and decoder see it: [h; z], [..., D + S*V], h first.

    With the robot's own state it is [h; z; p], [..., D + S*V + P].

    Args:
      latent: states [...].
      soft: the probabilities of the categoricals in place of the sample drawn from them: the expectation of z, without
        the noise of sampling. LUMOS, DiWA and WAM use the sample.
    """
    stochastic = jax.nn.softmax(latent.logits) if soft else latent.stochastic
    flat = stochastic.reshape(*stochastic.shape[:-2], -1)
    parts = [latent.deterministic, flat] + ([] if latent.robot is None else [latent.robot])
    return jnp.concatenate([part.astype(latent.deterministic.dtype) for part in parts], axis=-1)


def stochastic_noise(rng: Array, shape: tuple[int, ...]) -> Array:
    """What `sample_stochastic` needs to draw z, [..., S]; apart, so that loops draw it before they begin."""
    return jax.random.uniform(rng, shape)


@jax.custom_vjp
def sample_stochastic(logits: Array, noise: Array) -> Array:
    """Draws one-hot z; its gradient is that of the probabilities, straight through (Bengio et al. 2013).

    Args:
      logits: float32 [..., S, V].
      noise: float32 [..., S], from `stochastic_noise`.

    Returns:
      float32 [..., S, V].
    """
    return one_hot_at(logits, noise)


def _probabilities_gradient(logits: Array, gradient: Array) -> tuple[Array, None]:
    probability = jax.nn.softmax(logits)
    return probability * (gradient - jnp.sum(probability * gradient, axis=-1, keepdims=True)), None


sample_stochastic.defvjp(lambda logits, noise: (one_hot_at(logits, noise), logits), _probabilities_gradient)


def categorical_kl(logits_p: Array, logits_q: Array) -> Array:
    """KL(p || q) in nats between two products of S categoricals: [..., S, V] twice -> [...]."""
    p, q = (distrax.Independent(distrax.Categorical(logits=x), 1) for x in (logits_p, logits_q))
    return p.kl_divergence(q)


ROBOT_CHANGE = 0.1  # about what a coordinate of p, within [-1, 1], changes in a fast step
recurrent_dense = functools.partial(dense, dot_general=recurrent_dot)  # for layers of a step


class GRUCell(nn.Module):
    """The GRU of cuDNN and PyTorch: two biases, the reset gate applied after the hidden product.

    Flax's own cell has one bias for the update and reset gates; this one keeps LUMOS' parameter count.
    """

    hidden_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Array, x: Array) -> Array:
        """Maps hidden [B, D] and input [B, X] to the next hidden state [B, D]."""
        gates = 3 * self.hidden_dim
        from_input = recurrent_dense(gates, self.dtype, name="input")(x)
        from_hidden = recurrent_dense(gates, self.dtype, name="hidden", kernel_init=nn.initializers.orthogonal())(
            hidden
        )
        reset_x, update_x, new_x = jnp.split(from_input, 3, axis=-1)
        reset_h, update_h, new_h = jnp.split(from_hidden, 3, axis=-1)
        update = nn.sigmoid(update_x + update_h)
        candidate = nn.tanh(new_x + nn.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * candidate + update * hidden


class RSSM(nn.Module):
    """One step of the state-space model; time lives in world_model.py."""

    deterministic_dim: int
    num_latents: int
    num_classes: int
    hidden_dim: int
    robot_dim: int = 0  # P where the state has the robot's own
    dtype: Any = jnp.float32

    def setup(self):
        self.latent_in = recurrent_dense(self.hidden_dim, self.dtype)
        self.action_in = dense(self.hidden_dim, self.dtype, use_bias=False)
        self.norm_in = NormElu(self.dtype)
        self.gru = GRUCell(self.deterministic_dim, self.dtype)
        self.prior_hidden = recurrent_dense(self.hidden_dim, self.dtype)
        self.prior_norm = NormElu(self.dtype)
        self.prior_out = recurrent_dense(self.num_latents * self.num_classes, self.dtype)
        self.posterior_hidden = recurrent_dense(self.hidden_dim, self.dtype)
        self.posterior_embedding = dense(self.hidden_dim, self.dtype, use_bias=False)
        self.posterior_norm = NormElu(self.dtype)
        self.posterior_out = recurrent_dense(self.num_latents * self.num_classes, self.dtype)
        if self.robot_dim:
            self.robot_in = dense(self.hidden_dim, self.dtype, use_bias=False)
            self.robot_out = MLP((self.hidden_dim,), self.robot_dim, self.dtype)
        zeros = nn.initializers.zeros
        self.initial_deterministic = self.param("initial_deterministic", zeros, (self.deterministic_dim,))
        self.initial_stochastic = self.param("initial_stochastic", zeros, (self.num_latents, self.num_classes))

    def initial(self, batch_size: int) -> LatentState:
        """The learned state before an episode's first frame, [B, ...].

        LUMOS resets to zeros and trains its learned vectors only at the first batch of an epoch; here every window
        starts from them, so they are trained and used alike.
        """
        latent_shape = (batch_size, self.num_latents, self.num_classes)
        return LatentState(
            deterministic=jnp.broadcast_to(
                self.initial_deterministic.astype(self.dtype), (batch_size, self.deterministic_dim)
            ),
            logits=jnp.zeros(latent_shape, jnp.float32),
            stochastic=jnp.broadcast_to(self.initial_stochastic, latent_shape),
            robot=jnp.zeros((batch_size, self.robot_dim), jnp.float32) if self.robot_dim else None,
        )

    def project_action(self, action: Array) -> Array:
        """W_a a: [..., A] -> [..., hidden]."""
        return self.action_in(action)

    def project_robot(self, robot: Array) -> Array:
        """W_p p: [..., P] -> [..., hidden]."""
        return self.robot_in(robot)

    def robot_change(self, deterministic: Array, projected_action: Array) -> Array:
        """p_t - p_{t-1} as h_t [..., D] and W_a a_{t-1} + W_p p_{t-1} [..., hidden] expect it: float32 [..., P]."""
        return ROBOT_CHANGE * self.robot_out(jnp.concatenate([deterministic, projected_action], axis=-1))

    def project_embedding(self, embedding: Array) -> Array:
        """W_e e: [..., E] -> [..., hidden]."""
        return self.posterior_embedding(embedding)

    def recurrent(self, deterministic: Array, stochastic: Array, projected_action: Array) -> Array:
        """h_{t-1} [B, D], z_{t-1} [B, S, V] and W_a a_{t-1} (+ W_p p_{t-1}) [B, hidden] -> h_t [B, D]."""
        latent = self.latent_in(stochastic.reshape(*stochastic.shape[:-2], -1).astype(self.dtype))
        return self.gru(deterministic, self.norm_in(latent + projected_action))

    def prior_logits(self, deterministic: Array) -> Array:
        """h_t [..., D] -> float32 logits of p(z_t | h_t), [..., S, V]."""
        return self._logits(self.prior_out(self.prior_norm(self.prior_hidden(deterministic))))

    def posterior_logits(self, deterministic: Array, projected_embedding: Array) -> Array:
        """h_t [..., D] and W_e e_t [..., hidden] -> float32 logits of q(z_t | h_t, e_t), [..., S, V]."""
        hidden = self.posterior_norm(self.posterior_hidden(deterministic) + projected_embedding)
        return self._logits(self.posterior_out(hidden))

    def _logits(self, flat: Array) -> Array:
        return flat.astype(jnp.float32).reshape(*flat.shape[:-1], self.num_latents, self.num_classes)

    def __call__(self, action: Array, embedding: Array) -> Array:
        """Touches every parameter, for initialisation: [B, A] and [B, E] -> posterior logits."""
        state = self.initial(action.shape[0])
        projected = self.project_action(action)
        if state.robot is not None:
            projected = projected + self.project_robot(state.robot)
        hidden = self.recurrent(state.deterministic, state.stochastic, projected)
        if state.robot is not None:
            self.robot_change(hidden, projected)
        return self.prior_logits(hidden) + self.posterior_logits(hidden, self.project_embedding(embedding))
