"""World-Action Models in JAX: DreamerV2's RSSM with inverse dynamics, and PPO inside the frozen world model."""

__version__ = "0.1.0"
