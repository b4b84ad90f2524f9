"""MAR as a good engineer runs it, on PyTorch's operators alone.

What does not depend on the denoised token leaves the loop over diffusion steps, exactly: the
embeddings of all times, that of the condition, and so the adaLN modulations of all steps, which one
product makes (3/5 of the head's weights are then read once per outer step instead of T times). Both
halves share the state, and the variance channel of the unconditional one is not computed.

At batch 1 the head multiplies two rows, so a CPU does little but read weights: x W^T is computed
as (W x^T)^T there, which reads them about 1.5 times as fast as `F.linear`, and the weights of the
transformer are packed (`_linear`). A GPU would do little but launch: there torch.compile fuses what
lies between the products, and decoder and diffusion loop are CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar._weights import skeleton
from fastfar.baselines._linear import PreparedLinear, can_pack
from fastfar.baselines._mar_noise import Draws
from fastfar.graphs import Capturer, CudaCapturer, wanted
from fastfar.head import EPS, FinalLayer, ResBlock, SimpleMLPAdaLN
from fastfar.model import FAR
from fastfar.ops import layernorm_linear, use_backend
from fastfar.solver import PUBLISHED, schedule
from fastfar.transformer import Block

THIN = 16  # rows up to which a CPU multiplies faster with the weight on the left
ROWS_AHEAD = 1024  # rows (diffusion steps times rows of the head) of modulations made at once
MAX_GRAPHS = 4  # CUDA graphs kept, one for each number of rows


class PackedBlock(nn.Module):
    """A transformer block whose weights are in oneDNN's order; takes the place of `Block`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.num_heads = block.num_heads
        self.norm1, self.norm2 = block.norm1, block.norm2
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        self.layers = tuple(PreparedLinear(layer.weight, layer.bias) for layer in layers)

    def forward(self, x_BSD: Tensor, key_mask_BS: Tensor | None = None) -> Tensor:
        """x: (B, S, D); there is no mask."""
        qkv, proj, fc1, fc2 = self.layers
        batch, length, width = x_BSD.shape
        heads = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv(self.norm1(x_BSD)).view(heads).permute(2, 0, 3, 1, 4).unbind()
        out_BHSE = F.scaled_dot_product_attention(q, k, v)
        x_BSD = x_BSD + proj(out_BHSE.transpose(1, 2).reshape(x_BSD.shape))
        return x_BSD + fc2(F.gelu(fc1(self.norm2(x_BSD))))


class WellRun:
    """The well run form.

    Args:
        network: it is changed: blocks are packed, and the adaLN layers of the head become one.
        compile: torch.compile of the blocks and of a diffusion step.
        device: of the network; on CUDA decoder and diffusion loop are CUDA graphs.
        diffusion_steps: T.
        temperature: factor on the noise.
        x0_range: bounds of the predicted x0; None is the published rule, no bounds.
        capturer: makes CUDA graphs; None is the device's, if it has them.
    """

    casts = False

    def __init__(
        self,
        network: FAR,
        compile: bool,
        device: torch.device,
        diffusion_steps: int,
        temperature: float,
        x0_range: tuple[float, float] | None,
        capturer: Capturer | None = None,
    ) -> None:
        self.network, self.compile = network, compile
        if capturer is None and device.type == "cuda":
            capturer = CudaCapturer(device)
        self.graphs = capturer is not None
        self._packed = _prepare_blocks(network, compile)
        self._decoder = _captured(self._decode, capturer)
        with torch.inference_mode(), use_backend("torch"):
            self._head = Head(network, diffusion_steps, temperature, x0_range, compile)
        self._all_steps = _captured(self._head.all_steps, capturer)

    def ways(self, kind: str) -> str:
        """One sentence for tables; kind: the dtype in words."""
        weights = f"{kind} weights{' (packed)' if self._packed else ''}"
        return (
            f"{weights}, SDPA, modulations of all diffusion steps by one product, channels-last "
            f"decoder, {'torch.compile' if self.compile else 'eager'}"
            f"{', CUDA graphs' if self.graphs else ''}"
        )

    def context(self) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

    def transformer(
        self, tokens_MLP: Tensor, class_MD: Tensor, kept_MK: Tensor, predicted_MN: Tensor
    ) -> Tensor:
        """z of the tokens `predicted` given those `kept`, (M, N, D); both are numbers of tokens."""
        network, buffer = self.network, self.network.config.buffer_size
        x_MSD = layernorm_linear(
            network._encode(tokens_MLP.to(class_MD.dtype), class_MD, kept_MK),
            network.encoder_norm.weight,
            network.encoder_norm.bias,
            network.decoder_embed.weight,
            network.decoder_embed.bias,
            eps=EPS,
        )
        masked_MLD = network.mask_token.expand(*tokens_MLP.shape[:2], -1)
        index_MKD = kept_MK[..., None].expand(-1, -1, x_MSD.shape[-1])
        tokens_MLD = masked_MLD.scatter(1, index_MKD, x_MSD[:, buffer:])
        return self._decoder(torch.cat([x_MSD[:, :buffer], tokens_MLD], dim=1), predicted_MN)

    def _decode(self, x_MSD: Tensor, predicted_MN: Tensor) -> Tensor:
        """Decoder blocks; what follows them for the predicted tokens alone."""
        network = self.network
        x_MSD = network._through(network.decoder_blocks, x_MSD + network.decoder_pos_embed_learned)
        index_MND = predicted_MN[..., None].expand(-1, -1, x_MSD.shape[-1])
        position_MLD = network.diffusion_pos_embed_learned.expand(len(x_MSD), -1, -1)
        x_MND = x_MSD.gather(1, index_MND + network.config.buffer_size)
        z_MND: Tensor = network.decoder_norm(x_MND)
        return z_MND + position_MLD.gather(1, index_MND)

    def head(self, condition_MD: Tensor, guidance_scale: Tensor | None, draws: Draws) -> Tensor:
        """(N, P) float32 tokens; M = 2 N, conditional rows first, where guided, else N."""
        rows, width = len(condition_MD), self.network.head.in_channels
        tokens = rows if guidance_scale is None else rows // 2
        initial_NP = draws.next(tokens, width)
        # As many as the published form draws, so that equal generators give equal tokens.
        noise_TNP = draws.several(len(self._head.table_T11), rows, width)[:, :tokens]
        scale = () if guidance_scale is None else (guidance_scale,)
        return self._all_steps(condition_MD, initial_NP, noise_TNP, *scale)


