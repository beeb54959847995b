import numpy as np
import pytest

from gid_yolo.export.timing import interleave, latency


def test_percentiles():
    found = latency([float(n) for n in range(1, 102)], batch=4)  # 1 ... 101 ms, mean 51
    assert (found.p50, found.p95, found.p99) == pytest.approx((51.0, 96.0, 100.0))
    assert found.images_per_second == pytest.approx(4 * 1000 / 51)


def test_turns_are_interleaved_and_only_timed_runs_count():
    calls, now = [], [0.0]

    def call(name, seconds):
        def run(_):
            calls.append(name)
            now[0] += seconds

        return run

    pair = {"a": call("a", 0.001), "b": call("b", 0.002)}
    times = interleave(pair, [np.zeros(1)], warmup=1, runs=2, rounds=2, clock=lambda: now[0])
    assert times["a"] == pytest.approx([1.0] * 4)
    assert times["b"] == pytest.approx([2.0] * 4)
    assert "".join(calls) == "ab" + "aaabbb" * 2
