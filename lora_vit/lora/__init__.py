"""LoRA for packs of trials: functions, layers, injection into a model and merging out of it."""
