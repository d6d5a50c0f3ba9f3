"""Learning rates: layer-wise decay that survives the schedule (SH-7), and the schedule itself (SH-8)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_umit.architectures.encoder import SACViT
from nnunet_umit.architectures.mae import MaskedAutoencoder
from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.trainers.optimisation import (
    LearningRateSchedule,
    adamw,
    frozen_parameters,
    is_vector,
    layer_of,
    learning_rate_factor,
    parameter_groups,
    set_layer_decay,
    set_trainable,
    transformer_parameters,
)

DEPTH = 3
DECAY = 0.7
BASE = 1e-3


@pytest.fixture(params=["conv", "patch"])
def network(request: pytest.FixtureRequest) -> UMITSegmenter:
    return UMITSegmenter(
        1, 3, spacing=(3.0, 1.0, 1.0), token_size=8, stem=request.param, embed_dim=24, depth=DEPTH, num_heads=2,
        stem_channels=(4, 6, 8), decoder_channels=(4, 6, 8),
    )  # fmt: skip


def groups_of(network: UMITSegmenter, decay: float = DECAY) -> list[dict]:
    return parameter_groups(network, learning_rate=BASE, weight_decay=0.05, layer_decay=decay)


def test_layer_ids_count_from_the_image_upwards(network: UMITSegmenter) -> None:
    ids = {name: layer_of(network, name) for name, _ in network.named_parameters()}
    assert {value for name, value in ids.items() if name.startswith("encoder.stem.")} == {0}
    for block in range(DEPTH):
        inside = {value for name, value in ids.items() if name.startswith(f"encoder.transformer.blocks.{block}.")}
        assert inside == {block + 1}
    assert {value for name, value in ids.items() if name.startswith("encoder.transformer.norm.")} == {DEPTH + 1}
    assert {value for name, value in ids.items() if name.startswith("decoder.")} == {DEPTH + 1}
    assert set(ids.values()) == set(range(DEPTH + 2))


def test_scales_rise_with_depth_and_end_at_one(network: UMITSegmenter) -> None:
    scales = {group["layer"]: group["base_lr"] / BASE for group in groups_of(network)}
    assert scales == {layer: pytest.approx(DECAY ** (DEPTH + 1 - layer)) for layer in range(DEPTH + 2)}
    assert all(low < high for low, high in itertools.pairwise(scales[layer] for layer in sorted(scales)))


def test_groups_hold_every_trainable_parameter_once(network: UMITSegmenter) -> None:
    network.encoder.transformer.norm.weight.requires_grad_(False)
    grouped = [id(parameter) for group in groups_of(network) for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_vectors_have_no_weight_decay(network: UMITSegmenter) -> None:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in groups_of(network):
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected = 0.0 if parameter.ndim == 1 or name.endswith("bias") else 0.05
            assert group["weight_decay"] == expected, name


def test_single_tokens_count_as_vectors() -> None:
    assert is_vector(torch.zeros(1, 1, 24)) and is_vector(torch.zeros(24))
    assert not is_vector(torch.zeros(24, 24)) and not is_vector(torch.zeros(1, 24, 1, 1, 1))


def test_transformers_learn_at_their_own_share_of_the_rate(network: UMITSegmenter) -> None:
    """Attention must not follow convolutions to high rates, whatever the layer-wise decay is."""
    groups = parameter_groups(network, learning_rate=BASE, weight_decay=0.05, layer_decay=DECAY, transformer_rate=0.25)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimizer = adamw(groups, betas=(0.9, 0.98))
    for decay in (DECAY, 1.0):
        set_layer_decay(optimizer, learning_rate=BASE, layers=DEPTH + 1, decay=decay)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                share = 0.25 if name.startswith("encoder.transformer.") else 1.0
                layer = layer_of(network, name)
                assert group["base_lr"] == pytest.approx(BASE * share * decay ** (DEPTH + 1 - layer)), name


def test_a_decoder_of_masked_pretraining_is_a_transformer_too() -> None:
    encoder = SACViT(1, spacing=(1.0, 1.0, 1.0), token_size=8, embed_dim=24, depth=1, num_heads=2)
    network = MaskedAutoencoder(encoder, input_channels=1, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    attending = {names[each] for each in transformer_parameters(network)}
    assert any(name.startswith("decoder.blocks.0.") for name in attending)
    assert all(name.startswith(("encoder.transformer.", "decoder.")) for name in attending)


def test_schedule_keeps_the_layer_ratio(network: UMITSegmenter) -> None:
    """nnU-Net's PolyLRScheduler writes one rate into every group; ours must not."""
    optimizer = adamw(groups_of(network), betas=(0.9, 0.98))
    schedule = LearningRateSchedule(optimizer, total=100, warmup_fraction=0.1)
    for iteration in (0, 5, 10, 50, 99):
        factor = schedule.step(iteration)
        assert 0 < factor <= 1
        for group in optimizer.param_groups:
            expected = BASE * DECAY ** (DEPTH + 1 - group["layer"]) * factor
            assert group["lr"] == pytest.approx(expected)
    assert len({group["lr"] for group in optimizer.param_groups}) == DEPTH + 2


