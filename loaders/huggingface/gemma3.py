"""Gemma 3 with images, of which the text model is used."""

from __future__ import annotations

import re
from dataclasses import replace

from headrace.loaders.huggingface import gemma3_text
from headrace.loaders.huggingface.common import Description
from headrace.loaders.huggingface.config import Config

_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*")


def describe(config: Config) -> Description:
    """The text model of a config with `model_type` "gemma3"."""
    text = config.inner("text_config")
    if text is None:
        raise config.bad("text_config", "is missing")
    # Written since transformers 4.52, and before it.
    prefixes = (("model.language_model.", "model."), ("language_model.", ""))
    return replace(gemma3_text.describe(text), unread=_IMAGES, prefixes=prefixes)
