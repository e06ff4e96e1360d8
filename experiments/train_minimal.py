"""The whole method on one page of plain PyTorch: five training steps of a mixture of ranks on a small random base.

    python experiments/train_minimal.py

Nothing of morsr is imported. The tests run this loop beside the real training step and compare every number, so it is
both an introduction and an oracle. B images, L layers, D scores, N slots (E experts, then Z zero slots), R ranks.
"""

import re
import zlib

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

RANKS, SHARED, TOP_K, ZERO, SCORES = 6, 2, 3, 2, 3  # 4 experts of one rank and 2 zero slots beside 2 shared ranks
EXPERTS = RANKS - SHARED
STEPS, TIMESTEP, LR, ROUTER_LR_SCALE, HELPER_LR, WEIGHT_DECAY, CLIP = 5, 250, 1e-3, 20.0, 2e-3, 1e-2, 1.0
WEIGHTS = {"l1": 0.2, "l2": 1.0, "charbonnier": 0.2, "psnr": 0.01, "features": 0.5}
WEIGHTS |= {"vsd": 1.0, "csd": 0.5, "gan": 0.1, "balance": 1.0}
ALPHA, WINDOW, NOISE, NOISE_UNTIL = 0.01, 512, 1.0, 0.8
SCORE_RANK, SCORE_SCALE, GUIDANCE, SCORE_RANGE, GAN_RANGE, WIDTH = 4, 2.0, 7.5, (20, 979), (0, 200), 8
ADAPTED = r"(unet\.(?!.*time_emb).*|vae\.encoder\..*|vae\.quant_conv)"
UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 0.5,
}  # fmt: skip
SEVERITIES = torch.linspace(0.1, 0.9, 257)  # of a recipe's draws
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0).float()


class Layer(nn.Module):
    """A frozen Linear or Conv2d plus a gated sum of ranks: base(x) + Σ_r gate_r · up_r ⟨down_r, x⟩."""

    def __init__(self, base: nn.Module, switch: dict):
        super().__init__()
        self.base, self.switch, self.sets = base.requires_grad_(False), switch, nn.ParameterDict()

    def add(self, name: str, ranks: int, scale: float = 1.0):
        down = torch.randn(ranks, *self.base.weight.shape[1:]) * self.base.weight[0].numel() ** -0.5
        self.sets[f"{name}_down"] = nn.Parameter(down)
        self.sets[f"{name}_up"] = nn.Parameter(torch.randn(ranks, len(self.base.weight)) * 0.02)  # 0 in a real run
        self.scale = scale

    def forward(self, x):
        name = self.switch["active"]
        if name is None or f"{name}_up" not in self.sets:
            return self.base(x)
        down, up = self.sets[f"{name}_down"], self.sets[f"{name}_up"]
        gates = self.switch["gates"][self.index] if name == "generator" else up.new_full((1, len(up)), SCORE_SCALE)
        if isinstance(self.base, nn.Conv2d):
            hidden = F.conv2d(x, down, None, self.base.stride, self.base.padding) * gates[:, :, None, None]
            return self.base(x) + torch.einsum("brhw,ro->bohw", hidden, up)
        return self.base(x) + (x @ down.T * gates[:, None]) @ up


def gates_of(logits, form: str = "renormalize_real"):
    """Chosen slots (L, B, K) and gates (L, B, N) of logits (L, B, N)."""
    chosen = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :TOP_K]
    if form == "renormalize_real":  # a chosen zero slot takes a place, but no mass
        real = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        real[..., EXPERTS:] = False
        return chosen, logits.masked_fill(~real, -1e9).softmax(-1) * real * real.sum(-1, keepdim=True)
    picked = logits.softmax(-1).gather(-1, chosen)
    if form == "renormalize":  # chosen gates sum to K, so an even gate is a plain LoRA's
        picked = picked * TOP_K / picked.sum(-1, keepdim=True)
    return chosen, torch.zeros_like(logits).scatter(-1, chosen, picked)


def balance(probabilities, chosen, severity, running: dict):
    """Load balance whose zero slots weigh an image by 2 x the rank of its severity among those of a recipe."""
    seen = running["images"] + len(severity)
    rate = min(1.0, len(severity) / min(seen, WINDOW))
    share = F.one_hot(chosen, probabilities.shape[-1]).float().mean((1, 2))
    running["share"] = torch.lerp(running["share"], share, rate)
    running["images"] = seen
    weight = torch.ones(len(severity), probabilities.shape[-1])
    weight[:, EXPERTS:] = 2 * (running["severities"] < severity[:, None]).float().mean(1, keepdim=True)
    return ALPHA * probabilities.shape[-1] * (running["share"] * (probabilities * weight).mean(1)).sum()


def estimate(lr):
    """Scores (B, D) in [0, 1], higher is worse: a stand-in for CLIP's."""
    rows, columns = lr.diff(dim=-2).abs().mean((1, 2, 3)), lr.diff(dim=-1).abs().mean((1, 2, 3))
    return torch.stack([rows, columns, 0.5 - lr.std((1, 2, 3))], dim=1).clamp(0, 1)


