"""The one interface of all environments: batches of episodes, one call a chunk of actions.

Playtable implements it with compiled pure functions, a simulator in worker processes implements it on the host: nothing
in it needs either.
"""

from typing import Any, Protocol

from wam_jax.types import Array, Observation

State = Any  # a pytree (Playtable) or a handle (simulators); leading axis B where it is a pytree


class Environment(Protocol):
    """A batch of B independent episodes of the table."""

    name: str

    def reset_to_task(self, rng: Array, task: Array, number: Array | None = None) -> State:
        """Draws a random start for each episode, in which its task is possible and not yet solved.

        Args:
          rng: one key.
          task: int32 [B], index into specs.TASKS.
          number: int [B], of each episode; its start is decided by the key, its number and its task. None: 0 to B - 1.
        """
        ...

    def observe(self, state: State, drawn: Array | None = None) -> Observation:
        """Renders both cameras and reads the proprioception and scene state of each episode: [B, ...].

        Args:
          state: B episodes.
          drawn: bool [B], whose pictures are looked at; the others' may be black where drawing costs time. None: all.
        """
        ...

    def step_chunk(self, state: State, actions: Array, drawn: Array | None = None) -> tuple[State, Observation]:
        """Executes C actions in each episode.

        Args:
          state: B episodes.
          actions: float32 [B, C, 7], relative actions; the gripper is open where its entry is > 0, else closed.
          drawn: as in `observe`.

        Returns:
          the state after the chunk, and the observation after each action, [B, C, ...].
        """
        ...

    def start_expert(self, rngs: Array, task: Array, state: State) -> State:
        """Plans a scripted expert's attempt at task [B] in each episode, with a key for each, [B].

        Returns:
          what `act_expert` carries along.
        """
        ...

    def act_expert(self, expert: State, state: State) -> tuple[State, Array]:
        """The expert's next action in each episode, float32 [B, 7]; it may read the environment's state."""
        ...
