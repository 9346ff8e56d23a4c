"""Public checkpoints in: files, layouts, configs, LoRA."""
