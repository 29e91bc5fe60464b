"""Binaries and their configs."""
