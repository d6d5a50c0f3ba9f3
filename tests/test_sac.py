"""SAC against its one definition, replicate - convolve - average, in float64 (pumit.md §8, invariants 1 to 9)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunet_umit.architectures import sac
from nnunet_umit.architectures.sac import (
    SACConv,
    SACDown,
    SACUp,
    chunk_depth,
    down_conv,
    down_kernel,
    same_conv,
    same_kernel,
    up_kernel,
)
from nnunet_umit.architectures.slices import slice_conv
from nnunet_umit.spacing import Anisotropy

PLANAR = Anisotropy.from_spacing((1.0, 1.0))


def isotropic(power: int) -> Anisotropy:
    return Anisotropy(float(2**power))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def replicated_same(image: Tensor, kernel: Tensor, ratio: Fraction) -> Tensor:
    """Thin grid with ``denominator`` samples a thin slice: replicate, convolve (dilated), average."""
    p, q = ratio.numerator, ratio.denominator
    thin = image.repeat_interleave(p, 2)
    result = F.conv3d(thin, kernel, padding=(q, 1, 1), dilation=(q, 1, 1))
    return result.unflatten(2, (image.shape[2], p)).mean(3)


def test_isotropic_is_the_plain_convolution() -> None:
    image, anisotropy = random(2, 3, 8, 8, 8), Anisotropy(1.0)
    for fidelity in ("exact", "pumit"):
        kernel = random(4, 3, 3, 3, 3)
        reduced = same_kernel(kernel, anisotropy, 0, fidelity)
        torch.testing.assert_close(same_conv(image, reduced), F.conv3d(image, kernel, padding=1))
        kernel = random(4, 3, 4, 4, 4)
        torch.testing.assert_close(
            down_conv(image, down_kernel(kernel, anisotropy, 0), None), F.conv3d(image, kernel, stride=4)
        )
        kernel = random(3, 4, 4, 4, 4)
        assert torch.equal(up_kernel(kernel, anisotropy, 2, fidelity), kernel)


@settings(max_examples=25)
@given(st.fractions(min_value=1, max_value=32, max_denominator=4), st.integers(2, 4))
def test_same_size_equals_the_definition_for_any_real_ratio(ratio: Fraction, depth: int) -> None:
    image, kernel = random(1, 2, depth, 4, 5), random(3, 2, 3, 3, 3)
    ours = same_conv(image, same_kernel(kernel, Anisotropy(float(ratio)), 0, "exact"))
    torch.testing.assert_close(ours, replicated_same(image, kernel, ratio))


@pytest.mark.parametrize("power", range(6))
@pytest.mark.parametrize("size", [2, 4, 16])
def test_down_equals_the_full_kernel_on_replicated_slices(power: int, size: int) -> None:
    anisotropy = isotropic(power)
    depth = anisotropy.token(size)[0]
    image, kernel = random(1, 2, depth * 2, size, size), random(3, 2, size, size, size)
    ours = down_conv(image, down_kernel(kernel, anisotropy, 0), None)
    thin = image.repeat_interleave(size // depth, 2)
    torch.testing.assert_close(ours, F.conv3d(thin, kernel, stride=size))


@pytest.mark.parametrize("power", range(6))
def test_a_chain_of_down_layers_equals_the_chain_on_replicated_slices(power: int) -> None:
    anisotropy = isotropic(power)
    depth = anisotropy.token(16)[0]
    kernels = [random(3, 2, 4, 4, 4), random(4, 3, 2, 2, 2), random(5, 4, 2, 2, 2)]
    thick, halvings = random(1, 2, depth, 16, 16), 0
    thin = thick.repeat_interleave(16 // depth, 2)
    for kernel in kernels:
        thick = down_conv(thick, down_kernel(kernel, anisotropy, halvings), None)
        thin = F.conv3d(thin, kernel, stride=kernel.shape[-1])
        halvings += kernel.shape[-1].bit_length() - 1
    torch.testing.assert_close(thick, thin)


def test_down_on_one_slice_is_the_2d_convolution_and_thick_levels_coincide() -> None:
    image, kernel = random(1, 2, 1, 16, 16), random(3, 2, 16, 16, 16)
    flat = F.conv2d(image[:, :, 0], kernel.sum(2), stride=16)
    for anisotropy in (isotropic(4), isotropic(5), PLANAR):
        torch.testing.assert_close(down_conv(image, down_kernel(kernel, anisotropy, 0), None)[:, :, 0], flat)


def test_pumit_same_conv_keeps_slices_apart_while_they_are_thick() -> None:
    kernel = random(3, 2, 3, 3, 3)
    image = random(1, 2, 4, 5, 5)
    reduced = same_kernel(kernel, isotropic(2), 1, "pumit")
    expected = F.conv2d(image[:, :, 2], kernel.sum(2), padding=1)
    torch.testing.assert_close(same_conv(image, reduced)[:, :, 2], expected)
    changed = image.clone()
    changed[:, :, 1] += 1
    assert torch.equal(same_conv(changed, reduced)[:, :, 2], same_conv(image, reduced)[:, :, 2])
    assert torch.equal(same_kernel(kernel, isotropic(2), 2, "pumit"), kernel)  # isotropic after two halvings


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_slices_may_be_thick_along_any_axis_of_the_image(order: tuple[int, int, int]) -> None:
    """Stored kernels have the axes of the image: on thin slices along any axis, each layer is the plain one."""
    anisotropy, axis = Anisotropy(4.0, order=order), order[0] + 2
    turned, back = [axis + 2 for axis in order], [order.index(axis) + 2 for axis in range(3)]
    thick, kernel = random(1, 2, 8, 8, 8), random(3, 2, 3, 3, 3)
    thin = thick.repeat_interleave(4, axis)
    ours = same_conv(thick.permute(0, 1, *turned), same_kernel(kernel, anisotropy, 0, "exact"))
    plain = F.conv3d(thin, kernel, padding=1).unflatten(axis, (8, 4)).mean(axis + 1)
    torch.testing.assert_close(ours.permute(0, 1, *back), plain)
    kernel = random(3, 2, 8, 8, 8)
    ours = down_conv(thick.permute(0, 1, *turned), down_kernel(kernel, anisotropy, 0), None)
    torch.testing.assert_close(ours.permute(0, 1, *back), F.conv3d(thin, kernel, stride=8))
    kernel, coarse = random(2, 3, 8, 8, 8), random(1, 2, 1, 1, 1)
    made = up_kernel(kernel, anisotropy, 3, "exact")
    ours = F.conv_transpose3d(coarse, made, stride=tuple(made.shape[2:])).permute(0, 1, *back)
    plain = F.conv_transpose3d(coarse, kernel, stride=8).unflatten(axis, (2, 4)).mean(axis + 1)
    torch.testing.assert_close(ours, plain)


def test_exact_same_conv_sees_its_neighbours_and_2d_has_none() -> None:
    kernel, image = random(3, 2, 3, 3, 3), random(1, 2, 4, 5, 5)
    reduced = same_kernel(kernel, isotropic(2), 0, "exact")
    changed = image.clone()
    changed[:, :, 1] += 1
    assert not torch.allclose(same_conv(changed, reduced)[:, :, 2], same_conv(image, reduced)[:, :, 2])
    slice_ = image[:, :, :1]
    planar = same_conv(slice_, same_kernel(kernel, PLANAR, 0, "exact"))
    torch.testing.assert_close(planar[:, :, 0], F.conv2d(slice_[:, :, 0], kernel.sum(2), padding=1))


@pytest.mark.parametrize("power", range(6))
def test_down_then_up_restores_the_size(power: int) -> None:
    anisotropy = isotropic(power)
    depth = anisotropy.token(8)[0]
    image = random(1, 2, 2 * depth, 16, 8)
    token = down_conv(image, down_kernel(random(4, 2, 8, 8, 8), anisotropy, 0), None)
    kernel = up_kernel(random(4, 2, 8, 8, 8), anisotropy, 3, "exact")
    assert F.conv_transpose3d(token, kernel, stride=tuple(kernel.shape[2:])).shape == image.shape


def test_chunk_sums_are_associative() -> None:
    kernel = random(2, 3, 16, 4, 4)
    torch.testing.assert_close(chunk_depth(chunk_depth(kernel, 8, "sum"), 4, "sum"), chunk_depth(kernel, 4, "sum"))
    with pytest.raises(ValueError, match="16 depth taps cannot be joined into 5"):
        chunk_depth(kernel, 5, "sum")


@pytest.mark.parametrize("power", range(6))
def test_up_is_the_mean_of_the_thin_output_or_the_adjoint(power: int) -> None:
    anisotropy, size = isotropic(power), 8
    depth = anisotropy.token(size)[0]
    tokens, kernel = random(1, 4, 2, 3, 2), random(4, 2, size, size, size)
    thin = F.conv_transpose3d(tokens, kernel, stride=size).unflatten(2, (2 * depth, size // depth))
    for fidelity, expected in (("exact", thin.mean(3)), ("pumit", thin.sum(3))):
        reduced = up_kernel(kernel, anisotropy, 3, fidelity)
        ours = F.conv_transpose3d(tokens, reduced, stride=tuple(reduced.shape[2:]))
        torch.testing.assert_close(ours, expected)
    image = random(1, 2, 2 * depth, 3 * size, 2 * size)
    down = down_conv(image, down_kernel(kernel, anisotropy, 0), None)
    adjoint = up_kernel(kernel, anisotropy, 3, "pumit")
    back = F.conv_transpose3d(tokens, adjoint, stride=tuple(adjoint.shape[2:]))
    torch.testing.assert_close((down * tokens).sum(), (image * back).sum())


def test_inflated_2d_weights_give_the_2d_layer_at_every_thickness() -> None:
    flat = random(3, 2, 8, 8)
    kernel = flat.unsqueeze(2).expand(3, 2, 8, 8, 8) / 8
    image = random(1, 2, 1, 8, 8)
    torch.testing.assert_close(
        down_conv(image, down_kernel(kernel, PLANAR, 0), None)[:, :, 0], F.conv2d(image[:, :, 0], flat, stride=8)
    )
    volume = random(1, 2, 8, 8, 8)
    shuffled = volume[:, :, torch.randperm(8)]
    torch.testing.assert_close(down_conv(volume, kernel, None), down_conv(shuffled, kernel, None))


def test_depth_taps_get_one_gradient_while_the_voxel_stays_thick() -> None:
    layer = SACDown(1, 2, 4).double()
    layer(random(2, 1, 2, 8, 8), isotropic(3), 0).square().sum().backward()
    gradient = layer.weight.grad
    if gradient is None:
        raise AssertionError("no gradient")
    torch.testing.assert_close(gradient, gradient[:, :, :1].expand_as(gradient))


def test_remainders_are_refused_not_dropped() -> None:
    with pytest.raises(ValueError, match=r"\(9, 8, 8\) is not a multiple of \(4, 4, 4\) along axis 0"):
        down_conv(random(1, 2, 9, 8, 8), random(3, 2, 4, 4, 4), None)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("channels", "out"), [(2, 3), (3, 3), (4, 2)])
@pytest.mark.parametrize("taps", [1, 3])
def test_slice_convolution_and_its_gradients_equal_those_of_conv3d(
    taps: int, channels: int, out: int, depth: int
) -> None:
    image, kernel = random(2, channels, depth, 5, 6), random(out, channels, taps, 3, 3)
    weight = random(2, out, depth, 5, 6)
    found = []
    for convolve in (slice_conv, lambda *given: F.conv3d(*given, padding=(taps // 2, 1, 1))):
        inputs = image.clone().requires_grad_(), kernel.clone().requires_grad_()
        result = convolve(*inputs)
        found.append((result, *torch.autograd.grad((result * weight).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("channels", "out"), [(1, 2), (2, 1)])
def test_slice_convolution_can_be_differentiated_twice(channels: int, out: int) -> None:
    inputs = random(1, channels, 3, 3, 3).requires_grad_(), random(out, channels, 3, 3, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(slice_conv, inputs)


@pytest.mark.parametrize("layer", [SACDown(2, 2, 4), SACConv(2, 2), SACUp(2, 2, 4)])
def test_cached_kernels_follow_the_weights(layer: torch.nn.Module) -> None:
    anisotropy, image = isotropic(1), torch.randn(1, 2, 4, 8, 8)
    layer.eval()
    with torch.inference_mode():
        before = layer(image, anisotropy, 2 if isinstance(layer, SACUp) else 0)
    state = {name: value * 2 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    with torch.inference_mode():
        after = layer(image, anisotropy, 2 if isinstance(layer, SACUp) else 0)
    torch.testing.assert_close(after, before * 2)
    layer.train()
    layer(image, anisotropy, 2 if isinstance(layer, SACUp) else 0).sum().backward()
    if layer.weight.grad is None:
        raise AssertionError("the cached kernel has cut the gradient")


@pytest.mark.parametrize("layer", [SACDown(2, 2, 2), SACConv(2, 2), SACUp(2, 2, 2)])
def test_images_of_a_thousand_spacings_do_not_fill_the_memory(layer: Any) -> None:
    layer.eval()
    with torch.inference_mode():
        for step in range(50):
            ratio = 2.0 + step / 100
            layer(torch.randn(1, 2, 4, 8, 8), Anisotropy(ratio), 1)
        assert len(layer._reduced) <= sac.KEPT
        latest = layer._reduced[Anisotropy(2.49), 1]
        layer(torch.randn(1, 2, 4, 8, 8), Anisotropy(2.49), 1)
    assert layer._reduced[Anisotropy(2.49), 1] is latest, "kept while it is in use"


def test_unknown_fidelity_is_named() -> None:
    with pytest.raises(ValueError, match="'precise'"):
        SACConv(1, 1, "precise")
