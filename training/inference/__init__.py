"""A trained checkpoint in use: chat, evaluate, export, model card."""
