"""Both cameras by analytic ray casting: every pixel's ray meets every box in closed form, the nearest hit is shown.

A box costs one slab test in the frame it is aligned with (Kay and Kajiya 1986). The nearest distance, shade and colour
are carried through the list of boxes as arrays over pixels, so that a compiler fuses the whole picture into one loop
and no array has both a box and a pixel axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import specs
from wam_jax.environments.playtable import geometry
from wam_jax.environments.playtable.dynamics import State
from wam_jax.types import Array

_STATIC_EYE = np.array([0.42, -1.50, 1.42])
_STATIC_TARGET = np.array([0.035, -0.13, 0.50])
_STATIC_FOV = 26.5  # degrees
_GRIPPER_EYE = np.array([-0.07, 0.0, -0.135])  # in the tool frame, behind the hand's -x side
_GRIPPER_FOV = 75.0
_FAR = 1e3
_SHADOW_RADIUS = 0.05  # m

_LIGHT = np.array([0.25, -0.55, 0.8]) / np.linalg.norm([0.25, -0.55, 0.8])
_AMBIENT = 0.6

# 0xBBGGRR: the low byte comes first when a pixel is read as bytes.
_SKY = (214, 222, 232)
_FLOOR = (157, 165, 176)  # plain: a pattern would take most of a squared-error model's capacity
_TABLE, _BASE, _CABINET, _CAVITY = (205, 160, 108), (120, 92, 70), (164, 116, 74), (120, 84, 56)
_DOOR, _DRAWER, _TRAY = (226, 190, 140), (222, 182, 128), (150, 112, 76)
_HANDLE, _BUTTON = (52, 54, 62), (30, 30, 34)
_BLOCKS = ((214, 40, 40), (36, 70, 220), (236, 60, 200))
_FINGER, _PALM, _WRIST = (255, 255, 255), (88, 128, 150), (225, 228, 232)
_BULB = ((84, 84, 96), (255, 236, 40))  # off, on
_LED = ((34, 62, 46), (60, 255, 80))


class _Rays(NamedTuple):
    """Rays in one frame; lists of three components, each an array over pixels or a constant."""

    origin: list
    direction: list
    inverse: list  # 1 / direction
    offset: list  # origin / direction
    shade: list  # brightness of the face that a ray enters through, by axis


class _Hit(NamedTuple):
    """The nearest hit so far, over pixels."""

    distance: Array
    shade: Array
    color: Array  # int32, packed


def _pack(color) -> int:
    red, green, blue = color
    return red | green << 8 | blue << 16


def _look_at(eye: np.ndarray, target: np.ndarray, up: np.ndarray, fov: float) -> np.ndarray:
    """Directions through the pixel centres of a square picture, row by row from the top left: [pixels, 3]."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
    size = specs.IMAGE_SIZE
    grid = (np.arange(size) + 0.5) / size * 2 - 1
    half = np.tan(np.radians(fov) / 2)
    column, row = np.meshgrid(grid * half, -grid * half)
    rays = forward + column[..., None] * right + row[..., None] * np.cross(right, forward)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays.reshape(-1, 3).astype(np.float32)


_STATIC_RAYS = _look_at(_STATIC_EYE, _STATIC_TARGET, np.array([0.0, 0.0, 1.0]), _STATIC_FOV)
_GRIPPER_RAYS = _look_at(_GRIPPER_EYE, _GRIPPER_EYE + [0.03, 0.0, 0.1], np.array([1.0, 0.0, 0.0]), _GRIPPER_FOV)


def _shade(normal):
    return _AMBIENT + (1 - _AMBIENT) * jnp.maximum(0.0, sum(n * x for n, x in zip(normal, _LIGHT, strict=True)))


