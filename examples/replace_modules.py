"""Replace the modules of a plain PyTorch training loop by fused ones, in ten lines.

    python examples/replace_modules.py

A small model of the kind of MAR and FAR, written with stock modules, is trained for a few steps.
Then `replace_modules` swaps transformer blocks, head with its loss, and low-pass for those of
`fastfar.nn`, loads the same state dict, and the same training gives the same losses. On a GPU the
fused modules run Triton's kernels, on a CPU PyTorch's.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.reference import hybrid_loss, make_schedule, q_sample, timestep_embedding

CHANNELS, SIZE, LEVELS = 4, 8, 8  # the latent, and its frequency levels
WIDTH, HEADS, DEPTH = 64, 4, 2  # the transformer
HEAD_WIDTH, HEAD_DEPTH = 96, 2  # the denoising MLP


# --- a model as one finds it -----------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class StockBlock(nn.Module):
    """timm's Block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimeEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, HEAD_WIDTH)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, 256, torch.float32))


class HeadBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(HEAD_WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(HEAD_WIDTH, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, HEAD_WIDTH)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HEAD_WIDTH, 3 * HEAD_WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class HeadEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HEAD_WIDTH, 2 * CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HEAD_WIDTH, 2 * HEAD_WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, (HEAD_WIDTH,), eps=1e-6) * (1 + scale) + shift)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding()
        self.cond_embed = nn.Linear(WIDTH, HEAD_WIDTH)
        self.index_cond_embed = nn.Linear(1, HEAD_WIDTH)
        self.input_proj = nn.Linear(CHANNELS, HEAD_WIDTH)
        self.res_blocks = nn.ModuleList(HeadBlock() for _ in range(HEAD_DEPTH))
        self.final_layer = HeadEnd()

    def forward(self, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        y = self.time_embed(t) + self.cond_embed(z) + self.index_cond_embed(index)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class StockDiffLoss(nn.Module):
    """The diffusion loss of MAR and FAR."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Head()

    def forward(self, target: Tensor, z: Tensor, index: Tensor) -> Tensor:
        t = torch.randint(0, 1000, target.shape[:1], device=target.device)
        noise = torch.randn_like(target)
        noised = q_sample(target, noise, t, make_schedule(1000))
        return hybrid_loss(self.net(noised, t, z, index), target, noise, noised, t).mean()


class StockLowPass(nn.Module):
    """The low-passed, masked input of FAR, one image after the other."""

    def forward(self, latent: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        images = []
        for image, i in zip(latent.split(1), level.tolist(), strict=True):
            small = F.interpolate(image, (max(i, 1), max(i, 1)), mode="area")
            images.append((i > 0) * F.interpolate(small, (SIZE, SIZE), mode="bicubic"))
        tokens = torch.cat(images).flatten(2).transpose(1, 2)
        return tokens * ~mask[..., None]


class Model(nn.Module):
    """Masked, low-passed latent -> transformer -> one condition per token -> diffusion loss."""

    def __init__(self) -> None:
        super().__init__()
        self.low_pass: nn.Module = StockLowPass()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, SIZE * SIZE, WIDTH))
        self.blocks = nn.ModuleList(StockBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.diffloss: nn.Module = StockDiffLoss()

    def forward(self, latent: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(self.low_pass(latent, level, mask)) + self.positions
        for block in self.blocks:
            x = block(x)
        z = self.norm(x).flatten(0, 1)
        target = latent.flatten(2).transpose(1, 2).flatten(0, 1)
        index = level.repeat_interleave(SIZE * SIZE).float().unsqueeze(1)
        return self.diffloss(target=target, z=z, index=index)


# --- ten lines -------------------------------------------------------------------------------


def replace_modules(model: Model) -> None:
    """Swap the stock modules for fused ones. Make the optimizer after this: parameters are new."""
    from functools import partial

    from fastfar.nn import Block, DiffLoss, FilterMaskPatchify

    state = model.state_dict()
    norm = partial(nn.LayerNorm, eps=1e-6)
    for i in range(len(model.blocks)):
        model.blocks[i] = Block(WIDTH, HEADS, 4.0, qkv_bias=True, norm_layer=norm)
    model.diffloss = DiffLoss(CHANNELS, WIDTH, HEAD_DEPTH, HEAD_WIDTH, num_sampling_steps="100")
    model.low_pass = FilterMaskPatchify(patch_size=1, num_levels=LEVELS)
    model.load_state_dict(state)


# --- the training loop, the same for both ----------------------------------------------------


def train(model: Model, steps: int, device: str) -> list[float]:
    """Losses of `steps` steps on random latents; the same draws in every call."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        latent = torch.randn(8, CHANNELS, SIZE, SIZE, device=device)
        level = torch.randint(0, LEVELS, (8,), device=device)
        mask = torch.rand(8, SIZE * SIZE, device=device) < 0.5
        loss = model(latent, level, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    """Train twice from the same weights, print both runs; their losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    runs = []
    for replace in (False, True):
        torch.manual_seed(0)
        model = Model()
        if replace:
            replace_modules(model)
        runs.append(train(model, options.steps, options.device))
    stock, fused = runs
    print("  step      stock  fastfar.nn")
    for step, (one, other) in enumerate(zip(stock, fused, strict=True)):
        print(f"{step:6d} {one:10.6f} {other:11.6f}")
    print(f"largest difference {max(abs(a - b) for a, b in zip(stock, fused, strict=True)):.1e}")
    return stock, fused


if __name__ == "__main__":
    main()
