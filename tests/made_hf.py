"""Tiny random models of transformers, and inputs for them."""

import pytest
import torch

import data

hf = pytest.importorskip("transformers")
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IDS = torch.tensor([[7, 9, 4, 6, 6, 6, 6, 5, 9, 10, 11, 8, 12, 13, 14, 2]])     # a picture, a question, an answer of 4
ROLES = torch.where(IDS == 6, data.IMAGE, torch.where(torch.arange(16) > 11, data.ANSWER, data.CONTROL))
LAYERS = {"depth": 2, "num_hidden_layers": 2, "num_heads": 2, "num_attention_heads": 2}        # of a vision tower
QWEN = LAYERS | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 14,
                 "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
VQ = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1,
      "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32, "hidden_size": 32}
MODELS = {                                                                      # vision config, and the rest
    "Qwen2_5_VL": (QWEN, {"text_config": TEXT | ROPE}), "Qwen3VL": (QWEN, {"text_config": TEXT | ROPE}),
    "InternVL": (LAYERS | {"hidden_size": 16, "intermediate_size": 16, "image_size": [32, 32], "patch_size": [8, 8]},
                 {"text_config": TEXT | {"model_type": "qwen2"}}),
    "Janus": (LAYERS | {"hidden_size": 32, "image_size": 32, "patch_size": 16, "projection_dim": 32, "mlp_ratio": 2.0},
              {"text_config": TEXT | {"model_type": "llama"}, "vq_config": VQ | {"num_hidden_layers": 2}}),
    "Emu3": (None, {"text_config": TEXT, "vq_config": VQ, "vocabulary_map": {"<image>": 6, "<|extra_200|>": 3} | {
        f"<|visual token {c:06d}|>": 40 + c for c in range(8)}}),
    "Llama": (None, TEXT)}


def tiny(kind, attention="eager"):
    """A random model of three layers, and inputs in which ids 6 are the picture."""
    torch.manual_seed(0)
    tower, rest = MODELS[kind]
    vision = {"vision_config": tower, "image_token_id": 6} if tower else {}
    cls = getattr(hf, kind + ("ForConditionalGeneration" if "text_config" in rest else "ForCausalLM"))
    m = cls._from_config(getattr(hf, kind + "Config")(**vision, **rest), attn_implementation=attention).eval()
    for name, weight in m.named_parameters():        # far from even attention
        weight.data *= 20 if "q_proj.weight" in name or "k_proj.weight" in name else 1
    if tower is QWEN:
        return m, {"input_ids": IDS, "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
                   "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (IDS == 6).long()}
    return m, {"input_ids": IDS} | ({"pixel_values": torch.randn(1, 3, 32, 32)} if tower else {})
