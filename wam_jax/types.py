"""Containers that travel between environments, shards, networks and updates, and the legend of their axes.

Axis legend, used in every shape of this project:

    B  batch (windows, episodes or rollouts)      T  time, in control steps of 1/30 s
    H  imagined horizon, in decisions (in world_model.imagine: steps)
    C  chunk, the actions of one decision (4)     M  rows of a bank (latents that batches are drawn from)
    K  denoising steps (20)                       F  the last denoising steps, which PPO fine-tunes (10)
    A  action dim (7)                             P  proprioception dim as the network sees it (18)
    D  devices; sizes: deterministic state        S  categorical latents of the RSSM
    V  classes of each latent                     N  updates of one dispatch
    E  an embedding, of encoder or classifier     J  members of an ensemble
"""

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray  # host or device: the functions here take either
Params = dict
Metrics = dict[str, Array]


@flax.struct.dataclass
class Observation:
    """What the robot sees, under CALVIN's keys; leading axes are free."""

    rgb_static: Array  # uint8 [..., 64, 64, 3], fixed camera
    rgb_gripper: Array  # uint8 [..., 64, 64, 3], camera on the hand
    robot_obs: Array  # float32 [..., 15]: position (m), Euler XYZ (rad), opening (m), 7 joints (rad), gripper command
    scene_obs: (
        Array  # float32 [..., 24]: slider (m), drawer (m), button (m), switch (m), lightbulb, LED, 3 x block pose
    )


@flax.struct.dataclass
class StepBatch:
    """Consecutive steps of episodes in the RLDS alignment: `action[t]` is taken at `observation[t]`; [B, T, ...]."""

    observation: Observation
    action: Array  # float32 [B, T, 7], relative action in [-1, 1]; the gripper is -1 (close) or +1 (open)
    is_first: Array  # bool [B, T], first step of its episode
    is_last: Array  # bool [B, T], last step of its episode; its action leads nowhere
    task: Array  # int32 [B, T], index into specs.TASKS of the annotated task, -1 where there is none
    reward: Array  # float32 [B, T], 1 where the oracle finds the annotated task solved since the annotation's start


@flax.struct.dataclass
class LatentState:
    """A state of the RSSM; leading axes are free."""

    deterministic: Array  # [..., D], h
    logits: Array  # float32 [..., S, V], of the categoricals that `stochastic` was drawn from; no step reads them
    stochastic: Array  # [..., S, V], z, one-hot
    robot: Array | None = None  # float32 [..., P], the robot's own state, in models that carry it (`robot_state`)
