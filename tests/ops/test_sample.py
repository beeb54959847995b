import pytest
import torch

from gid_yolo.ops.sample import SampleRule, balanced_sample, keys_of_boxes, random_keys


def naive_sample(positive: list[bool], negative: list[bool], keys: list[float], count: int, share: float) -> set[int]:
    """One image: the positives of highest key up to their share, then negatives of highest key."""
    order = sorted(range(len(keys)), key=lambda r: -keys[r])
    chosen = [r for r in order if positive[r]][: int(count * share)]
    return {*chosen, *[r for r in order if negative[r]][: count - len(chosen)]}


def rule(count: int, share: float) -> SampleRule:
    return SampleRule(0.5, 0.5, count, share)


@pytest.mark.parametrize(
    ("count", "share"), [(16, 0.5), (16, 0.25), (7, 0.5), (1, 0.5), (10, 0.0), (10, 1.0), (500, 0.5)]
)
@pytest.mark.parametrize(("positives", "negatives"), [(0.02, 0.9), (0.5, 0.4), (0.0, 0.5), (0.3, 0.0), (0.0, 0.0)])
def test_equals_the_loop(count: int, share: float, positives: float, negatives: float) -> None:
    draw = torch.rand(5, 120)
    positive, negative = draw < positives, draw >= 1 - negatives
    keys = torch.rand(5, 120)
    index, valid = balanced_sample(positive, negative, keys, rule(count, share))
    assert index.shape == valid.shape == (5, min(count, 120))
    for b in range(5):
        expected = naive_sample(positive[b].tolist(), negative[b].tolist(), keys[b].tolist(), count, share)
        drawn = index[b][valid[b]].tolist()
        assert len(drawn) == len(set(drawn))
        assert set(drawn) == expected


def test_positives_come_first_and_invalid_ones_last() -> None:
    positive = torch.tensor([[False, True, False, False, True, False]])
    negative = torch.tensor([[True, False, False, True, False, False]])
    keys = torch.tensor([[0.9, 0.1, 0.99, 0.3, 0.2, 0.98]])  # the ignored ones have the highest
    index, valid = balanced_sample(positive, negative, keys, rule(6, 0.5))
    assert valid.tolist() == [[True] * 4 + [False] * 2]
    assert index[0, :4].tolist() == [4, 1, 0, 3]


def test_images_are_independent() -> None:
    draw, keys = torch.rand(4, 60), torch.rand(4, 60)
    index, valid = balanced_sample(draw < 0.1, draw > 0.4, keys, rule(20, 0.25))
    for b in range(4):
        alone = balanced_sample(draw[b : b + 1] < 0.1, draw[b : b + 1] > 0.4, keys[b : b + 1], rule(20, 0.25))
        assert torch.equal(alone[0][0], index[b])
        assert torch.equal(alone[1][0], valid[b])


def test_every_element_is_as_likely() -> None:
    # 4 of 10 positives and 4 of 30 negatives in each of 4000 draws: an element's count is binomial with deviation
    # sqrt(4000 p (1 - p)), 31 for positives and 21.5 for negatives; one of 40 lies beyond 5 of them once in 40 000
    positive = (torch.arange(40) < 10).expand(4000, 40)
    index, valid = balanced_sample(positive, ~positive, random_keys(positive), rule(8, 0.5))
    assert valid.all()
    counts = torch.bincount(index.flatten(), minlength=40)
    assert (counts[:10] - 4000 * 4 / 10).abs().max() < 5 * 31
    assert (counts[10:] - 4000 * 4 / 30).abs().max() < 5 * 21.5


def test_keys_that_follow_from_boxes() -> None:
    boxes = torch.rand(2, 3000, 4) * 500
    state = torch.random.get_rng_state()
    keys = keys_of_boxes(boxes)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(keys, keys_of_boxes(boxes))
    assert ((keys >= 0) & (keys < 1)).all()
    # 600 of 6000 fall in each tenth, with a deviation of sqrt(6000 * 0.1 * 0.9) = 23
    assert (torch.histc(keys, 10, 0, 1) - 600).abs().max() < 5 * 23
    # Boxes in a row, half a pixel apart: those of the higher keys are spread over it, 10 +- 4 in any 20 neighbours
    row = keys_of_boxes(torch.arange(400)[:, None] * 0.5 + torch.tensor([0.0, 0, 20, 20]))
    assert ((row > 0.5).unfold(0, 20, 1).sum(1) - 10).abs().max() <= 4
    assert keys_of_boxes(boxes[:, :0]).shape == (2, 0)
    assert keys_of_boxes(boxes.bfloat16()).dtype == torch.float32
