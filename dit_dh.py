"""DiT^DH and its flow: the diffusion side of an RAE (arXiv 2510.11690, sections 4 and 5).

    model = DiTDH(128, 4, backbone=(96, 5, 3), wide_head=(192, 1, 4), num_classes=10)
    alpha = shift_alpha(num_tokens=256, latent_dim=768)
    loss = flow_loss(model, z, y, alpha).mean()  # z (B, N, C), y (B,)
    z = sample(model, noise, y, time_grid(50, alpha), cfg_scale=1.5)  # noise (B, N, C) -> (B, N, C)

A token of a representation encoder has hundreds of channels, and a transformer narrower than that
cannot predict the noise in it (Theorem 1). DiT^DH (with a wide DDT head) therefore reads the noisy
latent twice: a deep, narrow backbone turns it into one condition per token, and a shallow head, at
least as wide as a token, turns the latent into the velocity under that condition.

Letters: B batch, N tokens, C latent channels, D width, d channels of an attention head; z latent,
y label, t time from 0 (data) to 1 (noise), v velocity. The file imports nothing of ours, so that
it can be copied out.
"""

import math
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Table 13: (width, depth, num_heads). The published heads have the width of G: (2048, 2, 16).
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
# The model. Its parameters have the names and shapes of the released checkpoints.


