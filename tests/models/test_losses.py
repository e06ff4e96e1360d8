"""Reconstruction losses against the metrics they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from morsr.errors import ConfigError
from morsr.functional.quality import psnr_y
from morsr.models.losses import Losses, RestorationLoss


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(3, 3, 16, 16, generator=generator)
    return (hr + 0.3 * torch.randn(hr.shape, generator=generator)).clamp(0, 1), hr


def test_psnr_term_is_minus_the_metric_where_errors_are_large() -> None:
    sr, hr = _pair()
    term = RestorationLoss(Losses.of(l2=0.0, psnr=1.0))(sr, hr)["psnr"]
    # The floor of 1e-3 takes under 0.3 dB off to images this bad.
    assert_close(term, -psnr_y(sr, hr).mean().float(), atol=0.3, rtol=0)


def test_psnr_term_counts_every_image_alike_and_spares_perfect_ones() -> None:
    sr, hr = _pair()
    sr = torch.cat([sr[:1], hr[1:2] + 0.01]).requires_grad_()
    RestorationLoss(Losses.of(l2=0.0, psnr=1.0))(sr, hr[:2])["psnr"].backward()
    hard, easy = (sr.grad[i].square().sum() for i in range(2))
    # Mean square error alone would give the hard image about 900 times the squared gradient of the easy one.
    assert hard < 10 * easy
    assert_close(RestorationLoss(Losses.of(l2=0.0, psnr=1.0))(hr, hr)["psnr"], torch.tensor(-30.0))


def test_total_is_the_weighted_sum() -> None:
    sr, hr = _pair()
    terms = RestorationLoss(Losses.of(l1=0.5, l2=2.0, psnr=0.01))(sr, hr)
    assert_close(terms["total"], 0.5 * terms["l1"] + 2 * terms["l2"] + 0.01 * terms["psnr"])
    assert_close(terms["l2"], 4 * (sr - hr).square().mean())


def test_weights_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        RestorationLoss(Losses.of(psnr=-1.0))
