"""DiT^DH and its flow, the diffusion side of an RAE (arXiv 2510.11690, sections 4, 5); letters as in rae.py.

    model = DiTDH(latent_dim=64, grid=4, width=(96, 128), depth=(4, 2), heads=(3, 4), num_classes=10)
    loss = flow_loss(model, z, y, alpha=shift_alpha(16, 64)).mean()                   # z (B, N, C), y (B,)
    z = sample(model, noise, y, time_grid(50, alpha=1.0), cfg=1.5)                    # (B, N, C)

A latent token has hundreds of channels, and a transformer narrower than that cannot predict its noise
(Theorem 1). DiT^DH therefore reads the noisy latent twice: a deep, narrow backbone turns it into one
condition per token, and a shallow head at least as wide as the token turns that into the velocity.
"""

import math
from functools import partial
from statistics import mode
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Table 13 of the paper: (width, depth, heads). DiT^DH's head takes its width and heads from here too, from G.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16),
         "XXL": (1280, 32, 16), "H": (1536, 32, 16), "G": (2048, 40, 16), "T": (2688, 40, 21)}

# -------------------------------------------------------------------------------------------------- the model
def sincos_2d(dim, grid):
    """2-D sin-cos positions (N, dim): first half of the channels for the column, second for the row."""
    freq = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freq                   # (grid, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                               # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1).float()

class TokenLinear(nn.Conv2d):
    """Linear map of tokens (B, N, C) -> (B, N, D), stored as a 1x1 convolution, as in the released files."""
    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)

class Rope(nn.Module):
    """2-D rotary positions: the first half of each head turns with the row, the second with the column."""
    def __init__(self, head_dim, grid):
        super().__init__()
        half = head_dim // 2
        freq = 10000.0 ** (-torch.arange(0, half, 2) / half)
        angle = torch.arange(grid)[:, None] * freq.repeat_interleave(2)            # (grid, half), equal pairs
        angle = torch.cat([angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)], dim=1)  # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())
    def forward(self, x):
        """x (..., N, head_dim); neighbouring channels (a, b) become (a cos - b sin, b cos + a sin)."""
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                       # (b, a)
        sign = torch.tensor([-1.0, 1.0], device=x.device).repeat(x.shape[-1] // 2)
        return torch.addcmul(x * self.freqs_cos, swapped, self.freqs_sin * sign)

class Attention(nn.Module):
    """Attention over x (B, N, D) whose queries and keys are turned by a Rope."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (3, B, heads, N, d)
        (q, k), v = rope(qkv[:2]).to(qkv.dtype), qkv[2]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))                                # (B, N, D)

class SwiGLU(nn.Module):
    """Gated MLP on x (B, N, D)."""
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)                # three matrices with the cost of a usual MLP's two
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)

def modulate(x, shift, scale):
    return x * (1 + scale) + shift

def modulation(width, n):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))

class Block(nn.Module):
    """Block with adaptive norms; the condition c is (B, 1, D) in the backbone, (B, N, D) in the head."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = modulation(width, 6)
    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)      # (B, N, D)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))          # (B, N, D)

class TimeEmbedder(nn.Module):
    """t (B,) -> (B, D) by 256 random frequencies and a small MLP."""
    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(torch.randn(256))           # trainable, like pos_embed, as in the released code
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))
    def forward(self, t):
        angle = 2 * math.pi * t[:, None].float() * self.W                             # (B, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))

class FinalLayer(nn.Module):
    """x (B, N, D) under c (B, 1 or N, D) -> velocity (B, N, C)."""
    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = modulation(width, 2)
    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                # (B, N, C)

