"""CALVIN's oracle of 34 tasks, on moments made up by hand."""

import dataclasses

import numpy as np
import pytest

from wam_jax import specs
from wam_jax.environments.calvin import experts, oracle, scene, starts
from wam_jax.environments.calvin.oracle import Block, Info

TABLE, SHELF, DRAWER = ("table", scene.TABLE_BASE), ("table", scene.PLANK), ("table", scene.DRAWER)
ROBOT = ("robot", scene.FINGERS[0])
ON_RED, ON_BLUE = ("block_red", -1), ("block_blue", -1)


def block(x=0.0, z=0.46, yaw=0.0, tilt=0.0, contacts=(TABLE,), velocity=0.0):
    """A block turned about z by `yaw`, or about x by `tilt`, degrees."""
    half = np.radians(yaw or tilt) / 2
    orientation = np.array([np.sin(half) * bool(tilt), 0, np.sin(half) * bool(yaw), np.cos(half)])
    return Block(np.array([x, -0.1, z]), orientation, np.full(3, velocity), np.zeros(3), frozenset(contacts))


def moment(red=None, blue=None, pink=None, slider=0.0, drawer=0.0, bulb=0, led=0):
    """Blocks far from each other on the table, but for those given; the robot touches what is in contact with it."""
    blocks = {
        "block_red": red or block(0.0),
        "block_blue": blue or block(0.15),
        "block_pink": pink or block(0.3),
    }
    return Info(
        joints={scene.SLIDER: slider, scene.DRAWER: drawer},
        lights={scene.LIGHTBULB: bulb, scene.LED: led},
        blocks=blocks,
        robot_contacts=frozenset(name for name, b in blocks.items() if ROBOT in b.contacts),
    )


START = moment()
SOLVED = [  # start, now, and all that was solved between
    (START, START, set()),
    (START, moment(drawer=0.13), {"open_drawer"}),
    (START, moment(drawer=0.11), set()),
    (moment(drawer=0.2), moment(drawer=0.07), {"close_drawer"}),
    (START, moment(slider=0.16), {"move_slider_left"}),
    (moment(slider=0.28), moment(slider=0.12), {"move_slider_right"}),
    (moment(slider=0.28), moment(slider=0.14), set()),
    (START, moment(bulb=1), {"turn_on_lightbulb"}),
    (moment(bulb=1), START, {"turn_off_lightbulb"}),
    (START, moment(led=1), {"turn_on_led"}),
    (moment(led=1, bulb=1), moment(bulb=1), {"turn_off_led"}),
    # Rotation: clockwise is right; not further than 0.1 m away, nearly flat, on something.
    (START, moment(red=block(yaw=-61)), {"rotate_red_block_right"}),
    (START, moment(blue=block(0.15, yaw=61)), {"rotate_blue_block_left"}),
    (moment(pink=block(0.3, yaw=150)), moment(pink=block(0.3, yaw=-140)), {"rotate_pink_block_left"}),
    (START, moment(red=block(yaw=59)), set()),
    (START, moment(red=block(tilt=80)), set()),
    (START, moment(red=block(0.0, yaw=61, contacts=[ROBOT])), set()),
    (START, moment(red=block(0.0, yaw=61, contacts=[ROBOT, TABLE])), {"rotate_red_block_left"}),
    # Push: 0.1 m along x, on the same bodies as before.
    (START, moment(red=block(0.11)), {"push_red_block_right"}),
    (START, moment(pink=block(0.19, contacts=[ROBOT, TABLE])), {"push_pink_block_left"}),
    (START, moment(red=block(0.09)), set()),
    (START, moment(red=block(0.11, contacts=[ROBOT])), set()),
    (START, moment(blue=block(0.26, contacts=[SHELF])), {"push_blue_block_right"}),  # bodies count, not their links
    # Lift: from that surface, by the robot alone.
    (START, moment(red=block(z=0.52, contacts=[ROBOT])), {"lift_red_block_table"}),
    (START, moment(red=block(z=0.50, contacts=[ROBOT])), set()),
    (START, moment(red=block(z=0.52, contacts=[ROBOT, TABLE])), set()),
    (moment(red=block(contacts=[TABLE, ROBOT])), moment(red=block(z=0.52, contacts=[ROBOT])), set()),
    (
        moment(blue=block(0.15, contacts=[SHELF])),
        moment(blue=block(0.15, z=0.50, contacts=[ROBOT])),
        {"lift_blue_block_slider"},
    ),
    (
        moment(pink=block(0.3, z=0.36, contacts=[DRAWER])),
        moment(pink=block(0.3, z=0.42, contacts=[ROBOT])),
        {"lift_pink_block_drawer"},
    ),
    # Place: held by the robot alone, then let go on the surface.
    (moment(red=block(contacts=[ROBOT])), moment(red=block(contacts=[SHELF])), {"place_in_slider"}),
    (moment(red=block(contacts=[ROBOT])), moment(red=block(contacts=[DRAWER])), {"place_in_drawer"}),
    (moment(red=block(contacts=[ROBOT])), moment(red=block(contacts=[SHELF, ROBOT])), set()),
    (moment(red=block(contacts=[ROBOT, TABLE])), moment(red=block(contacts=[SHELF])), set()),
    # Into the drawer, over the edge.
    (START, moment(blue=block(0.15, z=0.36, contacts=[DRAWER])), {"push_into_drawer"}),
    (moment(blue=block(0.15, contacts=[TABLE, SHELF])), moment(blue=block(0.15, contacts=[DRAWER])), set()),
    # Stacks: on blocks alone, and at rest.
    (START, moment(red=block(contacts=[ON_BLUE])), {"stack_block"}),
    (START, moment(red=block(contacts=[ON_BLUE, ROBOT])), set()),
    (START, moment(red=block(contacts=[ON_BLUE, TABLE])), set()),
    (START, moment(red=block(contacts=[ON_BLUE], velocity=-1.5)), set()),
    (moment(blue=block(0.15, contacts=[ON_RED])), START, {"unstack_block"}),
    (moment(blue=block(0.15, contacts=[ON_RED], velocity=2.0)), START, set()),
]


@pytest.mark.parametrize(("start", "now", "expected"), SOLVED)
def test_the_oracle_finds_what_was_solved(start, now, expected):
    assert oracle.solved(start, now) == expected


def test_a_lifted_robot_contact_with_two_bodies_is_no_placing():
    start = moment(red=block(contacts=[ROBOT]))
    start = dataclasses.replace(start, robot_contacts=frozenset({"block_red", "table"}))
    assert oracle.solved(start, moment(red=block(contacts=[SHELF]))) == set()


def test_there_are_34_tasks_and_the_eight_are_among_them():
    assert len(oracle.RULES) == 34
    assert set(specs.TASKS) == set(starts.TASKS) == set(experts.EXPERTS) < set(oracle.RULES)
    covered = {task for _, _, expected in SOLVED for task in expected}
    kinds = {
        task.replace(color, "COLOR") for task in oracle.RULES for color in ("red", "blue", "pink") if color in task
    }
    assert {task for task in oracle.RULES if not task.startswith(("rotate", "push_", "lift"))} <= covered
    assert len(kinds) == 7


def test_tasks_can_be_chosen():
    now = moment(drawer=0.2, led=1)
    assert oracle.solved(START, now, ("turn_on_led", "open_drawer")) == {"turn_on_led", "open_drawer"}
    assert oracle.solved(START, now, ("turn_on_led",)) == {"turn_on_led"}
    with pytest.raises(ValueError, match="unknown task 'open_door'"):
        oracle.solved(START, now, ("open_door",))
