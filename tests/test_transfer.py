"""Any-to-any transfer: methods.md MAE-11, MAE-12, and bad checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nnunet_umit.architectures.mae import MaskedAutoencoder
from nnunet_umit.architectures.transfer import adapt_channels, load_state, resize_kernel, save_encoder
from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.config import PretrainConfig

WIDTH: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 2,
    "stem_channels": [4, 6, 8],
    "decoder_channels": [4, 6, 8],
}
SITES = {
    "isotropic": (1, {"spacing": [1.0, 1.0, 1.0], "token_size": 8}),
    "thick": (1, {"spacing": [8.0, 1.0, 1.0], "token_size": 16}),
    "two_channels": (2, {"spacing": [2.0, 2.0, 2.0], "token_size": 4}),
    "flat": (3, {"spacing": [1.0, 1.0], "token_size": 16}),
}


def network(site: str, stem: str = "conv", **changes: Any) -> UMITSegmenter:
    channels, kwargs = SITES[site]
    return UMITSegmenter(channels, 3, **{**kwargs, "stem": stem, **WIDTH, **changes})


def checkpoint(folder: Path, site: str, stem: str = "conv", **changes: Any) -> Path:
    channels, kwargs = SITES[site]
    mae = MaskedAutoencoder.from_arch_kwargs(
        channels, {**kwargs, "stem": stem, **WIDTH, **changes}, PretrainConfig(decoder_dim=16)
    )
    file = folder / f"{site}.pth"
    torch.save({"network_weights": mae.state_dict(), "trainer_name": "UMITPretrainTrainer"}, file)
    return file


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(SITES, SITES)))
def test_every_pair_transfers(
    source: str, target: str, stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(tmp_path, source, stem)
    net = network(target, stem)
    decoder = {name: value.clone() for name, value in net.decoder.state_dict().items()}
    report = net.load_umit_pretrained(str(file))
    assert report.fraction == 1.0
    assert not [name for name in report.new if name.startswith("encoder.")]
    assert "100.0 % of the encoder" in capsys.readouterr().out
    state, _ = load_state(file)
    for name in report.loaded:
        assert torch.equal(net.state_dict()[name], state[name])
    for name, value in net.decoder.state_dict().items():
        assert torch.equal(value, decoder[name])
    assert all(name.startswith(("decoder.", "embed.", "mask_token", "head.")) for name in report.unused)
    if source == target:
        assert not report.adapted


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("patch", {}), ("conv", {})),
        (("conv", {}), ("patch", {})),
        (("conv", {"stem_channels": [4, 6, 12]}), ("conv", {})),
    ],
)
def test_stems_differ_but_the_transformer_arrives(tmp_path: Path, before: Any, after: Any) -> None:
    """Nothing of a stem is adapted to a layer that reads other things than the one it comes from."""
    wide = {"embed_dim": 96, "depth": 6, "token_size": 4}
    net = network("isotropic", after[0], **wide, **after[1])
    projection = net.encoder.stem.project.weight.clone()
    file = checkpoint(tmp_path, "isotropic", before[0], **wide, **before[1])
    report = net.load_umit_pretrained(str(file))
    assert 0.9 < report.fraction < 1.0 and not report.adapted
    assert "encoder.stem.project.weight" in report.new and torch.equal(net.encoder.stem.project.weight, projection)
    inner = [name for name in net.state_dict() if name.startswith("encoder.") and ".stem." not in name]
    assert set(inner) <= set(report.loaded)
    if before[0] != after[0]:
        assert all(name in report.new for name in net.state_dict() if name.startswith("encoder.stem."))


def test_channel_rules() -> None:
    grey = torch.randn(2, 1, 9, 9, 9)
    colour = torch.randn(4, 3, 3, 3, 3)
    torch.testing.assert_close(
        F.conv3d(grey, adapt_channels(colour, 1)),
        F.conv3d(grey.expand(-1, 3, -1, -1, -1), colour),
        atol=1e-4,
        rtol=1e-4,
    )
    single = torch.randn(4, 1, 3, 3, 3)
    torch.testing.assert_close(
        F.conv3d(grey.expand(-1, 2, -1, -1, -1), adapt_channels(single, 2)),
        F.conv3d(grey, single),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(("old", "new"), [(8, 16), (4, 16), (16, 8), (16, 4), (8, 8)])
def test_resized_kernels_keep_their_sum_and_see_the_enlarged_image(old: int, new: int) -> None:
    kernel = torch.randn(3, 2, old, old, old, dtype=torch.float64)
    resized = resize_kernel(kernel, new)
    assert resized.shape[-1] == new
    torch.testing.assert_close(resized.sum((2, 3, 4)), kernel.sum((2, 3, 4)))
    if new >= old:
        image = torch.randn(1, 2, old, old, old, dtype=torch.float64)
        enlarged = image
        for axis in (2, 3, 4):
            enlarged = enlarged.repeat_interleave(new // old, axis)
        torch.testing.assert_close((enlarged * resized[:1]).sum(), (image * kernel[:1]).sum())


def test_supervised_to_supervised_takes_the_decoder_but_no_head(tmp_path: Path) -> None:
    source = network("isotropic")
    file = tmp_path / "supervised.pth"
    torch.save({"network_weights": source.state_dict()}, file)
    net = network("isotropic")
    report = net.load_umit_pretrained(str(file))
    assert all(".head" in name for name in report.new)
    assert torch.equal(net.decoder.seg_layers["level0"].up.weight, source.decoder.seg_layers["level0"].up.weight)


def test_another_architecture_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    net = network("isotropic")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = checkpoint(tmp_path, "isotropic", embed_dim=24)
    with pytest.raises(ValueError, match=r"at least 90 % is needed.*First difference"):
        net.load_umit_pretrained(str(other))
    deeper = checkpoint(tmp_path, "isotropic", depth=5)
    with pytest.raises(ValueError, match=r"is deeper: it has encoder\.transformer\.blocks .* too"):
        net.load_umit_pretrained(str(deeper))
    torch.save({"network_weights": {"conv.weight": torch.zeros(3)}}, tmp_path / "unet.pth")
    with pytest.raises(ValueError, match="0.0 % of the encoder.*no parameter names"):
        net.load_umit_pretrained(str(tmp_path / "unet.pth"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    net = network("isotropic")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        net.load_umit_pretrained(str(tmp_path / "absent.pth"))
    whole = checkpoint(tmp_path, "isotropic")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole.read_bytes()[:500])
        with pytest.raises(ValueError, match=f"{name}.*(damaged|safetensors)"):
            net.load_umit_pretrained(str(tmp_path / name))
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no 'network_weights'"):
        net.load_umit_pretrained(str(tmp_path / "other.pth"))


class Payload:
    """Pickles to a call; must never run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    torch.save({"network_weights": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read safely"):
        load_state(tmp_path / "evil.pth")


def test_exported_encoder_round_trips_with_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = network("thick")
    file = save_encoder(source.encoder, tmp_path, {"method": "MAE", "licence": "CC BY 4.0"})
    net = network("thick")
    report = net.load_umit_pretrained(str(file))
    assert report.fraction == 1.0
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value)
    assert "licence of the pre-training data: CC BY 4.0" in capsys.readouterr().out


def test_stock_loader_takes_the_checkpoint_and_refuses_the_encoder_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("nnunetv2.run.load_pretrained_weights")
    stock = getattr(module.load_pretrained_weights, "__wrapped__", module.load_pretrained_weights)
    net = network("isotropic")
    stock(net, str(checkpoint(tmp_path, "isotropic")))
    state, _ = load_state(tmp_path / "isotropic.pth")
    assert torch.equal(net.state_dict()["encoder.stem.project.weight"], state["encoder.stem.project.weight"])
    file = str(save_encoder(net.encoder, tmp_path, {}))
    with pytest.raises((UnpicklingError, KeyError)):  # no pickle; newer torch reads it, and there is no network_weights
        stock(net, file)