class DiTDH(nn.Module):
    """DiT^DH (section 5, Fig. 5) or, with a head depth of 0, the plain DiT; released parameter names.
    latent_dim is C, grid the latent's side (N = grid * grid); width, depth and heads are pairs (backbone,
    head). Labels run from 0 to num_classes - 1, and num_classes is the null label."""
    def __init__(self, latent_dim, grid, width, depth, heads, num_classes):
        super().__init__()
        for w, h in list(zip(width, heads))[:2 if depth[1] else 1]:
            if w % h or w // h % 4:
                raise ValueError(f"width {w} with {h} heads: each head needs a multiple of 4 channels")
        self.config = dict(latent_dim=latent_dim, grid=grid, width=tuple(width), depth=tuple(depth),
                           heads=tuple(heads), num_classes=num_classes)
        self.latent_dim, self.grid, self.depth, self.num_classes = latent_dim, grid, tuple(depth), num_classes
        wide, last = (width[1], heads[1]) if depth[1] else (width[0], heads[0])
        self.pos_embed = nn.Parameter(sincos_2d(width[0], grid)[None])                # (1, N, D)
        self.x_embedder = nn.ModuleDict({"proj": TokenLinear(latent_dim, wide, 1)})
        self.t_embedder = TimeEmbedder(width[0])
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width[0])})
        if depth[1]:
            self.s_embedder = nn.ModuleDict({"proj": TokenLinear(latent_dim, width[0], 1)})
            self.s_projector = nn.Linear(width[0], wide) if wide != width[0] else nn.Identity()
            self.enc_feat_rope = Rope(width[0] // heads[0], grid)
            self.dec_feat_rope = Rope(wide // last, grid)
        else:
            self.feat_rope = Rope(width[0] // heads[0], grid)
        self.blocks = nn.ModuleList([Block(width[0], heads[0]) for _ in range(depth[0])]
                                    + [Block(wide, last) for _ in range(depth[1])])
        self.final_layer = FinalLayer(wide, latent_dim)
        self.checkpoint_activations = False            # True: blocks run again in the backward pass
        self.initialize()
    def initialize(self):
        """The released initialisation: every block starts as the identity and the velocity as zero."""
        for m in self.modules():
            if isinstance(m, TokenLinear) or isinstance(m, nn.Linear) and not self.depth[1]:
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for m in self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]:
            nn.init.normal_(m.weight, std=0.02)
        last = self.final_layer
        for m in (*(block.adaLN_modulation[1] for block in (*self.blocks, last)), last.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
    def forward(self, x_t, t, y):
        """x_t (B, N, C), t (B,) in [0, 1] after the shift, y (B,) int -> velocity v (B, N, C)."""
        blocks = [partial(checkpoint, block, use_reentrant=False) if self.checkpoint_activations else block
                  for block in self.blocks]
        t = self.t_embedder(t)[:, None]                                               # (B, 1, D)
        c = t + self.y_embedder["embedding_table"](y)[:, None]                        # (B, 1, D)
        if not self.depth[1]:
            x = self.x_embedder["proj"](x_t).float() + self.pos_embed                 # (B, N, D)
            for block in blocks:
                x = block(x, c, self.feat_rope)                                       # (B, N, D)
            return self.final_layer(x, c)                                             # (B, N, C)
        c = F.silu(c)                                  # residual streams stay float32 under autocast
        s = self.s_embedder["proj"](x_t).float() + self.pos_embed                     # (B, N, D)
        for block in blocks[:self.depth[0]]:
            s = block(s, c, self.enc_feat_rope)                                       # (B, N, D)
        s = self.s_projector(F.silu(s + t))                                           # (B, N, D_head)
        x = self.x_embedder["proj"](x_t).float()                                # (B, N, D_head), no positions
        for block in blocks[self.depth[0]:]:
            x = block(x, s, self.dec_feat_rope)                                       # (B, N, D_head)
        return self.final_layer(x, s)                                                 # (B, N, C)

# --------------------------------------------------------------------------------------------------- the flow
def shift_alpha(num_tokens, channels):
    """alpha = sqrt(N C / 4096), at least 1: more dimensions need more noise to hide an image (4.2)."""
    return max(1.0, math.sqrt(num_tokens * channels / 4096))

def shift_time(t, alpha):
    """t' = alpha t / (1 + (alpha - 1) t), section 4.2; keeps 0 and 1, moves all between towards the noise."""
    return alpha * t / (1 + (alpha - 1) * t)

def draw_time(u, dist="logit-normal"):
    """Training times from uniform u (B,), before the shift: logit-normal(0, 1) or uniform, <= 0.999."""
    if dist == "uniform":
        return 0.999 * u
    return torch.special.ndtri(u).sigmoid().clamp(max=0.999)

def time_grid(steps, alpha, t_last=0.0, t_first=1.0):
    """Times of a sampler of `steps` evaluations: steps + 1 points from t_first to t_last, shifted by alpha.
    Both are meant before the shift; steps=49, t_last=0.001 is the released code's "50 steps"."""
    t = t_first - torch.linspace(0, t_first - t_last, steps + 1, dtype=torch.float64)
    return shift_time(t, alpha).float()

def flow_loss(model, z, y, alpha, t=None, noise=None):
    """Squared error of the velocity, one mean per sample (B,) (appendix J), of latents z (B, N, C), labels y.
    t (B,), before the shift, and noise (B, N, C) are drawn here unless given."""
    t = draw_time(torch.rand(len(z), device=z.device)) if t is None else t
    noise = torch.randn_like(z) if noise is None else noise
    t = shift_time(t, alpha)
    x_t = (1 - t[:, None, None]) * z + t[:, None, None] * noise                       # (B, N, C)
    v = noise - z                                                                     # (B, N, C)
    return (model(x_t, t, y).float() - v).square().mean(dim=(1, 2))                   # (B,)

@torch.no_grad()
def sample(model, noise, y, grid, cfg=1.0, guide=None, scale=1.0, interval=(0.0, 1.0)):
    """Euler from noise (B, N, C) at grid[0] to a latent (B, N, C) at grid[-1], under labels y (B,).
    cfg: v = v_null + cfg (v - v_null). guide, scale: AutoGuidance, v = v_weak + scale (v - v_weak), v_weak
    from a smaller or less trained model. Either acts for t within interval only (section 5.1, appendix I)."""
    if cfg != 1 and guide is not None:
        raise ValueError("cfg and guide exclude each other: leave cfg at 1 or drop the guide")
    low, high = torch.tensor(interval, dtype=grid.dtype).tolist()                     # rounded like the grid
    x, null = noise, torch.full_like(y, model.num_classes)
    for now, after in zip(grid[:-1].tolist(), grid[1:].tolist()):
        t = torch.full((len(x),), now, device=x.device)
        guided = low <= now <= high
        if guided and cfg != 1:
            v, v_null = model(x.repeat(2, 1, 1), t.repeat(2), torch.cat([y, null])).float().chunk(2)
            v = v_null + cfg * (v - v_null)
        else:
            v = model(x, t, y).float()                                                # (B, N, C)
            if guided and guide is not None and scale != 1:
                v_weak = guide(x, t, y).float()
                v = v_weak + scale * (v - v_weak)
        x = x + (after - now) * v
    return x

# --------------------------------------------------------------------------------------------------- the file
def load_released(state_dict_or_path, heads=None, head_depth=2, where="state dict"):
    """DiTDH or plain DiT from a state dict in the released names, a file of one or a checkpoint of ours, with
    what else that holds as `about`. Sizes are the shapes', heads (a pair or a number) the tables' or a known
    width's; of equal widths the head's depth is the file's or head_depth. ValueError names the tensor."""
    file = state_dict_or_path
    if not isinstance(file, dict):
        file, where = torch.load(file, map_location="cpu", weights_only=True), str(file)
    state = file.get("ema", file)
    if "decoder_embed.weight" in state:
        raise ValueError(f"{where}: this is an RAE decoder, not a diffusion model; pass it as --decoder")
    def size(axis, *names):
        """What most tensors of these names say, so that one wrong tensor is the one that is named."""
        votes = [v.shape[axis] for k, v in state.items() if k.endswith(names) and v.ndim > max(axis, 0)]
        if not votes:
            raise ValueError(f"{where}: not a diffusion model, tensor {names[0]} is missing")
        return mode(votes)
    wide = any(key.startswith(("s_embedder.", "s_projector.", "dec_feat_rope.")) for key in state)
    width = (size(-1, "t_embedder.mlp.2.weight", "embedding_table.weight", "pos_embed"),
             size(-1, "final_layer.linear.weight", "norm_final.weight", "layer.adaLN_modulation.1.weight"))
    count = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    depth = count - file.get("config", {}).get("depth", (0, head_depth))[1] * wide
    if width[0] != width[1]:
        depth = sum(size(-1, *(f"blocks.{i}.{name}.weight" for name in ("norm1", "norm2", "attn.proj")))
                    == width[0] for i in range(count))
    ropes = ("enc_feat_rope", "dec_feat_rope") if wide else ("feat_rope", "feat_rope")
    tables = any("feat_rope." in key for key in state)
    if heads is None and tables:
        dims = [size(1, f"{rope}.freqs_cos", f"{rope}.freqs_sin") for rope in ropes]
        heads = [None if w % dim else w // dim for w, dim in zip(width, dims)]
    elif heads is None:
        heads = [{w: h for w, _, h in SIZES.values()}.get(w) for w in width]
    heads = (heads, heads) if isinstance(heads, int) else heads
    if None in heads:
        raise ValueError(f"{where}: {ropes[0]}.freqs_cos or {ropes[1]}.freqs_cos is missing or does not fit "
                         f"the widths {width}; pass heads")
    channels, n = size(0, "final_layer.linear.bias", "final_layer.linear.weight"), size(1, "pos_embed")
    classes = size(0, "y_embedder.embedding_table.weight") - 1
    model = DiTDH(channels, math.isqrt(n), width, (depth, count - depth), heads, classes)
    if not tables:
        state = state | {k: v for k, v in model.state_dict().items() if "feat_rope." in k}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{where}: {' '.join(str(e).split())}") from None
    model.about = {k: v for k, v in file.items() if "ema" in file and k not in ("ema", "model", "optimizer")}
    return model.eval()
