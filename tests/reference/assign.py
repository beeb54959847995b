"""Label assignment, one image, one anchor, one box at a time."""

from reference.boxes import iou

BACKGROUND, IGNORED = -1, -2


def naive_match(anchors, boxes, *, high=0.5, low=0.4, low_quality=True):
    """RetinaNet's assignment of one image: a list with the box of each anchor, -1 background, -2 ignored.

    Args:
        anchors: Lists of four floats.
        boxes: The real boxes of the image, without padding.
    """
    result = []
    table = [[iou(box, anchor) for anchor in anchors] for box in boxes]
    highest = [max(row) for row in table]
    for r in range(len(anchors)):
        if not boxes:
            result.append(BACKGROUND)
            continue
        best = max(row[r] for row in table)
        owner = next(m for m, row in enumerate(table) if row[r] == best)
        if best >= high:
            match = owner
        elif best >= low:
            match = IGNORED
        else:
            match = BACKGROUND
        if low_quality and any(row[r] == top and top > 0 for row, top in zip(table, highest, strict=True)):
            match = owner
        result.append(match)
    return result
