"""`python -m pretrain.doctor`: what would stop a job, found before it is queued."""