def sincos_2d(dim, grid_size):
    """2-D sin-cos positions (N, dim). Half of the channels encode the column, half the row."""
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (dim / 4,)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (grid, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column = axis.repeat(grid_size, 1)  # (N, dim / 2)
    row = axis.repeat_interleave(grid_size, dim=0)  # (N, dim / 2)
    return torch.cat([column, row], dim=1).float()


class TokenEmbedder(nn.Module):
    """A linear map of tokens (B, N, C) -> (B, N, D), stored as the released 1x1 convolution."""

    def __init__(self, latent_dim, width):
        super().__init__()
        self.proj = nn.Conv2d(latent_dim, width, kernel_size=1)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Times t (B,) -> (B, D): sin and cos at 256 random frequencies, a small MLP."""

    def __init__(self, width):
        super().__init__()
        # Trained, as in the released code: a checkpoint's frequencies are not its random start.
        self.W = nn.Parameter(torch.randn(256))
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 2 * math.pi * t[:, None].float() * self.W  # (B, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, D)


class LabelEmbedder(nn.Module):
    """Labels y (B,) -> (B, D). The last row, number num_classes, is the null label of guidance."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class Rope(nn.Module):
    """2-D rotary positions: half of each head turns with the row, then half with the column.

    (The other order than sincos_2d's; both as released.)
    """

    def __init__(self, head_dim, grid_size):
        super().__init__()
        half = head_dim // 2
        frequency = 10000.0 ** (-torch.arange(0, half, 2) / half)  # (half / 2,)
        frequency = frequency.repeat_interleave(2)  # a pair of channels turns together: (half,)
        angle = torch.arange(grid_size)[:, None] * frequency  # (grid, half)
        row = angle.repeat_interleave(grid_size, dim=0)  # (N, half)
        column = angle.repeat(grid_size, 1)  # (N, half)
        angle = torch.cat([row, column], dim=1)  # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """Turn x (..., N, head_dim): neighbours (a, b) become (a cos - b sin, b cos + a sin)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (..., N, head_dim / 2) each
        turned = torch.stack([-b, a], dim=-1).flatten(-2)  # (..., N, head_dim)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Self-attention over x (B, N, D), with rotary positions on queries and keys."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, num_heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, num_heads, N, d)
        q, k = rope(qkv[:2]).to(qkv.dtype)  # the float32 tables would undo autocast's bfloat16
        x = F.scaled_dot_product_attention(q, k, qkv[2])  # (B, num_heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """A gated MLP on x (B, N, D)."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)  # three matrices of 8/3 D cost as much as two of 4 D
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def modulate(x, shift, scale):
    """What adaLN does to a normed x."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block whose norms are modulated and whose branches are gated by a condition c.

    x is (B, N, D). In the backbone c is (B, 1, D), one for the image; in the head it is (B, N, D),
    one per token.
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
    """x (B, N, D) under c (B, 1, D) or (B, N, D) -> the velocity (B, N, C)."""

    def __init__(self, width, latent_dim):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, latent_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(nn.Module):
    """DiT^DH (section 5, Fig. 5), or the plain DiT where wide_head is None.

    latent_dim is C and grid_size the latent's side, so N = grid_size ** 2. backbone and wide_head
    are (width, depth, num_heads) each. Labels are 0 to num_classes - 1; num_classes is the null
    label.

    predict says what the last layer gives: the velocity "v", or the clean latent "x" (as in JiT, Li
    and He 2025), from which the velocity follows. The model returns the velocity either way.
    """

    def __init__(self, latent_dim, grid_size, backbone, wide_head, num_classes, predict="v"):
        super().__init__()
        for size in (backbone, wide_head):
            if size is not None and size[0] % (4 * size[2]) != 0:
                raise ValueError(
                    f"width {size[0]} with {size[2]} heads: a head wants a multiple of 4 channels"
                )
        self.config = dict(
            latent_dim=latent_dim,
            grid_size=grid_size,
            backbone=backbone,
            wide_head=wide_head,
            num_classes=num_classes,
            predict=predict,
        )
        self.latent_dim = latent_dim
        self.grid_size = grid_size
        self.num_classes = num_classes
        self.has_wide_head = wide_head is not None
        self.predict = predict

        # A plain DiT is built as one whose head, as wide as the backbone, has no blocks.
        width, depth, num_heads = backbone
        head_width, head_depth, head_num_heads = wide_head or (width, 0, num_heads)

        # The names are the checkpoints': s and enc mean the backbone, x and dec the head. The
        # positions are trained, as in the released code; they only start as sin and cos.
        self.pos_embed = nn.Parameter(sincos_2d(width, grid_size)[None])  # (1, N, D)
        self.x_embedder = TokenEmbedder(latent_dim, head_width)  # the only one of a plain DiT
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        if self.has_wide_head:
            self.s_embedder = TokenEmbedder(latent_dim, width)
            if head_width == width:
                self.s_projector = nn.Identity()
            else:
                self.s_projector = nn.Linear(width, head_width)
            self.enc_feat_rope = Rope(width // num_heads, grid_size)
            self.dec_feat_rope = Rope(head_width // head_num_heads, grid_size)
        else:
            self.feat_rope = Rope(width // num_heads, grid_size)

        backbone_blocks = [Block(width, num_heads) for _ in range(depth)]
        head_blocks = [Block(head_width, head_num_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(backbone_blocks + head_blocks)
        self.backbone_depth = depth
        self.final_layer = FinalLayer(head_width, latent_dim)
        self.checkpoint_activations = False  # True: blocks run again in the backward pass
        self.initialize()

    def initialize(self):
        """Start as the released models do: every block is the identity and the velocity is zero."""
        # The released plain DiT draws all its matrices Xavier-uniform, as the original DiT does. In
        # DiT^DH only the two token embedders (Conv2d) are; other matrices keep torch's default.
        for module in self.modules():
            plain_linear = isinstance(module, nn.Linear) and not self.has_wide_head
            if isinstance(module, nn.Conv2d) or plain_linear:
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        # Gates of zero close every branch. A last layer of zero predicts the velocity's mean, 0.
        zeroed = [layer.adaLN_modulation[1] for layer in [*self.blocks, self.final_layer]]
        for linear in [*zeroed, self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def run_blocks(self, blocks, x, c, rope):
        for block in blocks:
            if self.checkpoint_activations:
                # Nothing random happens in a block: no random state is to be kept for it.
                x = checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, rope)
        return x

    def forward(self, x_t, t, y):
        """x_t (B, N, C), t (B,) after the shift, labels y (B,) -> the velocity v (B, N, C).

        The condition c is the time's embedding plus the label's. The plain DiT:

            x = x_embedder(x_t) + pos_embed     through blocks (feat_rope) and final layer, under c

        With a head (section 5):

            h = s_embedder(x_t) + pos_embed     through the backbone (enc_feat_rope), under SiLU(c)
            s = s_projector(SiLU(h + t_emb))    one condition for each token
            x = x_embedder(x_t), as float32     through the head's blocks (dec_feat_rope) and final
                                                layer, under s

        What the final layer gives becomes the velocity in self.velocity.
        """
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        c = t_emb + self.y_embedder(y)[:, None]  # (B, 1, D)

        # The plain DiT.
        if not self.has_wide_head:
            x = self.x_embedder(x_t) + self.pos_embed  # (B, N, D)
            x = self.run_blocks(self.blocks, x, c, self.feat_rope)  # (B, N, D)
            return self.velocity(self.final_layer(x, c), x_t, t)  # (B, N, C)

        # The backbone: the noisy latent becomes one condition s per token. The released model
        # applies SiLU to c here, besides the one inside every block's modulation, and at the end
        # adds the time once more, without the label: both were trained so.
        backbone_blocks = self.blocks[: self.backbone_depth]
        h = self.s_embedder(x_t) + self.pos_embed  # (B, N, D)
        h = self.run_blocks(backbone_blocks, h, F.silu(c), self.enc_feat_rope)  # (B, N, D)
        s = self.s_projector(F.silu(h + t_emb))  # (B, N, D_head)

        # The head: the noisy latent once more, at full width, becomes the velocity. Beside the
        # rotary positions it needs no others, since s, which differs from token to token, carries
        # them.
        head_blocks = self.blocks[self.backbone_depth :]
        x = self.x_embedder(x_t)  # (B, N, D_head)
        # Autocast leaves x in bfloat16, where the residual stream would lose small branches.
        # (Above, adding the float32 positions has made it float32.)
        x = x.float()
        x = self.run_blocks(head_blocks, x, s, self.dec_feat_rope)  # (B, N, D_head)
        return self.velocity(self.final_layer(x, s), x_t, t)  # (B, N, C)

    def velocity(self, output, x_t, t):
        """The velocity (B, N, C) that the last layer's output (B, N, C) means."""
        if self.predict == "v":
            return output
        # x_t = (1 - t) z + t eps, so that v = eps - z = (x_t - z) / t. Near t = 0 an error of the
        # predicted z would be divided by nothing, hence the bound. The noise in v now comes from
        # x_t: the network needs no width to carry it.
        return (x_t - output) / t.clamp(min=0.05)[:, None, None]


# ---------------------------------------------------------------------------------------------
# The flow: x_t = (1 - t) z + t eps runs from data to noise, and v = eps - z is its velocity.


def shift_alpha(num_tokens, latent_dim):
    """The schedule shift alpha = sqrt(N C / 4096) (section 4.2), but never below 1, which is ours.

    The noise is independent in each of the N C numbers, while the image shows in many of them
    together: the larger the latent, the less the same t hides of it. The shift makes up for that.
    4,096 numbers are the size that the paper measures from.
    """
    return max(1.0, math.sqrt(num_tokens * latent_dim / 4096))


def shift_time(t, alpha):
    """t' = alpha t / (1 + (alpha - 1) t) (section 4.2): 0 and 1 stay, the rest gets noisier."""
    return alpha * t / (1 + (alpha - 1) * t)


def draw_time(u, dist="logit-normal"):
    """Training times (B,) before the shift, from uniform numbers u (B,).

    "logit-normal", the sigmoid of a standard normal clamped to 0.999, is the later release's;
    "uniform", 0.999 u, the first's. Sampling, which begins at 1, hardly extrapolates.
    """
    if dist == "uniform":
        return 0.999 * u
    normal = torch.special.ndtri(u)  # the inverse of the normal distribution function
    return normal.sigmoid().clamp(max=0.999)


def time_grid(steps, alpha, t_last=0.0, t_first=1.0):
    """The sampler's times (steps + 1,): evenly spaced from t_first down to t_last, then shifted.

    The model is evaluated at all but the last. The release counts points, not evaluations, and
    stops short of 0: its "50 steps" are steps=49, t_last=0.001.
    """
    t = t_first - torch.linspace(0, t_first - t_last, steps + 1, dtype=torch.float64)
    return shift_time(t, alpha).float()


def flow_loss(model, z, y, alpha, t=None, noise=None):
    """Flow matching's squared error (appendix J), one mean per sample (B,).

    z (B, N, C) are latents and y (B,) labels, some of them replaced by the null label if the model
    is to learn that. t (B,), before the shift by alpha, and noise (B, N, C) are drawn unless
    given. The model gets the time after the shift.
    """
    if t is None:
        t = draw_time(torch.rand(len(z), device=z.device))
    if noise is None:
        noise = torch.randn_like(z)
    t = shift_time(t, alpha)
    x_t = (1 - t[:, None, None]) * z + t[:, None, None] * noise  # (B, N, C)
    v = noise - z  # (B, N, C)
    v_hat = model(x_t, t, y).float()  # (B, N, C)
    return (v_hat - v).square().mean(dim=(1, 2))  # (B,)


@torch.no_grad()
def sample(
    model, noise, y, timesteps, cfg_scale=1.0, guide=None, guide_scale=1.0, interval=(0.0, 1.0)
):
    """Euler steps along v: noise (B, N, C) at timesteps[0] -> a latent (B, N, C) at timesteps[-1].

    timesteps are those of time_grid, on any device; y (B,) are labels. Two kinds of guidance
    (section 5.1, appendix I) move v further away from what a worse model predicts. A scale of 1 is
    none, and costs nothing. Both act only at times within `interval`, its ends included, after the
    shift like timesteps and compared in their dtype. To ask for both, at scales other than 1, is a
    ValueError:

        v = v_null + cfg_scale (v - v_null)      v_null is v under the label model.num_classes
        v = v_weak + guide_scale (v - v_weak)    v_weak is v of `guide`, a smaller or less trained
                                                 model (AutoGuidance)
    """
    use_cfg = cfg_scale != 1.0
    use_guide = guide is not None and guide_scale != 1.0
    if use_cfg and use_guide:
        raise ValueError(
            "cfg_scale and guide exclude each other: leave cfg_scale at 1 or drop the guide"
        )
    # The ends as float32, like the times, so that a time can be equal to an end.
    low, high = torch.tensor(interval, dtype=timesteps.dtype).tolist()
    y_null = torch.full_like(y, model.num_classes)  # (B,)

    x = noise  # (B, N, C)
    for t_now, t_next in zip(timesteps[:-1].tolist(), timesteps[1:].tolist()):
        t = torch.full((len(x),), t_now, device=x.device)  # (B,)
        within = low <= t_now <= high
        if use_cfg and within:
            # One call for both velocities is faster than two.
            both = model(x.repeat(2, 1, 1), t.repeat(2), torch.cat([y, y_null])).float()
            v, v_null = both.chunk(2)
            v = v_null + cfg_scale * (v - v_null)
        elif use_guide and within:
            v_weak = guide(x, t, y).float()
            v = v_weak + guide_scale * (model(x, t, y).float() - v_weak)
        else:
            v = model(x, t, y).float()
        x = x + (t_next - t_now) * v  # (B, N, C)
    return x


# ---------------------------------------------------------------------------------------------
# The file


def load_released(x, num_heads=None, where="state dict"):
    """A DiTDH, plain or with a head, in eval mode from x: a file, a state dict or a checkpoint.

    A state dict in the released names has its sizes in its tensors' shapes; num_heads, a pair for
    backbone and head, is needed only where it lacks the rotary tables. A checkpoint of ours holds
    one under "ema", and the sizes under "config". `where` names x in errors: a ValueError says
    which tensor is missing, misshapen or unexpected.
    """
    if not isinstance(x, dict):
        where = str(x)
        x = torch.load(x, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(x))
    state = x.get("ema", x)
    if "decoder_embed.weight" in state:
        raise ValueError(
            f"{where}: this is an RAE decoder, not a diffusion model; pass it as --decoder"
        )
    try:
        config = x.get("config") or released_config(state, num_heads)
    except KeyError as error:
        missing = error.args[0]
        hint = "; pass num_heads" if "rope" in missing else ""
        raise ValueError(
            f"{where}: not a diffusion model, tensor {missing} is missing{hint}"
        ) from None
    model = DiTDH(**config)
    if num_heads is not None:
        # The tables follow from the sizes, so the fresh model's stand in for missing ones.
        tables = {name: t for name, t in model.state_dict().items() if "feat_rope." in name}
        state = tables | state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    return model.eval()


def released_config(state, num_heads=None):
    """The arguments of DiTDH, read from shapes of single tensors; KeyError names a missing one."""
    has_wide_head = any(key.startswith("s_embedder.") for key in state)
    backbone_rope = "enc_feat_rope.freqs_cos" if has_wide_head else "feat_rope.freqs_cos"
    width = state["pos_embed"].shape[2]
    head_width = state["final_layer.norm_final.weight"].shape[0]
    if num_heads is None:
        # A rotary table is (N, head_dim).
        num_heads = [width // state[backbone_rope].shape[1]]
        if has_wide_head:
            num_heads.append(head_width // state["dec_feat_rope.freqs_cos"].shape[1])

    # Blocks as wide as the backbone are its own. Where the head is equally wide its depth cannot be
    # seen, and is taken for two: every released head has two blocks.
    numbers = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    num_blocks = 1 + max(numbers, default=0)
    if not has_wide_head:
        depth = num_blocks
    elif head_width == width:
        depth = num_blocks - 2
    else:
        widths = [state[f"blocks.{i}.norm1.weight"].shape[0] for i in range(num_blocks)]
        depth = widths.count(width)

    wide_head = None
    if has_wide_head:
        wide_head = (head_width, num_blocks - depth, num_heads[1])
    return dict(
        latent_dim=state["final_layer.linear.bias"].shape[0],
        grid_size=math.isqrt(state["pos_embed"].shape[1]),
        backbone=(width, depth, num_heads[0]),
        wide_head=wide_head,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )
