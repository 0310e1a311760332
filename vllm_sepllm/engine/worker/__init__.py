"""The worker's side: what CPU and GPU share."""