def test_layer_decay_moves_deep_layers_more(network: UMITSegmenter) -> None:
    """The rates are really used: after one AdamW step (update = lr * sign), layers have moved in proportion."""
    optimizer = adamw(
        parameter_groups(network, learning_rate=BASE, weight_decay=0.0, layer_decay=0.5), betas=(0.9, 0.9)
    )
    LearningRateSchedule(optimizer, total=10, warmup_fraction=0.0).step(0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (value.detach() - before[name]).abs().mean().item() for name, value in network.named_parameters()}
    first, last = moved["encoder.transformer.blocks.0.attn.qkv.weight"], moved["encoder.transformer.norm.weight"]
    assert last / first == pytest.approx(2.0**DEPTH, rel=1e-3)


@given(
    total=st.integers(2, 2000),
    warmup=st.floats(0.0, 0.9),
    shape=st.sampled_from(["cosine", "poly"]),
    minimum=st.floats(0.0, 0.5),
)
def test_schedule_rises_to_one_and_falls_to_the_minimum(total: int, warmup: float, shape: str, minimum: float) -> None:
    options = {"total": total, "warmup": warmup * total, "shape": shape, "minimum": minimum}
    if warmup > 0:
        assert learning_rate_factor(0, **options) == 0
    assert learning_rate_factor(warmup * total, **options) == pytest.approx(1.0)
    assert learning_rate_factor(total, **options) == pytest.approx(minimum)
    up = [learning_rate_factor(warmup * total * k / 20, **options) for k in range(21)]
    down = [learning_rate_factor(total * (warmup + (1 - warmup) * k / 20), **options) for k in range(21)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(up))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(down))


def test_cosine_is_half_way_in_the_middle() -> None:
    assert learning_rate_factor(60, total=100, warmup=20) == pytest.approx(0.5)


def test_all_warmup_and_positions_outside_are_allowed() -> None:
    assert learning_rate_factor(100, total=100, warmup=100) == 1.0
    assert learning_rate_factor(-5, total=100, warmup=10) == 0.0
    assert learning_rate_factor(500, total=100, warmup=10, minimum=0.1) == pytest.approx(0.1)


def test_no_iteration_is_spent_on_a_rate_of_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = adamw([{"params": [parameter], "lr": 1.0, "base_lr": 1.0}], betas=(0.9, 0.9))
    schedule = LearningRateSchedule(optimizer, total=4, warmup_fraction=0.5)
    rates = [schedule.step(iteration) for iteration in range(4)]
    assert min(rates) > 0
    assert rates == pytest.approx(
        [0.25, 0.75, 0.5 * (1 + math.cos(math.pi / 4)), 0.5 * (1 + math.cos(3 * math.pi / 4))]
    )


@pytest.mark.parametrize(("shape", "total", "warmup"), [("step", 10, 1), ("cosine", 0, 0), ("cosine", 10, 11)])
def test_impossible_schedules_are_refused(shape: str, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="schedule"):
        learning_rate_factor(0, total=total, warmup=warmup, shape=shape)


@pytest.mark.parametrize("what", ["none", "stem", "encoder"])
def test_frozen_parameters_neither_move_nor_collect_moments(network: UMITSegmenter, what: str) -> None:
    optimizer = adamw(groups_of(network), betas=(0.9, 0.98))
    set_trainable(frozen_parameters(network, what), False)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    network(torch.randn(1, 1, 8, 16, 16))[0].square().mean().backward()
    optimizer.step()
    prefix = {"none": "nothing", "stem": "encoder.stem.", "encoder": "encoder."}[what]
    for name, parameter in network.named_parameters():
        still = torch.equal(parameter, before[name])
        if name.startswith(prefix):
            assert still and parameter not in optimizer.state, name
    assert not torch.equal(network.decoder.seg_layers["head0"].weight, before["decoder.seg_layers.head0.weight"])
    changed = set_trainable(frozen_parameters(network, what), True)
    assert changed == sum(name.startswith(prefix) for name in before)
    assert set_trainable(frozen_parameters(network, what), True) == 0


def test_unknown_freeze_is_refused(network: UMITSegmenter) -> None:
    with pytest.raises(ValueError, match="'decoder'"):
        list(frozen_parameters(network, "decoder"))
