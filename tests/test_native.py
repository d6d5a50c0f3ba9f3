"""Images that bring their own spacing: views, mixed ratios in a batch, and the networks that read them."""

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_umit.architectures.mae import MaskedAutoencoder
from nnunet_umit.architectures.native import NativeView, append_spacing, bucket, depth_first
from nnunet_umit.architectures.rope import token_positions
from nnunet_umit.architectures.sac import SACConv
from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.config import PretrainConfig
from nnunet_umit.spacing import Anisotropy, token_grid

SMALL: dict[str, Any] = {
    "embed_dim": 24, "depth": 2, "num_heads": 2, "stem_channels": (4, 6, 8),
    "token_size": 8, "spacing": (1.0, 1.0, 1.0),
}  # fmt: skip


def tile(*spacings: tuple[float, ...], size: tuple[int, int, int], channels: int = 1, pad: int = 0) -> torch.Tensor:
    """A batch with one sample for each spacing, padded with zeros on both sides of every axis."""
    torch.manual_seed(0)
    images = [append_spacing(torch.randn(channels, *size), spacing) for spacing in spacings]
    return nn.functional.pad(torch.stack(images), (pad,) * 6)


@pytest.mark.parametrize(
    ("spacing", "turned", "expected"),
    [
        ((5.0, 1.0, 1.0), (5.0, 1.0, 1.0), (0, 2, False)),
        ((1.0, 5.0, 1.2), (5.0, 1.0, 1.2), (1, 2, False)),
        ((1.0, 1.2, 9.0), (9.0, 1.0, 1.2), (2, 3, False)),
        ((1.0, 1.01, 1.0), (1.0, 1.01, 1.0), (0, 0, False)),
        ((999.0, 1.0, 1.0), (1.0, 1.0), (0, 5, True)),
        ((40.0, 1.0, 1.0), (40.0, 1.0, 1.0), (0, 5, False)),
    ],
)
def test_the_thick_axis_comes_first(
    spacing: tuple[float, ...], turned: tuple[float, ...], expected: tuple[int, int, bool]
) -> None:
    assert depth_first(spacing) == turned
    assert bucket(spacing) == expected


def test_a_view_crops_the_padding_and_puts_logits_back() -> None:
    batch = tile((1.0, 4.0, 1.0), size=(9, 5, 7), pad=3)
    view = NativeView.of(batch)
    assert view.image.shape == (1, 1, 5, 9, 7) and view.spacings == ((4.0, 1.0, 1.0),)
    inside = batch[:, :1, 3:-3, 3:-3, 3:-3]
    assert torch.equal(view.image, inside.transpose(2, 3))
    logits = torch.cat((view.image, 2 * view.image), 1)
    restored = view.restore(logits)
    assert restored.shape == (1, 2, 15, 11, 13)
    assert torch.equal(restored[:, :1, 3:-3, 3:-3, 3:-3], inside)
    outside = restored.clone()
    outside[:, :, 3:-3, 3:-3, 3:-3] = torch.nan
    kept = outside[:, 1][~outside[:, 1].isnan()]
    assert kept.unique().tolist() == [-30.0] and outside[0, 0, 0, 0, 0] == -15.0
    assert restored.softmax(1)[0, 0, 0, 0, 0] > 0.999999 and restored.sigmoid()[0, :, 0, 0, 0].max() < 1e-6


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(1, 3, 4, 4, 4), "takes .B, C . 3, D, H, W."),
        (torch.ones(1, 5, 4, 4), "nnUNetv2_preprocess"),
        (torch.zeros(1, 4, 4, 4, 4), "positive mm"),
        (tile((1.0, 1.0, 1.0), (4.0, 1.0, 1.0), size=(4, 4, 4)), "one anisotropy level"),
        (tile((3.0, 1.0, 1.0), (1.0, 3.0, 1.0), size=(4, 4, 4)), "one thick axis"),
    ],
)
def test_bad_batches_are_named(batch: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NativeView.of(batch)


@pytest.mark.parametrize("halvings", [0, 1, 2])
@pytest.mark.parametrize("ratios", [(4.0, 5.5, 7.9), (1.0, 1.5, 1.9)])
def test_mixed_ratios_equal_each_sample_alone(ratios: tuple[float, ...], halvings: int) -> None:
    torch.manual_seed(0)
    layer = SACConv(3, 4).double()
    image = torch.randn(len(ratios), 3, 6, 8, 7, dtype=torch.float64)
    together = layer(image, Anisotropy(ratios[0], ratios), halvings)
    alone = [layer(image[i : i + 1], Anisotropy(ratio), halvings) for i, ratio in enumerate(ratios)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together[1], layer(image[1:2], Anisotropy(ratios[0]), halvings)[0])


def test_mixed_anisotropy_shares_a_level() -> None:
    mixed = Anisotropy.from_spacings([(5.0, 1.0, 1.0), (6.0, 1.0, 1.5)])
    assert mixed.ratios == (5.0, 6.0) and mixed.level == 2
    assert mixed.at(1).ratios == (2.5, 3.0)
    assert Anisotropy.from_spacings([(5.0, 1.0, 1.0), (10.0, 2.0, 2.0)]).ratios == ()
    with pytest.raises(ValueError, match="one level"):
        Anisotropy.from_spacings([(5.0, 1.0, 1.0), (9.0, 1.0, 1.0)])
    grid = token_grid((6, 16, 16), [(4.0, 1.0, 1.0), (6.0, 1.0, 1.0)], 8, "relative")
    assert token_positions(grid)[:, 4].tolist() == [[1.0, 0.0, 0.0], [1.5, 0.0, 0.0]]
    turned = token_grid((6, 16, 16), [(4.0, 1.0, 1.0), (6.0, 1.0, 1.0)], 8, "relative", (2, 0, 1))
    assert token_positions(turned)[:, 4].tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.5]], "slices along the last axis"