def _prepare_blocks(network: FAR, compile: bool) -> bool:
    """Compile the blocks, or pack them where that can be done; returns whether it was.

    One graph serves all blocks and all lengths.
    """
    packed = False
    for blocks in (network.encoder_blocks, network.decoder_blocks):
        for i, block in enumerate(blocks):
            assert isinstance(block, Block)
            if compile:
                block.compile(dynamic=True)
            elif can_pack(block.mlp.fc1.weight):
                blocks[i], packed = PackedBlock(block), True
    return packed


class Head:
    """The diffusion steps of one outer step.

    Args:
        network: its head's adaLN layers are taken out and become one matrix.
        diffusion_steps, temperature, x0_range, compile: see `WellRun`.
    """

    def __init__(
        self,
        network: FAR,
        diffusion_steps: int,
        temperature: float,
        x0_range: tuple[float, float] | None,
        compile: bool,
    ) -> None:
        self.head, self.x0_range = network.head, x0_range
        self.blocks = [(block.in_ln, *_products(block)) for block in _res_blocks(self.head)]
        weight, num_timesteps = self.head.input_proj.weight, network.config.num_timesteps
        self.dtype, self.width = weight.dtype, self.head.model_channels
        self.modulations = _take_modulations(self.head)
        steps = schedule(PUBLISHED, diffusion_steps, num_timesteps, temperature)
        timestep_T = torch.tensor(steps.timesteps, device=weight.device)
        self.time_TW: Tensor = self.head.time_embed(timestep_T)
        self.table_T11 = steps.table.to(weight.device, torch.float32)
        # dynamic=False: the number of rows does not change within a run.
        self._step = torch.compile(self.step, dynamic=False) if compile else self.step

    def all_steps(
        self,
        condition_MD: Tensor,
        initial_NP: Tensor,
        noise_TNP: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """(N, P) tokens; M = 2 N, conditional rows first, where guided, else N."""
        condition_MW = self.head.cond_embed(condition_MD)
        x_NP, ahead = initial_NP, max(1, ROWS_AHEAD // len(condition_MD))
        for start in range(0, len(self.time_TW), ahead):
            time_TW = self.time_TW[start : start + ahead]
            active_TMW = F.silu(time_TW[:, None] + condition_MW)
            both = zip(self.modulations(active_TMW), range(start, start + ahead), strict=False)
            for modulations, t in both:
                table_11, noise_NP = self.table_T11[t], noise_TNP[t]
                x_NP = self._step(x_NP, modulations, table_11, noise_NP, guidance_scale)
        return x_NP

    def step(
        self,
        x_NP: Tensor,
        modulations: Tensor,
        table_11: Tensor,
        noise_NP: Tensor,
        guidance_scale: Tensor | None,
    ) -> Tensor:
        """One diffusion step. modulations: (M, (3 d + 2) W); table_11: row of `schedule`."""
        head, rows = self.head, len(x_NP)
        parts = iter(modulations.view(len(modulations), -1, self.width).unbind(dim=1))
        h_MW = linear(head.input_proj, x_NP.to(self.dtype))
        if guidance_scale is not None:
            h_MW = torch.cat([h_MW, h_MW])
        for norm, fc1, fc2 in self.blocks:
            shift_MW, scale_MW, gate_MW = next(parts), next(parts), next(parts)
            y_MW = _modulated(norm(h_MW), shift_MW, scale_MW)
            y_MW = linear(fc2, F.silu(linear(fc1, y_MW)))
            h_MW = torch.addcmul(h_MW, gate_MW, y_MW)
        h_MW = F.layer_norm(h_MW, (self.width,), eps=EPS)
        h_MW = _modulated(h_MW, next(parts), next(parts))
        # The variance channel of the unconditional half comes along: it is not worth a product.
        eps_MP, v_MP = linear(head.final_layer.linear, h_MW).float().chunk(2, dim=-1)
        eps_NP, v_NP = eps_MP[:rows], v_MP[:rows]
        if guidance_scale is not None:
            eps_NP = eps_MP[rows:] + guidance_scale * (eps_NP - eps_MP[rows:])

        recip, recip_m1, mean_xt, mean_x0, _, low, high, noise, *_ = table_11.unbind()
        x0_NP = recip * x_NP - recip_m1 * eps_NP
        if self.x0_range is not None:
            x0_NP = x0_NP.clamp(*self.x0_range)
        log_variance_NP = low + (v_NP + 1) / 2 * (high - low)
        noise_NP = noise * torch.exp(0.5 * log_variance_NP) * noise_NP
        return mean_xt * x_NP + mean_x0 * x0_NP + noise_NP


def linear(layer: nn.Linear, x_MK: Tensor) -> Tensor:
    """The layer; for few rows of 16 bits on a CPU with the weight on the left of the product."""
    if x_MK.device.type == "cpu" and x_MK.dtype == torch.bfloat16 and len(x_MK) <= THIN:
        # contiguous() first: what follows is slow on the columns of a transposed result.
        return (layer.weight @ x_MK.t()).t().contiguous() + layer.bias
    return F.linear(x_MK, layer.weight, layer.bias)


def _modulated(h_MW: Tensor, shift_MW: Tensor, scale_MW: Tensor) -> Tensor:
    """h (1 + scale) + shift."""
    return torch.addcmul(h_MW + shift_MW, h_MW, scale_MW)


def _res_blocks(head: SimpleMLPAdaLN) -> list[ResBlock]:
    return [block for block in head.res_blocks if isinstance(block, ResBlock)]


def _products(block: ResBlock) -> tuple[nn.Linear, nn.Linear]:
    fc1, fc2 = block.mlp[0], block.mlp[2]
    assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
    return fc1, fc2


def _take_modulations(head: SimpleMLPAdaLN) -> Callable[[Tensor], Tensor]:
    """All adaLN layers as one, block by block, then the final one; the head's own go."""
    weights, biases = [], []
    owners: list[ResBlock | FinalLayer] = [*_res_blocks(head), head.final_layer]
    for owner in owners:
        layer = owner.adaLN_modulation[1]
        assert isinstance(layer, nn.Linear)
        weights.append(layer.weight.detach())
        biases.append(layer.bias.detach())
        del owner.adaLN_modulation
    weight, bias = torch.cat(weights), torch.cat(biases)
    if can_pack(weight):
        return PreparedLinear(weight, bias)
    with skeleton():
        joined = nn.Linear(weight.shape[1], len(weight))
    joined.weight, joined.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    head.modulations = joined
    return joined


# --- CUDA graphs -----------------------------------------------------------------------------


def _captured(function: Callable[..., Tensor], capturer: Capturer | None) -> Callable[..., Tensor]:
    """The same function of tensors, as a CUDA graph for each set of shapes."""
    return function if capturer is None else Captured(function, capturer)


class Captured:
    """A function of tensors, recorded once for each set of shapes and replayed from then on.

    Args:
        function: of tensors alone.
        capturer: of their device. The latest `MAX_GRAPHS` records are kept.
    """

    def __init__(self, function: Callable[..., Tensor], capturer: Capturer) -> None:
        self._function, self._capturer = function, capturer
        self._records: dict[Any, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        if not wanted(torch.device("cuda")):  # `graphs.disabled`
            return self._function(*arguments)
        key = tuple((x.shape, x.dtype) for x in arguments)
        # Taken out and put back: the oldest record comes first.
        record = self._records.pop(key, None) or self._record(arguments)
        self._records[key] = record
        while len(self._records) > MAX_GRAPHS:
            del self._records[next(iter(self._records))]
        inputs, output, replay = record
        for buffer, value in zip(inputs, arguments, strict=True):
            self._capturer.fill(buffer, value)
        replay()
        return output.clone()

    def _record(
        self, arguments: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], Tensor, Callable[[], None]]:
        inputs = [x.clone() for x in arguments]
        output = self._function(*inputs)  # compiles, and gives the shape of the result

        def body() -> None:
            output.copy_(self._function(*inputs))

        return inputs, output, self._capturer.capture([body])[0]
