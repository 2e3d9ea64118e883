"""What existing FLOps repositories import. It runs in the user's environment, beside `flops_worker`."""
