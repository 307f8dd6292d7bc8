"""YAML to RunPlan: planner, checks, warnings, resume, memory estimate, FLOPs, devices, DeepSpeed settings."""
