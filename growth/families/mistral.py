"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama's tensors, attention through a sliding window."""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA

MISTRAL = replace(LLAMA, name="Mistral", model_type="mistral")
