"""The loss equals the formula each kind of model was trained with, written out independently here."""

import comfy.model_sampling
import pytest
import torch
from concepts_pack.host.objective import denoising_error, output_scale, signal_to_noise, timestep_count


def material(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([20, 500, 990]), torch.randn(1, 77, 32, generator=generator)


def loss(*arguments, **options):
    return denoising_error(*arguments, **options).mean((1, 2, 3))


def network(model, noisy, timesteps, context):
    """The bare UNet on the variance-preserving noisy latents, as in training from scratch."""
    return model.diffusion_model(noisy, timesteps.float(), context=context.expand(len(noisy), -1, -1))


def alphas(model, timesteps):
    """Cumulative alpha of SD's scaled-linear schedule, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)[timesteps].float().view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_equals_the_training_formula(model, velocity_model, kind):
    base = (model if kind == "noise" else velocity_model).model
    latents, noise, timesteps, context = material()
    alpha = alphas(base, timesteps)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = noise if kind == "noise" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with torch.inference_mode():
        expected = (network(base, noisy, timesteps, context) - target).square().mean((1, 2, 3))
        ours = loss(base, latents, noise, timesteps, context, None)
    assert ours.shape == (3,)
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_min_snr_is_that_of_its_paper(model, velocity_model, kind):
    """Section 3.4: min(SNR, γ) / SNR on noise predictions, min(SNR, γ) / (SNR + 1) on velocity predictions."""
    base = (model if kind == "noise" else velocity_model).model
    latents, noise, timesteps, context = material()
    alpha = alphas(base, timesteps).flatten()
    snr = alpha / (1 - alpha)
    share = snr.clamp(max=5) / (snr if kind == "noise" else snr + 1)
    with torch.inference_mode():
        plain, capped = (loss(base, latents, noise, timesteps, context, None, snr_cap=cap) for cap in (0.0, 5.0))
    torch.testing.assert_close(capped, plain * share, rtol=1e-3, atol=1e-6)


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The schedule of flow models."""


def test_scale_of_a_flow_model():
    sigma = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(output_scale(Flow(), sigma), -sigma)
    torch.testing.assert_close(signal_to_noise(Flow(), sigma), ((1 - sigma) / sigma) ** 2)


def test_levels(model):
    assert timestep_count(model.model) == 1000


def test_samples_do_not_see_each_other(model):
    latents, noise, timesteps, context = material()
    with torch.inference_mode():
        together = loss(model.model, latents, noise, timesteps, context, None)
        alone = [loss(model.model, latents[i:i + 1], noise[i:i + 1], timesteps[i:i + 1], context, None)
                 for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
