"""What timm's model families need so that DepGraph can prune them."""
