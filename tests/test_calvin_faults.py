"""What may go wrong around CALVIN's simulator: interruptions, dead workers, wrong interpreters, assets, recordings."""

import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import threading

import helpers
import numpy as np
import pytest
from calvin_files import ASSETS, SHARED, needs_simulator

from wam_jax.environments.calvin import assets, pool, recordings, scene
from wam_jax.environments.calvin.pool import Pool, begin
from wam_jax.environments.calvin.recordings import Recording
from wam_jax.environments.calvin.worker import Settings

STATES = Settings(str(ASSETS), pictures=False)
START = begin(scene.EVALUATION_ROBOT_OBS, np.zeros(24))


@pytest.fixture(scope="module")
def recording():
    return recordings.load(str(SHARED / "replay_D.npz"))


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- The pool ---


@needs_simulator
def test_an_interrupted_request_leaves_no_answers_behind(recording, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    pool = Pool(STATES, num_workers=2)
    episodes = [begin(recording.reset_robot_obs, recording.reset_scene_obs)] * 2
    episodes, _ = pool.step(episodes, np.stack([recording.actions[:5]] * 2), [False] * 2)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.step(episodes, np.stack([recording.actions[5:]] * 20).reshape(2, -1, 7), [False] * 2)  # over a second
    _, frames = pool.step(episodes, np.stack([recording.actions[5:8]] * 2), [False] * 2)
    for moments in frames:
        np.testing.assert_array_equal(moments.robot_obs, recording.robot_obs[6:9])
        np.testing.assert_array_equal(moments.scene_obs, recording.scene_obs[6:9])
    assert pool.restarts == 0
    pool.close()
    with pytest.raises(RuntimeError, match="the pool of CALVIN's simulators is closed"):
        pool.look(episodes, [False] * 2)


@needs_simulator
def test_a_worker_lives_through_an_interrupt_while_it_imports(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "sys.addaudithook(lambda event, arguments: (event, arguments[:1]) == ('import', ('numpy',))\n"
        "                 and os.kill(os.getpid(), signal.SIGINT))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = Pool(STATES, num_workers=1)
    assert pool.facts["numpy"] == np.__version__
    pool.close()


@needs_simulator
def test_a_silent_worker_is_replaced_and_the_reason_logged(monkeypatch):
    pools, said = Pool(STATES, num_workers=1), []

    def warn(text, *values):
        said.append(text % values)
        monkeypatch.setattr(pool, "TIMEOUT", 600.0)

    monkeypatch.setattr("absl.logging.warning", warn)
    monkeypatch.setattr(pool, "TIMEOUT", 0.5)
    os.kill(pools.processes[0], signal.SIGSTOP)
    pools.look([START, START], [False, False])
    pools.close()
    assert len(said) == 1 and "ended (it was silent for 1 s, status -9)" in said[0]  # 0.5 s for each of two episodes


@needs_simulator
def test_there_are_no_more_processes_than_cores_and_episodes():
    cores = os.sched_getaffinity(0)
    wide = Pool(STATES, num_workers=4)
    os.sched_setaffinity(0, {min(cores)})
    try:
        narrow = Pool(STATES)
        assert [len(pool.look([START, START], [False] * 2)) for pool in (wide, narrow)] == [2, 2]
        assert [len(pool.processes) for pool in (wide, narrow)] == [2, 1]
    finally:
        os.sched_setaffinity(0, cores)
        wide.close()
        narrow.close()


@needs_simulator
def test_resets_do_not_add_up_in_memory_or_on_disk(tmp_path, monkeypatch):
    """The assets lack the floor's texture of 0.8 MB, which is drawn here."""
    assert not assets.exists(str(ASSETS), scene.FLOOR_TEXTURE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = Pool(Settings(str(ASSETS)), num_workers=1)

    def reset(times):
        for _ in range(times):
            pool.look([begin(START.robot_obs, START.scene_obs)], [True])
        return resident(pool.processes[0])

    few, more = reset(3), reset(20)
    assert more - few < 8e6
    assert len(list(tmp_path.rglob(scene.FLOOR_TEXTURE))) == 1
    pool.close()
    assert list(tmp_path.iterdir()) == []


# --- The interpreter ---


@needs_simulator
@pytest.mark.parametrize(
    ("python", "message"),
    [("/nonexistent", "cannot be started: .*'/nonexistent'"), (shutil.which("false"), "false ended .*, status 1")],
)
def test_an_interpreter_that_cannot_work_is_named(python, message):
    with pytest.raises(ValueError, match=f"{message}.*Python 3.10 or 3.11.* with numpy and pybullet"):
        Pool(STATES, python=python)


@needs_simulator
def test_the_binary_says_in_one_line_that_workers_die():
    code = (
        "from experiments import check_calvin\nfrom wam_jax import cli\n"
        "check_calvin.Pool._ask = lambda self, index, *_: self._workers[index].process.kill()\n"
        "cli.run(check_calvin.main)"
    )
    done = helpers.run_python("-c", code, f"--assets={ASSETS}", f"--replay={SHARED / 'replay_D.npz'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a process of CALVIN's simulator died 4 times, last with")


def test_a_broken_pybullet_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "pybullet.py").write_text("raise ImportError('libGL.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pybullet", raising=False)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"cannot import \(libGL.so is missing\).*-m pip install pybullet"):
            assets.load_pybullet()
    assert len(os.listdir("/proc/self/fd")) == open_before


# --- Assets ---


def assets_with(folder, name, content):
    """The assets, but for the content of one file."""
    for path in ASSETS.rglob("*"):
        copy = folder / path.relative_to(ASSETS)
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_text(content)
    return str(folder)


@needs_simulator
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "franka_panda/meshes/visual/link1.obj",
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1070650\n",
            "git-lfs pointers in place of franka_panda/meshes/visual/link1.obj; 'git lfs pull'",
        ),
        ("plane/plane.obj", "<html>not found</html>", "have no vertices in plane/plane.obj; give calvin_env's data/"),
        (scene.ROBOT_URDF, "<html>not found</html>", f"{scene.ROBOT_URDF} is not calvin_env's .*Cannot load URDF file"),
        (
            scene.ROBOT_URDF,
            '<robot name="arm"><link name="base"/></robot>',
            "of another version than calvin_env's: link 9 is None, not 'panda_leftfinger'",
        ),
    ],
)
def test_wrong_assets_are_named(tmp_path, name, content, message):
    directory = assets_with(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        Pool(Settings(directory), num_workers=1).look([START], [False])


@needs_simulator
def test_unknown_assets_are_reported_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *values: said.append(text % values))
    mesh = (ASSETS / "plane/plane.obj").read_text()
    pool = Pool(Settings(assets_with(tmp_path, "plane/plane.obj", f"{mesh}\n"), pictures=False), num_workers=2)
    pool.look([START, START], [False, False])
    pool.close()
    assert len(said) == 1 and "no version that was compared with the original" in said[0]


