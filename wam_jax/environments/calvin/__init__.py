"""CALVIN's simulator, with pybullet and numpy alone.

`environment` and `pool` serve the rest of the project; what the pool's processes run (`worker` and all that it imports)
never imports JAX: pybullet's wheels and JAX's need not fit one Python.
"""
