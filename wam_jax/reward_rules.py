"""The reward of imagination: a task is solved once several frames in a row say so.

What a frame says, its verdict, is the success classifier's (DiWA's default) or, for the hybrid world model, CALVIN's
oracle's on the scene state that is decoded from the latent, against the one decoded from the episode's first latent.
The classifier's may be held back where an ensemble disagrees.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from wam_jax import prior_ensemble, specs, success_classifier
from wam_jax.networks.layers import MLP
from wam_jax.prior_ensemble import PriorEnsemble
from wam_jax.types import Array, Params

# (reward_params, feature [..., B, state_dim], first feature of the episodes [B, state_dim]) -> bool [..., B].
Verdict = Callable[[Params, Array, Array], Array]


def by_classifier(params: Params, feature: Array, first_feature: Array, *, settings: Any) -> Array:
    """A verdict: whether the success classifier, of parameters `params`, exceeds `settings.threshold`."""
    del first_feature
    return success_classifier.success_probability(params, feature, settings=settings) > settings.threshold


def by_scene(params: Params, feature: Array, first_feature: Array, *, decoder: MLP) -> Array:
    """A verdict: whether the oracle finds the task solved in the decoded states; `params` from `scene_params`."""
    start, now = (
        specs.unscaled_mechanisms(decoder.apply({"params": params["scene_decoder"]}, x))
        for x in (first_feature, feature)
    )
    return specs.task_success(params["task"], start, now)


def where_ensemble_agrees(
    params: Params, feature: Array, first_feature: Array, *, verdict: Verdict, ensemble: PriorEnsemble
) -> Array:
    """A verdict: another one's, where the priors of an ensemble say nearly the same of the frame.

    Where they disagree imagination is beyond what play has shown, and a success there is not to be trusted.

    Args:
      params: from `agreement_params`.
      feature, first_feature: as for any verdict.
      verdict: the other one.
      ensemble: the priors' module.
    """
    deterministic = feature[..., : ensemble.deterministic_dim]  # features begin with h
    agree = prior_ensemble.disagreement(ensemble, params["ensemble"], deterministic) <= params["max_disagreement"]
    return verdict(params["verdict"], feature, first_feature) & agree


def agreement_params(verdict_params: Params, ensemble_params: Params, max_disagreement: float) -> Params:
    """What `where_ensemble_agrees` reads: what the other verdict does, the ensemble, and the limit in nats.

    Tasks that are fine-tuned at once have a copy of the ensemble each, small beside all else.
    """
    return {
        "verdict": verdict_params,
        "ensemble": ensemble_params,
        "max_disagreement": np.float32(max_disagreement),
    }


def scene_params(world_model_params: Params, task: str) -> Params:
    """What `by_scene` reads: the world model's decoder and the index of the task."""
    return {"scene_decoder": world_model_params["scene_decoder"], "task": np.int32(specs.task_index(task))}


def in_a_row(
    params: Params, feature: Array, first_feature: Array, count: Array, *, verdict: Verdict, consecutive: int
) -> tuple[Array, Array]:
    """Decides, frame by frame, whether a rollout has succeeded.

    Args:
      params: that the verdict reads.
      feature: [C, B, state_dim], the frames after C consecutive actions.
      first_feature: [B, state_dim], the frame from which the episode began.
      count: int32 [B], positive frames in a row until now; 0 at the start.
      verdict: on each frame.
      consecutive: positive frames in a row that are a success. The paper rewards a single frame; more of them remove
        fires that flicker.

    Returns:
      bool [C, B], whether `consecutive` frames in a row have been positive; and the count after the last.
    """
    positive = verdict(params, feature, first_feature)
    frame = jnp.arange(1, len(positive) + 1)[:, None]
    last_negative = lax.cummax(jnp.where(positive, 0, frame))  # 0: none until now, and the count goes on
    in_a_row = frame - last_negative + jnp.where(last_negative == 0, count, 0)
    return in_a_row >= consecutive, in_a_row[-1]
