"""DiT^DH, a diffusion transformer for high-dimensional latents (arXiv 2510.11690, sections 4, 5).

    model = DiTDH(768, 16, backbone=SIZES["XL"], wide_head=(2048, 2, 16), num_classes=1000)
    alpha = shift_alpha(num_tokens=256, latent_dim=768)
    loss = flow_loss(model, z, y, alpha).mean()  # z (B, N, C); y (B,), 10% of them null labels
    z = sample(model, noise, y, time_grid(50, alpha), cfg_scale=1.5)  # noise (B, N, C) -> (B, N, C)

A token of a representation encoder has hundreds of channels, and a transformer narrower than that
cannot predict the noise in it (Theorem 1). Wider still works better, but widening the whole DiT is
expensive. DiT^DH, a DiT with a DDT (decoupled diffusion transformer) head, instead feeds the noisy
latent to two networks: a deep, narrow backbone computes one conditioning vector per token, and a
shallow, wide head predicts the velocity from the noisy latent and these vectors.

Letters: B batch, N tokens, C latent channels, D width (D_head in the head), d head dim; z clean
latent, normalized; eps noise; t time from 0 (data) to 1 (noise); v velocity; y label. This file
needs only torch, so you can copy it anywhere. For bfloat16, use autocast and float32 parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Table 13: (width, depth, num_heads). The paper's DDT head has two blocks of G's width, 2048.
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "XXL": (1280, 32, 16),
    "H": (1536, 32, 16),
    "G": (2048, 40, 16),
    "T": (2688, 40, 21),
}

# ---------------------------------------------------------------------------------------------
# The model. Parameters have the names and shapes of the official checkpoints.


def sincos_2d(dim, grid_size):
    """2-D sin-cos positions (N, dim): the column's half first (in RoPE2d, the row's)."""
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (dim / 4,)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (grid, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column = axis.repeat(grid_size, 1)  # (N, dim / 2)
    row = axis.repeat_interleave(grid_size, dim=0)  # (N, dim / 2)
    return torch.cat([column, row], dim=1).float()


class TokenEmbedder(nn.Module):
    """Linear layer over tokens (B, N, C) -> (B, N, D), stored as the official 1x1 convolution."""

    def __init__(self, latent_dim, width):
        super().__init__()
        self.proj = nn.Conv2d(latent_dim, width, kernel_size=1)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Embed times t (B,) -> (B, D): random Fourier features, then a two-layer MLP."""

    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(torch.randn(256))
        self.mlp = nn.Sequential(
            nn.Linear(512, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, t):
        angle = 2 * math.pi * t[:, None].float() * self.W  # (B, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, D)


class LabelEmbedder(nn.Module):
    """Embed labels y (B,) -> (B, D). Label num_classes is the null label, for guidance."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class RoPE2d(nn.Module):
    """2-D rotary position embedding: rotate half of each head by the row, half by the column."""

    def __init__(self, head_dim, grid_size):
        super().__init__()
        half = head_dim // 2
        frequency = 10000.0 ** (-torch.arange(0, half, 2) / half)  # (half / 2,)
        frequency = frequency.repeat_interleave(2)  # neighboring channels share it: (half,)
        angle = torch.arange(grid_size)[:, None] * frequency  # (grid, half)
        row = angle.repeat_interleave(grid_size, dim=0)  # (N, half)
        column = angle.repeat(grid_size, 1)  # (N, half)
        angle = torch.cat([row, column], dim=1)  # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())  # saved, as in official checkpoints
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """Rotate x (..., N, head_dim): neighbors (a, b) become (a cos - b sin, b cos + a sin)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (..., N, head_dim / 2) each
        rotated = torch.stack([-b, a], dim=-1).flatten(-2)  # (..., N, head_dim)
        return x * self.freqs_cos + rotated * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention over x (B, N, D), with RoPE on queries and keys."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, num_heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, num_heads, N, d)
        q, k = rope(qkv[:2]).to(qkv.dtype)  # RoPE promotes to float32; cast back for autocast
        x = F.scaled_dot_product_attention(q, k, qkv[2])  # (B, num_heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """Gated MLP on x (B, N, D)."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)  # three matrices of 8/3 D^2 cost as much as two of 4 D^2
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def modulate(x, shift, scale):
    """Apply the shift and scale of adaLN (adaptive layer norm) to a normalized x."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Transformer block with adaLN: the condition c shifts, scales and gates both branches.

    x is (B, N, D). In the backbone c is (B, 1, D), one per image. In the head it is (B, N, D), one
    per token.
    """

    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)  # (B, N, D)
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, N, D)
        return x


