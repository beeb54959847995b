"""Frozen norms computed in the convolutions before them."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from gid_yolo.detectors.frozen_norm import AppliedNorm, AppliedNormAct, NormedConv2d, freeze_norms
from gid_yolo.engine.detection_model import GIDDetectionModel, fold_batch_norm

# Stem, blocks times convolutions, and the shortcuts of stages that change the shape; regnet's are left as they are
FOLDED = {
    "resnet18": 1 + 8 * 2 + 3,
    "resnet26d": 2 + 8 * 3 + 4,  # the third convolution of its stem stands in another part than its norm
    "mobilenetv2_050": 1 + 2 + 16 * 3,
    "regnety_002": 0,
    "ghostnet_050": None,  # its first convolution is returned as a map, without the norm behind it
}


def random_body(name: str) -> nn.Module:
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True, pretrained=False)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return body


@pytest.mark.parametrize("name", FOLDED)
def test_equals_frozen_norms(name: str) -> None:
    body = random_body(name)
    expected, ours = freeze_batch_norm_2d(deepcopy(body)), deepcopy(freeze_norms(deepcopy(body)))
    convolutions = sum(isinstance(m, NormedConv2d) for m in ours.modules())
    assert convolutions == sum(isinstance(m, AppliedNorm | AppliedNormAct) for m in ours.modules())
    assert FOLDED[name] in (None, convolutions)
    assert list(ours.state_dict()) == list(expected.state_dict())
    ours.load_state_dict(expected.state_dict())
    images = torch.rand(2, 3, 64, 96)
    gradients = []
    for network in (expected, ours):
        maps = network(images)
        sum((x.square().mean() * i for i, x in enumerate(maps, 1)), start=torch.zeros(())).backward()
        gradients.append([p.grad for p in network.parameters()])
        for found, wanted in zip(maps, expected(images), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))
    for found, wanted in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_norm_is_the_one_of_the_copy() -> None:
    body = freeze_norms(random_body("resnet18"))
    copied = deepcopy(body)
    assert copied.conv1.norm[0] is copied.bn1
    assert copied.conv1.norm[0] is not body.bn1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
@torch.no_grad()
def test_folding_leaves_plain_convolutions(name: str) -> None:
    body = freeze_norms(random_body(name)).eval()
    folded = fold_batch_norm(deepcopy(body))
    kinds = {type(m) for m in folded.modules()}
    assert not kinds & {NormedConv2d, AppliedNorm, AppliedNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d}
    images = torch.rand(1, 3, 64, 64)
    for found, wanted in zip(folded(images), body(images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_model_with_frozen_norms_is_fused() -> None:
    model = GIDDetectionModel({**GIDDetectionModel("retina_r18", verbose=False).yaml, "freeze_bn": True}, verbose=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().raw(images)[1].logits
        fused = model.fuse(verbose=False)
        torch.testing.assert_close(fused.raw(images)[1].logits, expected, rtol=1e-4, atol=1e-4)
    assert fused.is_fused()
    assert fused.folded
