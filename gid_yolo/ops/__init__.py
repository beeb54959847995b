"""Pure, batched functions of tensors; no detector, no Ultralytics.

Conventions used everywhere: B images, R predicted boxes, C classes, M ground-truth boxes (padded), K general
instances (padded), L pyramid levels. Boxes are xyxy in input pixels unless a name says otherwise.
"""