def _rays(axes, origin, eye, direction) -> _Rays:
    """Expresses rays in a frame.

    Args:
      axes: [3][3], the frame's axes in the world.
      origin: [3], the frame's origin in the world.
      eye: [3], where all rays start.
      direction: three arrays over pixels.
    """
    dot = lambda a, b: a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # noqa: E731
    start = [dot(axis, [eye[i] - origin[i] for i in range(3)]) for axis in axes]
    turned = [dot(axis, direction) for axis in axes]
    turned = [jnp.where(jnp.abs(x) < 1e-6, 1e-6, x) for x in turned]
    inverse = [1 / x for x in turned]
    shade = [jnp.where(x > 0, _shade([-a for a in axis]), _shade(axis)) for axis, x in zip(axes, turned, strict=True)]
    return _Rays(start, turned, inverse, [s * i for s, i in zip(start, inverse, strict=True)], shade)


def _slab(rays: _Rays, low, high):
    """Distances to the entering face by axis, and to the nearest leaving one."""
    first = [low[i] * rays.inverse[i] - rays.offset[i] for i in range(3)]
    second = [high[i] * rays.inverse[i] - rays.offset[i] for i in range(3)]
    enter = [jnp.minimum(a, b) for a, b in zip(first, second, strict=True)]
    leave = [jnp.maximum(a, b) for a, b in zip(first, second, strict=True)]
    return enter, leave


def _max3(x):
    return jnp.maximum(jnp.maximum(x[0], x[1]), x[2])


def _min3(x):
    return jnp.minimum(jnp.minimum(x[0], x[1]), x[2])


def _face_shade(rays: _Rays, enter, near):
    return jnp.where(near == enter[0], rays.shade[0], jnp.where(near == enter[1], rays.shade[1], rays.shade[2]))


def _keep(hit: _Hit, closer, distance, shade, color) -> _Hit:
    return _Hit(
        jnp.where(closer, distance, hit.distance),
        jnp.where(closer, shade, hit.shade),
        jnp.where(closer, color, hit.color),
    )


def _box(hit: _Hit, rays: _Rays, low, high, color) -> _Hit:
    enter, leave = _slab(rays, low, high)
    near, far = _max3(enter), _min3(leave)
    closer = (near < far) & (near > 0) & (near < hit.distance)
    return _keep(hit, closer, near, _face_shade(rays, enter, near), _pack(color))


def _hollow_box(hit: _Hit, rays: _Rays, box, hollow, colors, front=None) -> _Hit:
    """A box with an open cavity: where a ray enters inside the cavity, its inner wall is seen.

    Args:
      box, hollow: (low, high); the hollow reaches out of the box on its open side.
      colors: outside, inside.
      front: distance to a further plane that cuts the box, if there is one.
    """
    enter, leave = _slab(rays, *box)
    near, far = _max3(enter), _min3(leave)
    shade = _face_shade(rays, enter, near)
    if front is not None:
        front_distance, front_shade = front
        shade = jnp.where(front_distance > near, front_shade, shade)
        near = jnp.maximum(near, front_distance)
    closer = (near < far) & (near > 0) & (near < hit.distance)
    hollow_enter, hollow_leave = _slab(rays, *hollow)
    inner = _min3(hollow_leave)
    inside = (_max3(hollow_enter) <= near) & (near <= inner)
    inner_shade = jnp.where(inner == hollow_leave[0], 0.62, jnp.where(inner == hollow_leave[1], 0.8, 0.95))
    shade = jnp.where(inside, inner_shade, shade)
    color = jnp.where(inside, _pack(colors[1]), _pack(colors[0]))
    return _keep(hit, closer, jnp.where(inside, inner, near), shade, color)


def _sphere(hit: _Hit, rays: _Rays, center, radius, color) -> _Hit:
    to_center = [c - o for c, o in zip(center, rays.origin, strict=True)]
    along = sum(c * d for c, d in zip(to_center, rays.direction, strict=True))
    inside = along * along - (sum(c * c for c in to_center) - radius * radius)
    distance = along - jnp.sqrt(jnp.maximum(inside, 0))
    facing = jnp.sqrt(jnp.maximum(inside, 0)) / radius  # 1 in the middle of the disc, 0 at its rim
    closer = (inside > 0) & (distance > 0) & (distance < hit.distance)
    return _keep(hit, closer, distance, 0.72 + 0.28 * facing, color)


