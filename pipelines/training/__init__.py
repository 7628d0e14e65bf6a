"""What training of both stages shares: fitting, schedule, checkpoints, leaving, loggers."""
