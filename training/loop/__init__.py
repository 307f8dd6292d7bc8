"""One worker's life: worker, trainers, callbacks, throughput, trackers."""