def segmenter(native: bool, **options: Any) -> UMITSegmenter:
    torch.manual_seed(1)
    arguments = {**SMALL, "decoder_channels": (4, 6, 8), **options}
    return UMITSegmenter(1, 3, deep_supervision=False, native=native, **arguments).eval()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.3, 0.7, 0.7), (40.0, 1.0, 1.0)])
def test_a_native_network_equals_one_that_is_planned_for_the_spacing(spacing: tuple[float, ...]) -> None:
    native, planned = segmenter(True), segmenter(False, spacing=spacing)
    planned.load_state_dict(native.state_dict())
    batch = tile(spacing, size=(8, 16, 24))
    torch.testing.assert_close(native(batch), planned(batch[:, :1]))


def test_a_native_network_gives_2d_slices_what_the_2d_network_gives() -> None:
    native, planar = segmenter(True), segmenter(False, spacing=(1.0, 1.0))
    planar.load_state_dict(native.state_dict())
    batch = tile((999.0, 1.0, 1.0), size=(1, 16, 24))
    torch.testing.assert_close(native(batch)[:, :, 0], planar(batch[:, :1, 0]))


@pytest.mark.parametrize("spacing", [(4.0, 1.0, 1.0), (1.0, 4.0, 1.0)])
def test_padding_changes_nothing(spacing: tuple[float, ...]) -> None:
    native = segmenter(True)
    batch = tile(spacing, size=(8, 16, 24))
    plain = native(batch)
    padded = native(nn.functional.pad(batch, (2, 3, 0, 1, 4, 4)))
    torch.testing.assert_close(padded[:, :, 4:-4, :-1, 2:-3], plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_weights_turn_with_the_image(order: tuple[int, int, int], stem: str) -> None:
    """Where no axis is thick it does not matter which one the network takes for depth."""
    network = segmenter(False, stem=stem, upsample="transposed").double()
    image = torch.randn(1, 1, 16, 24, 8, dtype=torch.float64)
    plain = network(image)
    axes = [axis + 2 for axis in order]
    encoding = network.encoder(image.permute(0, 1, *axes), order=order, taps=network.decoder.taps)
    turned = network.decoder(encoding)[0]
    torch.testing.assert_close(turned, plain.permute(0, 1, *axes))
    if order != (0, 1, 2):
        ignored = network.decoder(network.encoder(image.permute(0, 1, *axes), taps=network.decoder.taps))[0]
        assert (ignored - turned).std() > 0.1 * plain.std(), "without the order it is another image"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_hair_of_thickness_changes_next_to_nothing(axis: int) -> None:
    """3 % thicker slices make that axis the depth, but the anatomy does not stand on its head."""
    native, spacing = segmenter(True), [1.0, 1.0, 1.0]
    spacing[axis] = 1.03
    isotropic, hair = (native(tile(each, size=(16, 16, 16))) for each in ((1.0, 1.0, 1.0), tuple(spacing)))
    assert 0 < (hair - isotropic).std() < 0.06 * isotropic.std()


def test_a_batch_of_several_spacings_equals_each_sample_alone() -> None:
    native = segmenter(True)
    spacings = [(4.0, 1.0, 1.0), (5.0, 0.7, 0.7), (7.9, 1.0, 1.3)]
    batch = tile(*spacings, size=(6, 16, 16))
    alone = torch.cat([native(batch[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(native(batch), alone)
    native.decoder.deep_supervision = True
    outputs = native(batch)
    assert len(outputs) == 3 and {output.shape for output in outputs} == {(3, 3, 6, 16, 16)}
    torch.testing.assert_close(outputs[0], alone)


def test_a_native_autoencoder_learns_from_what_is_inside() -> None:
    torch.manual_seed(0)
    config = PretrainConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    network = MaskedAutoencoder.from_arch_kwargs(1, {**SMALL, "native": True}, config)
    batch = tile((1.0, 4.0, 1.0), (1.0, 5.0, 1.0), size=(16, 4, 16))
    output = network(batch, torch.Generator().manual_seed(0))
    assert output.grid.shape == (2, 2, 2) and output.image.shape == (2, 1, 4, 16, 16)
    assert output.loss.item() == pytest.approx(output.losses.mean().item())
    padded = network(nn.functional.pad(batch, (1, 2, 3, 4, 5, 6)), torch.Generator().manual_seed(0))
    torch.testing.assert_close(padded.losses, output.losses)
    masked, filled, _ = network.reconstruct(batch, torch.Generator().manual_seed(0))
    assert masked.shape == filled.shape == (2, 1, 4, 16, 16) and masked.isnan().any() and not filled.isnan().any()


@pytest.mark.parametrize("axis", [1, 2])
def test_what_an_autoencoder_predicts_turns_with_the_image(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same anatomy in the same place, though slightly thicker slices made another axis the depth."""
    monkeypatch.setattr("nnunet_umit.architectures.native.NEARLY_EQUAL", 1.0)
    torch.manual_seed(0)
    config = PretrainConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    network = MaskedAutoencoder.from_arch_kwargs(1, {**SMALL, "native": True}, config).eval()
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 1.0001
    hidden_where = torch.zeros(2, 3, 2, dtype=torch.bool)  # tokens along the axes of the image
    hidden_where[0, 1, 0] = hidden_where[1, 2, 1] = hidden_where[1, 0, 0] = True
    volumes = []
    for each in ((1.0, 1.0, 1.0), tuple(spacing)):
        batch = tile(each, size=(16, 24, 16))
        order = NativeView.of(batch).order
        hidden = hidden_where.permute(*order).flatten()
        masks = hidden.logical_not().nonzero().T, hidden.nonzero().T
        output = network(batch, masks=masks)
        patches = torch.zeros(1, output.grid.tokens, 512).scatter(
            1, output.hidden.unsqueeze(-1).expand(-1, -1, 512), output.prediction
        )
        back = [order.index(axis) + 2 for axis in range(3)]
        volumes.append(output.grid.unpatchify(patches, 1).permute(0, 1, *back))
    plain, turned = volumes
    assert order != (0, 1, 2) and 0 < (turned - plain).std() < 1e-3 * plain.std()


class Ramp(nn.Module):
    """A head that gives the place of each of its voxels along the first axis, in hundreds of voxels of the image."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        factor = 16 / features.shape[2]
        place = ((torch.arange(features.shape[2]) + 0.5) * factor - 0.5) / 100
        return place.view(1, 1, -1, 1, 1).expand(features.shape[0], 3, *features.shape[2:])


def test_coarse_logits_lie_where_they_belong() -> None:
    """Ten slices are two tokens of eight, padded: coarse maps are brought to 16 slices before they are cropped."""
    network = UMITSegmenter(1, 3, native=True, **SMALL).eval()
    for name in network.decoder.seg_layers:
        if name.startswith("head"):
            network.decoder.seg_layers[name] = Ramp()
    found = network(tile((1.0, 1.0, 1.0), size=(10, 16, 24)))
    assert len(found) == 3
    for level, logits in enumerate(found):
        first = 2**level // 2  # before the centre of the first coarse voxel there is nothing to interpolate
        expected = torch.arange(first, 10) / 100
        torch.testing.assert_close(logits[0, 1, first:, 3, 3], expected, atol=1e-5, rtol=1e-4)


def test_native_networks_are_never_compiled() -> None:
    """nnU-Net's predictor compiles what it is given, where nnUNet_compile asks for it."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    native = segmenter(True)
    wrapped = torch.compile(native, backend=backend)
    with torch.no_grad():
        for spacing in ((1.0, 1.0, 1.0), (3.0, 1.0, 1.0)):
            batch = tile(spacing, size=(8, 16, 16))
            torch.testing.assert_close(wrapped(batch), native(batch))
        assert not compiled
        torch.compile(segmenter(False), backend=backend)(torch.randn(1, 1, 16, 16, 16))
    assert compiled
