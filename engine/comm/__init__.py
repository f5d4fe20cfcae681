"""Who talks to whom: what a group of ranks can do together, over torch.distributed or shared memory."""