# --- Recordings ---

RECORDING = Recording(
    reset_robot_obs=np.zeros(15),
    reset_scene_obs=np.zeros(24),
    actions=np.tile([0.0, 0, 0, 0, 0, 0, 1], (2, 1)),
    robot_obs=np.zeros((3, 15)),
    scene_obs=np.zeros((3, 24)),
    frame_steps=np.array([0, 2]),
    rgb_static=np.zeros((2, 8, 8, 3), np.uint8),
    rgb_gripper=np.zeros((2, 8, 8, 3), np.uint8),
)


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("actions", np.zeros(()), r"actions has shape \(\); expected \(1, 7\)"),
        ("actions", np.zeros((2, 7)), r"actions\[0\]: gripper command 0.0; expected"),
        ("frame_steps", np.zeros((), int), r"frame_steps has shape \(\); expected \(1,\)"),
        ("rgb_gripper", np.zeros(()), r"rgb_gripper has shape \(\); expected \(2, 64, 64, 3\)"),
        ("reset_robot_obs", np.full(15, "0"), "reset_robot_obs is <U1; expected float64"),
        ("frame_steps", np.array([0.0, 1.5]), "frame_steps is float64; expected int64"),
        ("rgb_static", np.zeros((2, 8, 8, 3)), "rgb_static is float64; expected uint8"),
    ],
)
def test_arrays_that_cannot_be_replayed_are_named(tmp_path, key, array, message):
    path = str(tmp_path / "replay.npz")
    np.savez(path, **dataclasses.asdict(RECORDING))
    assert len(recordings.load(path).actions) == 2
    np.savez(path, **(dataclasses.asdict(RECORDING) | {key: array}))
    with pytest.raises(ValueError, match=f"replay.npz: {message}"):
        recordings.load(path)


def test_files_that_are_no_recordings_are_named(tmp_path):
    single, empty = tmp_path / "actions.npy", tmp_path / "empty.npz"
    np.save(single, RECORDING.actions)
    empty.touch()
    with pytest.raises(ValueError, match="cannot read the recording .*actions.npy: it is a single array"):
        recordings.load(str(single))
    with pytest.raises(ValueError, match="cannot read the recording .*empty.npz: No data left"):
        recordings.load(str(empty))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted: finished work is kept; the same command goes on from there"),
        ("open('/dev/null/figures.json', 'w')", 1, "error: [Errno 20] Not a directory: '/dev/null/figures.json'"),
    ],
)
def test_a_binary_without_config_ends_in_one_line(body, status, said):
    done = helpers.run_python("-c", f"from wam_jax import cli\ndef main(argv):\n    {body}\ncli.run(main)")
    assert (done.returncode, done.stderr.strip()) == (status, said)


def test_a_flag_that_is_not_known_is_one_line():
    done = helpers.run_python("-m", "experiments.check_calvin", "--asets=x")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: Unknown command line flag 'asets'")
