"""Detect in one image with an exported ONNX file: python detect.py model.onnx image.jpg [conf [iou]]."""

import ast
import sys

import cv2
import numpy as np
import onnxruntime

if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = cv2.imread(sys.argv[2])  # (height, width, 3), BGR
if image is None:
    sys.exit(f"{sys.argv[2]} is not an image that OpenCV can read.")
stored = session.get_modelmeta().custom_metadata_map
if "names" not in stored:
    sys.exit(f"{sys.argv[1]} does not say what it detects: export it with gid-export or yolo export.")
names, size, args, limits = (ast.literal_eval(stored.get(key, "{}")) for key in ("names", "imgsz", "args", "limits"))
final = stored.get("end2end") == "True" or args.get("nms")  # with the NMS inside
given = [float(word) for word in sys.argv[3:]]
conf, iou = given + [0.25, limits.get("iou", 0.7)][len(given) :]  # a file of yolo export does not say its iou: 0.7
node, size = session.get_inputs()[0], [size, size] if isinstance(size, int) else size
batch, _, H, W = (n if isinstance(n, int) else free for n, free in zip(node.shape, (1, 3, *size), strict=True))

ratio = min(H / image.shape[0], W / image.shape[1])  # letterbox: as large as it fits, in the middle of grey
h, w = (max(round(side * ratio), 1) for side in image.shape[:2])
top, left = round((H - h) / 2 - 0.1), round((W - w) / 2 - 0.1)
canvas = np.full((H, W, 3), 114, np.uint8)
canvas[top : top + h, left : left + w] = cv2.resize(image, (w, h))
x = np.repeat(canvas[None, ..., ::-1].transpose(0, 3, 1, 2) / np.float32(255), batch, axis=0)  # RGB in [0, 1]
x = x.astype(np.float16 if "float16" in node.type else np.float32)
output = session.run(None, {node.name: x})[0][0].astype(np.float32)

if final:  # (N, 6): x1, y1, x2, y2, score, class
    boxes, scores, classes = output[:, :4], output[:, 4], output[:, 5].astype(int)
else:  # (4 + classes, R): x and y of the centre, width, height, scores
    boxes = np.concatenate([output[:2] - output[2:4] / 2, output[:2] + output[2:4] / 2]).T
    scores, classes = output[4:].max(0), output[4:].argmax(0)
areas, order = (boxes[:, 2:] - boxes[:, :2]).prod(1), np.argsort(-scores, kind="stable")
order = order[scores[order] > conf]
while len(order):
    best, order = order[0], order[1:]
    x1, y1, x2, y2 = (boxes[best] - [left, top, left, top]) / ([w / image.shape[1], h / image.shape[0]] * 2)
    print(f"{names[classes[best]]} {scores[best]:.3f} {x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}")
    if not final:  # NMS: drop what overlaps it and is of its class
        sides = np.minimum(boxes[best, 2:], boxes[order, 2:]) - np.maximum(boxes[best, :2], boxes[order, :2])
        shared = sides.clip(0).prod(1)
        overlaps = shared > iou * (areas[best] + areas[order] - shared)
        order = order[~overlaps | (classes[order] != classes[best])]
