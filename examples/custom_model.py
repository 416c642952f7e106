"""A language model of one's own from `liger.nn` and `liger.ops`, trained in a plain loop.

    python examples/custom_model.py --hidden 1024 --layers 12 --batch 8 --length 1024

The heads of queries and keys are normalised and rotated in one kernel, each residual sum and the norm after it in
another, and the loss comes from the last hidden states: the logits exist a chunk at a time.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_text import Tokenizer, batches
from liger.nn import LinearCrossEntropyLoss, RMSNorm, SwiGLU
from liger.ops import add_rms_norm, qk_norm_rotary
from python_help import pages

HEAD = 64  # columns of a head


class Block(nn.Module):
    """Attention and MLP, each after a norm. What goes from block to block is the residual and what is to be added."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = hidden // HEAD
        self.attention_norm, self.mlp_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.q_norm, self.k_norm = RMSNorm(HEAD), RMSNorm(HEAD)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = SwiGLU(hidden, 4 * hidden)

    def forward(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(what is to be added, the residual), both (B, S, hidden)."""
        x, residual = add_rms_norm(x, residual, self.attention_norm.weight)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD)).unbind(2)
        q, k = qk_norm_rotary(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, residual = add_rms_norm(self.out(attended.transpose(1, 2).flatten(2)), residual, self.mlp_norm.weight)
        return self.mlp(x), residual


class Model(nn.Module):
    """A decoder whose forward is its loss."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = RMSNorm(hidden)
        self.loss = LinearCrossEntropyLoss(hidden, vocabulary)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.loss.linear.weight = self.embedding.weight  # tied

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of each of the (B, S) tokens after those before it."""
        residual = self.embedding(tokens[:, :-1])
        rates = 10_000 ** (-torch.arange(0, HEAD, 2, device=tokens.device) / HEAD)
        angles = torch.arange(residual.shape[1], device=tokens.device)[:, None] * rates.repeat(2)
        cos, sin = angles.cos()[None], angles.sin()[None]
        x = torch.zeros_like(residual)
        for block in self.blocks:
            x, residual = block(x, residual, cos, sin)
        x, _ = add_rms_norm(x, residual, self.norm.weight)
        return self.loss(x, tokens[:, 1:])


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description="A model of one's own from liger.nn and liger.ops.")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="of a row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    source = "\n\n".join(text for _, text in pages())
    tokens = Tokenizer(source, options.vocabulary).encode(source)
    model = Model(options.vocabulary, options.hidden, options.layers).to(device)
    print(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    every = max(1, options.steps // 20)
    for step, rows in enumerate(batches(tokens, options.steps, options.batch, options.length + 1, device), start=1):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 or step == 1:
            print(f"step {step}: loss {loss.detach():.4f}", flush=True)


if __name__ == "__main__":
    main()
