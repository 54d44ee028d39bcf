"""The same step in eager PyTorch, for an interpreter that has torch and need not have anything else.

It takes a step, and prints its seconds, for each line that it reads; `peers` starts it.
"""

import argparse
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, mlp_ratio * width, bias=False)
        self.mlp_proj = nn.Linear(mlp_ratio * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, positions, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).split(width, 2)
        q, k, v = (y.view(batch, positions, self.heads, -1).transpose(1, 2) for y in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.vocab_size = args.vocab_size
        self.wte = nn.Embedding(-(-args.vocab_size // 128) * 128, args.embed_dim)
        self.wpe = nn.Embedding(args.seq_len, args.embed_dim)
        self.blocks = nn.Sequential(
            *(Block(args.embed_dim, args.num_heads, args.mlp_ratio) for _ in range(args.num_layers))
        )
        self.ln_f = nn.LayerNorm(args.embed_dim, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.ln_f(self.blocks(self.wte(tokens) + self.wpe.weight))
        logits = hidden @ self.wte.weight[: self.vocab_size].T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("num_layers", "embed_dim", "num_heads", "mlp_ratio", "seq_len", "vocab_size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    windows = torch.randint(args.vocab_size, (args.batch_size, args.seq_len + 1))
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
