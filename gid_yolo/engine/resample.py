"""What a run would have measured on other images: those of its split, drawn anew with replacement, many times.

Seeds say how a gain differs between trainings, all of which are measured on the same images. On others of the same kind
it would be another one: by how much, this bootstrap says, as far as the images at hand are a fair draw themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gid_yolo.engine.matches import Matches, read_matches

CONFIDENCE = 0.95  # of every interval
RESAMPLES = 500
LEAST = 20  # images; draws of fewer are too like each other, and call too many gains certain
RECALLS = np.linspace(0, 1, 101)  # pycocotools', at which it takes the precision
_BLOCK = 2**23  # detections, of some resamples together: what bounds the memory


@dataclass(frozen=True)
class OverImages:
    """What a gain would be on other images than those it was measured on.

    Attributes:
        low: Lower end of the confidence interval, in the unit of the results.
        high: Upper end, likewise.
        count: Images that it was measured on.
    """

    low: float
    high: float
    count: int

    @property
    def certain(self) -> bool:
        """True where the interval leaves 0 out, of images enough to say so."""
        return self.count >= LEAST and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, eq=False)
class Resampled:
    """mAP of one run on the resamples.

    Attributes:
        images: Their names in the order in which they were drawn, by which two runs are of the same draws.
        maps: (B,) in percent; NaN where no object was drawn.
    """

    images: tuple[str, ...]
    maps: np.ndarray


def resampled(matches: Matches, resamples: int = RESAMPLES) -> Resampled:
    """A run's mAP on resamples of its images, the same ones for all runs on these images, whatever their order.

    Args:
        matches: Of the run, at least one image's.
        resamples: How many, B.
    """
    count = len(matches.names)
    order = np.argsort(matches.names, kind="stable")
    weights = np.empty((resamples, count), np.int32)
    weights[:, order] = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
    return Resampled(tuple(matches.names[order].tolist()), mean_ap(matches, weights))


def resampled_run(file: Path, measured: float) -> Resampled | None:
    """Those of a run's file; None where it is missing or damaged, or of another evaluation than its results.

    Args:
        file: As `write_matches` writes it.
        measured: The mAP in percent that the run's results have.
    """
    matches = read_matches(file)
    if matches is None or not abs(mean_ap(matches, np.ones((1, len(matches.names)), int))[0] - measured) < 1e-3:
        return None
    return resampled(matches)


def mean_ap(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """The mAP of sets in which an image stands several times, or not at all: pycocotools' own.

    The copies of a detection count one after another, as pycocotools has them of images that follow each other; only
    where one image has equal scores in a class would it begin with the next copy after all of them.

    Args:
        matches: Of all images I.
        weights: (B, I) how often each image stands in each of B sets, whole numbers.

    Returns:
        (B,) in percent; NaN of a set without objects.
    """
    sums, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for label in np.unique(matches.object_classes):
        objects = weights[:, matches.object_images[matches.object_classes == label]].sum(axis=1)
        found = matches.classes == label
        images, matched = matches.images[found], matches.matched[:, found]
        there = np.flatnonzero(objects)  # elsewhere the class has no precision, and is left out of the mean
        for sets in _blocks(there, len(images)):
            sums[sets] += _average_precision(weights[sets][:, images], matched, objects[sets])
        classes[there] += 1
    return 100 * np.divide(sums, classes, out=np.full(len(weights), np.nan), where=classes > 0)


def _blocks(sets: np.ndarray, detections: int) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK // max(detections, 1))
    return (sets[i : i + step] for i in range(0, len(sets), step))


def _average_precision(weights: np.ndarray, matched: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """AP of one class, the mean over IoUs.

    A wrong detection lowers the precision and leaves the recall as it is, so that only the values at right ones count.

    Args:
        weights: (B, D) of the detections, the highest score first.
        matched: (T, D).
        objects: (B,) of the class, at least one.

    Returns:
        (B,) from 0 to 1.
    """
    counted = np.cumsum(weights, axis=1)
    total = np.zeros(len(weights))
    for right in matched:
        true = np.cumsum(weights[:, right], axis=1)
        precision = true / (counted[:, right] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        reached = np.searchsorted(RECALLS, true / objects[:, None], side="right")
        total += (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    return total / len(matched)


def over_images(
    runs: Mapping[int, Resampled], baseline: Mapping[int, Resampled], seeds: Iterable[int]
) -> OverImages | None:
    """The interval over images of the gain that is the mean over some seeds, each run compared with its twin.

    Args:
        runs: By seed.
        baseline: Likewise, what they are compared with.
        seeds: Of the gain.

    Returns:
        The interval, or None where a run is missing, where not all are of the same images, or without any object.
    """
    pairs = [(runs.get(seed), baseline.get(seed)) for seed in seeds]
    both = [(run, other) for run, other in pairs if run and other]
    if not both or len(both) < len(pairs) or len({found.images for pair in both for found in pair}) > 1:
        return None
    gains = np.mean([run.maps - other.maps for run, other in both], axis=0)
    gains = gains[~np.isnan(gains)]
    if not len(gains):
        return None
    low, high = np.percentile(gains, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return OverImages(float(low), float(high), len(both[0][0].images))
