"""A small DeepSeek-V3 trained with UE8M0 block FP8: the model, its training and its checkpoint."""
