"""One get_config() per experiment file."""
