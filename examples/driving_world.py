"""The simulated drives of driving.py, and the extended Kalman filter on the same measurements. Units: m, rad, s.

A car of the kinematic bicycle model, with its wheelbase L, steering angle s and acceleration a,

    x' = v cos h,  y' = v sin h,  h' = v tan(s) / L,  v' = a,

follows a closed road counter-clockwise by pure pursuit (Coulter, 1992), weaving and changing its speed. Posts stand
along the road, which the sensors tell apart. Every 0.1 s there are

    imu     acceleration and turn rate, with noise and, for the turn rate, a bias that is another one in each drive
    camera  bearings of the posts within 45 m and 50 degrees of straight ahead, with noise
    lidar   distances to the posts within 30 m, all round, with noise; one in 50 is an echo, which reads too long

and now and then a sensor gives nothing for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEP, WHEELBASE = 0.1, 2.7
POSTS = 16
RANGE_NOISE, BEARING_NOISE, TURN_NOISE, ACCELERATION_NOISE = 0.15, 0.015, 0.02, 0.3
TURN_BIAS = 0.02
ECHOES, ECHO_LENGTH = 0.02, 8.0
LIDAR_REACH, CAMERA_REACH, CAMERA_ANGLE = 30.0, 45.0, np.radians(50)
# Of each sensor: how often it drops out, per s, and for how long, between these.
DROPOUTS = {"imu": (1 / 40, 0.3, 1.0), "camera": (1 / 20, 0.5, 4.0), "lidar": (1 / 20, 0.5, 4.0)}
FAULTS = {"turn rate biased": "imu", "acceleration stuck": "imu", "camera turned": "camera", "lidar stuck": "lidar"}
FAULT_LENGTH, TURN_FAULT, CAMERA_FAULT = 5.0, 0.15, 0.08
COLUMNS = (
    "imu.acceleration",
    "imu.turn_rate",
    *(f"camera.post_{post}" for post in range(POSTS)),
    *(f"lidar.post_{post}" for post in range(POSTS)),
)


@dataclass
class Drives:
    """state    [D, T, 4]  the truth: x, y, heading, speed
    readings    [D, T, 34]  as COLUMNS; NaN where there is none
    fault       [D, T]      the number of the active one in FAULTS, -1 for none
    """

    state: np.ndarray
    readings: np.ndarray
    fault: np.ndarray


def radius(angle: np.ndarray) -> np.ndarray:
    """Of the middle of the road, seen from the origin."""
    return 60 + 12 * np.cos(2 * angle) + 6 * np.sin(3 * angle)


def at(angle: np.ndarray, aside: np.ndarray | float = 0.0) -> np.ndarray:
    """[..., 2]: places at these angles, `aside` of the middle of the road, outwards."""
    return (radius(angle) + aside)[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)


POST_PLACES = at(2 * np.pi * np.arange(POSTS) / POSTS, np.where(np.arange(POSTS) % 2 == 0, 8.0, -8.0))


def wrapped(angle: np.ndarray) -> np.ndarray:
    """The same angle, from -pi to pi."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def to_posts(place: np.ndarray, heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances and bearings, which are from -pi to pi and 0 straight ahead, of the posts: [..., POSTS] each."""
    offset = POST_PLACES - place[..., None, :]
    bearing = wrapped(np.arctan2(offset[..., 1], offset[..., 0]) - heading[..., None])
    return np.hypot(offset[..., 0], offset[..., 1]), bearing


def simulate(drives: int, seconds: float, seed: int, faults: int = 0) -> Drives:
    """Drives of this length, with so many faults in each, of random kinds at random times, which do not overlap."""
    random = np.random.default_rng(seed)
    steps = round(seconds / STEP)
    state, inputs = _drive(random, drives, steps)
    kinds = _fault_times(random, drives, steps, faults)
    imu = inputs + random.normal(0.0, (ACCELERATION_NOISE, TURN_NOISE), inputs.shape)
    imu[..., 1] += random.normal(0.0, TURN_BIAS, (drives, 1))
    distance, bearing = to_posts(state[..., :2], state[..., 2])
    echo = (random.random(distance.shape) < ECHOES) * random.exponential(ECHO_LENGTH, distance.shape)
    lidar = np.where(distance < LIDAR_REACH, distance + echo + random.normal(0.0, RANGE_NOISE, distance.shape), np.nan)
    in_view = (distance < CAMERA_REACH) & (np.abs(bearing) < CAMERA_ANGLE)
    camera = np.where(in_view, bearing + random.normal(0.0, BEARING_NOISE, bearing.shape), np.nan)
    sensors = {"imu": imu, "camera": camera, "lidar": lidar}
    _break(random, sensors, kinds)
    for name, values in sensors.items():
        own = [number for number, sensor in enumerate(FAULTS.values()) if sensor == name]
        values[_gone(random, drives, steps, *DROPOUTS[name]) & ~np.isin(kinds, own)] = np.nan
    return Drives(state, np.concatenate(list(sensors.values()), -1), kinds)


