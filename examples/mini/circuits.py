"""A start that can copy: weights of layers 0 and 2 set by hand so that retrieval is there before training begins.

Layer 0 gets two heads that look one and two tokens back and write a sketch of what they see into residual dimensions that
the embedding leaves free. Layer 2 gets induction heads that match those sketches: two find the place where the current token
stood before (`port` -> what followed `port`), two the place where the token before the current one stood two back
(`crew` and a space -> what followed them). They write the token found into the embedding's dimensions, and the head
reads those. Random weights need about 3M tokens to find this by themselves. Everything here stays trainable.
"""

from __future__ import annotations

import torch
from network import Network, Shape
from torch import Tensor

IDENTITY = slice(1, 128)
"""Residual dimensions of a token's own identity; dimension 0 is the same for every token."""
BACK_ONE = slice(128, 160)
BACK_TWO = slice(160, 192)
CONSTANT = 4.0
WIDTH = 32


def _orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows)).Q.T.contiguous()


@torch.no_grad()
def plant(network: Network) -> None:
    """Set the weights. The network has the default shape (hidden 192, nope, rope and value width 32)."""
    embedding = network.embed_tokens.weight
    embedding.mul_(1.2)
    embedding[:, 0] = CONSTANT
    embedding[:, 128:] = 0
    network.lm_head.weight.copy_(embedding / 127**0.5)
    network.lm_head.weight[:, 0] = 0
    for block in network.layers:
        for name, parameter in block.mlp.named_parameters():
            if "down_proj" in name:
                parameter.mul_(0.1)
    sketch = _orthonormal(WIDTH, 127)
    _look_back(network, sketch)
    _induce(network, sketch)


def _look_back(network: Network, sketch: Tensor) -> None:
    attention, shape = network.layers[0].self_attn, network.shape
    seen = CONSTANT / (CONSTANT**2 / 192 + 1.44 * 127 / 192) ** 0.5
    attention.q_a_proj.weight[0] = 0
    attention.q_a_proj.weight[0, 0] = 2.0
    latent = attention.q_a_proj.weight[1:].square().sum(1).mean().item()
    constant = 2 * seen / (latent + (2 * seen) ** 2 / shape.q_lora_rank) ** 0.5
    rope = attention.kv_a_proj_with_mqa.weight[shape.kv_lora_rank :]
    rope.zero_()
    rope[0::2, 0] = 6.0 / seen
    attention.kv_a_proj_with_mqa.weight[:WIDTH] = 0
    attention.kv_a_proj_with_mqa.weight[:WIDTH, IDENTITY] = sketch
    queries, keys, values = _views(network, 0)
    cosine, sine = network.cos[1:3], network.sin[1:3]
    for head, target in enumerate((BACK_ONE, BACK_TWO)):
        queries[head] = 0
        queries[head, WIDTH::2, 0] = 6.0 / constant * cosine[head]
        queries[head, WIDTH + 1 :: 2, 0] = -6.0 / constant * sine[head]
        keys[head] = 0
        values[head] = 0
        values[head, :, :WIDTH] = torch.eye(WIDTH)
        attention.o_proj.weight[target, head * WIDTH : (head + 1) * WIDTH] = torch.eye(WIDTH)


def _induce(network: Network, sketch: Tensor) -> None:
    attention, shape = network.layers[2].self_attn, network.shape
    attention.q_a_proj.weight[: 2 * WIDTH] = 0
    attention.q_a_proj.weight[:WIDTH, IDENTITY] = sketch
    attention.q_a_proj.weight[WIDTH : 2 * WIDTH, BACK_ONE] = torch.eye(WIDTH)
    latents = attention.kv_a_proj_with_mqa.weight[: shape.kv_lora_rank]
    latents.zero_()
    latents[:WIDTH, BACK_ONE] = torch.eye(WIDTH)
    latents[WIDTH : 2 * WIDTH, BACK_TWO] = torch.eye(WIDTH)
    content = _orthonormal(2 * WIDTH, 127)
    latents[2 * WIDTH :, IDENTITY] = content
    queries, keys, values = _views(network, 2)
    for head in range(4):
        match, half = head % 2, head // 2
        queries[head] = 0
        queries[head, :WIDTH, match * WIDTH : (match + 1) * WIDTH] = 3.0 * torch.eye(WIDTH)
        keys[head] = 0
        keys[head, :, match * WIDTH : (match + 1) * WIDTH] = torch.eye(WIDTH)
        values[head] = 0
        values[head, :, (2 + half) * WIDTH : (3 + half) * WIDTH] = torch.eye(WIDTH)
        part = content[half * WIDTH : (half + 1) * WIDTH]
        attention.o_proj.weight[IDENTITY, head * WIDTH : (head + 1) * WIDTH] = 12.0 * part.T


def _views(network: Network, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-head views of a layer's queries `[H, nope+rope, q_lora]`, content keys and values `[H, 32, kv_lora]`."""
    attention, shape = network.layers[layer].self_attn, network.shape
    heads = shape.num_attention_heads
    queries = attention.q_b_proj.weight.view(heads, -1, shape.q_lora_rank)
    pairs = attention.kv_b_proj.weight.view(heads, -1, shape.kv_lora_rank)
    return queries, pairs[:, : shape.qk_nope_head_dim], pairs[:, shape.qk_nope_head_dim :]


def planted(shape: Shape) -> Network:
    """A fresh network with the circuits in place."""
    network = Network(shape)
    plant(network)
    return network
