"""Playtable: CALVIN's table as pure JAX functions; `environment.Playtable` is the batched environment."""
