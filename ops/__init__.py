"""Linear attention operators: masked (`flash_linear_attention`) and causal with decay (`lightning_attention`)."""

from .lightning_attention import lightning_attention, lightning_attention_step
from .linear_attention import flash_linear_attention, normal_linear_attention

__all__ = [
    "flash_linear_attention",
    "lightning_attention",
    "lightning_attention_step",
    "normal_linear_attention",
]
