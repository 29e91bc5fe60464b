"""Where the hand is for given joints: forward kinematics of the Panda, for telling a target that is out of reach."""

import numpy as np

from wam_jax.environments.calvin import scene

# Of each joint's frame in the one before it: offset (m), and the quarter turns about x. Franka's modified
# Denavit-Hartenberg parameters.
_OFFSETS = (
    (0, 0, 0.333),
    (0, 0, 0),
    (0, -0.316, 0),
    (0.0825, 0, 0),
    (-0.0825, 0.384, 0),
    (0, 0, 0),
    (0.088, 0, 0),
)
_QUARTER_TURNS = (0, -1, 1, 1, -1, 1, 1)
_TCP = np.array([0, 0, 0.107 + 0.14])  # of flange and tool, along the last joint's axis


def tcp_position(joints: np.ndarray) -> np.ndarray:
    """World position of the hand, [3] in m.

    Args:
      joints: [7], rad.
    """
    position, rotation = np.array(scene.ROBOT_BASE), np.eye(3)
    for angle, offset, turn in zip(joints, _OFFSETS, _QUARTER_TURNS, strict=True):
        position = position + rotation @ offset
        rotation = rotation @ np.array([[1, 0, 0], [0, 1 - abs(turn), -turn], [0, turn, 1 - abs(turn)]])
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = rotation @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return position + rotation @ _TCP
