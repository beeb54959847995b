import time
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch

from gid_yolo.detectors import backbone as backbone_module
from gid_yolo.detectors import build_detector
from gid_yolo.detectors.backbone import TimmBackbone
from gid_yolo.errors import UserError


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_035", "tf_efficientnet_lite0", "convnext_atto", "regnetx_002"]
)
@torch.no_grad()
def test_maps_of_strides_8_16_32(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    features = backbone(torch.rand(2, 3, 96, 160))
    assert [tuple(x.shape) for x in features] == [
        (2, channels, 96 // stride, 160 // stride)
        for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


@torch.no_grad()
def test_maps_are_timms_own() -> None:
    backbone = TimmBackbone("resnet18").eval()
    whole = timm.create_model("resnet18", pretrained=False).eval()
    backbone.body.load_state_dict(whole.state_dict(), strict=False)
    images = torch.rand(1, 3, 64, 96)
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    x = whole.layer1(whole.maxpool(whole.act1(whole.bn1(whole.conv1(x)))))
    for feature, layer in zip(backbone(images), (whole.layer2, whole.layer3, whole.layer4), strict=True):
        x = layer(x)
        torch.testing.assert_close(feature, x)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite2", "resnet50", "mobilenetv2_100"])
def test_normalisation_is_the_backbones_own(name: str) -> None:
    backbone = TimmBackbone(name)
    cfg = timm.get_pretrained_cfg(name)
    assert backbone.mean.flatten().tolist() == pytest.approx(cfg.mean, rel=1e-6)
    assert backbone.std.flatten().tolist() == pytest.approx(cfg.std, rel=1e-6)
    if name == "tf_efficientnet_lite2":
        assert backbone.mean.unique().tolist() == backbone.std.unique().tolist() == [0.5]
    seen = []
    backbone.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        backbone.eval()(torch.full((1, 3, 32, 32), 0.25))
    expected = [(0.25 - m) / s for m, s in zip(cfg.mean, cfg.std, strict=True)]
    assert seen[0].amax((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18"])
def test_freeze_bn(name: str) -> None:
    detector = build_detector("retina_nano", 2, backbone=name, freeze_bn=True).train()
    body = detector.backbone.body
    thawed = TimmBackbone(name).body
    norms = {n for n, m in thawed.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
    trained = {n.rpartition(".")[0] for n, _ in body.named_parameters()}
    assert not norms & trained
    # All other parameters are still there to train
    assert {n for n, _ in body.named_parameters()} == {
        n for n, _ in thawed.named_parameters() if n.rpartition(".")[0] not in norms
    }
    before = {n: b.clone() for n, b in body.named_buffers()}
    assert {n.rpartition(".")[0] for n in before} == norms
    torch.stack([x.sum() for x in detector.raw(torch.rand(2, 3, 64, 64))[0]]).sum().backward()
    assert all(torch.equal(buffer, before[n]) for n, buffer in body.named_buffers())


def test_without_freeze_bn_the_statistics_move() -> None:
    backbone = TimmBackbone("mobilenetv2_035").train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.rand(2, 3, 64, 64))
    assert not torch.equal(backbone.body.bn1.running_mean, before)


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        ("resnet50", 0, []),
        ("resnet50", 1, ["conv1", "bn1", "act1"]),
        ("resnet50", 2, ["conv1", "bn1", "act1", "maxpool", "layer1"]),
        ("resnet50", 3, ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2"]),
        ("mobilenetv2_100", 1, ["conv_stem", "bn1", "blocks.0"]),
        ("mobilenetv2_100", 2, ["conv_stem", "bn1", "blocks.0", "blocks.1"]),
        # The map of stride 16 is that of blocks.4, with blocks.3 before it
        ("mobilenetv2_100", 4, ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
    ],
)
def test_frozen_names(name: str, stages: int, expected: list[str]) -> None:
    backbone = TimmBackbone(name, frozen_stages=stages)
    assert backbone.frozen_names == expected
    for part in expected:
        backbone.body.get_submodule(part)  # raises where there is no such part


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s"])
def test_backbone_without_the_strides_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"backbone={name}.*stride"):
        build_detector("retina_nano", 2, backbone=name)


def test_unknown_backbone_is_named_with_its_like() -> None:
    with pytest.raises(UserError, match=r"backbone=mobilenetv2_03 .*mobilenetv2_035"):
        build_detector("retina_nano", 2, backbone="mobilenetv2_03")


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors", "nested"])
def test_weights_from_a_file(tmp_path: Path, kind: str) -> None:
    whole = timm.create_model("mobilenetv2_035", pretrained=False)  # with its classifier
    state = whole.state_dict()
    path = tmp_path / f"weights.{kind if kind != 'nested' else 'pt'}"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": state} if kind == "nested" else state, path)
    detector = build_detector("retina_nano", 2, pretrained=path)
    assert detector.backbone.source.loaded
    assert not detector.backbone.source.failed
    assert path.name in detector.backbone.source.text
    loaded = detector.backbone.body.state_dict()
    assert loaded
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state[key])


def test_frozen_batch_norm_keeps_the_weights_of_the_file(tmp_path: Path) -> None:
    whole = timm.create_model("resnet18", pretrained=False)
    torch.nn.init.uniform_(whole.bn1.weight)
    torch.nn.init.uniform_(whole.bn1.running_mean)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    body = build_detector("retina_nano", 2, tmp_path / "w.pt", backbone="resnet18", freeze_bn=True).backbone.body
    assert torch.equal(body.bn1.weight, whole.bn1.weight)
    assert torch.equal(body.bn1.running_mean, whole.bn1.running_mean)


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    torch.save(timm.create_model("regnetx_002", pretrained=False).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="mobilenetv2_035"):
        build_detector("retina_nano", 2, pretrained=tmp_path / "w.pt")


def test_missing_tensors_are_counted(tmp_path: Path) -> None:
    state = timm.create_model("mobilenetv2_035", pretrained=False).state_dict()
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"1 are missing and 0 have another shape .first: conv_stem\.weight"):
        build_detector("retina_nano", 2, pretrained=tmp_path / "w.pt")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        build_detector("retina_nano", 2, pretrained=str(tmp_path / "nothing.pt"))


def test_random_weights_are_said() -> None:
    source = build_detector("retina_nano", 2).backbone.source
    assert not source.loaded
    assert not source.failed
    assert "random" in source.text


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbone_module, "_reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite2"])
@pytest.mark.usefixtures("offline")
def test_download_that_fails_is_quick_and_said(name: str) -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    start = time.monotonic()
    source = TimmBackbone(name, weights=True).source
    assert time.monotonic() - start < 10  # the hub client alone retries for most of a minute
    assert source.failed
    assert not source.loaded
    assert "RANDOM" in source.text
    assert name in source.text
    assert huggingface_hub.constants.HF_HUB_OFFLINE is before


def test_model_that_was_never_trained() -> None:
    source = TimmBackbone("mobilenetv2_035", weights=True).source
    assert not timm.get_pretrained_cfg("mobilenetv2_035").has_weights
    assert source.failed
    assert "no trained weights" in source.text


@pytest.mark.parametrize(
    ("url", "port"), [("https://a.b/c", 443), ("http://a.b", 80), ("http://a.b:8080/c", 8080), ("https://a.b:1", 1)]
)
def test_the_port_that_is_tried(monkeypatch: pytest.MonkeyPatch, url: str, port: int) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    tried = []
    monkeypatch.setattr("socket.create_connection", lambda place, timeout: tried.append(place) or nullcontext())
    assert backbone_module._reachable(url)
    assert tried == [("a.b", port)]


def test_reachable_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    assert not backbone_module._reachable("https://127.0.0.1:9", timeout=1.0)  # the discard port: nothing listens
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert backbone_module._reachable("https://127.0.0.1:9")
