"""Adapter kinds other than plain LoRA."""