class FinalLayer(nn.Module):
    """Project x (B, N, D), modulated by c (B, 1, D) or (B, N, D), to the velocity (B, N, C)."""

    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(nn.Module):
    """DiT^DH (section 5, Fig. 5), or the plain DiT if wide_head is None.

    latent_dim is C. grid_size is the side of the latent grid, so N = grid_size ** 2. backbone and
    wide_head are (width, depth, num_heads); 2-D RoPE needs a head dim that is a multiple of 4.
    Labels are 0 to num_classes - 1, plus the null label num_classes.
    """

    def __init__(self, latent_dim, grid_size, backbone, wide_head, num_classes):
        super().__init__()
        self.config = dict(
            latent_dim=latent_dim,
            grid_size=grid_size,
            backbone=backbone,
            wide_head=wide_head,
            num_classes=num_classes,
        )
        self.latent_dim = latent_dim
        self.grid_size = grid_size
        self.num_classes = num_classes
        self.has_wide_head = wide_head is not None
        self.checkpoint_activations = False  # True: recompute blocks in backward to save memory

        # Treat the plain DiT as one with a head of zero blocks, as wide as the backbone.
        width, depth, num_heads = backbone
        head_width, head_depth, head_num_heads = wide_head or (width, 0, num_heads)

        # In checkpoint names, s_ and enc_ stand for the backbone, x_ and dec_ for the head.
        # pos_embed and t_embedder.W are trained: the official model class freezes them, but the
        # official train.py then calls requires_grad_(True) on the whole model.
        self.pos_embed = nn.Parameter(sincos_2d(width, grid_size)[None])  # (1, N, D)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.x_embedder = TokenEmbedder(latent_dim, head_width)
        if self.has_wide_head:
            self.s_embedder = TokenEmbedder(latent_dim, width)
            self.s_projector = nn.Identity()
            if head_width != width:
                self.s_projector = nn.Linear(width, head_width)
            self.enc_feat_rope = RoPE2d(width // num_heads, grid_size)
            self.dec_feat_rope = RoPE2d(head_width // head_num_heads, grid_size)
        else:
            self.feat_rope = RoPE2d(width // num_heads, grid_size)

        self.backbone_depth = depth
        backbone_blocks = [Block(width, num_heads) for _ in range(depth)]
        head_blocks = [Block(head_width, head_num_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(backbone_blocks + head_blocks)
        self.final_layer = FinalLayer(head_width, latent_dim)
        self.initialize_weights()

    def initialize_weights(self):
        """Initialize like the official models, which start by predicting zero."""
        # As in the original DiT, all linear layers of the plain DiT are Xavier-uniform. In the
        # official DiT^DH, only the token embedders (Conv2d) are; the rest keeps PyTorch's default.
        for module in self.modules():
            plain_linear = isinstance(module, nn.Linear) and not self.has_wide_head
            if isinstance(module, nn.Conv2d) or plain_linear:
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        # adaLN-zero: all blocks start as the identity, and the model predicts v = 0.
        zeroed = [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for block in self.blocks:
            zeroed.append(block.adaLN_modulation[1])
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def run_blocks(self, blocks, x, c, rope):
        """Run x (B, N, D) through blocks that share one condition."""
        for block in blocks:
            if self.checkpoint_activations:
                # Blocks have no dropout, so there is no random state to preserve.
                x = checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, rope)
        return x

    def forward(self, x_t, t, y):
        """Noisy latents x_t (B, N, C), shifted times t (B,), labels y (B,) -> v (B, N, C)."""
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        c = t_emb + self.y_embedder(y)[:, None]  # (B, 1, D)

        if not self.has_wide_head:
            x = self.x_embedder(x_t) + self.pos_embed  # (B, N, D)
            x = self.run_blocks(self.blocks, x, c, self.feat_rope)  # (B, N, D)
            return self.final_layer(x, c)  # (B, N, C)

        # Backbone: turn the noisy latent into one condition s per token. SiLU acts on c here and
        # again inside each adaLN, and t_emb is added twice, as in the official models.
        backbone_blocks = self.blocks[: self.backbone_depth]
        s = self.s_embedder(x_t) + self.pos_embed  # (B, N, D)
        s = self.run_blocks(backbone_blocks, s, F.silu(c), self.enc_feat_rope)  # (B, N, D)
        s = self.s_projector(F.silu(s + t_emb))  # (B, N, D_head)

        # Head: predict the velocity from the noisy latent, conditioned on s. The head needs no
        # position embedding: s encodes positions, and RoPE adds relative positions in attention.
        head_blocks = self.blocks[self.backbone_depth :]
        x = self.x_embedder(x_t).float()  # a float32 residual stream; pos_embed does this for s
        x = self.run_blocks(head_blocks, x, s, self.dec_feat_rope)  # (B, N, D_head)
        return self.final_layer(x, s)  # (B, N, C)


# ---------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - t) z + t eps moves from data to noise with velocity v = eps - z.


def shift_alpha(num_tokens, latent_dim):
    """Schedule shift alpha = sqrt(N C / 4096) (section 4.2).

    Each of the N C values of a latent gets its own noise, but the values share information about
    the image. At the same t, more of the image therefore survives in a larger latent, and the shift
    moves t toward noise to compensate. (Clamping alpha to at least 1 is our choice.)
    """
    return max(1.0, math.sqrt(num_tokens * latent_dim / 4096))


def shift_time(t, alpha):
    """t' = alpha t / (1 + (alpha - 1) t) (section 4.2)."""
    return alpha * t / (1 + (alpha - 1) * t)


def draw_time(n, dist="logit-normal", generator=None, device=None):
    """Draw n training times (n,), before the shift.

    "logit-normal" is the sigmoid of a standard normal, as in the official training configs.
    "uniform" is U(0, 0.999), as in the first release.
    """
    if dist == "uniform":
        return 0.999 * torch.rand(n, generator=generator, device=device)
    return torch.randn(n, generator=generator, device=device).sigmoid()


def flow_loss(model, z, y, alpha, t=None, eps=None):
    """Flow-matching loss (appendix J) per image (B,): the mean of (v_hat - v)^2.

    z (B, N, C) are clean latents and y (B,) labels; for classifier-free guidance, the caller
    replaces some labels by the null label. If omitted, t (B,), before the shift, comes from
    draw_time, and eps (B, N, C) from randn.
    """
    if t is None:
        t = draw_time(len(z), device=z.device)
    if eps is None:
        eps = torch.randn_like(z)
    t = shift_time(t, alpha)[:, None, None]  # (B, 1, 1)
    x_t = (1 - t) * z + t * eps  # (B, N, C)
    v = eps - z  # (B, N, C)
    v_hat = model(x_t, t.flatten(), y).float()  # (B, N, C)
    return (v_hat - v).square().mean(dim=(1, 2))  # (B,)


def time_grid(steps, alpha, t_last=0.0):
    """Timesteps (steps + 1,) for `sample`: evenly spaced from 1 to t_last, then shifted.

    The official code counts grid points instead of steps and stops before 0: its "50 steps" are
    time_grid(49, alpha, t_last=0.001).
    """
    t = torch.linspace(1, t_last, steps + 1, dtype=torch.float64)
    return shift_time(t, alpha).float()


@torch.no_grad()
def sample(
    model,
    noise,
    y,
    timesteps,
    cfg_scale=1.0,
    guidance_model=None,
    guidance_scale=1.5,
    interval=(0.0, 1.0),
):
    """Integrate dx/dt = v by Euler steps: noise (B, N, C) at timesteps[0] -> latents (B, N, C).

    Both kinds of guidance (section 5.1, appendix I) push v away from a worse prediction:

        classifier-free:    v = v_null + cfg_scale (v - v_null)
        AutoGuidance:       v = v_weak + guidance_scale (v - v_weak)

    v_null is the prediction for the null label, v_weak that of guidance_model, which is smaller or
    less trained. A scale of 1 disables guidance. Guidance applies only at (shifted) timesteps
    inside `interval`. Requesting both kinds raises ValueError.
    """
    use_cfg = cfg_scale != 1.0
    use_autoguidance = guidance_model is not None and guidance_scale != 1.0
    if use_cfg and use_autoguidance:
        raise ValueError("use either cfg_scale or guidance_model, not both")

    x = noise  # (B, N, C)
    for t_now, t_next in zip(timesteps[:-1].tolist(), timesteps[1:].tolist()):
        t = torch.full((len(x),), t_now, device=x.device)  # (B,)
        in_interval = interval[0] <= t_now <= interval[1]
        if use_cfg and in_interval:
            # One call on a doubled batch is faster than two calls.
            y_null = torch.full_like(y, model.num_classes)  # (B,)
            both = model(x.repeat(2, 1, 1), t.repeat(2), torch.cat([y, y_null])).float()
            v, v_null = both.chunk(2)
            v = v_null + cfg_scale * (v - v_null)
        elif use_autoguidance and in_interval:
            v_weak = guidance_model(x, t, y).float()
            v = v_weak + guidance_scale * (model(x, t, y).float() - v_weak)
        else:
            v = model(x, t, y).float()
        x = x + (t_next - t_now) * v  # (B, N, C)
    return x


# ---------------------------------------------------------------------------------------------
# Checkpoints


def load_dit(file):
    """Build a DiTDH in eval mode and load its (EMA) weights.

    file is a path or a loaded dict: a checkpoint of train_diffusion.py, with "ema" and "config", or
    an official state dict, whose sizes are read from tensor shapes. torch's RuntimeError names
    tensors that are missing, unexpected or of a wrong shape.
    """
    if not isinstance(file, dict):
        file = torch.load(file, map_location="cpu", weights_only=True)
    state = file.get("ema") or file
    # Drop the prefixes of DDP and of torch.compile.
    state = {k.replace("module.", "").replace("_orig_mod.", ""): w for k, w in state.items()}
    config = file.get("config") or {}
    model = DiTDH(**(config if "latent_dim" in config else read_config(state)))
    model.load_state_dict(state)
    return model.eval()


def read_config(state):
    """The arguments of DiTDH for an official state dict. KeyError names a missing tensor."""
    width = state["pos_embed"].shape[2]
    head_width = state["final_layer.linear.weight"].shape[1]
    block_widths = [w.shape[0] for name, w in state.items() if name.endswith(".norm1.weight")]
    depth = len(block_widths)
    wide_head = None
    rope_table = "feat_rope.freqs_cos"  # (N, head_dim)
    if "s_embedder.proj.weight" in state:
        # Shapes can't tell the backbone from a head of equal width. Official heads have two blocks.
        head_depth = block_widths.count(head_width) if head_width != width else 2
        head_dim = state["dec_feat_rope.freqs_cos"].shape[1]
        wide_head = (head_width, head_depth, head_width // head_dim)
        depth -= head_depth
        rope_table = "enc_feat_rope.freqs_cos"
    return dict(
        latent_dim=state["final_layer.linear.bias"].shape[0],
        grid_size=math.isqrt(state["pos_embed"].shape[1]),
        backbone=(width, depth, width // state[rope_table].shape[1]),
        wide_head=wide_head,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )
