"""Segmentation network: methods.md SH-3 to SH-6 and UNETR-1 to UNETR-3."""

from __future__ import annotations

import itertools
import json
import math
import pydoc
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.spacing import Anisotropy

SMALL: dict[str, Any] = {
    "token_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "stem_channels": [4, 6, 8],
    "decoder_channels": [4, 6, 8],
}
SPACINGS = [((1.0, 1.0, 1.0), (16, 24, 17)), ((6.0, 1.0, 1.0), (5, 20, 24)), ((1.0, 1.0), (24, 37))]


def build(spacing: tuple[float, ...], channels: int = 1, classes: int = 2, **changes: Any) -> UMITSegmenter:
    return UMITSegmenter(channels, classes, **{"spacing": list(spacing), **SMALL, **changes})


@pytest.mark.parametrize(("spacing", "size"), SPACINGS)
@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("token_size", [4, 8, 16])
@pytest.mark.parametrize("upsample", ["interpolate", "transposed"])
def test_shapes_gradients_and_flag(
    spacing: tuple[float, ...], size: tuple[int, ...], stem: str, token_size: int, upsample: str
) -> None:
    for channels, classes in ((1, 5), (4, 2)):
        net = build(spacing, channels, classes, stem=stem, token_size=token_size, upsample=upsample)
        image = torch.randn(2, channels, *size)
        outputs = net(image)
        strides = Anisotropy.from_spacing(spacing).strides(token_size)
        for level, output in enumerate(outputs):
            factor = [math.prod(axis) for axis in zip(*strides[: level + 1], strict=True)][3 - len(size) :]
            expected = tuple(max(round(s / f), 1) for s, f in zip(size, factor, strict=True))
            assert output.shape == (2, classes, *expected)
        assert len(outputs) == len(strides) - 1  # nnU-Net drops the last stride
        sum(F.cross_entropy(o, o.argmin(1)) for o in outputs).backward()
        dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert dead == []
        keys = list(net.state_dict())
        net.decoder.deep_supervision = False
        single = net(image)
        assert isinstance(single, torch.Tensor)
        torch.testing.assert_close(single, outputs[0])
        assert keys == list(
            build(
                spacing, channels, classes, stem=stem, token_size=token_size, upsample=upsample, deep_supervision=False
            ).state_dict()
        )


def test_samples_are_independent_and_the_state_round_trips() -> None:
    net = build((3.0, 1.0, 1.0), deep_supervision=False).eval()
    one, two = torch.randn(2, 1, 1, 9, 16, 24).unbind(0)
    torch.testing.assert_close(net(torch.cat((one, two))), torch.cat((net(one), net(two))))
    other = build((3.0, 1.0, 1.0), deep_supervision=False).eval()
    other.load_state_dict(net.state_dict(), strict=True)
    torch.testing.assert_close(other(one), net(one))


@pytest.mark.parametrize(("spacing", "size"), SPACINGS[1:])
def test_it_compiles_into_one_graph_that_holds_the_positions(spacing: tuple[float, ...], size: tuple[int, ...]) -> None:
    """Traced as torch.compile traces it, but run as it is: no compiler is needed."""
    net, image, graphs = build(spacing), torch.randn(1, 1, *size), []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(net, backend=keep)
    torch.testing.assert_close(compiled(image), net(image))
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if "cos" in str(node.target)]  # else in every step, on the CPU
    net.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(image), net(image))


def test_plans_find_the_class_and_survive_json() -> None:
    found = pydoc.locate("nnunet_umit.architectures.unetr.UMITSegmenter")
    assert found is UMITSegmenter
    kwargs = json.loads(
        json.dumps({"spacing": [1.0, 1.0, 1.0], **SMALL, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]})
    )
    assert UMITSegmenter(input_channels=1, num_classes=3, deep_supervision=False, **kwargs)(
        torch.randn(1, 1, 16, 16, 16)
    ).shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize(
    ("depth", "token_size", "stem", "taps"),
    [(12, 16, "patch", (3, 6, 9)), (12, 8, "patch", (4, 8)), (12, 16, "conv", (9,)), (8, 8, "conv", ())],
)
def test_taps_are_evenly_spaced_blocks(depth: int, token_size: int, stem: str, taps: tuple[int, ...]) -> None:
    assert build((1, 1, 1), depth=depth, token_size=token_size, stem=stem).decoder.taps == taps


def test_taps_are_block_outputs_and_reach_the_logits() -> None:
    net = build((1, 1, 1), stem="patch", token_size=16, depth=12, deep_supervision=False).eval()
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(net.encoder.transformer.blocks):
        block.register_forward_hook(lambda _m, _i, out, index=index: seen.__setitem__(index, out))
    image = torch.randn(1, 1, 32, 16, 16)
    encoding = net.encoder(image, taps=net.decoder.taps)
    for tap, index in zip(encoding.taps, (3, 6, 9), strict=True):
        assert torch.equal(tap, seen[index])
    torch.testing.assert_close(encoding.tokens, net.encoder.transformer.norm(seen[11]))
    whole = net.decoder(encoding)[0]
    encoding.taps[1] = torch.zeros_like(encoding.taps[1])
    assert not torch.allclose(net.decoder(encoding)[0], whole)


@pytest.mark.parametrize("size", list(itertools.permutations((8, 16, 24))))
def test_a_bright_cell_of_the_image_is_a_bright_cell_of_the_map(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = build((1, 1, 1), stem="patch", deep_supervision=False).eval()
    for cell in itertools.product(*(range(length // 8) for length in size)):
        image = torch.zeros(1, 1, *size)
        z, y, x = (8 * index for index in cell)
        image[..., z : z + 8, y : y + 8, x : x + 8] = 1
        embedded = net.encoder.embed(image)
        feature = embedded.grid.unflatten(embedded.tokens)  # as the decoder does; the projection has no bias yet
        bright = feature[0].abs().sum(0) > 0
        assert bright[cell] and bright.sum() == 1


def test_a_wrong_stride_in_the_plans_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[\[1, 1, 1\], \[1, 2, 2\], \[1, 2, 2\], \[2, 2, 2\]\]"):
        build((6.0, 1.0, 1.0), strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]])
    with pytest.raises(ValueError, match="'window'"):
        build((1, 1, 1), window=7)
    with pytest.raises(ValueError, match="'pixelshuffle'"):
        build((1, 1, 1), upsample="pixelshuffle")


def test_logits_stay_inside_what_fp16_accumulates() -> None:
    net = build((1, 1, 1), deep_supervision=False).eval()
    with torch.no_grad():
        net.decoder.seg_layers["head0"].weight.mul_(1e6)
        logits = net(torch.randn(1, 1, 16, 16, 16) * 1e3)
    assert logits.abs().max() <= 100
    assert (logits.half() * 10 * 8).isfinite().all()


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_overfits_one_sample(stem: str) -> None:
    torch.manual_seed(0)
    z, y, x = torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")
    label = ((z - 8) ** 2 + (y - 8) ** 2 + (x - 8) ** 2 < 30).long()
    label[14:20, 14:20, 12:20] = 2
    image = (label.float() + 0.3 * torch.randn(24, 24, 24)).reshape(1, 1, 24, 24, 24)
    net = build((1, 1, 1), classes=3, stem=stem, deep_supervision=False)
    optimiser = torch.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(120):
        loss = F.cross_entropy(net(image), label.unsqueeze(0), weight=torch.tensor([0.2, 1.0, 1.0]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = net(image).argmax(1)[0]
    for value in (1, 2):
        dice = 2 * ((found == value) & (label == value)).sum() / ((found == value).sum() + (label == value).sum())
        assert dice > 0.9
