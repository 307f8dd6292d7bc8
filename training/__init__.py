"""Plan runs, launch and train them on a cluster, and use the trained models."""
