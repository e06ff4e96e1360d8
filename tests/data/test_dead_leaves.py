"""Dead leaves: one image per key and size, with the statistics that make them stand in for photographs."""

import torch

from morsr.data.dead_leaves import dead_leaves


def test_an_image_depends_on_its_key_alone():
    keys = torch.tensor([5, -3, 2**62, 5])
    images = dead_leaves(keys, 48)
    assert images.shape == (4, 3, 48, 48)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0], images[3], rtol=0, atol=0)
    torch.testing.assert_close(dead_leaves(keys[1:2], 48)[0], images[1], rtol=0, atol=1e-6)
    assert (images[0] - images[1]).abs().mean() > 0.05
    assert (images[1] - images[2]).abs().mean() > 0.05


def test_statistics_are_those_of_photographs():
    images = dead_leaves(torch.arange(12), 64)
    gray = images.mean(1)
    assert 0.25 < gray.mean() < 0.65
    assert gray.flatten(1).std(1).mean() > 0.1
    # the amplitude spectrum falls about as 1/f: a photograph's slope lies between -1.6 and -0.7
    power = torch.fft.rfft2(gray - gray.mean((1, 2), keepdim=True)).abs().square().mean(0)
    frequency = (torch.fft.fftfreq(64)[:, None].square() + torch.fft.rfftfreq(64).square()).sqrt()
    band = (frequency > 0.03) & (frequency < 0.4)
    x, y = frequency[band].log(), power[band].sqrt().log()
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(unbiased=False)
    assert -1.6 < slope < -0.7
    # edges: gradients are far more heavy-tailed than a Gaussian's kurtosis of 3
    gradient = (gray[:, :, 1:] - gray[:, :, :-1]).flatten()
    assert gradient.pow(4).mean() / gradient.square().mean().square() > 6
