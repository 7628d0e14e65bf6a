"""The shipped configs, installed beside the code as `smalti_configs`."""