def severity_of(scores):
    """Noisy-or (B,) of the scores: one strong degradation is enough."""
    return 1 - (1 - scores).prod(dim=1)


def draw(step: int, name: str, *shape: int):
    """Standard normal numbers, the same for a step and a name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode())))


def draw_timesteps(step: int, name: str, count: int, low: int, high: int):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
    return torch.randint(low, high + 1, (count,), generator=generator)


def pairs(step: int, count: int = 2):
    """Smooth random HR images (B, 3, 32, 32), and LR images (B, 3, 8, 8) with noise of random strength."""
    hr = F.interpolate(draw(step, "hr", count, 3, 6, 6) * 0.25 + 0.5, (32, 32), mode="bicubic").clamp(0, 1)
    noise = draw(step, "lr", count, 3, 8, 8) * draw(step, "strength", count, 1, 1, 1).abs() * 0.1
    return (F.avg_pool2d(hr, 4) + noise).clamp(0, 1), hr


class Method:
    """Base, adapters, router, score network and discriminator, with a step that trains all three networks."""

    def __init__(self, seed: int = 0, gate: str = "renormalize_real"):
        torch.manual_seed(seed)
        self.gate, self.switch = gate, {"active": "generator", "gates": None}
        self.base = nn.ModuleDict({"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE)})
        self.base.requires_grad_(False).eval()
        self.clean_prompt, self.degraded_prompt = torch.randn(2, 1, 1, UNET["cross_attention_dim"])
        self.layers = {}
        for name, module in list(self.base.named_modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and re.fullmatch(ADAPTED, name):
                parent, _, key = name.rpartition(".")
                layer = Layer(module, self.switch)
                layer.index = len(self.layers)
                setattr(self.base.get_submodule(parent), key, layer)
                self.layers[name] = layer
        for name, layer in self.layers.items():
            layer.add("generator", RANKS)
            if name.startswith("unet"):
                layer.add("score", SCORE_RANK)
        count, slots = len(self.layers), EXPERTS + ZERO
        self.router = nn.ParameterList([torch.randn(count, slots, SCORES) * 0.3, torch.randn(count, slots) * 0.1])
        scores = torch.cat([estimate(pairs(step, 16)[0]) for step in range(4)])
        self.mean, self.std = scores.mean(0), scores.std(0)
        self.running = {"share": torch.full((count, slots), 1 / slots), "severities": SEVERITIES, "images": 0}
        widths = [*UNET["block_out_channels"], UNET["block_out_channels"][-1]]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, WIDTH, 1), nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
                nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, 1, 1),
            )
            for width in widths
        )  # fmt: skip
        self.networks = {"generator": [*self.ranks("generator"), *self.router], "score": self.ranks("score")}
        self.networks["discriminator"] = list(self.heads.parameters())
        groups = [{"params": self.ranks("generator")}, {"params": list(self.router), "lr": LR * ROUTER_LR_SCALE}]
        self.optimizers = {
            "generator": torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY),
            "score": torch.optim.AdamW(self.networks["score"], lr=HELPER_LR, weight_decay=WEIGHT_DECAY),
            "discriminator": torch.optim.AdamW(self.networks["discriminator"], lr=HELPER_LR, weight_decay=WEIGHT_DECAY),
        }

    def ranks(self, name: str):
        return [p for layer in self.layers.values() for key, p in layer.sets.items() if key.startswith(f"{name}_")]

    def encode(self, images):
        return self.base["vae"].encode(images * 2 - 1).latent_dist.mean * VAE["scaling_factor"]

    def noise_in(self, latents, t, prompt=None, active=None):
        """The UNet's guess of the noise, with one set of adapters at work or none."""
        self.switch["active"] = active
        prompt = self.clean_prompt if prompt is None else prompt
        return self.base["unet"](latents, t, encoder_hidden_states=prompt.expand(len(latents), -1, -1)).sample

    def noised(self, z0, step, name, low, high):
        t, noise = draw_timesteps(step, f"{name}/t", len(z0), low, high), draw(step, f"{name}/noise", *z0.shape)
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return a.sqrt() * z0 + (1 - a).sqrt() * noise, noise, t, a

    def features(self, images):
        """What the frozen encoder holds before each halving and before its last convolution, of unit length."""
        self.switch["active"], found, encoder = None, [], self.base["vae"].encoder
        watched = [encoder.get_submodule("down_blocks.0.downsamplers.0.conv"), encoder.conv_out]
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for layer in watched]
        encoder(images * 2 - 1)
        for hook in hooks:
            hook.remove()
        return [F.normalize(level, dim=1, eps=1e-6) for level in found]

    def verdicts(self, z, t):
        """The discriminator: one head per level of the frozen UNet's down path and its middle."""
        self.switch["active"], unet = None, self.base["unet"]
        prompt = self.clean_prompt.expand(len(z), -1, -1)
        found, time, hidden = [], unet.time_embedding(unet.time_proj(t)), unet.conv_in(z)
        for block in unet.down_blocks:
            text = {"encoder_hidden_states": prompt} if hasattr(block, "attentions") else {}
            hidden, _ = block(hidden, time, **text)
            found.append(hidden)
        found.append(unet.mid_block(hidden, time, encoder_hidden_states=prompt))
        return [head(level) for head, level in zip(self.heads, found, strict=True)]

    def step(self, step: int):
        """One generator step, then one of each helper: unweighted terms and norms of the gradients by name."""
        lr, hr = pairs(step)
        scores = estimate(lr)
        weight, bias = self.router
        logits = torch.einsum("bd,lnd->lbn", (scores - self.mean) / self.std, weight) + bias[:, None]
        sigma = NOISE * max(0.0, 1 - step / STEPS / NOISE_UNTIL)
        noise = draw(step, "router", len(lr), *bias.shape).transpose(0, 1)
        chosen, gates = gates_of(logits + sigma * noise, self.gate)
        self.switch["gates"] = torch.cat([gates.new_ones(*gates.shape[:2], SHARED), gates[..., :EXPERTS]], dim=-1)
        self.switch["active"] = "generator"
        z = self.encode(F.interpolate(lr, hr.shape[-2:], mode="bicubic").clamp(0, 1))
        a = ALPHA_BAR[TIMESTEP]
        z0 = (z - (1 - a).sqrt() * self.noise_in(z, torch.tensor(TIMESTEP), active="generator")) / a.sqrt()
        sr = self.base["vae"].decode(z0 / VAE["scaling_factor"]).sample / 2 + 0.5

        terms = {"l1": F.l1_loss(sr, hr), "l2": F.mse_loss(sr * 2 - 1, hr * 2 - 1)}
        terms["charbonnier"] = ((sr - hr).square() + 1e-6).sqrt().mean()
        luma = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255
        error = ((sr - hr) * luma).sum(1).square().mean((1, 2))
        terms["psnr"] = 10 * (error + 1e-3).log10().mean()
        levels = zip(self.features(sr), self.features(hr), strict=True)
        terms["features"] = torch.stack([(x - y).square().sum(1).mean() for x, y in levels]).mean()
        terms["vsd"], terms["csd"] = (self.distillation(z0, step, side) for side in ("score", "degraded prompt"))
        terms["gan"] = torch.stack([-v.mean() for v in self.verdicts(*self.shown(z0, step, "adversarial"))]).mean()
        terms["balance"] = balance(logits.softmax(-1), chosen, severity_of(scores), self.running)
        total = sum(WEIGHTS[name] * term for name, term in terms.items())
        norms = {"generator": self.update("generator", total)}

        z0 = z0.detach()
        noisy, noise, t, _ = self.noised(z0, step, "score", 0, 999)
        terms["score"] = (self.noise_in(noisy, t, active="score") - noise).square().mean()
        norms["score"] = self.update("score", terms["score"])
        with torch.no_grad():
            self.switch["active"] = None
            real = self.encode(hr)
        fakes, reals = (self.verdicts(*self.shown(z, step, name)) for name, z in (("fake", z0), ("real", real)))
        hinge = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(reals, fakes, strict=True)]
        terms["discriminator"] = torch.stack(hinge).mean()
        norms["discriminator"] = self.update("discriminator", terms["discriminator"])
        return {**{n: v.item() for n, v in terms.items()}, "total": total.item()}, norms

    def shown(self, z0, step, name):
        noisy, _, t, _ = self.noised(z0, step, name, *GAN_RANGE)
        return noisy, t

    @torch.no_grad()
    def direction(self, z0, step, side):
        noisy, _, t, a = self.noised(z0, step, "distillation", *SCORE_RANGE)
        clean = lambda noise: (noisy - (1 - a).sqrt() * noise) / a.sqrt()  # noqa: E731
        without = self.noise_in(noisy, t, self.degraded_prompt)
        real = clean(without + GUIDANCE * (self.noise_in(noisy, t) - without))
        fake = clean(self.noise_in(noisy, t, active="score") if side == "score" else without)
        return (fake - real) / (z0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-4)

    def distillation(self, z0, step, side):
        """From what generated latents look like to what the guided teacher sees: to the score network (variational
        score distillation), or to the teacher under the degraded prompt (classifier score distillation)."""
        return F.mse_loss(z0, (z0 - self.direction(z0, step, side)).detach())

    def update(self, name: str, loss) -> float:
        """Gradient of one network alone, clipped, and one step of AdamW; the norm before clipping."""
        gradients = torch.autograd.grad(loss, self.networks[name])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for parameter, gradient in zip(self.networks[name], gradients, strict=True):
            parameter.grad = gradient * min(1.0, CLIP / (norm.item() + 1e-6))
        self.optimizers[name].step()
        return norm.item()


def main():
    method = Method()
    for step in range(STEPS):
        terms, norms = method.step(step)
        if step == 0:
            print("step " + "".join(f"{name:>14}" for name in [*terms, *(f"|{name}|" for name in norms)]))
        print(f"{step:4} " + "".join(f"{value:14.6f}" for value in [*terms.values(), *norms.values()]))


if __name__ == "__main__":
    main()
