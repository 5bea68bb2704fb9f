"""What a checkpoint of any family scores and writes, for evaluation harnesses."""
