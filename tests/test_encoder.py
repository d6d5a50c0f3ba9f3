"""Rotary positions, the transformer block and the encoder (pumit.md §8, 17-19; methods.md SH-2, SH-4; MAE-3, MAE-7)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_umit.architectures.encoder import SIZES, SACViT
from nnunet_umit.architectures.masking import random_masking
from nnunet_umit.architectures.rope import gather_table, rotary_angles, rotary_table, rotate, rotate_plainly
from nnunet_umit.architectures.transformer import Attention, Transformer, drop_path
from nnunet_umit.spacing import TokenGrid

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "stem_channels": (4, 6, 8)}
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (5.0, 0.8, 0.8), (40.0, 1.0, 1.0)]


def rotated(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = rotary_angles(positions, heads.shape[-1])
    table = gather_table(torch.stack((angles.cos(), angles.sin()))[:, None], None)
    turned = rotate(heads.float(), table.float())
    torch.testing.assert_close(turned, rotate_plainly(heads.float(), table.float()))
    return rotate_plainly(heads, table)


def test_rotary_scores_depend_on_the_shift_only() -> None:
    query, key = torch.randn(2, 1, 1, 4, 16, dtype=torch.float64).unbind(0)
    query, key = query.reshape(1, 1, 4, 16), key.reshape(1, 1, 4, 16)
    positions = torch.rand(4, 3) * 9
    shift = torch.tensor([3.0, -7.0, 2.5])
    scores = rotated(query, positions) @ rotated(key, positions).mT
    moved = rotated(query, positions + shift) @ rotated(key, positions + shift).mT
    torch.testing.assert_close(scores, moved, atol=1e-4, rtol=1e-4)  # positions are float32
    other = rotated(query, positions + shift) @ rotated(key, positions).mT
    assert not torch.allclose(scores, other, atol=1e-2)


def test_rotation_keeps_norms_and_the_origin() -> None:
    heads = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [4.0, 0.0, 9.0]])
    turned = rotated(heads, positions)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], heads[:, :, 0])


def test_rotary_angles_closed_form() -> None:
    angles = rotary_angles(torch.tensor([[2.0, 3.0, 5.0]]), 64)[0]
    for k in range(16):
        depth = 2 * 2333 ** (-(2 * k + 1) / 32)
        assert math.isclose(angles[k], depth + 3 * 10000 ** (-2 * k / 32), rel_tol=1e-12)
        assert math.isclose(angles[16 + k], depth + 5 * 10000 ** (-2 * k / 32), rel_tol=1e-12)
    flat = rotary_angles(torch.tensor([[0.0, 3.0, 5.0]]), 64)[0]
    assert math.isclose(flat[1], 3 * 10000 ** (-2 / 32), rel_tol=1e-12)  # depth 0 is EVA-02's 2D table
    with pytest.raises(ValueError, match="head width 18"):
        rotary_angles(torch.zeros(1, 3), 18)


def test_gathered_rows_equal_the_indexed_table() -> None:
    table = rotary_table(TokenGrid((3, 4, 5), (1, 1, 1)), 8, torch.device("cpu"))
    index = torch.tensor([[5, 2, 59], [0, 1, 7]])
    gathered = gather_table(table, index)
    assert gathered.shape == (2, 2, 1, 3, 4)
    for sample in range(2):
        assert torch.equal(gathered[:, sample, 0], table[:, 0, index[sample]])


def test_attention_equals_explicit_softmax_over_keys() -> None:
    layer = Attention(16, 2).double()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    query, key, value = (x.view(2, 5, 2, 8).transpose(1, 2) for x in layer.qkv(tokens).chunk(3, -1))
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    expected = layer.proj((weights @ value).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(layer(tokens, None), expected)
    order = torch.randperm(5)
    torch.testing.assert_close(layer(tokens[:, order], None), layer(tokens, None)[:, order])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_starts_with_what_is_near(axis: int) -> None:
    """Mean weights of a new network fall from token to token, along every axis."""
    torch.manual_seed(0)
    shape = tuple(6 if each == axis else 1 for each in range(3))
    layer = Transformer(64, 1, 2).blocks[0].attn
    rope = gather_table(rotary_table(TokenGrid(shape, (1, 1, 1)), 32, torch.device("cpu")), None)
    query, key, _ = layer.qkv(torch.randn(256, 6, 64)).view(256, 6, 3, 2, 32).permute(2, 0, 3, 1, 4)
    weights = (rotate(query, rope) @ rotate(key, rope).mT / 32**0.5).softmax(-1).mean((0, 1))
    assert weights[0, 0] > 1.4 * weights[0, 1] > 1.4 * 1.4 * weights[0, 2]
    torch.testing.assert_close(weights[2, 1], weights[2, 3], rtol=0.1, atol=0)


def test_the_sum_of_many_blocks_starts_small() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 20, 64)
    for depth in (2, 16):
        stack = Transformer(64, depth, 2)
        assert stack.run(tokens, None, range(depth)).std() < 1.5


def test_queries_give_the_same_rows_as_the_whole_sequence() -> None:
    stack = Transformer(16, 2, 2).double().eval()
    tokens = torch.randn(2, 6, 16, dtype=torch.float64)
    rows = torch.tensor([[0, 3], [5, 1]])
    some, _ = stack(tokens, None, queries=rows)
    full, _ = stack(tokens, None)
    torch.testing.assert_close(some, full.gather(1, rows.unsqueeze(-1).expand(-1, -1, 16)))


def test_checkpointing_changes_neither_output_nor_gradient() -> None:
    torch.manual_seed(0)
    plain, saving = Transformer(16, 2, 2), Transformer(16, 2, 2, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    tokens = torch.randn(2, 6, 16)
    for stack in (plain, saving):
        stack(tokens, None)[0].square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_on_a_cpu_is_for_the_products_of_the_blocks_only(checkpointing: bool) -> None:
    torch.manual_seed(0)
    small = {"spacing": (1, 1, 1), "token_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = SACViT(1, **small)
    fast = SACViT(1, **small, cpu_bfloat16=True, checkpointing=checkpointing)
    fast.load_state_dict(plain.state_dict())
    found: dict[str, set[torch.dtype]] = {"products": set(), "the rest": set()}
    for name, module in fast.named_modules():
        if not any(module.children()):
            product = isinstance(module, nn.Linear) and name.startswith("transformer.blocks")
            kind = "products" if product else "the rest" if not name.endswith("mlp.norm") else None
            if kind:
                module.register_forward_hook(lambda _m, _i, output, kind=kind: found[kind].add(output.dtype))
    image = torch.randn(1, 1, 8, 16, 16)
    exact, encoding = plain(image), fast(image)
    assert found == {"products": {torch.bfloat16}, "the rest": {torch.float32}}
    assert encoding.tokens.dtype == torch.float32
    error = (encoding.tokens - exact.tokens).norm() / exact.tokens.norm()
    assert 1e-5 < error < 2e-2, "bfloat16 keeps 8 bits of a number"
    for each in (exact, encoding):
        each.tokens.square().sum().backward()
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (other.grad - one.grad).norm() < 0.1 * one.grad.norm() + 1e-3


def test_drop_path_keeps_the_mean_and_is_off_in_eval() -> None:
    torch.manual_seed(0)
    branch = torch.ones(4000, 1)
    assert set(drop_path(branch, 0.5, True).flatten().tolist()) == {0.0, 2.0}
    assert abs(drop_path(branch, 0.5, True).mean().item() - 1) < 0.1
    assert torch.equal(drop_path(branch, 0.5, False), branch)


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("token_size", [4, 8, 16])
def test_one_state_dict_for_every_spacing_and_2d(stem: str, token_size: int) -> None:
    shapes = []
    for spacing in [*SPACINGS, (1.0, 1.0)]:
        encoder = SACViT(2, spacing=spacing, token_size=token_size, stem=stem, **SMALL)
        shapes.append({name: tuple(value.shape) for name, value in encoder.state_dict().items()})
    assert all(each == shapes[0] for each in shapes)


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_hidden_voxels_never_reach_the_encoder(stem: str, spacing: tuple[float, ...]) -> None:
    encoder = SACViT(2, spacing=spacing, token_size=8, stem=stem, **SMALL).eval()
    image = torch.randn(2, 2, 11, 17, 24)
    grid = encoder.grid(image)
    visible, hidden = random_masking(2, grid.tokens, 0.6)
    before = encoder(image, visible=visible).tokens
    shown = torch.zeros(2, grid.tokens).scatter(1, visible, 1.0)
    changed = image + 7 * (1 - grid.crop(grid.expand(shown)))
    assert torch.equal(encoder(changed, visible=visible).tokens, before)
    assert before.shape[1] == visible.shape[1]
    seen = image + 7 * grid.crop(grid.expand(shown))
    assert not torch.allclose(encoder(seen, visible=visible).tokens, before)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_visible_tokens_and_positions_permute_together(stem: str) -> None:
    encoder = SACViT(1, spacing=(1, 1, 1), token_size=8, stem=stem, **SMALL).eval()
    image = torch.randn(1, 1, 16, 16, 24)
    visible = torch.tensor([[0, 3, 5, 9, 11]])
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(
        encoder(image, visible=visible[:, order]).tokens, encoder(image, visible=visible).tokens[:, order]
    )


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_all_visible_is_the_plain_forward(stem: str) -> None:
    encoder = SACViT(1, spacing=(2, 1, 1), token_size=8, stem=stem, **SMALL).eval()
    image = torch.randn(1, 1, 8, 16, 24)
    every = torch.arange(encoder.grid(image).tokens).unsqueeze(0)
    torch.testing.assert_close(encoder(image, visible=every).tokens, encoder(image).tokens)


def test_samples_of_a_batch_are_independent_and_2d_input_is_taken() -> None:
    encoder = SACViT(1, spacing=(3, 1, 1), token_size=8, **SMALL).eval()
    one, two = torch.randn(2, 1, 1, 9, 16, 24).unbind(0)
    both = encoder(torch.cat((one, two))).tokens
    torch.testing.assert_close(both, torch.cat((encoder(one).tokens, encoder(two).tokens)))
    flat = torch.randn(1, 1, 20, 30)
    as_2d = encoder(flat).tokens
    planar = SACViT(1, spacing=(1, 1), token_size=8, **SMALL).eval()
    planar.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(as_2d, planar(flat).tokens)
    torch.testing.assert_close(as_2d, planar(flat.unsqueeze(2)).tokens)
    with pytest.raises(ValueError, match="expected"):
        encoder(torch.randn(9, 16, 24))


def test_prediction_then_training_in_one_process() -> None:
    encoder = SACViT(1, spacing=(2, 1, 1), token_size=8, **SMALL)
    image = torch.randn(1, 1, 8, 16, 16)
    with torch.inference_mode():
        encoder.eval()(image)
    encoder.train()(image).tokens.sum().backward()  # tables cached in inference mode must not break the graph


def test_layer_ids_and_sizes() -> None:
    encoder = SACViT(1, spacing=(1, 1, 1), token_size=8, **SMALL)
    ids = {name: encoder.layer_id(name) for name, _ in encoder.named_parameters()}
    assert ids["stem.project.weight"] == 0
    assert ids["transformer.blocks.0.attn.qkv.weight"] == 1
    assert ids["transformer.blocks.1.norm1.weight"] == 2
    assert ids["transformer.norm.weight"] == 3
    with torch.device("meta"):
        base = SACViT(3, spacing=(1, 1, 1), token_size=16, stem="patch", **SIZES["B"])
    blocks = sum(p.numel() for p in base.transformer.parameters())
    assert abs(blocks / 1e6 - 85.1) < 0.5  # EVA-02-B's blocks


def test_bad_arguments_are_named() -> None:
    for bad, message in [
        ({"token_size": 6}, "6"),
        ({"stem": "swin"}, "'swin'"),
        ({"fidelity": "almost"}, "'almost'"),
        ({"positions": "absolute"}, "'absolute'"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"stem_channels": (4, 8)}, "three widths"),
        ({"token_size": 2}, "below 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            SACViT(1, **{"spacing": (1, 1, 1), "token_size": 8, **SMALL, **bad})


def test_positions_reach_the_tokens() -> None:
    encoder = SACViT(1, spacing=(1, 1, 1), token_size=8, **SMALL).eval()
    image = torch.randn(1, 1, 8, 8, 32)
    rolled = torch.roll(image, 8, -1)
    assert not torch.allclose(
        F.normalize(encoder(image).tokens[:, 0], dim=-1), F.normalize(encoder(rolled).tokens[:, 1], dim=-1), atol=1e-3
    )


@pytest.mark.parametrize(("spacing", "size"), [((1.0, 1.0, 1.0), (16, 24, 16)), ((4.0, 1.0, 1.0), (6, 24, 32))])
def test_norms_of_the_stem_see_visible_voxels_only(spacing: tuple[float, ...], size: tuple[int, ...]) -> None:
    """Pre-training shows a quarter of an image, fine-tuning all of it: features must not differ in scale for that."""
    torch.manual_seed(0)
    encoder = SACViT(1, spacing=spacing, token_size=8, **SMALL)
    image = 3 + 2 * torch.randn(2, 1, *size)
    before: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    for down in encoder.stem.down:  # type: ignore[union-attr]
        torch.nn.init.ones_(down.bias)  # as it may become: nothing of it may lie on hidden voxels
    for block in (encoder.stem.full, *encoder.stem.conv):  # type: ignore[union-attr, misc]
        block.register_forward_hook(lambda _, inputs, output: (read.append(inputs[0]), before.append(output))[0])
    grid = encoder.grid(image)
    visible, _ = random_masking(2, grid.tokens, 0.75, torch.Generator().manual_seed(1))
    encoder.embed(image, visible=visible)
    shown = grid.expand(torch.zeros(2, grid.tokens).scatter(1, visible, 1.0)) > 0
    for image_or_features, features in zip(read, before, strict=True):
        depth, height, width = (whole // own for whole, own in zip(shown.shape[2:], features.shape[2:], strict=True))
        here = shown[:, :, ::depth, ::height, ::width].expand_as(features)
        assert (features[~here] == 0).all()
        assert (image_or_features[~here[:, :1].expand_as(image_or_features)] == 0).all()
        for sample in range(2):
            for channel, where in zip(features[sample], here[sample], strict=True):
                seen = channel[where]
                seen = torch.where(seen < 0, seen / 0.01, seen)  # before LeakyReLU: what the norm gave
                assert abs(seen.mean().item()) < 1e-4 and abs(seen.var(unbiased=False).item() - 1) < 1e-3
    everything = torch.arange(grid.tokens).expand(2, -1)
    for masked, whole in zip(
        encoder.embed(image, visible=everything).features, encoder.embed(image).features, strict=True
    ):
        torch.testing.assert_close(masked, whole, atol=1e-5, rtol=1e-4)