def _drive(random: np.random.Generator, drives: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The states [D, T, 4], and the true acceleration and turn rate [D, T, 2] that led to each."""
    start = random.uniform(0, 2 * np.pi, drives)
    place, ahead = at(start), at(start + 0.01) - at(start)
    heading, speed = np.arctan2(ahead[:, 1], ahead[:, 0]), random.uniform(7, 12, drives)
    cruise, weave = random.uniform(7, 12, drives), random.uniform(0.0, 2.0, drives)
    phase, slow = random.uniform(0, 2 * np.pi, (2, drives)), random.uniform(5, 15, (2, drives))
    states, inputs = np.empty((drives, steps, 4)), np.empty((drives, steps, 2))
    for step in range(steps):
        swing = np.sin(2 * np.pi * step * STEP / slow + phase)
        acceleration = np.clip(0.8 * (cruise + 2.5 * swing[0] - speed), -3, 3)
        reach = 4 + 0.6 * speed
        angle = np.arctan2(place[:, 1], place[:, 0])
        goal = at(angle + reach / radius(angle), weave * swing[1]) - place
        off = wrapped(np.arctan2(goal[:, 1], goal[:, 0]) - heading)
        steering = np.clip(np.arctan(2 * WHEELBASE * np.sin(off) / reach), -0.5, 0.5)
        turn = speed * np.tan(steering) / WHEELBASE
        place = place + STEP * speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], -1)
        heading, speed = wrapped(heading + STEP * turn), speed + STEP * acceleration
        states[:, step] = np.column_stack([place, heading, speed])
        inputs[:, step] = np.column_stack([acceleration, turn])
    return states, inputs


def _fault_times(random: np.random.Generator, drives: int, steps: int, faults: int) -> np.ndarray:
    """[D, T]: each fault at a random time of its own share of the drive, not at its beginning; each kind as often."""
    kinds = np.full((drives, steps), -1)
    kind = random.permutation(np.arange(drives * faults) % len(FAULTS)).reshape(drives, faults)
    length, share = round(FAULT_LENGTH / STEP), steps // max(faults, 1)
    for drive in range(drives):
        for fault in range(faults):
            start = fault * share + random.integers(length, share - length)
            kinds[drive, start : start + length] = kind[drive, fault]
    return kinds


def _break(random: np.random.Generator, sensors: dict[str, np.ndarray], kinds: np.ndarray) -> None:
    """Put the faults into the readings."""
    biased, held, turned, stuck = range(len(FAULTS))
    sign = random.choice([-1.0, 1.0], len(kinds))[:, None]
    sensors["imu"][..., 1] += np.where(kinds == biased, TURN_FAULT * sign, 0.0)
    sensors["camera"] += np.where(kinds == turned, CAMERA_FAULT * sign, 0.0)[..., None]
    for kind, values in ((held, sensors["imu"][..., :1]), (stuck, sensors["lidar"])):
        for step in range(1, kinds.shape[1]):
            rows = kinds[:, step] == kind
            values[rows, step] = values[rows, step - 1]


def _gone(random: np.random.Generator, drives: int, steps: int, rate: float, least: float, most: float) -> np.ndarray:
    """bool [D, T]: whether a sensor has dropped out."""
    left, gone = np.zeros(drives), np.empty((drives, steps), bool)
    for step in range(steps):
        left = np.where(random.random(drives) < rate * STEP, random.uniform(least, most, drives), left - STEP)
        gone[:, step] = left > 0
    return gone


class KalmanFilter:
    """Extended Kalman filters of many drives at once (Thrun, Burgard and Fox, Probabilistic Robotics, 2005, ch. 3.3).

    It knows the model, the posts and the noise. Its state is x, y, heading, speed and the bias of the turn rate,

        x += v cos(h) dt,  y += v sin(h) dt,  h += (turn rate - bias) dt,  v += acceleration dt,

    with the imu's readings as inputs. Distances and bearings of posts correct it one after the other; an innovation n
    of variance S is refused where n^2 / S > 10.8, which one good reading in 1000 exceeds. After a second in which most
    were refused, it takes itself for lost and becomes unsure.

    Args:
        state: [D, 5] at the start.
        deviation: of the errors of that state, [5] or [D, 5].
    """

    GATE, LOST = 10.8, np.array([10.0, 10.0, 0.5, 2.0, 0.05])

    def __init__(self, state: np.ndarray, deviation: np.ndarray) -> None:
        self.state = state.copy()
        self.covariance = np.square(np.broadcast_to(deviation, state.shape))[:, :, None] * np.eye(5)
        self._imu = np.zeros((len(state), 2))
        self._refusing = np.zeros(len(state))

    def step(self, readings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict and correct by readings [D, 34]. Returns the sum of n^2 / S and how many there were, [D] each.

        In the sum each counts no more than GATE: one echo would drown all else.
        """
        self._predict(readings[:, :2])
        values = readings[:, 2:].reshape(-1, 2, POSTS).mT.reshape(len(readings), -1)  # a post's bearing, its distance
        seen = ~np.isnan(values)
        count = seen.sum(1)
        order = np.argsort(~seen, axis=1, kind="stable")  # of each drive those that there are, in the order of posts
        rows, total, refused = np.arange(len(values)), np.zeros(len(values)), np.zeros(len(values))
        for number in range(count.max()):
            column, some = order[:, number], number < count
            reading = np.where(some, values[rows, column], 0.0)
            squares = self._correct(column // 2, reading, some, column % 2 == 1)
            total += np.minimum(squares, self.GATE)
            refused += squares > self.GATE
        self._refusing = np.where(count == 0, self._refusing, np.where(refused > count / 2, self._refusing + 1, 0))
        lost = self._refusing * STEP >= 1.0
        self.covariance[lost] += np.diag(np.square(self.LOST))
        self._refusing[lost] = 0
        return total, count

    def _predict(self, imu: np.ndarray) -> None:
        missing = np.isnan(imu)
        self._imu = np.where(missing, self._imu, imu)  # the last reading holds, with more doubt
        noise = np.where(missing, (1.5, 0.15), (ACCELERATION_NOISE, TURN_NOISE))
        heading, speed = self.state[:, 2], self.state[:, 3]
        cos, sin = np.cos(heading), np.sin(heading)
        change = np.tile(np.eye(5), (len(imu), 1, 1))  # the derivatives of the new state by the old one
        change[:, 0, 2], change[:, 0, 3] = -speed * sin * STEP, cos * STEP
        change[:, 1, 2], change[:, 1, 3] = speed * cos * STEP, sin * STEP
        change[:, 2, 4] = -STEP
        self.state[:, 0] += speed * cos * STEP
        self.state[:, 1] += speed * sin * STEP
        self.state[:, 2] = wrapped(heading + (self._imu[:, 1] - self.state[:, 4]) * STEP)
        self.state[:, 3] += self._imu[:, 0] * STEP
        self.covariance = change @ self.covariance @ change.transpose(0, 2, 1)
        self.covariance[:, 2, 2] += np.square(noise[:, 1] * STEP)
        self.covariance[:, 3, 3] += np.square(noise[:, 0] * STEP)

    def _correct(self, post: np.ndarray, reading: np.ndarray, seen: np.ndarray, is_range: np.ndarray) -> np.ndarray:
        """By one reading of each drive, of this post, where `seen`: [D] each. Returns n^2 / S, 0 where not seen."""
        offset = POST_PLACES[post] - self.state[:, :2]
        distance = np.maximum(np.hypot(offset[:, 0], offset[:, 1]), 0.5)
        bearing = np.arctan2(offset[:, 1], offset[:, 0]) - self.state[:, 2]
        innovation = np.where(is_range, reading - distance, wrapped(reading - bearing))
        variance = np.where(is_range, RANGE_NOISE**2, BEARING_NOISE**2)
        across = np.stack([offset[:, 1], -offset[:, 0]], -1) / distance[:, None]
        by = np.zeros((len(reading), 5))  # the derivatives of what is read by the state
        by[:, :2] = np.where(is_range[:, None], -offset, across) / distance[:, None]
        by[:, 2] = np.where(is_range, 0.0, -1.0)
        spread = np.einsum("dij,dj->di", self.covariance, by)
        variance = variance + np.einsum("di,di->d", by, spread)
        squares = np.where(seen, np.square(innovation) / variance, 0.0)
        gain = spread / variance[:, None] * (seen & (squares <= self.GATE))[:, None]
        self.state += gain * innovation[:, None]
        self.state[:, 2] = wrapped(self.state[:, 2])
        self.covariance -= gain[:, :, None] * spread[:, None, :]
        return squares


def run_filter(drives: Drives, state: np.ndarray, deviation: np.ndarray, first: int = 0) -> tuple[np.ndarray, ...]:
    """The filter over all steps from `first` on, from state [D, 5] before it, which is off by deviation [5] or [D, 5].

    Returns: states [D, T, 5], NaN before; and what `KalmanFilter.step` gives of each step, [D, T] each.
    """
    count, steps = drives.fault.shape
    found, total, seen = np.full((count, steps, 5), np.nan), np.zeros((count, steps)), np.zeros((count, steps))
    kalman = KalmanFilter(state, deviation)
    for step in range(first, steps):
        total[:, step], seen[:, step] = kalman.step(drives.readings[:, step])
        found[:, step] = kalman.state
    return found, total, seen
