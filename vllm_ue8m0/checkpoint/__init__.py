"""Checkpoint tools: read safetensors headers, check scales, convert."""
