"""Tools beside the cluster builder."""
