"""Neural network modules (Flax Linen); no losses here."""
