"""What happens on the cluster."""
