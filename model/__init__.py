"""TransNormer as a transformers model; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model.cache_transnormer import TransnormerCache
from model.configuration_transnormer import TransnormerConfig
from model.masks_transnormer import register_mask
from model.modeling_transnormer import TransnormerForCausalLM, TransnormerModel, TransnormerPreTrainedModel

AutoConfig.register("transnormer", TransnormerConfig)
AutoModel.register(TransnormerConfig, TransnormerModel)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM)

__all__ = [
    "TransnormerCache",
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "TransnormerModel",
    "TransnormerPreTrainedModel",
    "register_mask",
]
