"""Motions are named from pixels: on clips drawn here, whose track is known, in any colour and with a noisy ground."""

import numpy as np
import pytest

from flashbulb_distill.evaluate.motion import amplitudes, name_motion, track_subject

SIDE, FRAMES = 32, 16
U = np.linspace(0, 1, FRAMES)


def disc_clip(x, y, radius, colour=(200, 30, 60), noise=0.0, seed=0):
    """A disc on white; x, y, radius in sides, one value a frame or one for all."""
    ys, xs = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    rng = np.random.default_rng(seed)
    frames = []
    for cx, cy, r in zip(*(np.broadcast_to(v, FRAMES) for v in (x, y, radius)), strict=True):
        cover = np.clip((r - np.hypot(xs - cx, ys - cy)) * SIDE + 0.5, 0, 1)[..., None]
        frame = 255 * (1 - cover) + cover * np.array(colour) + noise * rng.standard_normal((SIDE, SIDE, 3))
        frames.append(np.clip(np.rint(frame), 0, 255))
    return np.array(frames, dtype=np.uint8)


MOVES = {
    "bouncing": (0.5, 0.72 - 0.44 * np.abs(np.sin(np.pi * 1.5 * U)), 0.15),
    "flying up": (0.5, 0.75 - 0.5 * U, 0.15),
    "sliding left": (0.75 - 0.5 * U, 0.5, 0.15),
    "sliding right": (0.25 + 0.5 * U, 0.5, 0.15),
    "growing": (0.5, 0.5, 0.14 * (1.6 / 0.55) ** U),
    "shrinking": (0.5, 0.5, 0.4 * (0.55 / 1.6) ** U),
}


@pytest.mark.parametrize("noise", [0, 6])
@pytest.mark.parametrize("colour", [(200, 30, 60), (255, 220, 0), (20, 20, 20)])
@pytest.mark.parametrize("motion", MOVES)
def test_each_motion_is_named_and_measures_one(motion, colour, noise):
    clip = disc_clip(*MOVES[motion], colour=colour, noise=noise)
    assert name_motion(clip) == motion
    wanted = 1.33 if motion == "bouncing" else 1  # what one and a half bounces differ from a line
    assert amplitudes(track_subject(clip))[motion] == pytest.approx(wanted, abs=0.2)


def test_played_backwards_a_motion_is_its_opposite():
    for one, other in (("sliding left", "sliding right"), ("growing", "shrinking")):
        assert name_motion(disc_clip(*MOVES[one])[::-1]) == other
    assert name_motion(disc_clip(*MOVES["flying up"])[::-1]) is None, "nobody asks for falling"


def test_what_stands_still_is_not_named():
    assert name_motion(disc_clip(0.5, 0.5, 0.2, noise=4)) is None
    assert name_motion(np.full((FRAMES, SIDE, SIDE, 3), 255, np.uint8)) is None


def test_the_track_is_the_discs_own():
    x, y, radius = MOVES["sliding right"]
    track = track_subject(disc_clip(x, y, radius))
    np.testing.assert_allclose(track.x, x, atol=0.005)
    np.testing.assert_allclose(track.y, 0.5, atol=0.005)
    np.testing.assert_allclose(track.spread, radius / np.sqrt(2), atol=0.01)  # of an even disc


def test_arrays_that_are_no_clips_are_refused():
    clip = disc_clip(0.5, 0.5, 0.2)
    with pytest.raises(ValueError, match="uint8"):
        track_subject(clip.astype(np.float32))