def _floor(rays: _Rays) -> _Hit:
    distance = -rays.offset[2]
    below = (distance > 0) & (distance < 4)
    color = jnp.where(below, _pack(_FLOOR), _pack(_SKY))
    return _Hit(jnp.where(below, distance, _FAR), jnp.ones_like(distance), color)


def _moved(box: geometry.Box, axis: int, distance) -> tuple[list, list]:
    """Limits of a box moved along one axis of its frame."""
    low, high = list(box.low), list(box.high)
    low[axis], high[axis] = low[axis] + distance, high[axis] + distance
    return low, high


def _world(hit: _Hit, rays: _Rays, panel: _Rays, state: State) -> _Hit:
    """The furniture, the button and the lamps."""
    drawer, button = state.joints[geometry.DRAWER], state.joints[geometry.BUTTON]
    front = (-panel.offset[2], _shade(geometry.PANEL_AXES[2]))
    hit = _box(hit, rays, geometry.TABLE_BASE.low, geometry.TABLE_BASE.high, _BASE)
    hit = _table_top(hit, rays, state)
    cavity = (geometry.CAVITY.low, geometry.CAVITY.high)
    hit = _hollow_box(hit, rays, geometry.CABINET[1:], cavity, (_CABINET, _CAVITY), front)
    bulb = jnp.where(state.lightbulb > 0.5, _pack(_BULB[1]), _pack(_BULB[0]))
    hit = _sphere(hit, rays, geometry.BULB_CENTER, geometry.BULB_RADIUS, bulb)
    hit = _led(hit, rays, state)
    hit = _box(hit, rays, *_moved(geometry.BUTTON_CAP, 2, -button), _BUTTON)
    low, high = geometry.DRAWER_FRONT.low, geometry.DRAWER_FRONT.high
    outer = ([low[0], low[1] - drawer, low[2]], [high[0], -0.155, high[2]])
    tray = geometry.DRAWER_TRAY
    inner = ([tray.low[0], tray.low[1] - drawer, tray.low[2]], [tray.high[0], -0.155, 1.0])
    hit = _hollow_box(hit, rays, outer, inner, (_DRAWER, _TRAY))
    for box in (geometry.DRAWER_BAR, *geometry.DRAWER_POSTS):
        hit = _box(hit, rays, *_moved(box, 1, -drawer), _HANDLE)
    return hit


def _table_top(hit: _Hit, rays: _Rays, state: State) -> _Hit:
    """The table's top with a soft shadow straight under the fingertips, which shows how high they are."""
    enter, leave = _slab(rays, geometry.TABLE_TOP.low, geometry.TABLE_TOP.high)
    near, far = _max3(enter), _min3(leave)
    x, y = (rays.origin[i] + near * rays.direction[i] - state.position[i] for i in range(2))
    shadow = 0.3 * jnp.maximum(0.0, 1 - (x * x + y * y) / _SHADOW_RADIUS**2)
    closer = (near < far) & (near > 0) & (near < hit.distance)
    return _keep(hit, closer, near, _face_shade(rays, enter, near) * (1 - shadow), _pack(_TABLE))


def _led(hit: _Hit, rays: _Rays, state: State) -> _Hit:
    enter, leave = _slab(rays, geometry.LED_LAMP.low, geometry.LED_LAMP.high)
    near, far = _max3(enter), _min3(leave)
    closer = (near < far) & (near > 0) & (near < hit.distance)
    shade = jnp.where(near == enter[2], 1.0, 0.88)
    return _keep(hit, closer, near, shade, jnp.where(state.led > 0.5, _pack(_LED[1]), _pack(_LED[0])))


