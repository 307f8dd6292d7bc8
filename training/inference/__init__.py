"""Commands that use a trained checkpoint: chat, evaluate, export, and the model card of an export."""
