"""The factor of the distillation terms at chosen moments of a run."""

import pytest

from gid_yolo.distill.fading import fading


def test_without_settings_it_is_one_to_the_end():
    assert [fading(x) for x in (0.0, 0.5, 0.999)] == [1, 1, 1]


def test_it_ends_at_its_share_of_the_run():
    assert [fading(x, until=0.6) for x in (0.0, 0.6, 0.601, 0.9)] == [1, 1, 0, 0]


def test_it_falls_along_a_line_or_half_a_wave():
    # A third of the way to 0.6: 1 - 1/3, and (1 + cos 60°) / 2 = (1 + 1/2) / 2
    assert fading(0.2, until=0.6, decay="linear") == pytest.approx(2 / 3)
    assert fading(0.2, until=0.6, decay="cosine") == pytest.approx(3 / 4)
    assert fading(0.0, decay="linear") == fading(0.0, decay="cosine") == 1
    assert fading(1 - 1e-9, decay="cosine") == pytest.approx(0, abs=1e-15)


def test_it_rises_over_the_warmup():
    # Half of the warm-up of a tenth, and half of the way that is left of a line: 0.5 x (1 - 0.05)
    assert fading(0.05, warmup=0.1) == pytest.approx(0.5)
    assert fading(0.05, warmup=0.1, decay="linear") == pytest.approx(0.5 * 0.95)
    assert fading(0.1, warmup=0.1) == 1


def test_another_decay_is_refused():
    with pytest.raises(ValueError, match="decay=step must be one of constant, linear, cosine"):
        fading(0.1, decay="step")