def _panel(hit: _Hit, rays: _Rays, state: State) -> _Hit:
    """What moves on the leaning front: the sliding door and the switch."""
    slider, switch = state.joints[geometry.SLIDER], state.joints[geometry.SWITCH]
    hit = _box(hit, rays, *_moved(geometry.DOOR, 0, -slider), _DOOR)
    hit = _box(hit, rays, *_moved(geometry.SLIDER_HANDLE, 0, -slider), _HANDLE)
    for box in (geometry.SWITCH_BAR, *geometry.SWITCH_POSTS):
        hit = _box(hit, rays, *_moved(box, 1, switch), _HANDLE)
    return hit


def _blocks(hit: _Hit, eye, direction, state: State) -> _Hit:
    for i in range(geometry.NUM_BLOCKS):
        x, y, yaw = state.blocks[i, 0], state.blocks[i, 1], state.blocks[i, 2]
        cos, sin = jnp.cos(yaw), jnp.sin(yaw)
        axes = [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]
        rays = _rays(axes, [x, y, geometry.BLOCK_HEIGHT], eye, direction)
        half = [float(h) for h in geometry.BLOCK_HALF_SIZES[i]]
        hit = _box(hit, rays, [-h for h in half], half, _BLOCKS[i])
    return hit


def _fingers(hit: _Hit, rays: _Rays, opening) -> _Hit:
    """The two fingers; rays in the tool frame."""
    low, high = geometry.FINGER_BOX
    half = opening / 2
    hit = _box(hit, rays, [low[0], low[1] + half, low[2]], [high[0], high[1] + half, high[2]], _FINGER)
    return _box(hit, rays, [low[0], -high[1] - half, low[2]], [high[0], -low[1] - half, high[2]], _FINGER)


def _picture(hit: _Hit) -> Array:
    """Colours of the hits as uint8 [64, 64, 3]."""
    channels = [((hit.color >> shift) & 255).astype(jnp.float32) * hit.shade for shift in (0, 8, 16)]
    channels = [jnp.minimum(x, 255.0).astype(jnp.int32) for x in channels]
    packed = channels[0] | channels[1] << 8 | channels[2] << 16
    rgb = jax.lax.bitcast_convert_type(packed, jnp.uint8)[..., :3]
    return rgb.reshape(specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3)


def _scene(eye, direction, state: State) -> _Hit:
    world = _rays(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), eye, direction)
    panel = _rays(geometry.PANEL_AXES, geometry.PANEL_ORIGIN, eye, direction)
    hit = _world(_floor(world), world, panel, state)
    hit = _panel(hit, panel, state)
    return _blocks(hit, eye, direction, state)


def render_static(state: State) -> Array:
    """Picture of the fixed camera in front of the table: uint8 [64, 64, 3]."""
    eye, direction = _STATIC_EYE.astype(np.float32), [_STATIC_RAYS[:, i] for i in range(3)]
    hit = _scene(eye, direction, state)
    axes = specs.euler_to_matrix(state.euler).T
    rays = _rays([[axes[i, j] for j in range(3)] for i in range(3)], state.position, eye, direction)
    hit = _fingers(hit, rays, state.opening)
    hit = _box(hit, rays, *geometry.PALM_BOX, _PALM)
    return _picture(_box(hit, rays, *geometry.WRIST_BOX, _WRIST))


def render_gripper(state: State) -> Array:
    """Picture of the camera on the hand, looking along the fingers: uint8 [64, 64, 3]."""
    rotation = specs.euler_to_matrix(state.euler)
    columns = [_GRIPPER_RAYS[:, i] for i in range(3)]
    direction = [sum(rotation[i, j] * columns[j] for j in range(3)) for i in range(3)]
    eye = [state.position[i] + sum(rotation[i, j] * float(_GRIPPER_EYE[j]) for j in range(3)) for i in range(3)]
    hit = _scene(eye, direction, state)
    tool = _rays(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), _GRIPPER_EYE.astype(np.float32), columns)
    return _picture(_fingers(hit, tool, state.opening))


def render(state: State) -> tuple[Array, Array]:
    """Both pictures of one episode.

    Args:
      state: one episode's state, without leading axes; use `jax.vmap` for more.

    Returns:
      fixed camera and hand camera, each uint8 [64, 64, 3].
    """
    return render_static(state), render_gripper(state)
