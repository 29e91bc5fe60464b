"""Converters from published datasets to this project's shards."""
