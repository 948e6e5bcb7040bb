"""AIA in other people's training code: the attention mass (Eq. 1) in any Llama- or Qwen-type model of transformers.

These models call their attention by name. Ours is called "aia" and is SDPA, except in a decoder that runs within
`masses`, which hands the condition down to its layers. lab/README.md has the lines of a training loop.

    python -m pytest tests/test_plug.py
"""

import contextlib
from types import SimpleNamespace

import torch

from model import attend_fused
from parts.settings import InputError

# Legend: B samples, T tokens, L layers, H heads, G key/value heads, U keys, D head size.


def attend_by_name(module, query, key, value, attention_mask, scaling=None, dropout=0.0, aia=None, **kwargs):
    """Attention as transformers calls it: query (B, H, T, D), key and value (B, G, U, D) -> (B, T, H, D), and None for
    the map. aia: what `masses` hands down; None in picture encoders, and where nobody asks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if aia is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    refuse_unusual(module, query, key, aia, dropout=dropout or None, **kwargs)
    if scaling is not None:                          # attend_fused divides by sqrt(D) itself
        query = query * (scaling * query.shape[-1] ** 0.5)
    if attention_mask is not None:      # CUDA has no fused kernel for a mask and shared heads: it would keep a map
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)     # (B, H, U, D)
    out, mass = attend_fused(query, key, value, attention_mask, aia.condition.to(key.device))
    if module.layer_idx == len(aia.found):           # not when gradient checkpointing computes a layer again
        aia.found.append(mass)
    return out.transpose(1, 2).contiguous(), None    # (B, T, H, D)


def refuse_unusual(module, query, key, aia, is_causal=None, **kwargs):
    """InputError unless this is plain causal attention among T tokens, whose mass has a gradient."""
    unusual = [name for name in ("dropout", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unusual or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise InputError(f"{type(module).__name__} has {', '.join(unusual) or 'no causal mask'}: AIA measures plain "
                         "causal attention, switch this off or choose another model")
    if aia.condition.shape != (len(key), key.shape[2]) or query.shape[2] != key.shape[2]:
        raise InputError(f"condition {tuple(aia.condition.shape)}, but {len(key)} samples of {query.shape[2]} tokens, "
                         f"{key.shape[2]} with the cache: give (B, T) and whole sequences")
    if aia.grad and not torch.is_grad_enabled():
        raise InputError("this gradient checkpointing loses the gradient of the mass: give {'use_reentrant': False}")


def register():
    """Make the name known to transformers."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise InputError("AIA in a model of transformers needs version 5: pip install -U transformers") from error
    AttentionInterface.register("aia", attend_by_name)
    AttentionMaskInterface.register("aia", sdpa_mask)            # a name without masks gets None: padding would be seen


@contextlib.contextmanager
def masses(model, condition):
    """The masses of all layers, L times (B, H, T), in a list that each call of the model within fills anew.

    condition (B, T) bool: keys of the other modality. The decoder keeps the attention "aia" afterwards, since the
    backward pass, which comes later, may compute its layers again.
    """
    register()
    decoder, found = model.get_decoder(), []         # the language model, without a picture encoder
    decoder.set_attn_implementation("aia")

    def hand_down(module, args, kwargs):
        found.clear()       # FSDP copies lists and dicts among the arguments, but passes an object it does not know
        return args, kwargs | {"aia": SimpleNamespace(condition=condition, found=found, grad=torch.is_grad_enabled())}
    with decoder.register_forward_pre_hook(hand_down, with_kwargs=True):
        yield found
    if len(found) != (layers := decoder.config.num_hidden_layers):
        raise InputError(f"{type(model).__name__}: {len(found)} of {layers} layers gave a mass: call the model within, "
                         "and choose one with softmax attention in every layer")
