"""What stands between encoder features and decoder input at one level: a file per family."""
