"""Where work is done: devices, processes, signals."""
