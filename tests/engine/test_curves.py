"""How long a run took, and its curve."""

import pytest

from gid_yolo.engine.curves import elapsed, read_curve


def test_the_clock_of_a_resumed_run_goes_on() -> None:
    assert elapsed([10.0, 20.0, 5.0, 15.0, 3.0]) == [10, 20, 20 + 5, 20 + 15, 20 + 15 + 3]
    assert elapsed([]) == []


def test_a_curve_is_read_from_what_ultralytics_writes(tmp_path) -> None:
    file = tmp_path / "results.csv"
    # older versions of Ultralytics fill their columns up with spaces
    file.write_text("epoch,   time, metrics/mAP50-95(B)\n1, 2.5, 0.12345\n2, 1.5, 0.5\n")
    assert read_curve(file) == [(1, 2.5, 12.35), (2, 2.5 + 1.5, 50.0)]


@pytest.mark.parametrize("lines", ["1,2", "1", "1,2,0.5,7", "one,2,0.5", "1,2,0.5\n2"])
def test_a_damaged_curve_is_a_value_error(tmp_path, lines: str) -> None:
    file = tmp_path / "results.csv"
    file.write_text(f"epoch,time,metrics/mAP50-95(B)\n{lines}\n")
    with pytest.raises(ValueError, match=r"results\.csv|one"):
        read_curve(file)
    file.write_text("epoch,time\n1,2\n")
    with pytest.raises(ValueError, match="KeyError"):
        read_curve(file)
