"""The fine-tuning service: OpenAI's API for files, jobs, models and chat on Ray Serve, with a bucket as its only state."""
