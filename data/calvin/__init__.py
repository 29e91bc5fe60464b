"""CALVIN's folders of one npz file a frame, converted to RLDS shards."""
