"""Training and distillation: losses, objectives, data, and the loop that puts them together."""
