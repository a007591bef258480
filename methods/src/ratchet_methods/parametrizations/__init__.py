"""Adapter kinds beside plain LoRA."""
