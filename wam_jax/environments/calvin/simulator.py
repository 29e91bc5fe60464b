"""One table of CALVIN in pybullet: load, reset, step, read; bit for bit the original's, counted from a fresh load.

Every `reset` loads the scene anew: pybullet keeps contacts and solver state that a reset of joints does not clear, and
with them the same actions lead elsewhere (measured: 3e-3 in scene_obs).
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from wam_jax.environments.calvin import assets, cameras, kinematics, oracle, scene


@dataclasses.dataclass
class Light:
    """What a lamp of the table remembers from step to step."""

    on: int
    was_active: bool  # its button pressed, its switch up: lamps follow edges


class Simulator:
    """A robot at one table, in a physics world of its own."""

    def __init__(self, directory: str, scene_name: str = "D", *, pictures: bool = True, draw_all: bool = False):
        """Connects; nothing is loaded before `reset`.

        Args:
          directory: the assets, laid out like calvin_env's `data/`.
          scene_name: which table.
          pictures: False loads no visual shapes: half the time of a reset and half the memory, and the same states.
          draw_all: True has links drawn that no picture can show: the same pixels, later; for comparison.

        Raises:
          ValueError: pybullet or files are missing, or the scene is unknown.
        """
        self._scene = scene.get_scene(scene_name)
        self._directory = directory
        assets.check(directory, self._scene)
        self._bullet = assets.World(assets.load_pybullet())
        self._pictures, self._draw_all = pictures, draw_all
        self.target_position = self.target_euler = np.zeros(3)

    def close(self) -> None:
        """Gives the physics world back."""
        self._bullet.disconnect()

    # --- Loading ---

    def _load(self) -> None:
        """Order and flags decide the last bits of what follows; see the original's `PlayTableSimEnv.load`."""
        bullet = self._bullet
        bullet.resetSimulation()
        bullet.setGravity(0, 0, scene.GRAVITY)
        self._load_robot()
        self._blocks = [
            self._load_body(
                urdf,
                basePosition=pose[:3],
                baseOrientation=bullet.getQuaternionFromEuler((0, 0, pose[3])),
                globalScaling=scene.SCALE,
            )
            for urdf, pose in zip(self._scene.block_urdfs, scene.BLOCK_POSES, strict=True)
        ]
        self._load_table()
        self._load_body(scene.PLANE_URDF, cameras.floor_folder(self._directory) if self._pictures else "")
        bullet.setTimeStep(scene.PHYSICS_STEP)
        # The original sets this flag before a resetSimulation that clears it. Without it a run depends on where the
        # blocks stood when they were loaded.
        bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        self._command = scene.GRIPPER_OPEN

    def _load_body(self, urdf: str, directory: str = "", **options: Any) -> int:
        """Loads a body; from the assets where no other folder is named.

        Raises:
          ValueError: pybullet cannot read the file.
        """
        path = assets.path(directory or self._directory, urdf)
        flags = 0 if self._pictures else self._bullet.URDF_IGNORE_VISUAL_SHAPES
        try:
            return self._bullet.loadURDF(path, flags=flags, **options)
        except self._bullet.error as error:
            raise ValueError(f"{path} is not calvin_env's ({error}); {assets.MEND}") from error

    def _load_robot(self) -> None:
        bullet = self._bullet
        self._robot = self._load_body(scene.ROBOT_URDF, basePosition=scene.ROBOT_BASE, useFixedBase=True)
        assets.check_links(bullet, self._robot, scene.ROBOT_URDF, scene.ROBOT_LINKS)
        self._colors = {shape[1]: shape[7] for shape in bullet.getVisualShapeData(self._robot)}
        self._hulls = cameras.hulls(bullet, self._robot) if self._pictures else {}
        self._invisible: frozenset[int] = frozenset()
        stand = bullet.createVisualShape(
            bullet.GEOM_CYLINDER, radius=scene.STAND_RADIUS, length=scene.STAND_LENGTH, rgbaColor=(1, 1, 1, 1)
        )
        bullet.createMultiBody(baseVisualShapeIndex=stand, basePosition=scene.STAND_CENTER)
        gear = bullet.createConstraint(
            self._robot, scene.FINGERS[0], self._robot, scene.FINGERS[1], bullet.JOINT_GEAR,
            jointAxis=(1, 0, 0), parentFramePosition=(0, 0, 0), childFramePosition=(0, 0, 0),
        )  # fmt: skip
        bullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50)

    def _load_table(self) -> None:
        bullet = self._bullet
        self._table = self._load_body(self._scene.table_urdf, useFixedBase=True, globalScaling=scene.SCALE)
        assets.check_links(bullet, self._table, self._scene.table_urdf, scene.TABLE_LINKS)
        for joint in (scene.SLIDER, scene.DRAWER, scene.SWITCH):
            bullet.setJointMotorControl2(self._table, joint, bullet.VELOCITY_CONTROL, force=scene.JOINT_FORCE)
        bullet.setJointMotorControl2(
            self._table, scene.BUTTON, bullet.POSITION_CONTROL, targetPosition=0, force=scene.JOINT_FORCE
        )

    # --- Reset ---

    def reset(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        """Loads the scene anew and sets it to a recorded state.

        Args:
          robot_obs: [15]; the seven joints and the opening count, the hand's pose follows from them.
          scene_obs: [24].

        Raises:
          ValueError: shapes are wrong, values are not finite, or a light is neither 0 nor 1.
        """
        robot_obs, scene_obs = _vector("robot_obs", robot_obs, 15), _vector("scene_obs", scene_obs, 24)
        if not np.isin(scene_obs[4:6], (0, 1)).all():
            raise ValueError(f"lights {scene_obs[4:6].tolist()} in scene_obs; each must be 0 or 1")
        self._load()
        self._reset_table(scene_obs)
        for block, pose in zip(self._blocks, scene_obs[6:].reshape(3, 6), strict=True):
            orientation = self._bullet.getQuaternionFromEuler(pose[3:])
            self._bullet.resetBasePositionAndOrientation(block, pose[:3], orientation)
        self._reset_robot(robot_obs)
        self._bullet.stepSimulation()

    def _reset_table(self, scene_obs: np.ndarray) -> None:
        for joint, value in zip((scene.SLIDER, scene.DRAWER, scene.BUTTON, scene.SWITCH), scene_obs[:4], strict=True):
            self._bullet.resetJointState(self._table, joint, value)
        self._lights = {
            link: Light(on=int(value), was_active=False)
            for link, value in zip((scene.LIGHTBULB, scene.LED), scene_obs[4:6], strict=True)
        }
        for link in self._lights:
            self._show_light(link)

    def _reset_robot(self, robot_obs: np.ndarray) -> None:
        finger = robot_obs[6] / 2
        for joint, value in zip(scene.ARM, robot_obs[7:14], strict=True):
            self._bullet.resetJointState(self._robot, joint, value)
            self._move_arm(joint, value)
        for joint in scene.FINGERS:
            self._bullet.resetJointState(self._robot, joint, finger)
            self._move_finger(joint, finger, scene.CLOSE_FORCE)
        self.target_position, self.target_euler = self._tcp_pose()
        self._joint_targets = robot_obs[7:14]

    # --- Step ---

    def step(self, action: np.ndarray) -> None:
        """Executes one relative action, 1/30 s.

        Args:
          action: [7], dx, dy, dz, droll, dpitch, dyaw in [-1, 1] (1: 0.02 m, 0.05 rad), gripper +1 open or -1 closed.

        Raises:
          ValueError: a value is not finite, out of range, or not a gripper command.
        """
        action = check_action(action)
        self.target_position = self.target_position + action[:3] * scene.POSITION_SCALE
        self.target_euler = self.target_euler + action[3:6] * scene.EULER_SCALE
        self._joint_targets = self._inverse_kinematics()
        for joint, value in zip(scene.ARM, self._joint_targets, strict=True):
            self._move_arm(joint, value)
        self._command = int(action[6])
        is_open = self._command == scene.GRIPPER_OPEN
        for joint in scene.FINGERS:
            self._move_finger(
                joint, scene.FINGER_OPEN if is_open else 0, scene.OPEN_FORCE if is_open else scene.CLOSE_FORCE
            )
        for _ in range(scene.PHYSICS_STEPS):
            self._bullet.stepSimulation()
        self._update_lights()

    def _inverse_kinematics(self) -> np.ndarray:
        rest = [*scene.INITIAL_JOINTS, scene.FINGER_OPEN, scene.FINGER_OPEN]
        joints = self._bullet.calculateInverseKinematics(
            self._robot,
            scene.TCP_LINK,
            self.target_position,
            self._bullet.getQuaternionFromEuler(self.target_euler),
            lowerLimits=[-scene.IK_LIMIT] * len(rest),
            upperLimits=[scene.IK_LIMIT] * len(rest),
            jointRanges=[scene.IK_RANGE] * len(rest),
            restPoses=rest,
        )
        return np.clip(joints[:7], scene.JOINT_LOW, scene.JOINT_HIGH)

    def _move_arm(self, joint: int, position: float) -> None:
        self._bullet.setJointMotorControl2(
            self._robot, joint, self._bullet.POSITION_CONTROL, targetPosition=position, force=scene.ARM_FORCE,
            maxVelocity=scene.ARM_VELOCITY,
        )  # fmt: skip

    def _move_finger(self, joint: int, position: float, force: float) -> None:
        self._bullet.setJointMotorControl2(
            self._robot, joint, self._bullet.POSITION_CONTROL, targetPosition=position, force=force,
            maxVelocity=scene.FINGER_VELOCITY,
        )  # fmt: skip

    def _update_lights(self) -> None:
        """The LED toggles whenever the button goes down; the bulb follows the switch when that crosses its middle."""
        pressed = self._table_joint(scene.BUTTON) > scene.BUTTON_RANGE / 2
        led, bulb = self._lights[scene.LED], self._lights[scene.LIGHTBULB]
        if pressed and not led.was_active:
            led.on = 1 - led.on
            self._show_light(scene.LED)
        led.was_active = pressed
        up = self._table_joint(scene.SWITCH) > scene.SWITCH_RANGE / 2
        if up != bulb.was_active:
            bulb.on = int(up)
            self._show_light(scene.LIGHTBULB)
        bulb.was_active = up

    def _show_light(self, link: int) -> None:
        if not self._pictures:
            return
        color = scene.LIGHT_COLORS[link] if self._lights[link].on else scene.OFF_COLOR
        self._bullet.changeVisualShape(self._table, link, rgbaColor=color)

    # --- Reading ---

    def _table_joint(self, joint: int) -> float:
        return self._bullet.getJointState(self._table, joint)[0]

    def _tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """As of the last physics step: the original reads links without fresh kinematics, 1 mm behind the joints."""
        position, orientation = self._bullet.getLinkState(self._robot, scene.TCP_LINK)[:2]
        return np.array(position), np.array(self._bullet.getEulerFromQuaternion(orientation))

    def robot_obs(self) -> np.ndarray:
        """float64 [15]: hand position, Euler XYZ, opening, seven joints, last gripper command."""
        fingers = [self._bullet.getJointState(self._robot, joint)[0] for joint in scene.FINGERS]
        arm = [self._bullet.getJointState(self._robot, joint)[0] for joint in scene.ARM]
        position, euler = self._tcp_pose()
        return np.array([*position, *euler, sum(fingers), *arm, self._command], np.float64)

    def scene_obs(self) -> np.ndarray:
        """float64 [24]: slider, drawer, button, switch, lightbulb, LED, three block poses (xyz, Euler XYZ)."""
        joints = [self._table_joint(joint) for joint in (scene.SLIDER, scene.DRAWER, scene.BUTTON, scene.SWITCH)]
        poses = []
        for block in self._blocks:
            position, orientation = self._bullet.getBasePositionAndOrientation(block)
            poses += [*position, *self._bullet.getEulerFromQuaternion(orientation)]
        return np.array([*joints, self._lights[scene.LIGHTBULB].on, self._lights[scene.LED].on, *poses], np.float64)

    def info(self) -> oracle.Info:
        """What the oracle compares."""
        names = {self._robot: "robot", self._table: "table"} | dict(
            zip(self._blocks, self._scene.block_names, strict=True)
        )

        def contacts(body: int) -> frozenset[tuple[str, int]]:
            points = self._bullet.getContactPoints(bodyA=body)
            return frozenset((names.get(point[2], f"body {point[2]}"), point[4]) for point in points)

        blocks = {}
        for block, name in zip(self._blocks, self._scene.block_names, strict=True):
            position, orientation = map(np.array, self._bullet.getBasePositionAndOrientation(block))
            velocity, spin = map(np.array, self._bullet.getBaseVelocity(block))
            blocks[name] = oracle.Block(position, orientation, velocity, spin, contacts(block))
        return oracle.Info(
            joints={link: self._table_joint(link) for link in (scene.SLIDER, scene.DRAWER)},
            lights={link: light.on for link, light in self._lights.items()},
            blocks=blocks,
            robot_contacts=frozenset(body for body, _ in contacts(self._robot)),
        )

    def smallest_gap(self, limit: float) -> float:
        """Metres between the two nearest blocks, at most `limit`."""
        pairs = itertools.combinations(self._blocks, 2)
        points = [p for a, b in pairs for p in self._bullet.getClosestPoints(a, b, limit)]
        return min([limit, *(point[8] for point in points)])

    def reach_error(self) -> float:
        """Metres between the target and the place that the inverse kinematics found for it; large: out of reach."""
        return float(np.linalg.norm(kinematics.tcp_position(self._joint_targets) - self.target_position))

    def render(self, static_size: int, gripper_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Both cameras' pictures, uint8 [size, size, 3].

        Raises:
          ValueError: the simulator was built without pictures.
        """
        if not self._pictures:
            raise ValueError("this simulator was built with pictures=False, for states alone")
        static = self._draw(cameras.static_view(self._bullet), scene.STATIC_LENS, static_size)
        return static, self._draw(cameras.gripper_view(self._bullet, self._robot), scene.GRIPPER_LENS, gripper_size)

    def _draw(self, view: tuple[float, ...], lens: scene.Lens, size: int) -> np.ndarray:
        """A picture; the renderer skips links that are invisible, which those that it cannot show become."""
        if not self._draw_all:
            unseen = cameras.out_of_view(self._bullet, self._robot, self._hulls, view, lens)
            for link in unseen ^ self._invisible:
                color = (*self._colors[link][:3], 0) if link in unseen else self._colors[link]
                self._bullet.changeVisualShape(self._robot, link, rgbaColor=color)
            self._invisible = unseen
        return cameras.render(self._bullet, view, lens, size)


def check_action(action: Any) -> np.ndarray:
    """Returns an action as float64 [7].

    Raises:
      ValueError: it is not one, and why.
    """
    action = _vector("action", action, 7)
    if np.abs(action[:6]).max() > 1:
        raise ValueError(f"action {action.tolist()} is out of range; its first six entries must be in [-1, 1]")
    if action[6] not in (scene.GRIPPER_OPEN, scene.GRIPPER_CLOSE):
        raise ValueError(f"gripper command {action[6]}; expected +1 (open) or -1 (close)")
    return action


def _vector(name: str, value: Any, size: int) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.shape != (size,):
        raise ValueError(f"{name} has shape {value.shape}; expected ({size},)")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has entries that are not finite: {value.tolist()}")
    return value
