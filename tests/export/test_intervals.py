"""The gain of a comparison on other images: that of the model over its baseline in the same setting."""

from pathlib import Path

import numpy as np
import pytest
from coco_helpers import crowded_images

from gid_yolo.engine.coco_eval import CocoAccumulator
from gid_yolo.engine.matches import write_matches
from gid_yolo.engine.resample import resampled
from gid_yolo.export.contenders import Contender
from gid_yolo.export.intervals import rows_of


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model and its baseline on 30 images, of which the baseline misses every other detection."""
    images = list(crowded_images(np.random.default_rng(5), 30, 2, 4, 12))
    cells = {}
    for role, kept in (("model", 1), ("baseline", 2)):
        accumulator = CocoAccumulator(2)
        for i, (boxes, classes, found, scores, labels) in enumerate(images):
            accumulator.add(boxes, classes, found[::kept], scores[::kept], labels[::kept], name=f"{i}.png")
        file = tmp_path_factory.mktemp(role) / "matches.npz"
        write_matches(accumulator.matches(), file)
        given = {"role": role, "label": role, "path": Path(f"{role}.pt"), "fingerprint": "", "limits": {}}
        cells[role] = {**given, "size": (64, 64), "columns": accumulator.columns(), "matches": file}, accumulator
    return cells


def test_the_interval_is_of_the_paired_draws(measured):
    own, plain = (Contender(**measured[role][0]) for role in ("model", "baseline"))
    teacher = Contender(**measured["model"][0] | {"role": "teacher"})
    row, *others = rows_of([own, plain, teacher], compared=True)
    draws = [resampled(measured[role][1].matches()).maps for role in ("model", "baseline")]
    low, high = np.percentile(draws[0] - draws[1], [2.5, 97.5])
    assert (row.gain_low, row.gain_high) == pytest.approx((low, high))
    assert row.gain_certain == (low > 0 or high < 0)
    assert row.gain_low < own.columns["mAP"] - plain.columns["mAP"] < row.gain_high
    assert [(x.gain_low, x.gain_high) for x in others] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("model", "baseline", "compared"),
    [
        ({}, {}, False),
        ({}, {"size": (64, 96)}, True),  # another setting
        ({"failed": "boxes differ"}, {}, True),
        ({}, {"failed": "boxes differ"}, True),
        ({"columns": None}, {}, True),
        ({}, {"matches": None}, True),
        ({}, {"matches": Path("missing.npz")}, True),
    ],
)
def test_nothing_is_said_without_two_results(measured, model, baseline, compared):
    cells = [Contender(**measured[role][0] | more) for role, more in (("model", model), ("baseline", baseline))]
    assert {(row.gain_low, row.gain_high) for row in rows_of(cells, compared)} == {(None, None)}
